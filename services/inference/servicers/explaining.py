"""Explanations: what each word, token or sentence of a text is worth to a label or a continuation.

By occlusion every part is left out once, all of them together once, and a few nested sets for the deletion test: passes that run side by
side, at the lowest class of work, and share the cache of whatever stands before the part. By gradient × input one forward and one backward
pass weigh every token, beside the batch, and one more pass tells what the target scores without any part.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from argosy.v1 import content_pb2, explanation_pb2, usage_pb2
from services.chassis.errors import DeadlineExceeded, FieldInvalid, FieldOutOfRange, ModelCapability, PromptTooLong
from services.inference import attributions, units
from services.inference.engine.calls import Weigh, Weighed, WorkClass
from services.inference.engine.host import Host
from services.inference.servicers.encoding import Encoder, Left, Spending
from services.inference.servicers.generating import Who
from services.inference.servicers.locating import Unlocated, locate
from services.inference.servicers.measured import Work
from services.inference.servicers.plans import Planner
from services.inference.servicers.subjects import Subject, Subjects
from services.pretrained.templates import TemplateRefused

__all__ = ["MOST_UNITS", "Explainer"]

MOST_UNITS = 512  # of one request: as many passes
GRADIENT_TOKENS = 1_024  # of all candidates' prompts together: a backward pass keeps about 0.8 MB for each, of a model of 270M parameters


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
        self._subjects = Subjects(planner, encoder)

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
        spending = Spending(replace(who, work_class=WorkClass.EXPLAIN), work, usage, left_s, passes=True)
        subject = await self._subjects.of(asked, spending)
        parts = await self._units(subject, asked.unit)
        if asked.method == explanation_pb2.ATTRIBUTION_METHOD_GRADIENT_X_INPUT:
            reply = await self._weighed(subject, parts, spending)
        else:
            await self._afford(subject, len(parts), left_s())
            reply = await self._occluded(subject, parts, spending)
        reply.model.CopyFrom(model)
        reply.usage.CopyFrom(usage)
        return reply

    # --- parts ---------------------------------------------------------------------------------------------------------------------------

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
        self._bounded(subject, count, MOST_UNITS)
        rate = self._host.load.prefill_tokens_per_s
        # On average half of a variant is read anew, and half comes from the cache: it is the same up to the part left out.
        tokens = sum(map(len, await self._planner.tokenizer.aencode_batch(subject.texts))) / 2
        if rate > 0 and count * tokens > rate * left_s:
            raise FieldOutOfRange(subject.field, count, int(rate * left_s / tokens), "units")

    @staticmethod
    def _bounded(subject: Subject, count: int, most: int) -> None:
        if count > most:
            raise FieldOutOfRange(subject.field, count, most, "units")
        if count == 0:
            raise FieldInvalid(subject.field, "no_units")

    # --- leaving out --------------------------------------------------------------------------------------------------------------------

    async def _occluded(self, subject: Subject, parts: Sequence[Unit], spending: Spending) -> explanation_pb2.ExplainResponse:
        """Weight of a unit: target's score with all units, less the score without this one."""
        await subject.candidates()  # what all passes need is there before they run side by side
        known: dict[frozenset[int], list[float]] = {}

        async def without(gone: frozenset[int]) -> list[float]:
            return await subject.scores(_left(subject.texts, parts, gone))

        async def learn(sets: Sequence[frozenset[int]]) -> list[list[float]]:
            fresh = [one for one in dict.fromkeys(sets) if one not in known]
            known.update(zip(fresh, await spending.each([partial(without, one) for one in fresh]), strict=True))
            return [known[one] for one in sets]

        alone = [frozenset({place}) for place in range(len(parts))]
        found = await learn([frozenset(), frozenset(range(len(parts))), *alone])
        target = subject.target if subject.target is not None else max(range(len(found[0])), key=found[0].__getitem__)
        whole, baseline, *single = [scores[target] for scores in found]
        weights = [whole - score for score in single]
        reply = explanation_pb2.ExplainResponse(
            attributions=_attributions(subject, parts, weights), target_score=whole, baseline_score=baseline
        )
        points = attributions.curves(weights)
        if points is not None:
            tested = [scores[target] for scores in await learn(points.deletions)]
            reply.faithfulness = attributions.faithfulness(whole, baseline, single, weights, points, tested)
        return reply

    # --- gradient × input ---------------------------------------------------------------------------------------------------------------

    async def _weighed(self, subject: Subject, parts: Sequence[Unit], spending: Spending) -> explanation_pb2.ExplainResponse:
        """Weight of a unit: the sum over its tokens."""
        self._bounded(subject, len(parts), MOST_UNITS)
        continuations, contrast = await subject.candidates()
        try:
            located = await asyncio.to_thread(locate, self._planner.tokenizer, subject.render, subject.texts)
        except (Unlocated, TemplateRefused):
            raise ModelCapability("method", "gradient_x_input_of_this_template") from None
        length = len(located.ids) + max(map(len, continuations), default=0)
        most = min(subject.longest, GRADIENT_TOKENS // max(1, len(continuations)))
        if length > most:
            raise PromptTooLong(subject.field, length, most, "tokens")
        call = Weigh(
            id=spending.id(),
            prefix=located.ids,
            continuations=tuple(map(tuple, continuations)),
            deadline_s=spending.deadline_s(),
            tenant=spending.who.tenant,
            contrast=tuple(contrast),
            target=subject.target,
            adapter=spending.who.adapter,
            owner=spending.who.tenant,
        )
        try:
            async with asyncio.timeout(spending.deadline_s()):
                answer = await self._encoder.ask(call, spending)
        except TimeoutError:
            raise DeadlineExceeded from None
        assert isinstance(answer, Weighed)  # what a Weigh is answered with
        weights: list[float] = []
        for place, (text, tokens) in enumerate(zip(subject.texts, located.texts, strict=True)):
            own = [(len(text[: part.first].encode()), len(text[: part.last].encode())) for part in parts if part.text == place]
            weights += attributions.by_unit([(first, last) for _, first, last in tokens], [answer.weights[at] for at, _, _ in tokens], own)
        baseline = (await subject.scores(_left(subject.texts, parts, frozenset(range(len(parts))))))[answer.target]
        return explanation_pb2.ExplainResponse(
            attributions=_attributions(subject, parts, weights), target_score=answer.scores[answer.target], baseline_score=baseline
        )


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
