"""Validators as processes: killed, restarted, overtaken by a deletion, out of memory. A version comes to rest, once."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from argosy.v1 import dataset_pb2 as pb
from services.chassis.errors import StoreUnavailable
from services.finetune import dataset_store
from services.finetune.hosts import ProcessHost, ValidatorDied
from services.finetune.settings import DatasetSettings
from services.finetune.validating import ATTEMPTS, Validators
from services.finetune.validation import Outcome, Task, validate
from tests.finetune.served import Served, datasets_served
from tests.finetune.test_dataset import ROWS


@pytest.fixture
async def served(finetune_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with datasets_served(finetune_url, tmp_path / "objects", validate=False, processes=True) as found:
        yield found


class Held:
    """A host that validates when told to, and reports before."""

    def __init__(self, served: Served) -> None:
        self.started, self.go = asyncio.Event(), asyncio.Event()
        self.calls = 0
        self._store = served.objects.sync

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Outcome | None:
        self.calls += 1
        assert await progress(10)
        self.started.set()
        await self.go.wait()
        return await asyncio.to_thread(validate, self._store, task, lambda done: None)


class Dying:
    """A host whose child always dies."""

    calls = 0

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Outcome | None:
        self.calls += 1
        raise ValidatorDied


def children() -> list[int]:
    """Processes of ours that validate."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if b"services.finetune.validation" in line and parent == os.getpid():
            found.append(int(pid))
    return found


async def test_progress_is_told_and_the_claim_renewed(served: Served) -> None:
    tenant = served.tenant()
    version = await tenant.upload((await tenant.dataset()).name, ROWS)
    held = served.validators.host = Held(served)
    working = asyncio.create_task(served.validators.run())
    await held.started.wait()
    shown = await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))
    assert (shown.state, shown.validated_bytes) == (shown.STATE_VALIDATING, 10)
    held.go.set()
    assert (await tenant.validated(version.name)).state == shown.STATE_READY
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


async def test_a_service_that_ends_leaves_its_work_to_the_next_at_once(served: Served) -> None:
    tenant = served.tenant()
    version = await tenant.upload((await tenant.dataset()).name, ROWS)
    held = served.validators.host = Held(served)
    working = asyncio.create_task(served.validators.run())
    await held.started.wait()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    after = Validators(served.store, served.objects, served.validators.settings)
    working = asyncio.create_task(after.run())
    assert (await tenant.validated(version.name)).state == version.STATE_READY
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


async def test_a_dead_services_claim_runs_out_and_its_late_verdict_is_not_written(served: Served) -> None:
    tenant = served.tenant()
    version = await tenant.upload((await tenant.dataset()).name, ROWS)
    held = served.validators.host = Held(served)
    stalled = asyncio.create_task(served.validators.run())
    await held.started.wait()
    async with served.store.transaction() as connection:
        assert await dataset_store.claim_validation(connection, "00000000-0000-4000-8000-000000000000") is None
        await connection.execute(text("UPDATE dataset_versions SET claim_time = claim_time - interval '1 minute'"))
    after = Validators(served.store, served.objects, served.validators.settings)
    working = asyncio.create_task(after.run())
    done = await tenant.validated(version.name)
    assert done.state == done.STATE_READY
    given_up = asyncio.Event()
    give_up = served.validators._give_up

    async def noted(*of: Any) -> None:
        await give_up(*of)
        given_up.set()

    served.validators._give_up = noted  # type: ignore[method-assign]
    held.go.set()
    await asyncio.wait_for(given_up.wait(), 10)
    again = await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))
    assert (again.etag, again.state) == (done.etag, done.STATE_READY)
    for task in (stalled, working):
        task.cancel()
    await asyncio.gather(stalled, working, return_exceptions=True)


async def test_a_deletion_stops_its_validation_and_leaves_nothing(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    version = await tenant.upload(dataset.name, ROWS)
    held = served.validators.host = Held(served)
    tasks = [asyncio.create_task(each.run()) for each in (served.validators, served.eraser)]
    await held.started.wait()
    deletion = await tenant("DeleteDatasetVersion", pb.DeleteDatasetVersionRequest(name=version.name))
    held.go.set()
    await tenant.deleted(deletion)
    assert [path async for path, _ in served.objects.list(f"datasets/{tenant.uid}")] == []
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_rows_that_kill_every_validator_reject_the_version(served: Served) -> None:
    tenant = served.tenant()
    version = await tenant.upload((await tenant.dataset()).name, ROWS)
    dying = served.validators.host = Dying()
    working = asyncio.create_task(served.validators.run())
    async with asyncio.timeout(20):
        while (await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))).state == version.STATE_VALIDATING:
            async with served.store.transaction() as connection:
                await connection.execute(text("UPDATE dataset_versions SET claim_time = claim_time - interval '1 minute'"))
            served.validators.wake()
            await asyncio.sleep(0.02)
    assert dying.calls == ATTEMPTS
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


async def test_a_killed_child_is_a_dead_validator_and_leaves_no_process(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b"".join(b'{"text":"Row %d mail a%d@b.example","label":"%d"}\n' % (i, i, i % 3) for i in range(200_000))
    served.objects.sync.put("v/data", rows)
    task = Task(served.objects.url, "v/data", "", len(rows), dataset_store.Layout("classify"))
    seen: list[int] = []
    monkeypatch.setenv("ARGOSY_DATABASE_URL", "postgresql://secret")

    async def progress(done: int) -> bool:
        seen.append(done)
        assert children()
        for child in children():
            assert b"ARGOSY" not in Path(f"/proc/{child}/environ").read_bytes()
            os.kill(child, signal.SIGKILL)
        return True

    with pytest.raises(ValidatorDied):
        await ProcessHost()(task, progress)
    assert seen
    assert children() == []

    async def unwanted(done: int) -> bool:
        return False

    assert await ProcessHost()(task, unwanted) is None
    assert children() == []
    running = asyncio.create_task(ProcessHost()(task, progress))
    async with asyncio.timeout(10):
        while not children():
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert children() == []


async def test_a_validator_that_wants_too_much_memory_dies_alone(finetune_url: str, tmp_path: Path) -> None:
    settings = DatasetSettings(validator_memory_bytes=24 << 20)
    async with datasets_served(finetune_url, tmp_path / "objects", settings, validate=False, processes=True) as served:
        tenant = served.tenant()
        version = await tenant.upload((await tenant.dataset()).name, ROWS * 400)
        async with served.store.transaction() as connection:
            row = await dataset_store.claim_validation(connection, str(uuid4()))
        assert row is not None
        task, _ = await served.validators._task(row)
        with pytest.raises(ValidatorDied):
            await ProcessHost()(task, lambda done: asyncio.sleep(0, True))
        assert version.state == version.STATE_VALIDATING


async def test_a_store_that_is_away_is_no_fault_of_the_rows(served: Served) -> None:
    task = Task("file:///sys/none", "v/data", "", 1, dataset_store.Layout("classify"))  # nobody may write there
    with pytest.raises(StoreUnavailable):
        await ProcessHost()(task, lambda done: asyncio.sleep(0, True))
    tenant = served.tenant()
    version = await tenant.upload((await tenant.dataset()).name, ROWS)
    calls = 0

    async def away(task: Task, progress: Callable[[int], Awaitable[bool]]) -> Outcome | None:
        nonlocal calls
        calls += 1
        if calls <= 2 * ATTEMPTS:
            raise StoreUnavailable
        return await asyncio.to_thread(validate, served.objects.sync, task, lambda done: None)

    served.validators.host = away
    working = asyncio.create_task(served.validators.run())
    async with asyncio.timeout(20):
        while (await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))).state == version.STATE_VALIDATING:
            served.validators.wake()
            await asyncio.sleep(0.02)
    assert (await tenant.validated(version.name)).state == version.STATE_READY
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
