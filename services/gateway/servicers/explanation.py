"""ExplanationService: why a model answers as it does. Billed by passes, so the reservation counts the words that may be left out."""

from typing import Any, NoReturn

from argosy.v1 import explanation_pb2
from services.chassis import bounds
from services.chassis.errors import ModelCapability
from services.gateway.servicers.plans import attribution, plan, sticky_key
from services.gateway.servicers.relay import Relay, caller

SERVICE = "argosy.v1.ExplanationService"


class ExplanationServicer:
    """argosy.v1.ExplanationService."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def Explain(self, request: explanation_pb2.ExplainRequest, context: Any) -> explanation_pb2.ExplainResponse:
        """What in the input speaks for the target."""
        made = await plan(self._relay, request, context, method=f"/{SERVICE}/Explain", capability="EXPLAIN")
        return await self._relay.attribute(made, attribution(made, request), context)

    async def FindNearestExamples(self, request: explanation_pb2.FindNearestExamplesRequest, context: Any) -> NoReturn:
        """Training rows near an input."""
        bounds.check(request)
        await self._relay.resolve(request.model, caller(), sticky_key(context))
        raise ModelCapability("model", "NEAREST_EXAMPLES")  # no model has an index of its rows yet
