"""Where the replicas are, by the cluster's own word: EndpointSlices, and pods if asked for, listed and watched on threads.

A view outlives the API server that gave it (F19): the gateway goes on with what it last saw, and says how old that is.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.chassis.cluster import Api, Feed
from services.chassis.telemetry import Telemetry
from services.gateway.endpoints import LABELS, View, broken_devices, view

SAMPLE_S = 1.0  # of the view's age
END_S = 2.0  # for the threads to end
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
PODS = "/api/v1/namespaces/{namespace}/pods"


class Discovery:
    """The EndpointSlices, and with `gpu_health` the pods, of some namespaces. Use `following`."""

    def __init__(self, namespaces: Sequence[str], api: Any, *, gpu_health: bool = False, telemetry: Telemetry | None = None) -> None:
        """`api` is a kubernetes.client.ApiClient, as cluster.connect returns it."""
        self._telemetry = telemetry or Telemetry.off()
        self._api = Api(api)
        paths = [(SLICES, each) for each in namespaces] + ([(PODS, each) for each in namespaces] if gpu_health else [])
        self._feeds = [Feed(self._api, path.format(namespace=namespace), LABELS) for path, namespace in paths]
        self._slices, self._pods = self._feeds[: len(namespaces)], self._feeds[len(namespaces) :]
        self._began = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the API server last said anything of the namespace it has been silent on for longest."""
        since_start_s = time.monotonic() - self._began
        return max(since_start_s if (age := feed.fresh.age_s) is None else age for feed in self._feeds)

    def view(self) -> View | None:
        """The replicas as last seen; None until every namespace has been listed once."""
        if not all(feed.listed for feed in self._slices):
            return None
        broken = broken_devices(pod for feed in self._pods for pod in feed.view.values())
        self._telemetry.record("argosy.gpu.unhealthy", broken.total())
        return view((each for feed in self._slices for each in feed.view.values()), frozenset(broken))

    @asynccontextmanager
    async def following(self, follow_view: Callable[[View], Awaitable[None]]) -> AsyncIterator[None]:
        """Call `follow_view` with each new view while inside, never two at once; the newest alone counts."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(changed.set)

        async def told() -> None:
            last: View | None = None
            while True:
                await changed.wait()
                changed.clear()
                if (now := self.view()) is not None and now != last:
                    await follow_view(now)
                    last = now

        async def sampled() -> None:
            while True:
                self._telemetry.record("argosy.cluster.view_age", self.age_s)
                await asyncio.sleep(SAMPLE_S)

        tasks = [asyncio.create_task(told(), name="discovery"), asyncio.create_task(sampled(), name="view age")]
        for feed in self._feeds:
            feed.changed = tell
            feed.start()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await asyncio.to_thread(self._end)

    def _end(self) -> None:
        """Interrupt what waits, and close the connections. A thread that is just connecting is left to itself."""
        given_up = time.monotonic() + END_S
        left = self._feeds
        while left and time.monotonic() < given_up:
            left = [feed for feed in left if not feed.stop(END_S / 40)]
        self._api.close()
