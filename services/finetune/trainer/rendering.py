"""Rows as examples: chats by the base's own template, texts to be labelled as plain ids. What a replica would render is what is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.finetune.trainer.batches import Example
from services.pretrained.control import Control
from services.pretrained.templates import ChatTemplate, Message, PlainTemplate
from services.pretrained.tokenizer import Tokenizer

__all__ = ["Renderer", "Turn"]


class Turn(Protocol):
    """A chat message of a row."""

    @property
    def role(self) -> str:
        """The system, the user or the assistant."""
        ...

    @property
    def content(self) -> str:
        """What was said."""
        ...


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders for one base. `end` closes an answer: the token at which a replica stops."""

    tokenizer: Tokenizer
    template: ChatTemplate
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: ChatTemplate, end_ids: Sequence[int]) -> "Renderer":
        """Find how the template closes an assistant's turn. Raises ValueError where nothing ends an answer."""
        ends = set(end_ids)
        if not isinstance(template, PlainTemplate):
            probe = [Message("user", "a"), Message("assistant", "argosy"), Message("user", "b")]
            parts = template.render(probe)
            at = parts.index("argosy") if "argosy" in parts else len(parts)
            after = next((part.id for part in parts[at + 1 :] if isinstance(part, Control)), None)
            if after in ends and after is not None:
                return cls(tokenizer, template, after)
        if not ends:
            raise ValueError("the base names no token that ends an answer")
        return cls(tokenizer, template, min(ends))

    def chat(self, turns: Sequence[Turn]) -> list[Example]:
        """A chat whose last turn is the assistant's, as one example; its supervised spans are the assistant's texts and end tokens.

        An earlier turn that the template repeats in other words than it was answered in becomes an example of its own.
        """
        messages = [Message(turn.role, turn.content) for turn in turns]
        last = len(messages) - 1
        prompt = self._prompt(messages[:last])
        answer = [*self._answer(messages[last].text), self.end]
        ids, spans = [*prompt, *answer], [(len(prompt), len(prompt) + len(answer))]
        apart: list[Example] = []
        for at in (index for index in range(last) if messages[index].role == "assistant"):
            before, said = self._prompt(messages[:at]), self._answer(messages[at].text)
            begin, stop = len(before), len(before) + len(said)
            if ids[:begin] == before and ids[begin:stop] == said:
                spans.append((begin, stop + (ids[stop : stop + 1] == [self.end])))
            else:
                apart.append(Example((*before, *said, self.end), ((begin, stop + 1),)))
        return [*apart, Example(tuple(ids), tuple(sorted(spans)))]

    def labelled(self, text: str, label: int) -> Example:
        """A text with its label's index: the beginning token and plain ids, no template and no control token."""
        return Example((*self.tokenizer.prefix, *self.tokenizer.encode(text)), label=label)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.encode_parts(self.template.render(messages))

    def _answer(self, text: str) -> list[int]:
        """What a replica would have to generate: after the plain template's colon, a blank first."""
        return self.tokenizer.encode(f" {text.strip()}" if isinstance(self.template, PlainTemplate) else text)
