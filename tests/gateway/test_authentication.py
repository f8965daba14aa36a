"""Who gets in, who does not, and what a store that is away changes about it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import grpc
import pytest
from sqlalchemy import text

from services.chassis.errors import ApiKeyInvalid, MetadataInvalid, RateLimited, ScopeMissing, ServiceError, StoreUnavailable
from services.chassis.interceptors import Incoming
from services.gateway import authentication as module
from services.gateway.authentication import Authentication, authenticating, deadline_cap_s, peer_of, permit
from services.gateway.keys import Grant, KeyRecord, mint
from services.gateway.store import Store, StoreSettings, open_store
from tests.gateway.books import CHAT, PEPPER, add_key, add_project, rows


@dataclass
class Context:
    """The part of grpc's that authentication reads."""

    address: str = "ipv4:192.0.2.1:40000"

    def peer(self) -> str:
        return self.address

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise PermissionError(code, details)


@dataclass
class Shelf:
    """Keys in memory, with an off switch."""

    pepper: bytes = PEPPER
    records: dict[str, KeyRecord] = field(default_factory=dict)
    away: bool = False
    asked: int = 0
    slow: asyncio.Event | None = None

    def add(self, **changes: Any) -> str:
        minted = mint(str(uuid4()), "test", PEPPER)
        record = KeyRecord(minted.uid, str(uuid4()), "acme", True, (minted.mac,), Grant(frozenset({"generate"})), "00")
        self.records[minted.uid] = replace(record, **changes)
        return minted.token

    async def key(self, uid: str) -> KeyRecord | None:
        self.asked += 1
        if self.slow is not None:
            await self.slow.wait()
        if self.away:
            raise StoreUnavailable
        return self.records.get(uid)

    async def dead_keys(self, uids: Sequence[str]) -> set[str]:
        if self.away:
            raise StoreUnavailable
        return {uid for uid in uids if uid not in self.records or not self.records[uid].live}

    async def used(self, uids: Sequence[str]) -> None:
        return None

    async def listen(self, changed: Callable[[], None]) -> None:
        await asyncio.Event().wait()

    def kill(self, token: str) -> None:
        uid = next(uid for uid in self.records if token.startswith("argosy_") and module.parse(token).uid == uid)  # type: ignore[union-attr]
        self.records[uid] = replace(self.records[uid], live=False)


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


def calling(*values: str, path: str = CHAT) -> Incoming:
    return Incoming(path, tuple(("authorization", value) for value in values))


def an_answer(error: ServiceError) -> tuple[object, ...]:
    return (error.code, error.reason, error.sentence, error.metadata, error.pushback_ms)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def door(shelf: Shelf, clock: Clock) -> Authentication:
    return Authentication(shelf, clock=clock)


async def test_a_key_opens(door: Authentication, shelf: Shelf) -> None:
    token = shelf.add()
    caller = await door(calling(f"Bearer {token}"), Context())
    assert caller.project == "acme"
    assert caller.scopes == {"generate"}
    again = await door(calling(f"bearer {token}"), Context())
    assert again.request_id != caller.request_id
    assert shelf.asked == 1


async def test_A8_bad_keys_get_the_same_answer(door: Authentication, shelf: Shelf) -> None:
    good = shelf.add()
    wrong = mint(module.parse(good).uid, "test", PEPPER).token  # type: ignore[union-attr]
    unknown = mint(str(uuid4()), "test", PEPPER).token
    dead = shelf.add(live=False)
    answers = set()
    for values in ([f"Bearer {wrong}"], [f"Bearer {unknown}"], [f"Bearer {dead}"], [f"Bearer {good}x"], [f"Basic {good}"], [good], []):
        with pytest.raises(ApiKeyInvalid) as refused:
            await door(calling(*values), Context())
        answers.add(repr(an_answer(refused.value)))
    assert len(answers) == 1


async def test_A8_malformed_key_costs_no_query(door: Authentication, shelf: Shelf) -> None:
    with pytest.raises(ApiKeyInvalid):
        await door(calling("Bearer argosy_live_nonsense"), Context())
    assert shelf.asked == 0


async def test_A8_twenty_failures_a_minute(door: Authentication, shelf: Shelf, clock: Clock) -> None:
    good = shelf.add()
    for _ in range(20):
        with pytest.raises(ApiKeyInvalid):
            await door(calling("Bearer nonsense"), Context())
    with pytest.raises(RateLimited) as limited:
        await door(calling(f"Bearer {good}"), Context())
    assert 0 < (limited.value.retry_after_s or 0) <= 60
    assert shelf.asked == 0
    await door(calling(f"Bearer {good}"), Context("ipv4:192.0.2.2:1"))  # another peer
    await door(calling(f"Bearer {good}"), Context())  # a key that has opened is not locked out by what is beside it
    clock.now += 61
    with pytest.raises(ApiKeyInvalid):
        await door(calling("Bearer nonsense"), Context())


async def test_A8_one_key_id_from_many_peers(door: Authentication, shelf: Shelf) -> None:
    good = shelf.add()
    uid = module.parse(good).uid  # type: ignore[union-attr]
    for n in range(20):
        with pytest.raises(ApiKeyInvalid):
            await door(calling(f"Bearer {mint(uid, 'test', PEPPER).token}"), Context(f"ipv4:198.51.100.{n}:1"))
    with pytest.raises(RateLimited):
        await door(calling(f"Bearer {mint(uid, 'test', PEPPER).token}"), Context("ipv4:198.51.100.99:1"))
    await door(calling(f"Bearer {good}"), Context("ipv4:198.51.100.100:1"))  # its owner still gets in


async def test_A11_two_credentials_are_refused(door: Authentication, shelf: Shelf) -> None:
    token = shelf.add()
    with pytest.raises(MetadataInvalid):
        await door(calling(f"Bearer {token}", f"Bearer {token}"), Context())


async def test_A12_unknown_method_is_unimplemented(door: Authentication, shelf: Shelf) -> None:
    with pytest.raises(PermissionError) as ended:
        await door(calling(f"Bearer {shelf.add()}", path="/argosy.v1.GenerationService/Nope"), Context())
    assert ended.value.args[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_A9_dead_key_is_refused_within_two_seconds(door: Authentication, shelf: Shelf, clock: Clock) -> None:
    token = shelf.add()
    await door(calling(f"Bearer {token}"), Context())
    shelf.kill(token)
    await door(calling(f"Bearer {token}"), Context())  # cached
    clock.now += module.FRESH_SECONDS
    with pytest.raises(ApiKeyInvalid):
        await door(calling(f"Bearer {token}"), Context())
    assert module.FRESH_SECONDS < 2


async def test_A9_live_streams_hear_of_it(door: Authentication, shelf: Shelf) -> None:
    token = shelf.add()
    caller = await door(calling(f"Bearer {token}"), Context())
    cuts: list[str] = []
    with door.watch(caller.key_id, lambda: cuts.append("a")), door.watch(caller.key_id, lambda: cuts.append("b")):
        with door.watch(caller.key_id, lambda: cuts.append("over")):
            pass
        await door.recheck()
        assert cuts == []
        shelf.kill(token)
        await door.recheck()
        await door.recheck()
        assert sorted(cuts) == ["a", "b"]
    assert door._watched == {}


async def test_F15_known_keys_for_a_minute_nobody_after(door: Authentication, shelf: Shelf, clock: Clock) -> None:
    known, unknown = shelf.add(), shelf.add()
    await door(calling(f"Bearer {known}"), Context())
    shelf.away = True
    clock.now += 2
    await door(calling(f"Bearer {known}"), Context())
    with pytest.raises(StoreUnavailable):
        await door(calling(f"Bearer {unknown}"), Context())
    clock.now += 59
    await door(calling(f"Bearer {known}"), Context())
    clock.now += 2
    with pytest.raises(StoreUnavailable):
        await door(calling(f"Bearer {known}"), Context())
    shelf.away = False
    clock.now += 1
    await door(calling(f"Bearer {known}"), Context())


async def test_F15_key_not_seen_for_ten_minutes_is_not_known(door: Authentication, shelf: Shelf, clock: Clock) -> None:
    token = shelf.add()
    await door(calling(f"Bearer {token}"), Context())
    clock.now += 601
    shelf.away = True
    with pytest.raises(StoreUnavailable):
        await door(calling(f"Bearer {token}"), Context())


async def test_F15_expired_key_is_not_taken_at_its_word(door: Authentication, shelf: Shelf, clock: Clock) -> None:
    token = shelf.add(grant=Grant(frozenset({"generate"}), expire_time=datetime.now(UTC) - timedelta(seconds=1)))
    await door(calling(f"Bearer {token}"), Context())  # the database's clock said live
    shelf.away = True
    clock.now += 2
    with pytest.raises(ApiKeyInvalid):
        await door(calling(f"Bearer {token}"), Context())


async def test_F16_slow_store_holds_up_no_known_key(door: Authentication, shelf: Shelf, clock: Clock) -> None:
    token = shelf.add()
    await door(calling(f"Bearer {token}"), Context())
    shelf.slow = asyncio.Event()
    clock.now += 2
    await asyncio.wait_for(door(calling(f"Bearer {token}"), Context()), 5)
    shelf.kill(token)
    shelf.slow.set()
    await asyncio.sleep(0)
    while next(iter(door._seen.values())).query is not None:
        await asyncio.sleep(0)
    with pytest.raises(ApiKeyInvalid):
        await door(calling(f"Bearer {token}"), Context())


async def test_F32_one_query_a_key(door: Authentication, shelf: Shelf) -> None:
    token = shelf.add()
    await asyncio.gather(*(door(calling(f"Bearer {token}"), Context()) for _ in range(200)))
    assert shelf.asked == 1


async def test_L2_caller_that_leaves_takes_nobody_along(door: Authentication, shelf: Shelf) -> None:
    token = shelf.add()
    shelf.slow = asyncio.Event()
    first, second = (asyncio.create_task(door(calling(f"Bearer {token}"), Context())) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait((first,))
    shelf.slow.set()
    assert (await second).project == "acme"


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("ipv4:192.0.2.1:40000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:443", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:5::6]:443", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.1]:1", "192.0.2.1"),
        ("unix:", "unix"),
    ],
)
def test_peer_of(address: str, peer: str) -> None:
    assert peer_of(address) == peer


async def test_scope_is_asked_for(door: Authentication, shelf: Shelf) -> None:
    caller = await door(calling(f"Bearer {shelf.add()}"), Context())
    permit(CHAT, caller)
    permit("/argosy.admin.v1.ApiKeyService/GetCaller", caller)
    with pytest.raises(ScopeMissing):
        permit("/argosy.admin.v1.ProjectService/CreateProject", caller)
    assert deadline_cap_s(CHAT) == 300.0


# --- on the real store --------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def at_the_door(url: str) -> AsyncIterator[tuple[Store, Authentication]]:
    async with open_store(StoreSettings(database_url=url), PEPPER, wait=True) as store, authenticating(store) as door:
        yield store, door


@pytest.mark.parametrize(
    "end",
    [
        "UPDATE api_keys SET state = 'DISABLED' WHERE uid = :uid",
        "UPDATE api_keys SET state = 'DELETED' WHERE uid = :uid",
        "UPDATE api_keys SET expire_time = clock_timestamp() WHERE uid = :uid",
        "UPDATE projects SET state = 'SUSPENDED' FROM api_keys k WHERE projects.uid = k.project_uid AND k.uid = :uid",
    ],
)
async def test_A9_end_of_a_key_is_heard_at_once(postgres_url: str, end: str) -> None:
    async with at_the_door(postgres_url) as (store, door):
        uid, token = await add_key(store, await add_project(store))
        caller = await door(calling(f"Bearer {token}"), Context())
        revoked = asyncio.Event()
        with door.watch(caller.key_id, revoked.set):
            async with store.transaction() as connection:
                await connection.execute(text(end), {"uid": uid})
            await asyncio.wait_for(revoked.wait(), 5)
        with pytest.raises(ApiKeyInvalid):
            await door(calling(f"Bearer {token}"), Context())


async def test_ceiling_is_the_smaller_of_key_and_project(postgres_url: str) -> None:
    async with at_the_door(postgres_url) as (store, door):
        project = await add_project(store, output_token_ceiling=100)
        _, wide = await add_key(store, project, output_token_ceiling=200)
        _, narrow = await add_key(store, project, output_token_ceiling=50)
        assert (await door(calling(f"Bearer {wide}"), Context())).output_token_ceiling == 100
        assert (await door(calling(f"Bearer {narrow}"), Context())).output_token_ceiling == 50


async def test_last_use_is_noted(postgres_url: str) -> None:
    async with open_store(StoreSettings(database_url=postgres_url), PEPPER, wait=True) as store:
        uid, token = await add_key(store, await add_project(store))
        async with authenticating(store) as door:
            await door(calling(f"Bearer {token}"), Context())
        (row,) = await rows(store, "SELECT last_use_time FROM api_keys WHERE uid = :uid", uid=uid)
        assert row["last_use_time"] is not None
