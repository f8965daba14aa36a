"""EmbeddingService."""

from typing import Any

from argosy.v1 import embedding_pb2
from services.gateway.servicers.plans import encoding, plan
from services.gateway.servicers.relay import Relay

SERVICE = "argosy.v1.EmbeddingService"


class EmbeddingServicer:
    """argosy.v1.EmbeddingService."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def EmbedTexts(self, request: embedding_pb2.EmbedTextsRequest, context: Any) -> embedding_pb2.EmbedTextsResponse:
        """A vector for each text."""
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/EmbedTexts", capability="EMBED")
        reply = await self._relay.encode(made, encoding(made, request, embed=request), context)
        return reply.embed
