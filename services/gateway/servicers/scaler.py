"""KEDA's external scaler over the gateways' demand: whether a model needs a replica, pushed as it changes, and how many."""

import math
from collections.abc import AsyncIterator
from typing import Any, Protocol

from argosy_internal.scaler.v1 import scaler_pb2
from services.chassis.errors import FieldInvalid, ResourceNotFound
from services.gateway.demand import Demand, Signal

SERVICE = "externalscaler.ExternalScaler"


class Demands(Protocol):
    """See scaling.Scaling."""

    def demand(self, model: str) -> Demand | None:
        """What is asked of `models/{m}`; None: it is not installed. Raises NotStarted while that is not known."""
        ...

    async def changed(self) -> None:
        """Wait for the next change."""
        ...


class ScalerServicer:
    """externalscaler.ExternalScaler. A trigger's metadata names the model, the signal and the target."""

    def __init__(self, demands: Demands) -> None:
        self._demands = demands

    async def IsActive(self, request: scaler_pb2.ScaledObjectRef, context: Any) -> scaler_pb2.IsActiveResponse:
        """Whether anything is asked of the model."""
        return scaler_pb2.IsActiveResponse(result=self._demand(request).active)

    async def StreamIsActive(self, request: scaler_pb2.ScaledObjectRef, context: Any) -> AsyncIterator[scaler_pb2.IsActiveResponse]:
        """The same at once, and whenever it changes."""
        told: bool | None = None
        while True:
            if (active := self._demand(request).active) != told:
                told = active
                yield scaler_pb2.IsActiveResponse(result=active)
            await self._demands.changed()

    async def GetMetricSpec(self, request: scaler_pb2.ScaledObjectRef, context: Any) -> scaler_pb2.GetMetricSpecResponse:
        """The one metric, and its target a replica."""
        target = _target(request)
        spec = scaler_pb2.MetricSpec(metric_name=_signal(request), target_size=math.ceil(target), target_size_float=target)
        return scaler_pb2.GetMetricSpecResponse(metric_specs=[spec])

    async def GetMetrics(self, request: scaler_pb2.GetMetricsRequest, context: Any) -> scaler_pb2.GetMetricsResponse:
        """Its value over all gateways."""
        value = self._demand(request.scaled_object_ref).value(_signal(request.scaled_object_ref))
        found = scaler_pb2.MetricValue(metric_name=request.metric_name, metric_value=value, metric_value_float=value)
        return scaler_pb2.GetMetricsResponse(metric_values=[found])

    def _demand(self, request: scaler_pb2.ScaledObjectRef) -> Demand:
        """Raises ResourceNotFound for a model that the cluster does not list."""
        model = request.scaler_metadata.get("model", "")
        if not model:
            raise FieldInvalid("scaler_metadata.model", "required")
        found = self._demands.demand(f"models/{model}")
        if found is None:
            raise ResourceNotFound("scaler_metadata.model")
        return found


def _signal(request: scaler_pb2.ScaledObjectRef) -> Signal:
    try:
        return Signal(request.scaler_metadata.get("signal", Signal.QUEUE))
    except ValueError:
        raise FieldInvalid("scaler_metadata.signal", f"one of {', '.join(Signal)}") from None


def _target(request: scaler_pb2.ScaledObjectRef) -> float:
    try:
        target = float(request.scaler_metadata.get("target", ""))
    except ValueError:
        target = math.nan
    if not 0 < target < math.inf:
        raise FieldInvalid("scaler_metadata.target", "a number above 0")
    return target
