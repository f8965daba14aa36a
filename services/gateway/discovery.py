"""Where the replicas are, by the cluster's own word: EndpointSlices, and pods if asked for, listed and watched on threads.

A view outlives the API server that gave it (F19): the gateway goes on with what it last saw, and says how old that is.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import urllib3

from services.chassis.listwatch import RELIST_SECONDS, Event, Expired, Freshness, Kind, Pace, Unreachable, follow
from services.chassis.telemetry import Telemetry
from services.gateway.endpoints import LABELS, Object, View, broken_devices, view

log = logging.getLogger(__name__)

CONNECT_S, ANSWER_S = 3.0, 10.0
SILENCE_S = RELIST_SECONDS - CONNECT_S  # of a watch whose other end is gone
WATCH_S = round(SILENCE_S - 2)  # the server ends it by then: a deletion that was missed is seen with the next list (F21)
SAMPLE_S = 1.0  # of the view's age
END_S = 2.0  # for the threads to end
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
PODS = "/api/v1/namespaces/{namespace}/pods"
GONE = 410


class NoCluster(ValueError):
    """No cluster to ask: not inside one, and no kubeconfig that works."""


def connect() -> Any:
    """A client, kubernetes.client.ApiClient, of the cluster this process runs in, else of the one KUBECONFIG names.

    Raises:
        NoCluster: there is neither.
    """
    from kubernetes import client, config  # half a second, and only for those who have a cluster

    settings = client.Configuration()
    try:
        try:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as error:
        raise NoCluster(f"model namespaces are set, but there is no cluster to ask: {error}") from error
    settings.retries = 0  # its own would hide an outage, and hammer (R10)
    return client.ApiClient(settings)


@dataclass(eq=False)
class _Feed:
    """The objects of one kind in one namespace, as the two calls that listwatch makes. JSON as it comes: no model classes."""

    api: Any
    path: str
    namespace: str
    pace: Pace
    view: Mapping[str, Object] | None = None  # None: never answered
    fresh: Freshness = field(default_factory=Freshness)
    _open: Any = None  # the urllib3 response that a watch reads

    @property
    def what(self) -> str:
        """For an operator."""
        return f"{self.path.rsplit('/', 1)[-1]} in {self.namespace}"

    def run(self, changed: Callable[[], None], stopped: threading.Event) -> None:
        """Follow until stopped; `changed` is called with each new view in place. For a thread."""

        def seen(objects: Mapping[str, Object]) -> None:
            self.view = dict(objects)
            changed()

        def failed(error: Exception) -> None:
            if not stopped.is_set():  # else we cut it off ourselves
                self._failed(error)

        follow(self.list, self.watch, seen, stopped=stopped, heard=self._heard, failed=failed, pace=self.pace)

    def _heard(self) -> None:
        if self.fresh.trouble:
            log.info("%s can be read again", self.what)
        self.fresh.heard()

    def _failed(self, error: Exception) -> None:
        if str(error) != self.fresh.trouble:
            log.warning("%s cannot be read: %s; what was last seen stays", self.what, error)
        self.fresh.failed(error)

    def list(self) -> tuple[dict[str, Object], str]:
        """All objects by uid, and the version they are of."""
        with self._get(ANSWER_S) as response:
            found = json.loads(response.data)
        return {item["metadata"]["uid"]: item for item in found.get("items") or ()}, found["metadata"]["resourceVersion"]

    def watch(self, version: str) -> Iterator[Event[Object]]:
        """What changes from `version` on, until the server ends it."""
        asked = [("watch", "true"), ("resourceVersion", version), ("allowWatchBookmarks", "true"), ("timeoutSeconds", str(WATCH_S))]
        with self._get(SILENCE_S, *asked) as response:
            self._open = response
            try:
                for line in _lines(response):
                    event = json.loads(line)
                    kind, thing = event["type"], event["object"]
                    if kind == "ERROR":
                        raise _error(thing.get("code", 0), thing.get("message", ""))
                    meta = thing["metadata"]
                    yield Event(Kind(kind), meta.get("uid", ""), thing, meta["resourceVersion"])
            finally:
                self._open = None

    def stop(self) -> None:
        """End a watch that waits, from another thread."""
        if (response := self._open) is not None:
            with contextlib.suppress(ValueError, RuntimeError, OSError):  # it ended meanwhile
                response.shutdown()

    @contextlib.contextmanager
    def _get(self, answer_s: float, *query: tuple[str, str]) -> Iterator[Any]:
        method, url, headers, *_ = self.api.param_serialize(
            "GET",
            self.path,
            {"namespace": self.namespace},
            [("labelSelector", LABELS), *query],
            {"Accept": "application/json"},
            auth_settings=["BearerToken"],
        )
        try:
            response = self.api.call_api(method, url, headers, _request_timeout=(CONNECT_S, answer_s)).response
            try:
                if response.status >= 400:
                    raise _error(response.status, response.data.decode(errors="replace")[:200], response.headers.get("Retry-After"))
                yield response
            finally:
                response.close()
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(type(error.__cause__ or error).__name__) from error
        except (OSError, KeyError, TypeError, ValueError) as error:  # ValueError: not JSON, or an event of a kind nobody knows
            raise Unreachable(f"not an answer of a cluster: {type(error).__name__}") from error


def _lines(response: Any) -> Iterator[bytes]:
    rest = b""
    for chunk in response.stream(65_536, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line)


def _error(status: int, says: str, retry_after: str | None = None) -> Exception:
    if status == GONE:
        return Expired(says)
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
    return Unreachable(f"HTTP {status} {says}".strip(), retry_after_s=seconds)


class Discovery:
    """The EndpointSlices, and with `gpu_health` the pods, of some namespaces. Use `following`."""

    def __init__(self, namespaces: Sequence[str], api: Any, *, gpu_health: bool = False, telemetry: Telemetry | None = None) -> None:
        """`api` is what `connect` returns."""
        self._telemetry = telemetry or Telemetry.off()
        pace = Pace()
        self._slices = [_Feed(api, SLICES, namespace, pace) for namespace in namespaces]
        self._pods = [_Feed(api, PODS, namespace, pace) for namespace in namespaces] if gpu_health else []
        self._began = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the API server last said anything of the namespace it has been silent on for longest."""
        since_start_s = time.monotonic() - self._began
        return max(since_start_s if (age := feed.fresh.age_s) is None else age for feed in (*self._slices, *self._pods))

    def view(self) -> View | None:
        """The replicas as last seen; None until every namespace has been listed once."""
        known = [feed.view for feed in self._slices if feed.view is not None]
        if len(known) < len(self._slices):
            return None
        broken = broken_devices(pod for feed in self._pods for pod in (feed.view or {}).values())
        self._telemetry.record("argosy.gpu.unhealthy", broken.total())
        return view((each for objects in known for each in objects.values()), frozenset(broken))

    @asynccontextmanager
    async def following(self, follow_view: Callable[[View], Awaitable[None]]) -> AsyncIterator[None]:
        """Call `follow_view` with each new view while inside, never two at once; the newest alone counts."""
        loop, changed, stopped = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

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

        feeds = [*self._slices, *self._pods]
        # Daemons: a read that waits for a silent server must not hold up the exit.
        threads = [threading.Thread(target=feed.run, args=(tell, stopped), name=f"watch {feed.what}", daemon=True) for feed in feeds]
        tasks = [asyncio.create_task(told(), name="discovery"), asyncio.create_task(sampled(), name="view age")]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopped.set()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await asyncio.to_thread(self._end, feeds, threads)

    @staticmethod
    def _end(feeds: Sequence[_Feed], threads: Sequence[threading.Thread]) -> None:
        """Interrupt what waits, and close the connections. A thread that is just connecting is left to itself."""
        given_up = time.monotonic() + END_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < given_up:
            for feed, thread in zip(feeds, threads, strict=True):
                feed.stop()
                thread.join(END_S / 40)
        for feed in feeds:
            feed.api.rest_client.pool_manager.clear()
