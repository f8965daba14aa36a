"""When a job owes, how much, and how long that is remembered."""

from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy.exc
from sqlalchemy import text

from services.finetune import sql_charges
from services.finetune.sql_charges import Charge, due, outcome_of
from services.finetune.store import open_store

PROJECT = "0b0e5a5e-0a4c-4a39-9d0f-2f6a6f0f4a01"


def row(state: str, seconds: float, **changed: Any) -> dict[str, Any]:
    return {
        "project_uid": PROJECT, "project": "p", "key_id": "k", "uid": "j", "state": state, "reason": "", "model": "m", "model_version": "",
        "currency": "USD", "nanos_per_second": 1_000, "device_seconds": seconds, "charges": 2, "charged_seconds": 100.0,
        "charged_nanos": 100_000,
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "owed"),
    [
        ("RUNNING", row("RUNNING", 159.9), None),
        ("RUNNING", row("RUNNING", 160.0), (60_000, 60.0, "")),
        ("PAUSING", row("PAUSED", 100.5), (500, 0.5, "")),
        ("RUNNING", row("QUEUED", 101.0), (1_000, 1.0, "")),
        ("QUEUED", row("PAUSED", 100.0), None),  # nothing was used
        ("QUEUED", row("CANCELLED", 100.0), (0, 0.0, "CANCELLED")),  # but every end is told
        ("RUNNING", row("SUCCEEDED", 100.25), (250, 0.25, "DONE")),
        ("RUNNING", row("FAILED", 100.0, reason="DEADLINE"), (0, 0.0, "DEADLINE")),
        ("RUNNING", row("FAILED", 100.0001, reason="DIVERGED"), (1, 0.0001, "FAILED")),
        ("SUCCEEDED", row("SUCCEEDED", 100.25), None),  # such as its servable event
    ],
)
def test_I4_a_job_owes_what_it_has_used_since(before: str, after: dict[str, Any], owed: tuple[int, float, str] | None) -> None:
    found = due(row(before, 100.0), after)
    if owed is None:
        assert found is None
        return
    assert found is not None and found.number == 3
    assert (found.nanos, found.device_seconds, found.outcome) == (owed[0], pytest.approx(owed[1]), owed[2])


def test_a_state_that_does_not_rest_for_good_has_no_outcome() -> None:
    assert {outcome_of(state, "") for state in ("QUEUED", "PREPARING", "RUNNING", "PAUSING", "PAUSED", "CANCELLING")} == {""}


def charge(work: str, number: int = 1, outcome: str = "") -> Charge:
    return Charge(PROJECT, "p", str(uuid4()), work, number, "TRAINING", "m", "", "USD", 5, 1.0, outcome)


async def test_I4_a_work_ends_once_and_a_charge_has_one_name(finetune_url: str) -> None:
    async with open_store(finetune_url, wait=True) as store:
        work = str(uuid4())
        async with store.transaction() as connection:
            await sql_charges.add(connection, charge(work, 1, "DONE"))
        for again in (charge(work, 2, "CANCELLED"), charge(work, 1)):
            with pytest.raises(sqlalchemy.exc.IntegrityError):
                async with store.transaction() as connection:
                    await sql_charges.add(connection, again)


async def test_only_what_the_books_have_is_forgotten(finetune_url: str) -> None:
    async with open_store(finetune_url, wait=True) as store, store.transaction() as connection:
        before = await sql_charges.last(connection)
        for _ in range(3):
            await sql_charges.add(connection, charge(str(uuid4())))
        await connection.execute(
            text("UPDATE charges SET create_time = clock_timestamp() - interval '40 days' WHERE sequence IN (:a, :c)"),
            {"a": before + 1, "c": before + 3},
        )
        await sql_charges.settled(connection, before + 2)
        await sql_charges.settled(connection, before + 100)  # of another log: nothing of it is in ours
        await sql_charges.settled(connection, before + 1)  # another gateway, further behind
        await sql_charges.fold(connection)
        assert [row["sequence"] - before for row in await sql_charges.after(connection, before, 10)] == [2, 3]
