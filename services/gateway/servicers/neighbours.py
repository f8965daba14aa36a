"""Asks finetune for training rows near a vector; without fine-tuning no model has any."""

import array
import sys
from typing import Any, Protocol

import grpc
import grpc.aio

from argosy.v1 import explanation_pb2
from argosy_internal.registry.v1 import registry_pb2, registry_pb2_grpc
from services.chassis import status
from services.chassis.channel import remaining
from services.chassis.errors import ModelCapability, ResourceNotFound, StoreUnavailable
from services.chassis.identity import Caller

__all__ = ["CAPABILITY", "Neighbours"]

CAPABILITY = "NEAREST_EXAMPLES"
ASK_S = 10.0  # a search reads at most one index from the object store
MARGIN_S = 0.2


class Upstream(Protocol):
    """The way to finetune; see finetune.FineTune."""

    off: bool

    @property
    def channel(self) -> Any:
        """A grpc.aio.Channel."""
        ...

    def metadata(self, caller: Caller) -> Any:
        """The signed caller."""
        ...


class Neighbours:
    """Indexes of training rows, which finetune keeps and searches."""

    def __init__(self, finetune: Upstream) -> None:
        self._finetune = finetune
        self._stub: Any = None if finetune.off else registry_pb2_grpc.RegistryServiceStub(finetune.channel)

    async def find(self, version: str, values: list[float], top_k: int, who: Caller) -> list[explanation_pb2.NearestExample]:
        """The rows nearest to a vector; none for an empty one, which only asks whether there is an index.

        Raises:
            ModelCapability: the version has none.
            ResourceNotFound: it was erased.
            StoreUnavailable: finetune is away.
        """
        if self._stub is None:
            raise ModelCapability("model", CAPABILITY)
        floats = array.array("f", values)
        if sys.byteorder == "big":
            floats.byteswap()
        asked = registry_pb2.FindNearestRequest(version=version, vector=floats.tobytes(), top_k=top_k)
        try:
            reply = await self._stub.FindNearest(asked, timeout=min(ASK_S, remaining(MARGIN_S)), metadata=self._finetune.metadata(who))
        except grpc.aio.AioRpcError as error:
            info = status.error_info(error)
            reason = info.reason if info is not None else ""
            if reason == "MODEL_CAPABILITY":
                raise ModelCapability("model", CAPABILITY) from None
            if reason in ("RESOURCE_NOT_FOUND", "WRONG_STATE"):
                raise ResourceNotFound("model") from None
            raise StoreUnavailable from None
        return list(reply.examples)
