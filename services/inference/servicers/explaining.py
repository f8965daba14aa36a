"""Explanations by leaving out: what each word, token or sentence of a text is worth to a label or a continuation.

Every part is left out once, all of them together once, and a few nested sets for the deletion test: passes that run side by side, at the
lowest class of work, and share the cache of whatever stands before the part.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from argosy.v1 import content_pb2, explanation_pb2, usage_pb2
from services.chassis.errors import FieldInvalid, FieldOutOfRange, ModelCapability, PromptTooLong
from services.inference import attributions, tasks, units
from services.inference.engine.calls import WorkClass
from services.inference.engine.host import Host
from services.inference.servicers.encoding import SENTIMENT, Encoder, Left, Spending
from services.inference.servicers.generating import Who
from services.inference.servicers.measured import Work
from services.inference.servicers.plans import Planner, messages_from_proto, tools_from_proto

__all__ = ["MOST_UNITS", "Explainer"]

MOST_UNITS = 512  # of one request: as many passes, and about as many again are never needed

Scores = Callable[[Sequence[str]], Awaitable[list[float]]]


@dataclass(frozen=True, slots=True)
class Subject:
    """Texts whose parts are left out, and how likely each candidate is after what is left of them, in nats."""

    field: str  # the texts' path in the request
    texts: tuple[str, ...]
    sources: tuple[str, ...]  # Span.source_id of each text
    scores: Scores
    target: int | None  # which candidate is explained; None: the likeliest


@dataclass(frozen=True, slots=True)
class Unit:
    """One part: of which text, and its characters."""

    text: int
    first: int
    last: int


class Explainer:
    """Answers `Attribute` with the engine's scores."""

    def __init__(self, host: Host, planner: Planner, encoder: Encoder) -> None:
        self._host = host
        self._planner = planner
        self._encoder = encoder

    async def explain(
        self,
        asked: explanation_pb2.ExplainRequest,
        who: Who,
        work: Work,
        model: content_pb2.ServedModel,
        usage: usage_pb2.Usage,
        left_s: Left,
    ) -> explanation_pb2.ExplainResponse:
        """The caller's reply, whole. `usage` grows as passes end.

        Raises FieldOutOfRange where there are more units than may be, or than the deadline has time for; PromptTooLong; FieldInvalid;
        ModelCapability.
        """
        usage.cached_input_tokens = 0  # known, even where nothing was cached
        if asked.method == explanation_pb2.ATTRIBUTION_METHOD_GRADIENT_X_INPUT:
            raise ModelCapability("method", "gradient_x_input")
        spending = Spending(replace(who, work_class=WorkClass.EXPLAIN), work, usage, left_s, passes=True)
        subject = await self._subject(asked, spending)
        parts = await self._units(subject, asked.unit)
        await self._afford(subject, len(parts), left_s())
        reply = await self._occluded(subject, parts, spending)
        reply.model.CopyFrom(model)
        reply.usage.CopyFrom(usage)
        return reply

    # --- what is explained --------------------------------------------------------------------------------------------------------------

    async def _subject(self, asked: explanation_pb2.ExplainRequest, spending: Spending) -> Subject:
        if asked.WhichOneof("target") == "classify":
            return await self._labelled(asked.classify, spending)
        return await self._continued(asked.generation, spending)

    async def _labelled(self, asked: explanation_pb2.ClassifyTarget, spending: Spending) -> Subject:
        """A label of ClassifyText: the score is the logarithm of the probability that it would answer."""
        source = asked.WhichOneof("label_source")
        if source is None:
            raise ModelCapability("classify.label_source", "classify_tuned")
        labels = list(asked.zero_shot.labels) if source == "zero_shot" else list(SENTIMENT)
        target = _place(labels, asked.label) if asked.HasField("label") else None
        word = tasks.label if source == "zero_shot" else tasks.sentiment
        instruction = asked.zero_shot.instruction

        def wording(text: str) -> tasks.Wording:
            return word(text, labels, instruction)

        bias: list[float] = []

        async def scores(texts: Sequence[str]) -> list[float]:
            if not bias:  # the first is the whole text, alone; its script decides, so that every variant is judged alike
                bias.extend(await self._encoder.bias(tasks.script(asked.text), labels, instruction, wording, spending))
            found, _ = await self._encoder.label_scores(texts[0], labels, wording, spending)
            return attributions.log_softmax([score - base for score, base in zip(found, bias, strict=True)])

        return Subject("classify.text", (asked.text,), ("",), scores, target)

    async def _continued(self, asked: explanation_pb2.GenerationTarget, spending: Spending) -> Subject:
        """A continuation: the score is its log-probability after the prompt, all tokens together."""
        continuation = await self._planner.tokenizer.aencode(asked.continuation)
        if asked.WhichOneof("input") == "chat":
            messages = messages_from_proto(asked.chat.messages)
            tools = tools_from_proto(asked.chat.tools)
            field = "generation.chat"
            texts = tuple(message.text for message in messages)
            sources = tuple(str(place) for place in range(len(messages)))

            async def prompt(texts: Sequence[str]) -> tuple[int, ...]:
                return await self._planner.chat([replace(one, text=text) for one, text in zip(messages, texts, strict=True)], tools)
        else:
            field, texts, sources = "generation.prompt", (asked.prompt,), ("",)

            async def prompt(texts: Sequence[str]) -> tuple[int, ...]:
                # With nothing before it, a model without a beginning-of-text token starts from a blank line.
                return await self._planner.text(texts[0]) or self._planner.tokenizer.newline_ids[:1]

        length, room = len(await prompt(texts)), self._planner.hello.context - len(continuation)
        if length > room:
            raise PromptTooLong(field, length, max(0, room), "tokens")

        async def scores(texts: Sequence[str]) -> list[float]:
            reply = await self._encoder.score(await prompt(texts), [continuation], spending)
            return [sum(reply.continuations[0].logprobs)]

        return Subject(field, texts, sources, scores, 0)

    async def _units(self, subject: Subject, unit: explanation_pb2.AttributionUnit.ValueType) -> list[Unit]:
        """Every part of every text."""
        cuts = await asyncio.to_thread(lambda: [self._cut(text, unit) for text in subject.texts])
        return [Unit(place, first, last) for place, cut in enumerate(cuts) for first, last in cut]

    def _cut(self, text: str, unit: explanation_pb2.AttributionUnit.ValueType) -> list[tuple[int, int]]:
        match unit:
            case explanation_pb2.ATTRIBUTION_UNIT_TOKEN:
                return units.tokens(text, [(piece.start_byte, piece.end_byte) for piece in self._planner.tokenizer.pieces(text)])
            case explanation_pb2.ATTRIBUTION_UNIT_SENTENCE:
                return units.sentences(text)
            case _:
                return units.words(text)

    async def _afford(self, subject: Subject, count: int, left_s: float) -> None:
        """Raise FieldOutOfRange where there are more units than may be asked for, or than are read before the deadline."""
        if count > MOST_UNITS:
            raise FieldOutOfRange(subject.field, count, MOST_UNITS, "units")
        if count == 0:
            raise FieldInvalid(subject.field, "no_units")
        rate = self._host.load.prefill_tokens_per_s
        # On average half of a variant is read anew, and half comes from the cache: it is the same up to the part left out.
        tokens = sum(map(len, await self._planner.tokenizer.aencode_batch(subject.texts))) / 2
        if rate > 0 and count * tokens > rate * left_s:
            raise FieldOutOfRange(subject.field, count, int(rate * left_s / tokens), "units")

    # --- leaving out --------------------------------------------------------------------------------------------------------------------

    async def _occluded(self, subject: Subject, parts: Sequence[Unit], spending: Spending) -> explanation_pb2.ExplainResponse:
        """Weight of a unit: target's score with all units, less the score without this one."""
        whole = await subject.scores(subject.texts)
        target = subject.target if subject.target is not None else max(range(len(whole)), key=whole.__getitem__)
        known: dict[frozenset[int], float] = {}

        async def without(gone: frozenset[int]) -> float:
            return (await subject.scores(_left(subject.texts, parts, gone)))[target]

        async def learn(sets: Sequence[frozenset[int]]) -> list[float]:
            fresh = [one for one in dict.fromkeys(sets) if one not in known]
            known.update(zip(fresh, await spending.each([partial(without, one) for one in fresh]), strict=True))
            return [known[one] for one in sets]

        alone = [frozenset({place}) for place in range(len(parts))]
        *single, baseline = await learn([*alone, frozenset(range(len(parts)))])
        weights = [whole[target] - score for score in single]
        reply = explanation_pb2.ExplainResponse(
            attributions=_attributions(subject, parts, weights), target_score=whole[target], baseline_score=baseline
        )
        points = attributions.curves(weights)
        if points is not None:
            scores = await learn(points.deletions)
            reply.faithfulness = attributions.faithfulness(whole[target], baseline, single, weights, points, scores)
        return reply


def _left(texts: Sequence[str], parts: Sequence[Unit], gone: frozenset[int]) -> list[str]:
    """The texts without some of their parts."""
    found = []
    for place, text in enumerate(texts):
        own = [(number, part) for number, part in enumerate(parts) if part.text == place]
        found.append(units.kept(text, [(part.first, part.last) for _, part in own], [number not in gone for number, _ in own]))
    return found


def _attributions(subject: Subject, parts: Sequence[Unit], weights: Sequence[float]) -> list[explanation_pb2.Attribution]:
    """With spans in bytes of their text."""
    found, at, place = [], 0, -1
    for part, weight in zip(parts, weights, strict=True):
        at = at if part.text == place else 0  # parts follow each other without a gap
        place = part.text
        text = subject.texts[place][part.first : part.last]
        span = content_pb2.Span(start_byte=at, end_byte=at + len(text.encode()), text=text, source_id=subject.sources[place])
        found.append(explanation_pb2.Attribution(span=span, weight=weight))
        at = span.end_byte
    return found


def _place(labels: Sequence[str], label: str) -> int:
    if label not in labels:
        raise FieldInvalid("classify.label", "not_a_label")
    return labels.index(label)
