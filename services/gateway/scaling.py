"""The demand for every model, over all gateways: exchanged once a second, shown as metrics, and told to whoever scales."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from services.chassis.errors import NotStarted, StoreUnavailable
from services.chassis.telemetry import Telemetry
from services.gateway.demand import Demand, Signal, bare, total
from services.gateway.replicas import Replicas

log = logging.getLogger(__name__)

BEAT_S = 1.0


class SharedDemand(Protocol):
    """Where gateways tell each other; see sql_demand.SqlDemand."""

    async def exchange(self, own: Mapping[str, Demand]) -> tuple[list[tuple[str, Demand]], dict[str, float]]:
        """Write this gateway's demand; the others', and the seconds that models last took to wake. Raises StoreUnavailable."""
        ...

    async def loaded(self, model: str, seconds: float) -> None:
        """A model has woken. Raises StoreUnavailable."""
        ...


class Scaling:
    """What all gateways want of every installed model. Without a store, or while it is away, this one's wants alone."""

    def __init__(self, replicas: Replicas, shared: SharedDemand | None, telemetry: Telemetry) -> None:
        self._replicas = replicas
        self._shared = shared
        self._telemetry = telemetry
        self._totals: dict[str, Demand] = {}
        self._changed = asyncio.Event()
        self._loads: asyncio.Queue[tuple[str, float]] = asyncio.Queue(maxsize=64)
        self._away = False

    def demand(self, model: str) -> Demand | None:
        """For a model, `models/{m}`; None: it is not installed. Raises NotStarted while nobody has told what is."""
        if not self._replicas.told:
            raise NotStarted()
        found = self._totals.get(model)
        return found if found is not None or model not in self._replicas.installed else Demand()

    async def changed(self) -> None:
        """Wait for the next change of any model's demand."""
        await self._changed.wait()

    @asynccontextmanager
    async def following(self) -> AsyncIterator["Scaling"]:
        """Exchange while inside."""
        self._replicas.loaded = self._loaded
        beating = asyncio.create_task(self._beat(), name="demand")
        try:
            yield self
        finally:
            beating.cancel()
            await asyncio.wait((beating,))

    def _loaded(self, model: str, seconds: float) -> None:
        if not self._loads.full():  # a lost one costs a guess
            self._loads.put_nowait((model, seconds))

    async def _beat(self) -> None:
        while True:
            await self.once()
            await asyncio.sleep(BEAT_S)

    async def once(self) -> None:
        """One exchange."""
        own = self._replicas.demand()
        others = await self._exchange(own)
        totals = total([*own.items(), *others])
        for model in self._replicas.installed | totals.keys():
            for signal in Signal:
                value = totals.get(model, Demand()).value(signal)
                self._telemetry.record(f"argosy.demand.{signal}", value, {"model": bare(model)})
        if totals != self._totals:
            self._totals = totals
            self._changed.set()
            self._changed = asyncio.Event()

    async def _exchange(self, own: Mapping[str, Demand]) -> list[tuple[str, Demand]]:
        if self._shared is None:
            return []
        try:
            others, loads = await self._shared.exchange(own)
            while not self._loads.empty():
                await self._shared.loaded(*self._loads.get_nowait())
        except StoreUnavailable:
            if not self._away:
                log.warning("the store is away: an autoscaler sees only what is asked through this gateway")
            self._away = True
            return []
        self._away = False
        for model, seconds in loads.items():
            if model in self._replicas.installed and not (waking := self._replicas.waking(model)).seen:
                waking.load_s = seconds
        return others
