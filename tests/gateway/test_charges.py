"""What finetune says that jobs owe, in the books: settled once, bounded by the day's budget, and followed behind a cursor."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from argosy.v1 import finetune_pb2, finetune_pb2_grpc, usage_pb2
from argosy_internal.registry.v1 import registry_pb2
from services.chassis.errors import EventSequenceAhead, StoreUnavailable
from services.chassis.identity import Caller, CallerVerifier
from services.gateway import charges, records
from services.gateway.finetune import AUDIENCE
from services.gateway.ledger import Charge, Outcome
from services.gateway.sql_charges import SqlCharges
from services.gateway.store import Store, StoreSettings, open_store
from tests.fakes.edge import KEY, caller, edge, metadata
from tests.fakes.engine import fake_engine
from tests.fakes.finetune import FakeFineTune, fake_finetune
from tests.gateway.books import PEPPER, add_key, add_project, rows

MODEL = "projects/acme/models/m"
METHOD = "/argosy.v1.FineTuneService/CreateFineTuneJob"


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[Store]:
    async with open_store(StoreSettings(database_url=postgres_url), PEPPER, wait=True) as opened:
        yield opened


def owed(project_uid: str, key_uid: str, sequence: int = 1, **changes: Any) -> Charge:
    """A minute of a job that goes on."""
    plain = Charge(
        sequence=sequence, project_uid=project_uid, project="projects/acme", key_uid=key_uid, work_uid=str(uuid4()), number=1,
        method=METHOD, model=MODEL, version="", currency="USD", nanos=600, device_seconds=60.0, outcome=None, time=datetime.now(UTC),
    )  # fmt: skip
    return replace(plain, **changes)


def asks(project_uid: str, key_uid: str) -> Caller:
    return replace(caller(), project_uid=project_uid, key_id=key_uid)


async def test_I4_a_job_is_settled_once_in_steps_and_counted_as_one_request(store: Store) -> None:
    project = await add_project(store)
    key, _ = await add_key(store, project)
    books, work = SqlCharges(store, "USD"), str(uuid4())
    await books.reset()
    first = owed(project, key, 1, work_uid=work)
    end = owed(project, key, 2, work_uid=work, number=2, nanos=50, device_seconds=5.5, outcome=Outcome.DONE, version=f"{MODEL}/versions/1")
    for charge in (first, end, first, end):  # two gateways, and one that starts again
        assert await books.settle(charge) == ()
    assert await books.cursor() == 2
    found = await rows(store, "SELECT * FROM ledger WHERE project_uid = :p ORDER BY entry", p=project)
    assert [(row["entry"], row["outcome"], row["nanos"], row["device_millis"], str(row["request_id"])) for row in found] == [
        (1, "PART", 600, 60_000, work), (2, "DONE", 50, 5_500, work),
    ]  # fmt: skip
    async with store.transaction() as connection:
        start = datetime.now(UTC) - timedelta(days=1)
        (total,) = await records.usage_sums(connection, project, start, start + timedelta(days=2), None, frozenset({"method"}), None, 10)
        assert (total["method"], total["requests"], total["nanos"], total["device_millis"]) == (METHOD, 1, 650, 65_500)
        assert [row["outcome"] for row in await records.usage_of_request(connection, project, work, 10)] == ["PART", "DONE"]
        used = await records.quota_usage(connection, project)
    assert (used["day_nanos"], used["day_device_seconds"], used["day_requests"], used["running"]) == (650, 65, 0, 0)


async def test_a_job_that_has_only_begun_is_in_the_sums(store: Store) -> None:
    project = await add_project(store)
    await SqlCharges(store, "USD").settle(owed(project, str(uuid4())))
    async with store.transaction() as connection:
        start = datetime.now(UTC) - timedelta(days=1)
        (total,) = await records.usage_sums(connection, project, start, start + timedelta(days=2), None, frozenset(), None, 10)
    assert (total["requests"], total["nanos"]) == (0, 600)


async def test_A28_what_is_left_is_what_the_day_has_not_used(store: Store) -> None:
    project = await add_project(store, nanos_per_day=1_000, gpu_seconds_per_day=100, concurrent_jobs=3)
    key, _ = await add_key(store, project, nanos_per_day=700)
    books = SqlCharges(store, "USD")
    before = await books.allowed(asks(project, key))
    assert (before.concurrent_jobs, before.job_nanos_left, before.job_seconds_left) == (3, 700, 100)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    await books.settle(owed(project, key, 1, time=yesterday))  # told late: that day paid
    assert (await books.allowed(asks(project, key))).job_nanos_left == 700
    await books.settle(owed(project, key, 2))
    after = await books.allowed(asks(project, key))
    assert (after.job_nanos_left, after.job_seconds_left) == (100, 40)
    other = await books.allowed(asks(project, str(uuid4())))
    assert other.job_nanos_left == 400  # of the project alone
    unlimited = await books.allowed(asks(await add_project(store), "gateway"))
    assert (unlimited.concurrent_jobs, unlimited.job_nanos_left, unlimited.job_seconds_left) == (None, None, None)


@pytest.mark.parametrize(
    ("policy", "limits", "exhausted"),
    [
        ({"nanos_per_day": 600}, {}, ["project"]),
        ({"gpu_seconds_per_day": 60}, {}, ["project"]),
        ({"nanos_per_day": 601, "gpu_seconds_per_day": 61}, {"nanos_per_day": 601}, []),
        ({}, {"nanos_per_day": 600}, ["key"]),
    ],
)
async def test_A29_who_has_used_up_the_day_is_told(
    store: Store, policy: dict[str, int], limits: dict[str, int], exhausted: list[str]
) -> None:
    project = await add_project(store, **policy)
    key, _ = await add_key(store, project, **limits)
    charge = owed(project, key)
    expected = tuple({"project": "", "key": key}[each] for each in exhausted)
    assert await SqlCharges(store, "USD").settle(charge) == expected
    assert await SqlCharges(store, "USD").settle(charge) == expected  # told again, it is said again


async def test_a_charge_of_an_unknown_project_does_not_stop_the_feed(store: Store) -> None:
    books = SqlCharges(store, "USD")
    await books.settle(owed(str(uuid4()), str(uuid4()), 7))
    assert await books.cursor() >= 7
    await books.reset()
    assert await books.cursor() == 0


# --- the follower -----------------------------------------------------------------------------------------------------------------------


class Books:
    """JobBooks in memory; may be away for the first calls."""

    currency = "USD"

    def __init__(self, at: int = 0, away: int = 0, over: tuple[str, ...] = ()) -> None:
        self.at, self.away, self.over = at, away, over
        self.settled: list[Charge] = []
        self.changed = asyncio.Event()

    async def cursor(self) -> int:
        return self.at

    async def settle(self, charge: Charge) -> tuple[str, ...]:
        if self.away:
            self.away -= 1
            raise StoreUnavailable
        self.settled.append(charge)
        self.at = charge.sequence
        self.changed.set()
        return self.over

    async def reset(self) -> None:
        self.at = 0

    async def allowed(self, who: Caller) -> Caller:
        return replace(who, concurrent_jobs=2, job_nanos_left=5, job_seconds_left=7)


def told(sequence: int, currency: str = "USD", **fields: Any) -> registry_pb2.ChargeEvent:
    said = {"project_uid": "uid-acme", "project": "projects/acme", "key_uid": str(uuid4()), "work_uid": str(uuid4()), "number": 1}
    charge = registry_pb2.Charge(
        **(said | fields), method=METHOD, model=MODEL, cost=usage_pb2.Cost(currency_code=currency, nanos=9), device_seconds=1.5
    )
    charge.time.GetCurrentTime()
    return registry_pb2.ChargeEvent(sequence=sequence, charge=charge)


BOOKMARK = registry_pb2.ChargeEvent(sequence=2, bookmark=registry_pb2.ChargeBookmark())


@asynccontextmanager
async def billed(books: Books, said: Any) -> AsyncIterator[tuple[FakeFineTune, Any]]:
    async with (
        fake_engine() as engine,
        fake_finetune(verifier=CallerVerifier({"k": KEY.public_key()}, AUDIENCE), replies={"WatchCharges": said}) as fake,
        edge(engine, finetune=fake.address, jobs=books) as at,
    ):
        yield fake, at


async def test_the_feed_is_settled_in_order_and_read_on_behind_the_books_cursor() -> None:
    def said(request: registry_pb2.WatchChargesRequest) -> list[Any]:
        return [
            event for event in (told(1), told(2, outcome=registry_pb2.CHARGE_OUTCOME_CANCELLED)) if event.sequence > request.after_sequence
        ]

    books = Books(away=1)
    async with billed(books, said) as (fake, _):
        await fake.until(lambda f: len(f.of("WatchCharges")) >= 3 and books.at == 2)
        assert [(each.sequence, each.outcome, each.nanos, each.device_seconds) for each in books.settled] == [
            (1, None, 9, 1.5), (2, Outcome.CANCELLED, 9, 1.5),
        ]  # fmt: skip
        asked = fake.of("WatchCharges")
        assert asked[-1].request.after_sequence == 2
        assert asked[0].caller is not None and asked[0].caller.scopes == frozenset({"fleet"})


async def test_a_project_over_its_day_has_its_jobs_paused() -> None:
    books = Books(over=("", "k1"))
    async with billed(books, [told(1), ...]) as (fake, _):
        await fake.until(lambda f: len(f.of("PauseJobs")) == 2)
        one, two = fake.of("PauseJobs")
        assert (one.request.key_uid, two.request.key_uid) == ("", "k1")
        assert one.caller is not None and (one.caller.project_uid, one.caller.project) == ("uid-acme", "acme")


async def test_another_log_is_read_from_its_start() -> None:
    def said(request: registry_pb2.WatchChargesRequest) -> Any:
        return EventSequenceAhead(1) if request.after_sequence > 1 else [told(1), ...]

    books = Books(at=40)
    async with billed(books, said):
        await asyncio.wait_for(books.changed.wait(), 10)
        assert books.at == 1


async def test_money_of_another_currency_is_not_settled(caplog: pytest.LogCaptureFixture) -> None:
    books = Books()
    async with billed(books, [told(1, "EUR"), ...]) as (fake, _):
        await fake.until(lambda f: len(f.of("WatchCharges")) >= 2)
        assert not books.settled
    assert sum("charges are in EUR" in record.getMessage() for record in caplog.records) == 1


async def test_calls_that_start_jobs_carry_what_the_books_have_left() -> None:
    async with billed(Books(), [BOOKMARK, ...]) as (fake, at):
        stub = finetune_pb2_grpc.FineTuneServiceStub(at.channel)
        await stub.CreateFineTuneJob(finetune_pb2.CreateFineTuneJobRequest(), metadata=metadata(), timeout=5)
        await stub.GetFineTuneJob(finetune_pb2.GetFineTuneJobRequest(), metadata=metadata(), timeout=5)
        (created,), (read,) = fake.of("CreateFineTuneJob"), fake.of("GetFineTuneJob")
        assert created.caller is not None and read.caller is not None
        assert (created.caller.concurrent_jobs, created.caller.job_nanos_left, created.caller.job_seconds_left) == (2, 5, 7)
        assert read.caller.job_nanos_left is None


def test_every_outcome_has_its_word() -> None:
    said = set(registry_pb2.ChargeOutcome.values()) - {registry_pb2.CHARGE_OUTCOME_UNSPECIFIED}
    assert set(charges.OUTCOMES) == said
