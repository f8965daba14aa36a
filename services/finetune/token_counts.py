"""Tokens of rows as a base would see them: what a report tells and V9 judges."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.finetune.rows import Row
from services.pretrained.templates import ChatTemplate, Message, TemplateRefused, load_template
from services.pretrained.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseTokens:
    """One base's tokenizer and template."""

    base_model: str
    tokenizer: Tokenizer
    template: ChatTemplate

    def count(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of each row: prefix and text; a chat or a preference's longer answer after the template."""
        return [self._of(row) for row in rows]

    def _of(self, row: Row) -> int:
        if row.messages:
            return self._chat([Message(turn.role, turn.content) for turn in row.messages])
        if row.prompt:
            answer = max(row.chosen, row.rejected, key=len)
            return self._chat([Message("user", row.prompt), Message("assistant", answer)])
        return len(self.tokenizer.prefix) + len(self.tokenizer.encode(row.text))

    def _chat(self, messages: Sequence[Message]) -> int:
        try:
            return len(self.tokenizer.encode_parts(self.template.render(messages)))
        except TemplateRefused:  # a role this base does not know: its texts alone
            return sum(len(self.tokenizer.encode(message.text)) for message in messages)


def counters(bases: Sequence[tuple[str, Path]]) -> list[BaseTokens]:
    """A counter for each base whose directory holds a usable tokenizer."""
    found = []
    for name, directory in bases:
        try:
            tokenizer = Tokenizer.from_directory(directory)
            found.append(BaseTokens(name, tokenizer, load_template(directory, tokenizer, tokenizer.prefix)))
        except Exception:  # the tokenizers library has no class of its own: whatever it is, rows can be judged without
            log.warning("tokens of %s are not counted: its tokenizer or template cannot be used", name)
    return found
