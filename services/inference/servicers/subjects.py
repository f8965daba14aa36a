"""What an explanation is of: texts, and how likely each candidate is after what is left of them."""

import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from argosy.v1 import explanation_pb2
from services.chassis.errors import FieldInvalid, PromptTooLong
from services.inference import attributions, tasks
from services.inference.servicers.encoding import SENTIMENT, Encoder, Spending
from services.inference.servicers.plans import Planner, messages_from_proto, tools_from_proto
from services.pretrained.control import Control
from services.pretrained.templates import Message

__all__ = ["Subject", "Subjects", "Texts"]

Texts = Sequence[str]
Scores = Callable[[Texts], Awaitable[list[float]]]
Render = Callable[[Texts], Sequence[str | Control]]
Candidates = Callable[[], Awaitable[tuple[list[list[int]], list[float]]]]


@dataclass(frozen=True, slots=True)
class Subject:
    """Texts whose parts are left out, and how likely each candidate is after what is left of them, in nats."""

    field: str  # the texts' path in the request
    texts: tuple[str, ...]
    sources: tuple[str, ...]  # Span.source_id of each text
    scores: Scores
    render: Render  # the prompt around texts; blocking
    # To be asked once before `scores`: the candidates' tokens, none where a head has them; and each one's contrast, none for one alone.
    candidates: Candidates
    longest: int  # tokens that a prompt with its continuation may have
    target: int | None  # which candidate is explained; None: the likeliest


class Subjects:
    """Makes them of requests."""

    def __init__(self, planner: Planner, encoder: Encoder) -> None:
        self._planner = planner
        self._encoder = encoder

    async def of(self, asked: explanation_pb2.ExplainRequest, spending: Spending) -> Subject:
        """Raises FieldInvalid, ModelCapability or PromptTooLong."""
        if asked.WhichOneof("target") == "classify":
            return await self._labelled(asked.classify, spending)
        return await self._continued(asked.generation, spending)

    async def _labelled(self, asked: explanation_pb2.ClassifyTarget, spending: Spending) -> Subject:
        """A label of ClassifyText: the score is the logarithm of the probability that it would answer."""
        source = asked.WhichOneof("label_source")
        if source is None:
            return self._tuned(asked, spending)
        labels = list(asked.zero_shot.labels) if source == "zero_shot" else list(SENTIMENT)
        word = tasks.label if source == "zero_shot" else tasks.sentiment
        instruction = asked.zero_shot.instruction
        bias: list[float] = []

        def wording(text: str) -> tasks.Wording:
            return word(text, labels, instruction)

        async def candidates() -> tuple[list[list[int]], list[float]]:
            if not bias:  # asked for once before any pass; the whole text's script decides, so that every variant is judged alike
                bias.extend(await self._encoder.bias(tasks.script(asked.text), labels, instruction, wording, spending))
            return await self._encoder.continuations(labels), bias

        async def scores(texts: Texts) -> list[float]:
            found, _ = await self._encoder.label_scores(texts[0], labels, wording, spending)
            return attributions.log_softmax([score - base for score, base in zip(found, bias, strict=True)])

        return Subject(
            field="classify.text",
            texts=(asked.text,),
            sources=("",),
            scores=scores,
            render=lambda texts: self._planner.parts(wording(texts[0])),
            candidates=candidates,
            longest=self._planner.hello.context,
            target=_place(labels, asked.label) if asked.HasField("label") else None,
        )

    def _tuned(self, asked: explanation_pb2.ClassifyTarget, spending: Spending) -> Subject:
        """A label of the model's own head."""
        labels = self._encoder.tuned_labels(spending, "classify.label_source")
        tuned, prefix = spending.who.tuned, self._planner.tokenizer.prefix
        assert tuned is not None  # `tuned_labels` asked
        nothing = "" if prefix else "\n"  # a pass needs a token

        async def scores(texts: Texts) -> list[float]:
            ((chances, _),) = await self._encoder.tuned_chances([texts[0] or nothing], spending)
            return [math.log(max(chance, sys.float_info.min)) for chance in chances]

        async def candidates() -> tuple[list[list[int]], list[float]]:
            return [], []

        return Subject(
            field="classify.text",
            texts=(asked.text,),
            sources=("",),
            scores=scores,
            render=lambda texts: [*map(Control, prefix), texts[0]],
            candidates=candidates,
            longest=min(tuned.max_tokens or self._planner.hello.context, self._planner.hello.context),
            target=_place(labels, asked.label) if asked.HasField("label") else None,
        )

    async def _continued(self, asked: explanation_pb2.GenerationTarget, spending: Spending) -> Subject:
        """A continuation: the score is its log-probability after the prompt, all tokens together."""
        continuation = await self._planner.tokenizer.aencode(asked.continuation)
        if asked.WhichOneof("input") == "chat":
            messages = messages_from_proto(asked.chat.messages)
            tools = tools_from_proto(asked.chat.tools)
            field, texts = "generation.chat", tuple(message.text for message in messages)
            sources = tuple(str(place) for place in range(len(messages)))

            def said(texts: Texts) -> list[Message]:
                return [replace(one, text=text) for one, text in zip(messages, texts, strict=True)]

            def render(texts: Texts) -> Sequence[str | Control]:
                return self._planner.template.render(said(texts), tools)

            async def prompt(texts: Texts) -> tuple[int, ...]:
                return await self._planner.chat(said(texts), tools)
        else:
            field, texts, sources = "generation.prompt", (asked.prompt,), ("",)

            def render(texts: Texts) -> Sequence[str | Control]:
                return [*map(Control, self._planner.tokenizer.prefix), texts[0]]

            async def prompt(texts: Texts) -> tuple[int, ...]:
                # With nothing before it, a model without a beginning-of-text token starts from a new line.
                return await self._planner.text(texts[0]) or self._planner.tokenizer.newline_ids[:1]

        length, room = len(await prompt(texts)), self._planner.hello.context - len(continuation)
        if length > room:
            raise PromptTooLong(field, length, max(0, room), "tokens")

        async def scores(texts: Texts) -> list[float]:
            reply = await self._encoder.score(await prompt(texts), [continuation], spending)
            return [sum(reply.continuations[0].logprobs)]

        async def candidates() -> tuple[list[list[int]], list[float]]:
            return [continuation], []

        return Subject(field, texts, sources, scores, render, candidates, self._planner.hello.context, 0)


def _place(labels: Sequence[str], label: str) -> int:
    if label not in labels:
        raise FieldInvalid("classify.label", "not_a_label")
    return labels.index(label)
