"""One suite for all launchers: processes of this machine, and Jobs on an API server of this process.

tests/deploy/control_plane/test_jobs_contract.py runs it on a real control plane.
"""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.finetune.launchers.local import LocalLauncher
from tests.fakes.kubernetes import running
from tests.protocols.clusters import Cluster
from tests.protocols.launcher_contract import LauncherContract

RUN = "import os, signal, sys, time; open('ran', 'a').write('x'); signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "


class Processes:
    """Ground of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[LocalLauncher] = []

    def launcher(self, code: int | None) -> LocalLauncher:
        async def directory(name: str) -> Path:
            return self._folder

        program = RUN + ("time.sleep(600)" if code is None else f"sys.exit({code})")
        made = LocalLauncher(self._folder / "runs", "127.0.0.1:1", "memory://", directory, command=(sys.executable, "-c", program))
        self._open.append(made)
        return made

    async def starts(self, name: str) -> int:
        ran = self._folder / "runs" / name / "ran"
        async with asyncio.timeout(60):
            while not ran.exists() or not ran.read_text():  # a process runs a moment before its program does
                await asyncio.sleep(0.02)
        return len(ran.read_text())

    def close(self) -> None:
        for each in self._open:
            each.close()


class TestLocal(LauncherContract):
    @pytest.fixture
    def ground(self, tmp_path: Path) -> Iterator[Processes]:
        ground = Processes(tmp_path)
        yield ground
        ground.close()


class TestCluster(LauncherContract):
    @pytest.fixture
    def ground(self, tmp_path: Path) -> Iterator[Cluster]:
        with running() as cluster:
            ground = Cluster(cluster.client, tmp_path, lambda name: len(cluster.pods(name)))
            yield ground
            ground.close()
