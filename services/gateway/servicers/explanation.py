"""ExplanationService: declared, and refused by every model until one has the capability."""

from typing import Any, NoReturn

from argosy.v1 import explanation_pb2
from services.chassis import bounds
from services.chassis.errors import ModelCapability
from services.gateway.catalog import require
from services.gateway.servicers.relay import Relay, caller

SERVICE = "argosy.v1.ExplanationService"


class ExplanationServicer:
    """argosy.v1.ExplanationService."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def Explain(self, request: explanation_pb2.ExplainRequest, context: Any) -> NoReturn:
        """What in the input speaks for the target."""
        self._refuse(request)

    async def FindNearestExamples(self, request: Any, context: Any) -> NoReturn:
        """Training rows near an input."""
        self._refuse(request)

    def _refuse(self, request: Any) -> NoReturn:
        bounds.check(request)
        require(self._relay.fleet.resolve(request.model, caller().models), "EXPLAIN")
        raise ModelCapability("model", "EXPLAIN")  # the replica has it, but its EngineService has no method for it yet
