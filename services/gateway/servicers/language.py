"""LanguageService: typed tasks. What writes text is a generation; the rest is an encoding."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from argosy.v1 import language_pb2, stream_pb2
from services.chassis.errors import FieldInvalid
from services.gateway.servicers.fold import fold
from services.gateway.servicers.plans import asked_of, encoding, generation, outputs_of, plan
from services.gateway.servicers.relay import Events, Relay

SERVICE = "argosy.v1.LanguageService"
PRESET_BYTES = 64  # of the labels and instruction a preset stands for


class LanguageServicer:
    """argosy.v1.LanguageService."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def ClassifyText(self, request: language_pb2.ClassifyTextRequest, context: Any) -> language_pb2.ClassifyTextResponse:
        """Labels with probabilities."""
        tuned = request.WhichOneof("label_source") is None
        # Each label is scored after each text.
        size = request.ByteSize() + len(request.texts) * (request.zero_shot.ByteSize() + PRESET_BYTES)
        made = await plan(
            self._relay,
            request,
            context,
            method=f"/{SERVICE}/ClassifyText",
            capability="CLASSIFY_TUNED" if tuned else "CLASSIFY_ZERO_SHOT",
            size=size,
        )
        reply = await self._relay.encode(made, encoding(made, request, classify=request), context)
        return reply.classify

    async def _summarize(self, request: language_pb2.SummarizeTextRequest, context: Any, method: str, *, stream: bool) -> Events:
        made = await plan(
            self._relay,
            request,
            context,
            method=f"/{SERVICE}/{method}",
            capability="GENERATE",
            outputs=1,
            asked=request.max_length if request.HasField("max_length") else asked_of(request.config),
            stream=stream,
        )
        return self._relay.stream(made, generation(self._relay, made, request, request.config, summarize=request), context)

    async def StreamSummarizeText(self, request: language_pb2.SummarizeTextRequest, context: Any) -> AsyncIterator[bytes]:
        """One summary, event by event."""
        async with aclosing(await self._summarize(request, context, "StreamSummarizeText", stream=True)) as events:
            async for event in events:
                yield event

    async def SummarizeText(self, request: language_pb2.SummarizeTextRequest, context: Any) -> stream_pb2.GenerationResult:
        """One summary."""
        async with aclosing(await self._summarize(request, context, "SummarizeText", stream=False)) as events:
            return await fold(events)

    async def _translate(self, request: language_pb2.TranslateTextRequest, context: Any, method: str, *, stream: bool) -> Events:
        made = await plan(
            self._relay,
            request,
            context,
            method=f"/{SERVICE}/{method}",
            capability="GENERATE",
            outputs=len(request.texts),
            asked=asked_of(request.config),
            stream=stream,
        )
        return self._relay.stream(made, generation(self._relay, made, request, request.config, translate=request), context)

    async def StreamTranslateText(self, request: language_pb2.TranslateTextRequest, context: Any) -> AsyncIterator[bytes]:
        """Translations, event by event; `index` says of which text."""
        async with aclosing(await self._translate(request, context, "StreamTranslateText", stream=True)) as events:
            async for event in events:
                yield event

    async def TranslateText(self, request: language_pb2.TranslateTextRequest, context: Any) -> stream_pb2.GenerationResult:
        """Translations."""
        async with aclosing(await self._translate(request, context, "TranslateText", stream=False)) as events:
            return await fold(events)

    async def _answer(self, request: language_pb2.AnswerQuestionRequest, context: Any, method: str, *, stream: bool) -> Events:
        made = await plan(
            self._relay,
            request,
            context,
            method=f"/{SERVICE}/{method}",
            capability="GENERATE",
            outputs=outputs_of(request.config),
            asked=asked_of(request.config),
            stream=stream,
        )
        return self._relay.stream(made, generation(self._relay, made, request, request.config, answer=request), context)

    async def StreamAnswerQuestion(self, request: language_pb2.AnswerQuestionRequest, context: Any) -> AsyncIterator[bytes]:
        """A written answer, event by event; spans cannot be streamed."""
        if request.mode != language_pb2.ANSWER_MODE_GENERATIVE:
            raise FieldInvalid("mode", "generative_only")
        async with aclosing(await self._answer(request, context, "StreamAnswerQuestion", stream=True)) as events:
            async for event in events:
                yield event

    async def AnswerQuestion(self, request: language_pb2.AnswerQuestionRequest, context: Any) -> language_pb2.AnswerQuestionResponse:
        """Spans of the passages, or a written answer."""
        if request.mode == language_pb2.ANSWER_MODE_GENERATIVE:
            async with aclosing(await self._answer(request, context, "AnswerQuestion", stream=False)) as events:
                result = await fold(events)
            return language_pb2.AnswerQuestionResponse(generation=result, model=result.started.model, usage=result.completed.usage)
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/AnswerQuestion", capability="ANSWER_EXTRACTIVE")
        reply = await self._relay.encode(made, encoding(made, request, answer=request), context)
        return reply.answer
