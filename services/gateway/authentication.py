"""API key in, Caller out, at the gateway's door.

One answer for every bad key: unknown, wrong, expired and revoked give the same bytes after the same work. A good key is looked up again
after `FRESH_SECONDS` or at once when the database says that keys have changed. While the store is away, keys that opened something in
the last 10 minutes still do, for a minute; then nobody enters.
"""

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import unquote
from uuid import uuid4

import grpc

from services.chassis.errors import ApiKeyInvalid, RateLimited, ScopeMissing, ServiceError, StoreUnavailable
from services.chassis.identity import Caller
from services.chassis.interceptors import Incoming
from services.gateway.access import MAX_CALL_SECONDS, MAX_STREAM_SECONDS, access_of
from services.gateway.keys import KeyRecord, Presented, fingerprint, parse, proves

log = logging.getLogger(__name__)

FRESH_SECONDS = 1.5  # with a query of at most half a second, a revoked key is refused within 2 s (A9)
RECHECK_SECONDS = 1.0  # keys of live streams; the stream is cut within 5 s
PATIENCE_SECONDS = 0.25  # a slow store is waited for this long when the key is known (F16)
KNOWN_GOOD_SECONDS = 600.0
AWAY_SECONDS = 60.0
RETRY_SECONDS = 0.5  # between questions to a store that is away
FAILURES_A_MINUTE = 20
CACHED_KEYS = 10_000
USE_NOTED_SECONDS = 30.0


class KeyStore(Protocol):
    """What authentication asks of the store."""

    pepper: bytes

    async def key(self, uid: str) -> KeyRecord | None:
        """The key of this uid; raises `StoreUnavailable`."""
        ...

    async def dead_keys(self, uids: Sequence[str]) -> set[str]:
        """Those that may no longer be used; raises `StoreUnavailable`."""
        ...

    async def used(self, uids: Sequence[str]) -> None:
        """Note a use; raises `StoreUnavailable`."""
        ...

    async def listen(self, changed: Callable[[], None]) -> None:
        """Call `changed` at every change, until the connection breaks; raises `StoreUnavailable`."""
        ...


@dataclass(slots=True)
class Seen:
    """What is known of one token."""

    record: KeyRecord | None  # None: refused
    at: float  # when the question was asked, monotonic seconds
    epoch: int
    query: "asyncio.Task[KeyRecord | None] | None" = None


@dataclass
class Failures:
    """Counts failed tries by subject over a minute; bounded, the oldest subject is forgotten first."""

    clock: Callable[[], float]
    _since: "OrderedDict[str, tuple[float, int]]" = field(default_factory=OrderedDict)

    def wait_s(self, subject: str) -> float:
        """Seconds until the subject may fail again; 0: now."""
        since, count = self._since.get(subject, (0.0, 0))
        left = since + 60.0 - self.clock()
        return left if count >= FAILURES_A_MINUTE and left > 0 else 0.0

    def note(self, subject: str) -> None:
        """One more failure."""
        now = self.clock()
        since, count = self._since.pop(subject, (now, 0))
        self._since[subject] = (now, 1) if now - since >= 60.0 else (since, count + 1)
        while len(self._since) > CACHED_KEYS:
            self._since.popitem(last=False)


def peer_of(address: str) -> str:
    """Whom a peer's failures are counted against: the IPv4 address, or the IPv6 network of /64 that one caller owns whole."""
    kind, _, rest = unquote(address).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if kind == "ipv6":
        with contextlib.suppress(ValueError):
            parsed = ipaddress.IPv6Address(host)
            return str(parsed.ipv4_mapped or ipaddress.IPv6Network((parsed, 64), strict=False))
    return host if kind == "ipv4" else kind


class Authentication:
    """The `authenticate` of the gateway's door. Opened by `authenticating`, which keeps it informed."""

    def __init__(self, store: KeyStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()
        self._failures = Failures(clock)
        self._epoch = 0
        self._away_since: float | None = None
        self._ask_again_at = 0.0
        self._watched: dict[str, set[Callable[[], None]]] = {}
        self._changed = asyncio.Event()
        self._used: set[str] = set()

    async def __call__(self, incoming: Incoming, context: Any) -> Caller:
        """Resolve the caller of one call.

        Raises:
            MetadataInvalid: more than one `authorization`.
            ApiKeyInvalid: none, or one that opens nothing.
            RateLimited: too many failures from this peer, or with this key id.
            StoreUnavailable: the store is away and the key was not seen of late.
        """
        if access_of(incoming.method) is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        value = incoming.value("authorization")
        if not isinstance(value, str) or value[:7].lower() != "bearer ":
            raise ApiKeyInvalid
        token = value[7:].strip(" ")
        record = self._known(token) or await self._judge(token, peer_of(context.peer()))
        self._used.add(record.uid)
        return Caller(
            project_uid=record.project_uid,
            project=record.project,
            key_id=record.uid,
            scopes=record.grant.scopes,
            request_id=str(uuid4()),
            kv_scope=record.kv_scope,
            models=record.grant.models,
            output_token_ceiling=record.grant.output_token_ceiling,
        )

    @contextlib.contextmanager
    def watch(self, key_id: str, cut: Callable[[], None]) -> Iterator[None]:
        """Call `cut` once if the key may no longer be used while the block runs (A9)."""
        cuts = self._watched.setdefault(key_id, set())
        cuts.add(cut)
        try:
            yield
        finally:
            cuts.discard(cut)
            if not cuts and self._watched.get(key_id) is cuts:
                del self._watched[key_id]

    def invalidate(self) -> None:
        """Keys have changed: look each up again before its next call, and those of live streams now."""
        self._epoch += 1
        self._changed.set()

    # --- one key ----------------------------------------------------------------------------------------------------------------

    def _known(self, token: str) -> KeyRecord | None:
        """The record of a token that was good a moment ago."""
        seen = self._seen.get(fingerprint(token))
        if seen is None or seen.record is None or seen.epoch != self._epoch or self._clock() - seen.at >= FRESH_SECONDS:
            return None
        return seen.record

    async def _judge(self, token: str, peer: str) -> KeyRecord:
        mark = fingerprint(token)
        seen = self._seen.get(mark)
        trusted = seen is not None and seen.record is not None  # a flood from beside an honest caller must not lock it out
        if not trusted and (wait_s := self._failures.wait_s(peer)):
            raise RateLimited(wait_s, "authentication_failures")
        presented = parse(token)
        record = None if presented is None else await self._looked_up(mark, presented)
        if record is not None:
            return record
        self._failures.note(peer)
        if presented is not None:
            # Only failing tries are refused by key id: whoever learns an id must not be able to lock its owner out.
            if wait_s := self._failures.wait_s(presented.uid):
                raise RateLimited(wait_s, "authentication_failures")
            self._failures.note(presented.uid)
        raise ApiKeyInvalid

    async def _looked_up(self, mark: bytes, presented: Presented) -> KeyRecord | None:
        seen = self._seen.get(mark)
        now = self._clock()
        if seen is not None and seen.record is None and seen.epoch == self._epoch and now - seen.at < FRESH_SECONDS:
            return None  # refused a moment ago
        if now < self._ask_again_at:
            return self._last_known_good(seen)
        if seen is None:
            seen = self._seen[mark] = Seen(None, float("-inf"), self._epoch)
            while len(self._seen) > CACHED_KEYS:
                self._seen.popitem(last=False)
        else:
            self._seen.move_to_end(mark)
        if seen.query is None:  # one question a key, however many calls wait for it (F32)
            seen.query = asyncio.create_task(self._ask(mark, seen, presented))
            seen.query.add_done_callback(lambda done: done.cancelled() or done.exception())  # its waiters may be gone
        query = seen.query
        if seen.record is not None:
            await asyncio.wait((query,), timeout=PATIENCE_SECONDS)
            if not query.done():
                return self._last_known_good(seen)
        try:
            return await asyncio.shield(query)
        except StoreUnavailable:
            return self._last_known_good(seen)

    async def _ask(self, mark: bytes, seen: Seen, presented: Presented) -> KeyRecord | None:
        asked_at, epoch = self._clock(), self._epoch
        try:
            record = await self._store.key(presented.uid)
        except StoreUnavailable:
            if self._away_since is None:
                self._away_since = asked_at
                log.warning("the store does not answer: keys seen of late are taken at their word")
            self._ask_again_at = self._clock() + RETRY_SECONDS
            if seen.record is None:
                self._seen.pop(mark, None)
            raise
        finally:
            seen.query = None
        self._away_since = None
        seen.record = record if proves(presented, record, self._store.pepper) else None
        seen.at, seen.epoch = asked_at, epoch
        return seen.record

    def _last_known_good(self, seen: Seen | None) -> KeyRecord:
        now = self._clock()
        if seen is None or seen.record is None or now - seen.at > KNOWN_GOOD_SECONDS:
            raise StoreUnavailable
        if self._away_since is not None and now - self._away_since > AWAY_SECONDS:
            raise StoreUnavailable
        expire_time = seen.record.grant.expire_time
        if expire_time is not None and expire_time <= datetime.now(UTC):
            raise ApiKeyInvalid
        return seen.record

    # --- keys of live streams ---------------------------------------------------------------------------------------------------

    async def recheck(self) -> None:
        """Cut the streams of keys that may no longer be used. A store that is away cuts nobody (F15)."""
        if not self._watched:
            return
        dead = await self._store.dead_keys(list(self._watched))
        if dead:
            self._epoch += 1  # nobody may have been listening when they died
        for uid in dead:
            for cut in self._watched.pop(uid, set()):
                cut()

    async def _keep_rechecking(self) -> None:
        noted_at = self._clock()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_SECONDS):  # not wait_for, which may swallow a cancellation
                    await self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(StoreUnavailable):
                await self.recheck()
                if self._used and self._clock() - noted_at >= USE_NOTED_SECONDS:
                    used, self._used, noted_at = self._used, set(), self._clock()
                    await self._store.used(list(used))

    async def _keep_listening(self) -> None:
        while True:
            with contextlib.suppress(ServiceError):  # the recheck and the short freshness hold the promise meanwhile
                await self._store.listen(self.invalidate)
            self.invalidate()  # what changed while nobody listened
            await asyncio.sleep(RETRY_SECONDS)


@asynccontextmanager
async def authenticating(store: KeyStore) -> AsyncIterator[Authentication]:
    """An `Authentication` that hears of changes until the block is left."""
    authentication = Authentication(store)
    tasks = [asyncio.create_task(authentication._keep_rechecking()), asyncio.create_task(authentication._keep_listening())]
    try:
        yield authentication
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if authentication._used:
            with contextlib.suppress(StoreUnavailable):
                await store.used(list(authentication._used))


def permit(method: str, caller: Caller) -> None:
    """The `permit` of the gateway's door: the scope of the RPC's row.

    Raises:
        ScopeMissing: the key lacks it.
    """
    access = access_of(method)
    if access is not None and access.scope is not None and access.scope not in caller.scopes:
        raise ScopeMissing(access.scope)


def deadline_cap_s(method: str, max_stream_s: float = MAX_STREAM_SECONDS) -> float:
    """The `deadline_cap_s` of the gateway's door, in seconds."""
    access = access_of(method)
    return MAX_CALL_SECONDS if access is None else access.cap_s(max_stream_s)
