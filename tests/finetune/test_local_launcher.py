"""Attempts as processes: started once by name, seen, stopped as a group, and found again by another control plane."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from services.finetune.jobs import Attempt, NameTaken, Seen, Where, attempt_name
from services.finetune.launchers.local import LocalLauncher

HANG = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(143)); print('up', flush=True); time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def launcher(folder: Path, code: str = "") -> LocalLauncher:
    async def directory(name: str) -> Path:
        return folder

    return LocalLauncher(folder / "runs", "127.0.0.1:1", "memory://", directory, command=(sys.executable, "-c", code))


def attempt(number: int = 1, uid: str = "", digest: str = "d") -> Attempt:
    uid = uid or str(uuid4())
    return Attempt(attempt_name(uid, number), uid, number, "p", "models/x", "secret-token", digest)


async def until(there: LocalLauncher, name: str, wanted: Callable[[Seen], bool]) -> Seen:
    async with asyncio.timeout(60):
        while not wanted(seen := await there.observe(name)):
            await asyncio.sleep(0.02)  # another process: nothing tells of it
    return seen


def up(there: LocalLauncher, name: str) -> bool:
    log = there.folder / name / "log"
    return log.exists() and "up" in log.read_text()


async def test_an_attempt_runs_once_by_its_name_and_its_exit_code_is_kept(tmp_path: Path) -> None:
    there = launcher(tmp_path, "import os, sys; open('ran', 'a').write('x'); sys.exit(65)")
    one = attempt()
    assert await there.observe(one.name) == Seen(Where.ABSENT)
    await asyncio.gather(*(there.ensure(one) for _ in range(5)))
    seen = await until(there, one.name, lambda seen: seen.where is Where.EXITED)
    assert seen.code == 65
    await there.ensure(one)
    assert (there.folder / one.name / "ran").read_text() == "x"
    assert await there.list() == {one.name}
    await there.reap(one.name)
    assert await there.observe(one.name) == Seen(Where.ABSENT)
    assert await there.list() == frozenset()


async def test_a_name_with_another_spec_is_not_touched(tmp_path: Path) -> None:
    there = launcher(tmp_path, HANG)
    one = attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is Where.RUNNING)
    with pytest.raises(NameTaken):
        await there.ensure(attempt(1, one.job_uid, "another"))
    await there.stop(one.name, 5)
    await until(there, one.name, lambda seen: seen.where is Where.EXITED)


async def test_a_restarted_control_plane_finds_its_attempt_and_can_end_it(tmp_path: Path) -> None:
    one = attempt()
    first = launcher(tmp_path, HANG)
    await first.ensure(one)
    await until(first, one.name, lambda seen: up(first, one.name))
    first.close()
    second = launcher(tmp_path, HANG)
    assert (await second.observe(one.name)).where is Where.RUNNING
    await second.ensure(one)  # adopted, not started again
    await second.stop(one.name, 30)
    assert (await until(second, one.name, lambda seen: seen.where is Where.EXITED)).code == 143
    second.close()


async def test_an_attempt_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path) -> None:
    there = launcher(tmp_path, DEAF)
    one = attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: up(there, one.name))
    await there.stop(one.name, 0.1)
    assert (await until(there, one.name, lambda seen: seen.where is Where.EXITED)).code == 137
    there.close()


async def test_a_trainer_out_of_memory_is_told_by_its_code(tmp_path: Path) -> None:
    there = launcher(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    one = attempt()
    await there.ensure(one)
    seen = await until(there, one.name, lambda seen: seen.where is Where.EXITED)
    assert (seen.code, seen.reason) == (137, "signal 9")


async def test_A24_an_attempt_gets_an_environment_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGOSY_KEY_PEPPER", "not for a trainer")
    told = "(dict(os.environ), os.getcwd(), sorted(os.listdir('/proc/self/fd')))"
    there = launcher(tmp_path, f"import os; open('seen', 'w').write(repr({told}))")
    one = attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is Where.EXITED)
    folder = there.folder / one.name
    environ, cwd, numbers = eval((folder / "seen").read_text())  # written by ourselves just now
    assert "ARGOSY_KEY_PEPPER" not in environ
    assert (environ["ARGOSY_JOB"], environ["HOME"], cwd) == (one.job_uid, str(folder), str(folder))
    assert len(numbers) <= 6  # the three, the lock, the file written, and the folder being listed
    assert oct((folder / "token").stat().st_mode)[-3:] == "600"
    assert (folder / "token").read_text() == "secret-token"
    assert os.getsid(0) != int((folder / "pid").read_text())


def test_a_name_that_is_no_attempt_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        asyncio.run(launcher(tmp_path).observe("../../etc"))
