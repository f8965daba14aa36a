"""What every launcher keeps, whatever runs the attempts; each kind of ground has a class of its own in the suites."""

import asyncio
from collections.abc import Callable
from typing import Protocol
from uuid import uuid4

import pytest

from services.finetune.jobs import Attempt, Launcher, NameTaken, Seen, Where, attempt_name

GONE = (Where.EXITED, Where.ABSENT)


class Ground(Protocol):
    """Somewhere that attempts run."""

    def launcher(self, code: int | None) -> Launcher:
        """One that starts attempts which end with `code`, or, None, run until they are stopped. A test may have several at once."""
        ...

    async def starts(self, name: str) -> int:
        """How often the attempt was started."""
        ...


def attempt(number: int = 1, uid: str = "", digest: str = "d") -> Attempt:
    uid = uid or str(uuid4())
    return Attempt(attempt_name(uid, number), uid, number, "00000000-0000-4000-8000-000000000001", "models/tiny", "secret-token", digest)


async def until(there: Launcher, name: str, wanted: Callable[[Seen], bool]) -> Seen:
    async with asyncio.timeout(60):
        while not wanted(seen := await there.observe(name)):
            await asyncio.sleep(0.05)  # the attempt is another process: nothing tells of it
    return seen


async def listed(there: Launcher, names: frozenset[str]) -> None:
    """Wait until the launcher lists these: a list may come from a view that is a moment old."""
    async with asyncio.timeout(60):
        while await there.list() != names:
            await asyncio.sleep(0.05)


class LauncherContract:
    """The suite."""

    async def test_what_was_never_started_is_absent_and_may_be_stopped_and_reaped(self, ground: Ground) -> None:
        there, one = ground.launcher(0), attempt()
        assert await there.observe(one.name) == Seen(Where.ABSENT)
        await there.stop(one.name, 1)
        await there.reap(one.name)
        await listed(there, frozenset())

    async def test_F22_an_attempt_runs_once_by_its_name_and_its_exit_code_is_kept(self, ground: Ground) -> None:
        there, one = ground.launcher(65), attempt()
        await asyncio.gather(*(there.ensure(one) for _ in range(5)))
        seen = await until(there, one.name, lambda seen: seen.where is Where.EXITED)
        assert (seen.code, seen.disrupted) == (65, False)
        await there.ensure(one)
        assert await there.observe(one.name) == seen
        assert await ground.starts(one.name) == 1
        await listed(there, frozenset({one.name}))
        await there.reap(one.name)
        await there.reap(one.name)
        await until(there, one.name, lambda seen: seen.where is Where.ABSENT)
        await listed(there, frozenset())

    async def test_the_next_attempt_of_a_job_runs_beside_what_is_left_of_none(self, ground: Ground) -> None:
        there, one = ground.launcher(0), attempt()
        two = attempt(2, one.job_uid)
        for each in (one, two):
            await there.ensure(each)
            assert (await until(there, each.name, lambda seen: seen.where is Where.EXITED)).code == 0
            await there.reap(each.name)
        await listed(there, frozenset())

    async def test_a_name_with_another_spec_is_not_touched(self, ground: Ground) -> None:
        there, one = ground.launcher(None), attempt()
        await there.ensure(one)
        await until(there, one.name, lambda seen: seen.where is Where.RUNNING)
        with pytest.raises(NameTaken):
            await there.ensure(attempt(1, one.job_uid, "another"))
        assert (await there.observe(one.name)).where is Where.RUNNING
        await there.stop(one.name, 5)
        await until(there, one.name, lambda seen: seen.where in GONE)
        await there.reap(one.name)

    async def test_F24_another_control_plane_adopts_what_runs_and_can_end_it(self, ground: Ground) -> None:
        one, first = attempt(), ground.launcher(None)
        await first.ensure(one)
        await until(first, one.name, lambda seen: seen.where is Where.RUNNING)
        second = ground.launcher(None)
        await second.ensure(one)
        assert (await second.observe(one.name)).where is Where.RUNNING
        assert await ground.starts(one.name) == 1
        for _ in range(3):
            await second.stop(one.name, 5)
        await until(second, one.name, lambda seen: seen.where in GONE)
        await until(first, one.name, lambda seen: seen.where in GONE)
        await first.reap(one.name)
        await second.reap(one.name)
        await until(second, one.name, lambda seen: seen.where is Where.ABSENT)

    async def test_a_name_that_is_no_attempts_is_refused(self, ground: Ground) -> None:
        there = ground.launcher(0)
        for act in (there.observe, there.reap):
            with pytest.raises(ValueError):
                await act("../../etc")
