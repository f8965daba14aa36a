"""A project's own models: what a name means now, and adapters pushed to the replicas before anybody asks for them.

`OwnModels` asks finetune and remembers; `Pusher` follows its feed: a version that is ready is loaded by every replica of its base, then
reported servable; a name that moved is asked for anew; what is erased is evicted. Several gateways may do all of it at once.
"""

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from argosy.v1 import model_pb2
from argosy_internal.registry.v1 import registry_pb2, registry_pb2_grpc
from services.chassis import status
from services.chassis.channel import remaining, streaming
from services.chassis.errors import DeadlineExceeded, NotStarted, ResourceNotFound, StoreUnavailable, WrongState
from services.chassis.identity import Caller
from services.chassis.telemetry import Telemetry
from services.gateway.catalog import Catalog, Served
from services.gateway.meanings import Meaning, Meanings, Target, model_of, pick

log = logging.getLogger(__name__)

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs forgot it

FLEET_SCOPE = "fleet"  # of calls that we make for no key: no key can have it
SERVICE = "/argosy.internal.registry.v1.RegistryService/"
ASK_S = 2.0  # one question about a name
PATIENCE_S = 0.5  # for an answer, where what the name meant is known
MARGIN_S = 0.2
LOAD_S = 60.0  # one adapter on one replica
TOGETHER_S = 2.0  # replicas that load within this are reported together
REPLICAS_S = 60.0  # that a push waits for the first replica of its base
TRIES = 3  # of a replica that does not answer; the first call loads what is missing
PUSHES = 4  # versions pushed at once
LATE_S = 600.0  # of what was ready while nobody followed the feed, that is still pushed: older ones are loaded when asked for
BACKOFF_S, BACKOFF_CAP_S = 0.1, 2.0


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

    def watch_call(self, method: str, call: Any) -> None:
        """Measure a call."""
        ...


class Shelf(Protocol):
    """A replica's adapters; see replicas.Shelf."""

    @property
    def name(self) -> str:
        """The replica's opaque label."""
        ...

    def holds(self, adapter: str) -> bool:
        """Whether it said so."""
        ...

    async def load(self, adapter: str, owner: Caller, timeout_s: float) -> float:
        """Load it; returns the seconds that took. grpc's errors come through."""
        ...

    async def drop(self, adapter: str, owner: Caller, timeout_s: float) -> None:
        """Forget it. grpc's errors come through."""
        ...


class Shelves(Protocol):
    """The replicas; see replicas.Replicas."""

    def shelves(self, digest: str = "") -> Sequence[Shelf]:
        """Those that serve this base, or any, and can be reached."""
        ...

    async def judged(self) -> None:
        """Wait for the next report of any replica."""
        ...


def fleet_caller(project_uid: str = "", project: str = "") -> Caller:
    """The gateway itself, on behalf of a project or of none."""
    return Caller(
        project_uid=project_uid,
        project=project.removeprefix("projects/"),
        key_id="gateway",
        scopes=frozenset({FLEET_SCOPE}),
        request_id=str(uuid.uuid4()),
        kv_scope="",
    )


class OwnModels:
    """Resolves `projects/{p}/models/{m}`, its versions and its aliases."""

    def __init__(self, finetune: Upstream, catalog: Catalog, meanings: Meanings) -> None:
        self._finetune = finetune
        self._catalog = catalog
        self._meanings = meanings
        self._stub: Any = None if finetune.off else registry_pb2_grpc.RegistryServiceStub(finetune.channel)
        self._queries: dict[tuple[str, str], asyncio.Task[Meaning]] = {}

    async def resolve(self, name: str, who: Caller, sticky: str) -> Served:
        """The version that answers `who`, with what its base can do. `sticky` decides on which side of a split alias.

        Raises:
            ResourceNotFound: no such name in the caller's project, or not on the key's list; foreign and random alike (A10).
            WrongState: it means no version that can answer.
            ModelNotServed: no replica serves its base.
            StoreUnavailable: finetune is away, and the name was not asked for of late.
        """
        hidden = who.models and name not in who.models and model_of(name) not in who.models
        if self._finetune.off or hidden or not name.startswith(f"projects/{who.project}/"):
            raise ResourceNotFound("model")
        if self._catalog.empty:
            raise NotStarted
        return self._catalog.tuned(pick(await self._meaning(name, who), sticky))

    async def _meaning(self, name: str, who: Caller) -> Meaning:
        key, now = (who.project_uid, name), _now()
        if (fresh := self._meanings.fresh(*key, now)) is not None:
            return fresh
        query = self._queries.get(key)
        if query is None:  # one question a name, however many calls wait for it
            query = self._queries[key] = asyncio.create_task(self._ask(name, who), name="resolve")
            query.add_done_callback(lambda done: self._asked(key, done))
        last = self._meanings.last(*key, now)
        await asyncio.wait({query}, timeout=min(ASK_S if last is None else PATIENCE_S, remaining(MARGIN_S)))
        try:
            if query.done():
                return query.result()
        except StoreUnavailable:
            if last is None:
                raise
        if last is None:
            raise DeadlineExceeded if remaining(MARGIN_S) <= 0 else StoreUnavailable
        return last

    def _asked(self, key: tuple[str, str], done: "asyncio.Task[Meaning]") -> None:
        self._queries.pop(key, None)
        if not done.cancelled():
            done.exception()  # its waiters may be gone

    async def _ask(self, name: str, who: Caller) -> Meaning:
        asked_at = _now()
        request = registry_pb2.ResolveModelRequest(name=name)
        metadata = self._finetune.metadata(fleet_caller(who.project_uid, who.project))
        try:
            call = self._stub.ResolveModel(request, timeout=ASK_S, metadata=metadata)
            self._finetune.watch_call(SERVICE + "ResolveModel", call)
            meaning = meaning_from(await call)
        except grpc.aio.AioRpcError as error:
            info = status.error_info(error)
            if info is not None and info.reason == "RESOURCE_NOT_FOUND":
                self._meanings.forget(who.project_uid, name)
                raise ResourceNotFound("model") from None
            if info is not None and info.reason == "WRONG_STATE":  # a model without a version, or a version that is not READY
                raise WrongState("model", info.metadata.get("state")) from None
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                log.warning("finetune cannot say what a name means: %s", info.reason if info is not None else error.code().name)
            raise StoreUnavailable from None
        if not meaning.targets:
            raise ResourceNotFound("model")
        self._meanings.learn(who.project_uid, name, meaning, asked_at)
        return meaning

    async def close(self) -> None:
        """End what is still asked."""
        for query in tuple(self._queries.values()):
            query.cancel()
        await asyncio.gather(*self._queries.values(), return_exceptions=True)


class Pusher:
    """Follows finetune's feed for as long as it is entered."""

    def __init__(self, finetune: Upstream, shelves: Shelves, meanings: Meanings, telemetry: Telemetry | None = None) -> None:
        self._finetune = finetune
        self._shelves = shelves
        self._telemetry = telemetry or Telemetry.off()
        self._meanings = meanings
        self._stub: Any = None if finetune.off else registry_pb2_grpc.RegistryServiceStub(finetune.channel)
        self._pushing: set[asyncio.Task[None]] = set()
        self._pushes = asyncio.Semaphore(PUSHES)
        self._sequence = 0  # of the last change seen
        self._current = False  # all that was stored when we came has been seen

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow while inside; where fine-tuning is off there is nothing to follow."""
        follower = None if self._finetune.off else asyncio.create_task(self._follow(), name="adapter feed")
        try:
            yield
        finally:
            tasks = {*self._pushing, *([follower] if follower is not None else [])}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        failures = 0
        while True:
            try:
                metadata = self._finetune.metadata(fleet_caller())
                request = registry_pb2.WatchVersionsRequest(after_sequence=self._sequence)
                async with streaming(self._stub.WatchVersions(request, metadata=metadata)) as events:
                    while (event := await events.read()) is not EOF:
                        failures = 0
                        self._sequence = max(self._sequence, event.sequence)
                        self._take(event)
            except grpc.aio.AioRpcError as error:
                info = status.error_info(error)
                if info is not None and info.reason == "EVENT_SEQUENCE_AHEAD":  # its log is another than the one we followed
                    self._sequence = int(info.metadata.get("last", "0"))
                if failures == 1 and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    log.warning("the feed of adapters is lost: %s", error.code().name)
            except Exception:  # a change that we do not understand is passed by: what is moved or erased behind it must still be heard
                log.exception("a change of the feed of adapters was not understood")
            failures += 1
            await asyncio.sleep(min(BACKOFF_CAP_S, BACKOFF_S * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0))

    def _take(self, event: registry_pb2.VersionEvent) -> None:
        match event.WhichOneof("event"):
            case "bookmark":
                self._current = True
            case "moved":
                self._meanings.moved(event.moved.project_uid, event.moved.model, event.sequence)
            case "ready":
                # What replays as we start was pushed by whoever followed then; only what nobody may have seen is pushed late.
                if self._current or time.time() - event.ready.ready_time.seconds < LATE_S:
                    self._meanings.moved(event.ready.project_uid, model_of(event.ready.version), event.sequence)
                    self._start(self._push(event.ready))
            case "erased":
                self._meanings.erased(event.erased.project_uid, event.erased.version, event.erased.adapter_digest)
                self._meanings.moved(event.erased.project_uid, model_of(event.erased.version), event.sequence)
                if event.erased.adapter_digest:
                    self._start(self._evict(event.erased))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work, name="push")
        self._pushing.add(task)
        task.add_done_callback(self._pushing.discard)

    async def _push(self, ready: registry_pb2.VersionReady) -> None:
        try:
            async with asyncio.timeout(REPLICAS_S):
                while not (shelves := self._shelves.shelves(ready.base_digest)):
                    await self._shelves.judged()  # we or they have just started
        except TimeoutError:
            return  # who comes later loads it when it is asked for
        async with self._pushes:
            owner = fleet_caller(ready.project_uid, ready.project)
            loads = [asyncio.create_task(self._load(shelf, ready.adapter_digest, owner)) for shelf in shelves]
            try:
                # One word for all of them; a replica that takes longer is not waited for with it.
                done, _ = await asyncio.wait(loads, timeout=TOGETHER_S)
                if not any(task.result() is not None for task in done):
                    for load in asyncio.as_completed(loads):
                        if await load is not None:
                            break
                took = [task.result() for task in loads if task.done()]
                loaded = [seconds for seconds in took if seconds is not None]
                if loaded:
                    await self._report(ready, owner, len(loaded), max(loaded))
                await asyncio.wait(loads)
            finally:
                for task in loads:
                    task.cancel()

    async def _load(self, shelf: Shelf, adapter: str, owner: Caller) -> float | None:
        """Seconds, or None where the replica could not."""
        began = _now()
        seconds = await self._try(shelf, adapter, owner)
        self._telemetry.record("argosy.adapter.push", _now() - began, {"argosy.outcome": "FAILED" if seconds is None else "DONE"})
        return seconds

    async def _try(self, shelf: Shelf, adapter: str, owner: Caller) -> float | None:
        for failures in range(TRIES):
            try:
                return await shelf.load(adapter, owner, LOAD_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or failures + 1 == TRIES:
                    info = status.error_info(error)
                    log.warning("replica %s did not load an adapter: %s", shelf.name, info.reason if info else error.code().name)
                    return None
            await asyncio.sleep(BACKOFF_S * 2.0**failures * random.uniform(0.5, 1.0))
        return None

    async def _report(self, ready: registry_pb2.VersionReady, owner: Caller, replicas: int, seconds: float) -> None:
        load = Duration()
        load.FromNanoseconds(round(seconds * 1e9))
        request = registry_pb2.ReportServableRequest(version=ready.version, replicas=replicas, load=load)
        with contextlib.suppress(grpc.aio.AioRpcError):  # it loses its event, and serves all the same
            await self._stub.ReportServable(request, timeout=ASK_S, metadata=self._finetune.metadata(owner))

    async def _evict(self, erased: registry_pb2.VersionErased) -> None:
        owner = fleet_caller(erased.project_uid, erased.project)
        for shelf in self._shelves.shelves():
            if not (self._current or shelf.holds(erased.adapter_digest)):
                continue
            for _ in range(TRIES):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await shelf.drop(erased.adapter_digest, owner, ASK_S)
                    break
                await asyncio.sleep(BACKOFF_S)
            else:
                log.error("replica %s did not forget an erased adapter", shelf.name)


def meaning_from(reply: registry_pb2.ResolveModelResponse) -> Meaning:
    """The message as a value."""
    return Meaning(
        targets=tuple(
            Target(
                version=target.model.version,
                base=target.base_model,
                digest=target.model.base_digest,
                adapter=target.model.adapter_digest,
                capabilities=frozenset(
                    model_pb2.ModelCapability.Name(capability).removeprefix("MODEL_CAPABILITY_")
                    for capability in target.capabilities
                    if capability in model_pb2.ModelCapability.values()
                )
                | (frozenset({"CLASSIFY_TUNED"}) if target.tuned_labels else frozenset()),
                percent=target.percent,
                private=target.private,
            )
            for target in reply.targets
        ),
        alias=reply.alias,
        sequence=reply.sequence,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
