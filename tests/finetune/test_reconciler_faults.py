"""What one job's fault, a full look, or an attempt that is not cleared away may not do to the other jobs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from services.finetune import reconciler as module
from services.finetune import sql_jobs
from services.finetune.jobs import Launcher, Seen, State, Where, attempt_name
from services.finetune.reconciler import BATCH, Reconciler, in_turn, wanted
from services.finetune.settings import JobQuotas, JobSettings
from services.finetune.store import FineTuneStore
from services.finetune.tokens import TokenMint

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class NoStore:
    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ready.set()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        yield None


class Faulty:
    """A launcher that cannot look at one of its attempts, and at first cannot list any."""

    def __init__(self, bad: str = "") -> None:
        self.bad = bad
        self.looked: list[str] = []
        self.lists = 0
        self.listed_again = asyncio.Event()

    async def observe(self, name: str) -> Seen:
        self.looked.append(name)
        if name == self.bad:
            raise OSError("no space left on device")
        return Seen(Where.RUNNING)

    async def list(self) -> frozenset[str]:
        self.lists += 1
        if self.lists == 1:
            raise PermissionError("runs")
        self.listed_again.set()
        return frozenset()


def row(uid: str, state: State = State.RUNNING, **changed: Any) -> dict[str, Any]:
    return {
        "uid": uid, "project_uid": "p", "state": state.value, "attempt": 1, "launch_time": NOW, "reaped": False, "nonce": "n",
        "lease_time": None, "update_time": NOW, "deadline": None, "expire_time": None, "barren": 0, "reason": "", "priority": 2,
        "create_time": NOW,
    } | changed  # fmt: skip


def reconciler(launcher: Faulty) -> Reconciler:
    settings = JobSettings(poll_seconds=0.02)
    return Reconciler(cast("FineTuneStore", NoStore()), cast("Launcher", launcher), TokenMint(b"0" * 32), settings, JobQuotas())


@pytest.fixture
def due(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs of every look; those that were put off are marked."""
    rows: list[dict[str, Any]] = []

    async def claim(connection: Any, owner: str, lease_s: float, limit: int) -> list[dict[str, Any]]:
        return rows[:limit]

    async def now(connection: Any) -> datetime:
        return NOW

    async def working(connection: Any) -> tuple[int, dict[str, int]]:
        return 0, {}

    async def later(connection: Any, found: dict[str, Any], seconds: float) -> None:
        found["put_off"] = True

    async def live_names(connection: Any) -> dict[str, int]:
        return {}

    for function in (claim, now, working, later, live_names):
        monkeypatch.setattr(sql_jobs, function.__name__, function)
    return rows


async def test_a_job_that_cannot_be_looked_at_keeps_no_other_waiting(due: list[dict[str, Any]]) -> None:
    launcher = Faulty(attempt_name("a", 1))
    due += [row("a"), row("b")]
    assert await reconciler(launcher).once() is False
    assert launcher.looked == [attempt_name("a", 1), attempt_name("b", 1)]
    assert [each["put_off"] for each in due] == [True, True]


async def test_a_launcher_that_fails_does_not_end_the_reconciler(due: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.0)
    launcher = Faulty()
    running = asyncio.create_task(reconciler(launcher).run())
    async with asyncio.timeout(30):
        await launcher.listed_again.wait()
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_no_project_passes_another_by_the_priority_of_its_own_jobs() -> None:
    jobs = [
        row("greedy-1", State.QUEUED, project_uid="greedy", priority=3, create_time=NOW),
        row("greedy-2", State.QUEUED, project_uid="greedy", priority=2, create_time=NOW - timedelta(hours=9)),
        row("small", State.QUEUED, project_uid="small", priority=1, create_time=NOW + timedelta(hours=1)),
        row("runs", project_uid="greedy", create_time=NOW + timedelta(hours=2)),
    ]
    assert [each["uid"] for each in in_turn(cast("Any", jobs), {})] == ["runs", "greedy-1", "small", "greedy-2"]
    assert [each["uid"] for each in in_turn(cast("Any", jobs), {"greedy": 1})] == ["runs", "small", "greedy-1", "greedy-2"]


async def test_a_full_look_is_followed_by_another_at_once(due: list[dict[str, Any]]) -> None:
    due += [row(str(number)) for number in range(BATCH)]
    assert await reconciler(Faulty()).once() is True
    del due[0]
    assert await reconciler(Faulty()).once() is False


async def test_a_job_that_was_paused_while_it_was_queued_expires_too(due: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []

    async def owned(connection: Any, found: dict[str, Any]) -> dict[str, Any]:
        return found

    async def change(connection: Any, found: dict[str, Any], **values: Any) -> dict[str, Any]:
        written.append(values)
        return found

    monkeypatch.setattr(sql_jobs, "owned", owned)
    monkeypatch.setattr(sql_jobs, "change", change)
    due += [row("a", State.PAUSED, reaped=True), row("b", State.PAUSED, reaped=True, expire_time=NOW + timedelta(days=1))]
    await reconciler(Faulty()).once()
    assert [list(values) for values in written] == [["expire_time"]]


@pytest.mark.parametrize(
    ("state", "to", "direct"),
    [
        (State.PAUSED, State.CANCELLING, State.CANCELLED),
        (State.QUEUED, State.CANCELLING, State.CANCELLED),
        (State.QUEUED, State.PAUSING, State.PAUSED),
        (State.RUNNING, State.CANCELLING, State.CANCELLING),
    ],
)
async def test_what_rests_is_cancelled_though_its_attempt_is_not_cleared_away(
    state: State, to: State, direct: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def move(connection: Any, found: dict[str, Any], to: State, **values: Any) -> dict[str, Any]:
        return found | {"state": to}

    monkeypatch.setattr(sql_jobs, "move", move)
    moved = await wanted(cast("Any", None), cast("Any", row("a", state)), to, "CALLER")
    assert moved["state"] is direct
