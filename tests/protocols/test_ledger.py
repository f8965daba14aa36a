"""What every ledger promises, for the one in PostgreSQL and the one in memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from services.chassis.errors import IdempotencyKeyReused, QuotaExceeded, RateLimited, RequestAlreadySettled, RequestInFlight
from services.gateway.ledger import Ledger, Outcome
from services.gateway.sql_ledger import LedgerSettings, open_ledger
from services.gateway.store import StoreSettings, open_store
from tests.fakes.ledger import Limits, MemoryLedger
from tests.gateway.books import PEPPER, a_reservation, a_settlement, add_key, add_project

Make = Callable[..., Awaitable[tuple[Ledger, str, str]]]


@pytest.fixture(params=["sql", "memory"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes (ledger, project uid, key uid) for limits."""
    async with AsyncExitStack() as stack:

        async def memory(**limits: int) -> tuple[Ledger, str, str]:
            return MemoryLedger(Limits(**limits)), str(uuid4()), str(uuid4())

        async def sql(**limits: int) -> tuple[Ledger, str, str]:
            store = await stack.enter_async_context(open_store(StoreSettings(database_url=url), PEPPER, wait=True))
            ledger = await stack.enter_async_context(open_ledger(store, LedgerSettings(journal_dir=tmp_path)))
            project = await add_project(store, **limits)
            key, _ = await add_key(store, project)
            return ledger, project, key

        url = request.getfixturevalue("postgres_url") if request.param == "sql" else ""
        yield sql if request.param == "sql" else memory


async def test_reserve_and_settle(make: Make) -> None:
    ledger, project, key = await make()
    r = a_reservation(project, key)
    await ledger.reserve(r)
    await ledger.settle(a_settlement(r))


async def test_settling_again_or_unreserved_is_a_no_op(make: Make) -> None:
    ledger, project, key = await make(tokens_per_day=45)
    r = a_reservation(project, key)
    await ledger.reserve(r)
    await asyncio.gather(*(ledger.settle(a_settlement(r)) for _ in range(3)))
    await ledger.settle(a_settlement(r, output_tokens=1_000))
    await ledger.settle(a_settlement(a_reservation(project, key)))
    await ledger.reserve(a_reservation(project, key))  # 15 used of 45: 30 more fit exactly


async def test_reserving_again_is_a_no_op(make: Make) -> None:
    ledger, project, key = await make(requests_per_minute=1)
    r = a_reservation(project, key)
    await ledger.reserve(r)
    await ledger.reserve(r)
    with pytest.raises(RateLimited):
        await ledger.reserve(a_reservation(project, key))


async def test_request_id_completes_once(make: Make) -> None:
    ledger, project, key = await make()
    r = a_reservation(project, key)
    await ledger.reserve(r)
    again = replace(r, generation_id=str(uuid4()))
    with pytest.raises(RequestInFlight) as in_flight:
        await ledger.reserve(again)
    assert in_flight.value.pushback_ms
    await ledger.settle(a_settlement(r))
    with pytest.raises(RequestAlreadySettled):
        await ledger.reserve(again)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.DONE])
async def test_request_id_runs_again_after_failure(make: Make, outcome: Outcome) -> None:
    ledger, project, key = await make()
    r = a_reservation(project, key)
    await ledger.reserve(r)
    await ledger.settle(a_settlement(r, outcome))
    again = replace(r, generation_id=str(uuid4()))
    await ledger.reserve(again)
    await ledger.settle(a_settlement(again))
    with pytest.raises(RequestAlreadySettled):
        await ledger.reserve(replace(r, generation_id=str(uuid4())))


async def test_A23_other_body_is_refused_other_method_is_not(make: Make) -> None:
    ledger, project, key = await make()
    r = a_reservation(project, key)
    await ledger.reserve(r)
    other = replace(r, generation_id=str(uuid4()), body_digest=b"e" * 32)
    with pytest.raises(IdempotencyKeyReused):
        await ledger.reserve(other)
    await ledger.settle(a_settlement(r))
    with pytest.raises(IdempotencyKeyReused):
        await ledger.reserve(other)
    await ledger.reserve(replace(other, method="/argosy.v1.GenerationService/StreamChat"))


async def test_no_request_id_is_no_protection(make: Make) -> None:
    ledger, project, key = await make()
    for _ in range(2):
        r = a_reservation(project, key, request_id="")
        await ledger.reserve(r)
        await ledger.settle(a_settlement(r))


async def test_A28_last_token_goes_to_one(make: Make) -> None:
    ledger, project, key = await make(tokens_per_day=30 * 7)
    outcomes = await asyncio.gather(*(ledger.reserve(a_reservation(project, key)) for _ in range(100)), return_exceptions=True)
    assert outcomes.count(None) == 7
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(error, QuotaExceeded) and error.pushback_ms == -1 for error in refused)


async def test_concurrency_is_given_back(make: Make) -> None:
    ledger, project, key = await make(concurrent_streams=2)
    first, second, third = (a_reservation(project, key) for _ in range(3))
    await ledger.reserve(first)
    await ledger.reserve(second)
    with pytest.raises(RateLimited) as limited:
        await ledger.reserve(third)
    assert limited.value.retry_after_s == 1.0
    await ledger.settle(a_settlement(first, Outcome.CANCELLED))
    await ledger.reserve(third)


async def test_request_over_the_whole_minute_is_told_so(make: Make) -> None:
    ledger, project, key = await make(tokens_per_minute=29)
    with pytest.raises(QuotaExceeded):
        await ledger.reserve(a_reservation(project, key))


async def test_A28_impossible_counts_are_refused(make: Make) -> None:
    ledger, project, key = await make()
    r = a_reservation(project, key)
    await ledger.reserve(r)
    for wrong in ({"output_tokens": -1}, {"input_tokens": 1 << 60}, {"cached_input_tokens": 11}):
        with pytest.raises(ValueError, match="impossible"):
            await ledger.settle(a_settlement(r, **wrong))
    await ledger.settle(a_settlement(r))
