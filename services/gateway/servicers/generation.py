"""GenerationService: text and chat, streamed or folded, and counting."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from argosy.v1 import generation_pb2, stream_pb2
from services.gateway.servicers.fold import fold
from services.gateway.servicers.plans import TEMPLATE_TOKENS, asked_of, generation, outputs_of, plan
from services.gateway.servicers.relay import Events, Relay

SERVICE = "argosy.v1.GenerationService"
FIRST_MESSAGES = 2  # system and the first question: what later turns of a dialogue share


class GenerationServicer:
    """argosy.v1.GenerationService."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def _text(self, request: generation_pb2.GenerateTextRequest, context: Any, method: str, *, stream: bool) -> Events:
        made = await plan(
            self._relay,
            request,
            context,
            method=f"/{SERVICE}/{method}",
            capability="GENERATE",
            size=len(request.prompt.encode()),
            outputs=outputs_of(request.config),
            asked=asked_of(request.config),
            prefix=request.prompt,
            stream=stream,
        )
        return self._relay.stream(made, generation(self._relay, made, request, request.config, text=request.prompt), context)

    async def _chat(self, request: generation_pb2.ChatRequest, context: Any, method: str, *, stream: bool) -> Events:
        made = await plan(
            self._relay,
            request,
            context,
            method=f"/{SERVICE}/{method}",
            capability="GENERATE",
            size=request.ByteSize() + len(request.messages) * TEMPLATE_TOKENS,
            outputs=outputs_of(request.config),
            asked=asked_of(request.config),
            prefix="\n".join(part.text for message in request.messages[:FIRST_MESSAGES] for part in message.parts),
            stream=stream,
        )
        return self._relay.stream(made, generation(self._relay, made, request, request.config, chat=request), context)

    async def StreamGenerateText(self, request: generation_pb2.GenerateTextRequest, context: Any) -> AsyncIterator[bytes]:
        """Continue a raw prompt, event by event."""
        async with aclosing(await self._text(request, context, "StreamGenerateText", stream=True)) as events:
            async for event in events:
                yield event

    async def GenerateText(self, request: generation_pb2.GenerateTextRequest, context: Any) -> stream_pb2.GenerationResult:
        """Continue a raw prompt."""
        async with aclosing(await self._text(request, context, "GenerateText", stream=False)) as events:
            return await fold(events)

    async def StreamChat(self, request: generation_pb2.ChatRequest, context: Any) -> AsyncIterator[bytes]:
        """Answer a dialogue, event by event."""
        async with aclosing(await self._chat(request, context, "StreamChat", stream=True)) as events:
            async for event in events:
                yield event

    async def Chat(self, request: generation_pb2.ChatRequest, context: Any) -> stream_pb2.GenerationResult:
        """Answer a dialogue."""
        async with aclosing(await self._chat(request, context, "Chat", stream=False)) as events:
            return await fold(events)

    async def CountTokens(self, request: generation_pb2.CountTokensRequest, context: Any) -> generation_pb2.CountTokensResponse:
        """Tokens of a prompt, and the room left."""
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/CountTokens", capability="GENERATE")
        return await self._relay.ask(made, "CountTokens", request, context)  # type: ignore[no-any-return]

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> generation_pb2.TokenizeResponse:
        """The tokens of a text."""
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/Tokenize", capability="GENERATE")
        return await self._relay.ask(made, "Tokenize", request, context)  # type: ignore[no-any-return]
