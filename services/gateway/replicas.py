"""The inference replicas: a channel each, what they say of themselves, and places on them.

Each replica has two watchers: one reads GetEngineInfo and then WatchLoad, the other Health. It takes calls while both say it may, and the
cluster too where it was discovered. A call gets a `Place` through the admission of its model, and leaves it exactly once. A replica that
the cluster no longer lists is closed once its last call has left.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from argosy.v1 import model_pb2
from argosy_internal.engine.v1 import engine_pb2, engine_pb2_grpc
from services.chassis.channel import ENGINE, LastingChannel, PlaintextRefused, streaming
from services.chassis.errors import NotStarted, ResourceNotFound, Shed
from services.chassis.identity import CALLER_KEY, Caller, CallerSigner
from services.chassis.telemetry import Telemetry
from services.gateway import routing
from services.gateway.admission import RETRY_AFTER_MIN_S, Admission, Ask, Waiting
from services.gateway.catalog import Catalog, Served
from services.gateway.demand import Demand, Waking
from services.gateway.endpoints import Endpoint, View
from services.gateway.settings import Placing

log = logging.getLogger(__name__)

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs forgot it

AUDIENCE = "argosy.inference"  # what a pod's CallerVerifier is made with
INFO_TIMEOUT_S = 5.0
QUIET_S = 20.0  # an idle replica reports each 15 s
HUNG_S = 10.0  # one that holds our calls reports each 100 ms, a long step apart: this silence means it is frozen
BACKOFF_S, BACKOFF_CAP_S = 0.1, 2.0
HASTE = 1.25  # an answer is taken to need so many times what is predicted: calls that come later will slow it
# Words of gRPC's core and its TLS library.
HANDSHAKE = re.compile(r"(CERTIFICATE_VERIFY_FAILED: [\w ]+|WRONG_VERSION_NUMBER|Hostname Verification Check failed)")
GENERATE = "/argosy.internal.engine.v1.EngineService/Generate"
# The gateway itself, where no caller is behind a call: a replica lets nobody in unsigned.
GATEWAY = Caller(project_uid="", project="", key_id="gateway", scopes=frozenset(), request_id="", kv_scope="")

Metadata = tuple[tuple[str, str | bytes], ...]


def label(address: str) -> str:
    """What callers may know of a replica, by its address or its pod's uid: enough to tell two apart."""
    return hashlib.blake2b(address.encode(), digest_size=4).hexdigest()


@dataclass(eq=False)
class Link:
    """One replica: its channel, its calls, its last words."""

    endpoint: Endpoint
    channel: Any  # a LastingChannel, which is as good as a grpc.aio.Channel to a stub
    replica: routing.Replica
    served: Served | None = None
    info: engine_pb2.EngineInfo | None = None
    healthy: bool = True  # until Health says otherwise: a replica need not have it
    loads: bool = False  # WatchLoad is up
    trouble: str = ""  # why it is not, as last said
    streams: int = 0
    unary: int = 0
    stub: Any = None
    generate: Any = None  # EngineService/Generate, events as bytes
    watchers: tuple[asyncio.Task[None], ...] = ()

    def __post_init__(self) -> None:
        self.stub = engine_pb2_grpc.EngineServiceStub(self.channel)
        # No deserializer: the events are relayed unopened.
        self.generate = self.channel.unary_stream(
            GENERATE, request_serializer=engine_pb2.GenerateRequest.SerializeToString, response_deserializer=None
        )

    @property
    def address(self) -> str:
        """host:port."""
        return self.endpoint.address

    def judge(self) -> None:
        """Reachable is both watchers' word, and the cluster's that it may have new work."""
        self.replica.reachable = self.healthy and self.loads and self.endpoint.offered


@dataclass(eq=False)
class Place:
    """A started call's place on a replica. Whoever got it calls `leave`, once."""

    _pool: "Pool"
    link: Link
    ask: Ask
    stream: bool
    _number: int
    waiting: Waiting["Place"] | None = None
    _left: bool = False

    @property
    def served_by(self) -> str:
        """The replica's opaque label."""
        return self.link.replica.name

    def metadata(self, caller: Caller) -> Metadata:
        """The signed caller, for a call to this place's replica."""
        return self._pool.replicas.metadata(caller)

    def started(self) -> None:
        """The replica has queued the call: its load reports count it from here."""
        self.link.replica.started(self._number, self._pool.now())

    async def abort(self, generation_id: str, caller: Caller) -> None:
        """Ask the replica to end a generation of `caller`; its stream then ends with the usage in its trailers. Errors come through."""
        request, within_s = engine_pb2.AbortRequest(generation_ids=[generation_id]), self._pool.replicas.placing.abort_seconds
        await self.link.stub.Abort(request, timeout=within_s, metadata=self.metadata(caller))

    def move(self) -> bool:
        """Go to another replica, after this one failed before it began. False: none is left, or the retry budget is used up."""
        pool = self._pool
        self._ended(failed=True)
        pool.count(self.link, self.stream, -1)
        if not pool.replicas.retries.take():
            self._left_replica()
            return False
        link = pool.choose(self.ask, self.stream, without=frozenset({self.link.replica.name}))
        if link is None:
            self._left_replica()
            return False
        self.link = link
        self._number = link.replica.place(pool.work(self.ask), pool.now())
        pool.count(link, self.stream, +1)
        return True

    def _ended(self, *, failed: bool | None) -> None:
        replica = self.link.replica
        was = replica.standing
        replica.ended(self._number, self._pool.now(), failed=failed)
        self._pool.replicas.let_go(self.link)
        if replica.standing is routing.Standing.EJECTED is not was:
            self._pool.replicas.telemetry.record("argosy.replica.ejected", 1, {"argosy.reason": "FAILURES"})

    def _left_replica(self) -> None:
        self._number = 0  # `leave` must not end it twice

    def leave(self, *, failed: bool | None, cost: float | None = None) -> None:
        """Give the place to the next in line. `failed`: see routing.Replica.ended; `cost`: tokens it took in the end. Safe to repeat."""
        if self._left:
            return
        self._left = True
        now = self._pool.now()
        if self._number:
            self._ended(failed=failed)
            self._pool.count(self.link, self.stream, -1)
        assert self.waiting is not None  # set before anybody could see the place
        self._pool.admission(self.stream).leave(self.waiting, now, cost=cost)


@dataclass(eq=False)
class Pool:
    """The replicas of one model, and the two budgets before them: streams and unary calls (R7)."""

    replicas: "Replicas"
    digest: str
    name: str  # `models/{m}`
    held: int = 0  # calls that wait for the model to wake
    _awake: asyncio.Event = field(default_factory=asyncio.Event)  # set, and replaced, when it may have
    _streams: Admission[Place] = field(init=False)
    _unary: Admission[Place] = field(init=False)

    def __post_init__(self) -> None:
        queue = self.replicas.placing.queue_calls
        self._streams = Admission(lambda ask: self._start(ask, stream=True), self._ready_s, max_queued=queue)
        self._unary = Admission(lambda ask: self._start(ask, stream=False), self._ready_s, max_queued=queue)

    def admission(self, stream: bool) -> Admission[Place]:
        """The budget of streams, or of unary calls."""
        return self._streams if stream else self._unary

    def now(self) -> float:
        """Monotonic seconds."""
        return asyncio.get_running_loop().time()

    def links(self) -> list[Link]:
        """The replicas that serve this model, reachable or not."""
        return [link for link in self.replicas.links if link.served is not None and link.served.digest == self.digest]

    @property
    def alive(self) -> bool:
        """Whether any replica could take a call now or soon."""
        return any(link.replica.reachable and not link.replica.load.draining for link in self.links())

    def count(self, link: Link, stream: bool, by: int) -> None:
        """Keep the books of places taken."""
        if stream:
            link.streams += by
        else:
            link.unary += by

    @staticmethod
    def work(ask: Ask) -> routing.Work:
        """What routing needs to know of `ask`."""
        return routing.Work(ask.prompt_tokens, max(1, round(ask.cost) - ask.prompt_tokens), ask.adapter)

    def choose(self, ask: Ask, stream: bool, *, without: frozenset[str] = frozenset()) -> Link | None:
        """The best replica with a free place for `ask`. Raises Shed where there are places, and all would answer too late."""
        placing, links = self.replicas.placing, self.links()
        peers = [link.replica for link in links]
        full = frozenset(
            link.replica.name
            for link in links
            if (link.streams >= placing.streams_per_replica if stream else link.unary >= placing.unary_per_replica)
            or (link.replica.in_flight and routing.start_s(link.replica, peers) > placing.start_seconds)
        )
        chosen = self._choose(ask, without | full | (frozenset() if without else self._late(ask, peers)), without)
        if chosen is None and not without and self._choose(ask, full, without) is not None:
            raise Shed(RETRY_AFTER_MIN_S)
        return next((link for link in links if link.replica is chosen), None)

    def _choose(self, ask: Ask, barred: frozenset[str], failed: frozenset[str]) -> routing.Replica | None:
        peers = [link.replica for link in self.links()]
        return routing.choose(peers, self.work(ask), self.now(), key=ask.key, salt=os.urandom(4), without=barred, retry=bool(failed))

    def _late(self, ask: Ask, peers: Sequence[routing.Replica]) -> frozenset[str]:
        """The replicas where one call more would be answered too late, as it would make all of theirs. Idle ones are as fast as can be."""
        left, work = ask.latest_end - self.now(), self.work(ask)
        return frozenset(peer.name for peer in peers if peer.in_flight and routing.answer_s(peer, work, peers) * HASTE > left)

    def _start(self, ask: Ask, *, stream: bool) -> Place | None:
        link = self.choose(ask, stream)
        if link is None:
            return None
        now = self.now()
        self.count(link, stream, +1)
        return Place(self, link, ask, stream, link.replica.place(self.work(ask), now))

    def _ready_s(self) -> float:
        reachable = routing.usable([link.replica for link in self.links()], self.now())
        return min((routing.start_s(replica, reachable) for replica in reachable), default=float("inf"))

    def look(self) -> None:
        """Have the calls that are held see whether the model is awake."""
        self._awake.set()
        self._awake = asyncio.Event()

    def pump(self) -> None:
        """Room may have grown, or the last replica gone."""
        now = self.now()
        for admission in (self._streams, self._unary):
            if self.alive:
                admission.pump(now)
            else:
                admission.close(now)

    def check(self, ask: Ask, *, stream: bool) -> None:
        """Raise what `enter` would raise now without waiting, and take no place."""
        if not self.alive:
            self._may_be_held(ask)
            return
        now = self.now()
        self.admission(stream).check(self._in_time(ask, now), now, lambda ask: self.choose(ask, stream) is not None)

    def _in_time(self, ask: Ask, now: float) -> Ask:
        """With the latest start that leaves time to answer."""
        peers = routing.usable([link.replica for link in self.links()], now)
        answer_s = min((routing.answer_s(peer, self.work(ask), peers) for peer in peers), default=0.0) * HASTE
        return replace(ask, latest_start=min(ask.latest_start, ask.latest_end - answer_s))

    async def enter(self, ask: Ask, *, stream: bool) -> Place:
        """A place for `ask`, at once or after a wait.

        Raises:
            NotStarted: no replica is there, and the model is not asleep, or wakes too late.
            Shed: none will be free in time.
        """
        if not self.alive:
            ask = await self._held(ask)
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        admission = self.admission(stream)
        ask = self._in_time(ask, loop.time())
        waiting = admission.offer(ask, loop.time(), lambda: None if told.done() else told.set_result(None))
        if waiting.placement is not None:
            waiting.placement.waiting = waiting
            self.replicas.retries.attempted()
            return waiting.placement
        try:
            await asyncio.wait_for(told, max(0.0, ask.latest_start - loop.time()))
        except TimeoutError:
            pass  # judged below: it may have started in the same turn of the loop
        except BaseException:
            admission.withdraw(waiting)
            if waiting.placement is not None:
                waiting.placement.waiting = waiting
                waiting.placement.leave(failed=None)
            raise
        admission.withdraw(waiting)
        if waiting.placement is None:
            if self.alive:
                raise waiting.refusal or Shed()
            return await self.enter(await self._held(ask), stream=stream)
        waiting.placement.waiting = waiting
        self.replicas.retries.attempted()
        return waiting.placement

    def _may_be_held(self, ask: Ask) -> float:
        """Until when, in monotonic seconds. Raises NotStarted where the model would not be awake by then, with the time that it takes."""
        replicas, now = self.replicas, self.now()
        if not replicas.asleep(self.name):
            raise NotStarted()
        waking = replicas.waking(self.name)
        waking.want(now)
        until = ask.latest_start if ask.latest_end == float("inf") else ask.latest_end
        if now + waking.remaining_s(now) > until or self.held >= replicas.placing.queue_calls:
            raise NotStarted(waking.remaining_s(now))
        return until

    async def _held(self, ask: Ask) -> Ask:
        """Wait for the first replica; then the ask, with as long to wait for a place as any other."""
        until, waking = self._may_be_held(ask), self.replicas.waking(self.name)
        self.held += 1
        try:
            async with asyncio.timeout_at(until):
                while not self.alive:
                    if self.replicas.served_elsewhere(self):
                        raise NotStarted()  # it woke with other weights than those this call was admitted for
                    await self._awake.wait()
        except TimeoutError:
            raise NotStarted(waking.remaining_s(self.now())) from None
        finally:
            self.held -= 1
        return replace(ask, latest_start=min(until, self.now() + self.replicas.placing.queue_seconds))


@dataclass(frozen=True)
class Shelf:
    """The adapters of one replica."""

    _link: Link
    _replicas: "Replicas"

    @property
    def name(self) -> str:
        """The replica's opaque label."""
        return self._link.replica.name

    def holds(self, adapter: str) -> bool:
        """Whether its last load report named it."""
        return adapter in self._link.replica.load.adapters

    async def load(self, adapter: str, owner: Caller, timeout_s: float) -> float:
        """Load `owner`'s adapter; returns the seconds that took, as the replica says. Errors come through."""
        request = engine_pb2.PrefetchAdapterRequest(adapter_digest=adapter)
        reply = await self._link.stub.PrefetchAdapter(request, timeout=timeout_s, metadata=self._replicas.metadata(owner))
        return float(reply.load.ToNanoseconds() / 1e9)

    async def drop(self, adapter: str, owner: Caller, timeout_s: float) -> None:
        """Forget `owner`'s adapter. Errors come through."""
        request = engine_pb2.EvictAdapterRequest(adapter_digest=adapter)
        await self._link.stub.EvictAdapter(request, timeout=timeout_s, metadata=self._replicas.metadata(owner))


class Replicas:
    """All replicas: a static list, or whatever `follow` is told of. Use `watching()`; it closes the channels."""

    def __init__(
        self,
        addresses: Sequence[str] = (),
        *,
        placing: Placing,
        signer: CallerSigner,
        credentials: grpc.ChannelCredentials | None = None,
        telemetry: Telemetry | None = None,
        changed: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        """`changed(usable)` is awaited when the fleet becomes usable or stops being so.

        It is usable while a replica can be reached; and where a view of the cluster says that there is none to be reached.
        """
        self.placing = placing
        self.retries = routing.RetryBudget()
        self.catalog = Catalog()
        self._signer = signer
        self._telemetry = telemetry or Telemetry.off()
        self._changed = changed
        self.usable = False
        self._pools: dict[str, Pool] = {}
        self._waking: dict[str, Waking] = {}  # by model
        self.loaded: Callable[[str, float], None] = lambda model, seconds: None  # told of each wake
        self._judged = asyncio.Event()  # set, and replaced, at each report
        self._credentials = credentials
        self._models: frozenset[str] | None = None  # installed in the cluster; None: nobody has told yet
        self._watching = False
        self._leaving: set[Link] = set()  # listed no more, with calls that go on
        self._closing: set[asyncio.Task[None]] = set()
        self.links: list[Link] = []
        for address in addresses:
            self._add(Endpoint(address, address))

    def metadata(self, caller: Caller) -> Metadata:
        """The signed caller for one call, and the trace it belongs to."""
        return self._telemetry.inject(((CALLER_KEY, self._signer.sign(caller, AUDIENCE, time.time())),))

    def resolve(self, name: str, allowed: Iterable[str]) -> Served:
        """Like Catalog.resolve, but NotStarted for what is not known yet: everything before the first replica, a model before its own."""
        permitted = frozenset(allowed)
        try:
            return self.catalog.resolve(name, permitted)
        except ResourceNotFound:
            if name in self.installed and (not permitted or name in permitted):
                raise self._unknown(name) from None
            if self.catalog.empty:
                raise NotStarted() from None
            raise

    def _unknown(self, name: str) -> NotStarted:
        """Of an installed model that nobody has described to us yet: wake it; only then can a call for it be judged."""
        now = asyncio.get_running_loop().time()
        self.waking(name).want(now)
        return NotStarted(self.waking(name).remaining_s(now))

    def waking(self, model: str) -> Waking:
        """How far a model is on its way from no replica to the first."""
        return self._waking.setdefault(model, Waking())

    def asleep(self, model: str) -> bool:
        """Whether the cluster offers no replica of an installed model, or the first is on its way to us."""
        if model not in (self._models or ()):
            return False
        offered = any(link.endpoint.offered and link.endpoint.model == model for link in self.links)
        return not offered or (model in self._waking and self._waking[model].since is not None)

    def served_elsewhere(self, pool: Pool) -> bool:
        """Whether replicas serve the model of `pool` with other weights, and none with its own."""
        return not pool.alive and any(link.served.name == pool.name for link in self.links if link.served and link.replica.reachable)

    @property
    def told(self) -> bool:
        """Whether a cluster has been seen at all."""
        return self._models is not None

    @property
    def installed(self) -> frozenset[str]:
        """The models that the cluster lists."""
        return self._models or frozenset()

    def demand(self) -> dict[str, Demand]:
        """What is asked of each model through this gateway now."""
        now = asyncio.get_running_loop().time()
        found: dict[str, Demand] = {}
        for name in {*self._waking, *(pool.name for pool in self._pools.values())}:
            pools = [pool for pool in self._pools.values() if pool.name == name]
            queued = sum(pool.held + pool.admission(True).queued + pool.admission(False).queued for pool in pools)
            if name in self._waking:
                queued = max(queued, int(self._waking[name].wanted(now)))
                self._waking[name].lost_interest(now)
            links = [link for link in (*self.links, *self._leaving) if link.served is not None and link.served.name == name]
            kv = sum(link.replica.load.kv_used for link in links if link.replica.reachable)
            found[name] = Demand(queued, sum(link.streams + link.unary for link in links), round(100 * kv))
        return found

    def shelves(self, digest: str = "") -> list[Shelf]:
        """The adapters of the replicas that serve this base, or any, and can be reached."""
        reachable = [link for link in self.links if link.replica.reachable and link.served is not None]
        return [Shelf(link, self) for link in reachable if link.served is not None and digest in ("", link.served.digest)]

    def ready(self, served: Served) -> int:
        """Replicas that could take a call for this model now."""
        return sum(link.replica.reachable and not link.replica.load.draining for link in self.pool(served.digest).links())

    @property
    def pools(self) -> Iterable[Pool]:
        """Of every model that was asked for or reported."""
        return self._pools.values()

    @property
    def telemetry(self) -> Telemetry:
        """Where the places on the replicas are counted."""
        return self._telemetry

    def pool(self, digest: str, name: str = "") -> Pool:
        """The replicas of one model and the queues before them."""
        pool = self._pools.get(digest)
        if pool is None:
            pool = self._pools[digest] = Pool(self, digest, name)
        pool.name = name or pool.name
        return pool

    def check(self, served: Served, ask: Ask, *, stream: bool) -> None:
        """See Pool.check."""
        self.pool(served.digest, served.shared).check(ask, stream=stream)

    async def enter(self, served: Served, ask: Ask, *, stream: bool) -> Place:
        """See Pool.enter."""
        return await self.pool(served.digest, served.shared).enter(ask, stream=stream)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator["Replicas"]:
        """Watch every replica while inside."""
        self._watching = True
        for link in self.links:
            self._watch(link)
        try:
            yield self
        finally:
            self._watching = False
            await asyncio.gather(*(self._close(link) for link in (*self.links, *self._leaving)), *self._closing)

    async def follow(self, seen: View) -> None:
        """Have a channel to each replica in `seen`, and none to any other but for the calls that still run there."""
        first, self._models = self._models is None, seen.models
        for link in list(self.links):
            endpoint = seen.endpoints.get(link.endpoint.uid)
            if endpoint is None or endpoint.address != link.address or endpoint.server_name != link.endpoint.server_name:
                self._retire(link)
            elif endpoint != link.endpoint:
                link.endpoint = endpoint
                await self._judge(link)
        known = {link.endpoint.uid for link in self.links}
        for endpoint in seen.endpoints.values():
            if endpoint.uid not in known:
                self._add(endpoint)
        self.catalog.keep_asleep(seen.models)
        self._waking = {model: waking for model, waking in self._waking.items() if model in seen.models}
        for model, seconds in seen.load_s.items():
            if not (waking := self.waking(model)).seen:
                waking.load_s = seconds
        if first:
            log.info("the cluster lists %d replicas of %d models", len(seen.endpoints), len(seen.models))
        await self._weigh()
        for pool in self._pools.values():
            pool.pump()

    async def renew(self, credentials: grpc.ChannelCredentials, grace_s: float) -> None:
        """Show every replica these credentials from the next call on; what runs has `grace_s` to end."""
        self._credentials = credentials
        for link in self.links:
            link.channel.renew(credentials, grace_s)
            for watcher in link.watchers:
                watcher.cancel()
            await asyncio.gather(*link.watchers, return_exceptions=True)
            self._watch(link)

    def _add(self, endpoint: Endpoint) -> None:
        options: dict[str, int | str] = dict(ENGINE)
        if endpoint.server_name:
            options["grpc.ssl_target_name_override"] = endpoint.server_name
        name = label(endpoint.uid)
        try:
            # No interceptors: one would add a hop to each event of each stream.
            channel = LastingChannel(endpoint.address, credentials=self._credentials, options=options)
        except PlaintextRefused as refused:
            if self._models is None:  # from the settings: an operator is there to read it
                raise
            log.error("replica %s is passed over: %s", name, refused)
            return
        self.links.append(link := Link(endpoint, channel, routing.Replica(name)))
        if self._watching:
            self._watch(link)

    def _watch(self, link: Link) -> None:
        link.watchers = (asyncio.create_task(self._watch_load(link)), asyncio.create_task(self._watch_health(link)))

    def _retire(self, link: Link) -> None:
        """No new work; its calls go on until they end."""
        if link.loads:
            log.info("replica %s leaves, with %d calls", link.replica.name, len(link.replica.in_flight))
        link.replica.reachable = False
        for watcher in link.watchers:
            watcher.cancel()
        self.links.remove(link)
        self.catalog.forget(link.replica.name)
        self._leaving.add(link)
        self.let_go(link)

    def let_go(self, link: Link) -> None:
        """A call on `link` has ended: it is closed if it was to leave, and that was its last."""
        if link in self._leaving and not link.replica.in_flight:
            self._leaving.remove(link)
            closing = asyncio.create_task(self._close(link))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _close(self, link: Link) -> None:
        for watcher in link.watchers:
            watcher.cancel()
        await asyncio.gather(*link.watchers, return_exceptions=True)
        await link.channel.close(None)
        self._telemetry.forget("argosy.replica.inflight", "argosy.replica", link.replica.name)

    async def until(self, reachable: int, timeout_s: float = 10.0) -> None:
        """Wait until exactly so many replicas are reachable; TimeoutError if that does not come about."""
        async with asyncio.timeout(timeout_s):
            while sum(link.replica.reachable for link in self.links) != reachable:
                await self.judged()

    async def judged(self) -> None:
        """Wait for the next report of any replica."""
        await self._judged.wait()

    async def _judge(self, link: Link) -> None:
        was = link.replica.reachable
        link.judge()
        if was and not link.replica.reachable:
            self._telemetry.record("argosy.replica.ejected", 1, {"argosy.reason": _why(link)})
        await self._weigh()
        if link.served is not None:
            self.pool(link.served.digest, link.served.name).pump()
            if link.replica.reachable and not was:
                self._woke(link.served.name)

    def _woke(self, model: str) -> None:
        """A replica of it can be reached, where there may have been none."""
        if model in self._waking:
            took_s = self._waking[model].woke(asyncio.get_running_loop().time())
            if took_s is not None:
                log.info("%s is awake after %.1f s", model, took_s)
                self.loaded(model, took_s)
        for pool in self._pools.values():
            if pool.name == model and pool.held:
                pool.look()

    async def _weigh(self) -> None:
        """The fleet may have become usable, or no longer be."""
        self._judged.set()
        self._judged = asyncio.Event()
        reachable = sum(each.replica.reachable for each in self.links)
        self._telemetry.record("argosy.replica.ready", reachable)
        usable = reachable > 0 or (self._models is not None and not any(link.endpoint.offered for link in self.links))
        if usable != self.usable:
            self.usable = usable
            if self._changed is not None:
                await self._changed(usable)

    async def _watch_load(self, link: Link) -> None:
        failures = 0
        while True:
            reported = False
            try:
                info = await link.stub.GetEngineInfo(
                    engine_pb2.GetEngineInfoRequest(), timeout=INFO_TIMEOUT_S, metadata=self.metadata(GATEWAY)
                )
                link.info, link.served = info, served_from(info)
                self.catalog.serves(link.replica.name, link.served)
                async with streaming(link.stub.WatchLoad(engine_pb2.WatchLoadRequest(), metadata=self.metadata(GATEWAY))) as loads:
                    while (load := await self._next_load(link, loads)) is not EOF:
                        failures, reported = 0, True
                        link.replica.report(load_from(load), asyncio.get_running_loop().time())
                        link.trouble = ""
                        if not link.loads:
                            log.info("replica %s serves %s", link.replica.name, link.served.name)
                        link.loads = True
                        await self._judge(link)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                if reported and isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    continue  # a watch has a longest life too; the replica is as well as it was
                self._tell(link, _word(error))
            link.loads = False
            await self._judge(link)
            failures += 1
            await asyncio.sleep(_backoff(failures))

    def _tell(self, link: Link, word: str) -> None:
        """Say once why a replica cannot be had; it tries again all the time."""
        if link.loads or word != link.trouble:
            log.warning("replica %s %s: %s", link.replica.name, "is gone" if link.loads else "cannot be reached", word)
        link.trouble = word

    async def _next_load(self, link: Link, loads: Any) -> Any:
        """The next report; TimeoutError when it stays out for longer than a live replica would let it."""
        read = asyncio.ensure_future(loads.read())
        try:
            quiet = 0.0
            while not (await asyncio.wait({read}, timeout=HUNG_S))[0]:
                quiet += HUNG_S
                if quiet >= QUIET_S or _waits_since(link.replica, asyncio.get_running_loop().time() - HUNG_S):
                    raise TimeoutError
            return await read
        finally:
            if not read.done():
                read.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await read

    async def _watch_health(self, link: Link) -> None:
        failures = 0
        stub = health_pb2_grpc.HealthStub(link.channel)
        while True:
            try:
                async with streaming(stub.Watch(health_pb2.HealthCheckRequest(service="ready"))) as states:
                    async for state in states:
                        failures = 0
                        link.healthy = state.status == health_pb2.HealthCheckResponse.SERVING
                        await self._judge(link)
            except grpc.aio.AioRpcError as error:
                # Unreachable is the load watcher's to say; a server without Health must not count as ill.
                link.healthy = link.healthy or error.code() is grpc.StatusCode.UNIMPLEMENTED
            failures += 1
            await asyncio.sleep(_backoff(failures))


def _why(link: Link) -> str:
    """Why it takes no new work."""
    if not link.loads:
        return "UNREACHABLE"
    if not link.endpoint.healthy:
        return "DEVICE"
    return "LEAVING" if not link.endpoint.offered else "UNHEALTHY"


def _waits_since(replica: routing.Replica, moment: float) -> bool:
    """Whether it holds a call that was sent before `moment`: then it owes us reports."""
    return any(placed.at < moment for placed in replica.in_flight.values())


def _backoff(failures: int) -> float:
    """Seconds, jittered, doubled each time up to the cap."""
    return min(BACKOFF_CAP_S, BACKOFF_S * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)


def _word(error: Exception) -> str:
    """In a few words, none of which a peer can choose."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return "silent"
    said = HANDSHAKE.search(error.details() or "")
    return f"{error.code().name}, no handshake: {said[1]}" if said else error.code().name


def load_from(load: engine_pb2.EngineLoad) -> routing.Load:
    """The message as a value."""
    return routing.Load(
        queued_tokens=load.queued_tokens,
        running_tokens=load.running_tokens,
        waiting_sequences=load.waiting_sequences,
        running_sequences=load.running_sequences,
        prefill_tokens_per_s=load.prefill_tokens_per_second,
        decode_tokens_per_s=load.decode_tokens_per_second,
        step_s=load.step_time.ToNanoseconds() / 1e9,
        batch=load.batch,
        draining=load.draining,
        adapters=frozenset(load.resident_adapters),
        kv_used=1 - min(1.0, load.free_blocks / load.total_blocks) if load.total_blocks else 0.0,
    )


def served_from(info: engine_pb2.EngineInfo) -> Served:
    """What a replica serves, with the public description of its model: a base has no head, whatever its engine can do with one."""
    capabilities = [capability for capability in info.capabilities if capability != model_pb2.MODEL_CAPABILITY_CLASSIFY_TUNED]
    model = model_pb2.Model(
        name=info.model,
        uid=info.base_digest,
        base_digest=info.base_digest,
        capabilities=capabilities,
        context_tokens=info.context_tokens,
        vocabulary_size=info.vocabulary_size,
        embedding_dimensions=info.embedding_dimensions,
        default_config=info.default_config,
        architecture=info.architecture,
    )
    return Served(
        name=info.model,
        digest=info.base_digest,
        context_tokens=info.context_tokens,
        capabilities=frozenset(
            model_pb2.ModelCapability.Name(capability).removeprefix("MODEL_CAPABILITY_")
            for capability in capabilities
            if capability in model_pb2.ModelCapability.values()  # a newer replica may know more
        ),
        description=model.SerializeToString(),
    )
