"""A fleet in a process of its own, and what a test does with it: make a tenant, look at the books, look at the truth."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from argosy import AsyncClient, Client
from argosy.admin.v1 import api_key_pb2, usage_pb2

ROOT = Path(__file__).parents[2]
TENANT_SCOPES = ("generate", "models.read", "keys.read", "quota.read", "usage.read")
TUNER_SCOPES = (
    *TENANT_SCOPES,
    "explain",
    "models.write",
    "models.promote",
    "datasets.read",
    "datasets.write",
    "datasets.content",
    "finetune.read",
    "finetune.write",
)
SETTLED = usage_pb2.UsageOutcome


@dataclass(frozen=True)
class Tenant:
    """A project of one test's own, with one key."""

    fleet: "Fleet"
    project: str
    key: str
    key_name: str

    def client(self) -> AsyncClient:
        """Speaks as the tenant to the fleet's model."""
        return AsyncClient(self.fleet.address, self.key, model=self.fleet.model)

    async def records(self, count: int) -> list[usage_pb2.UsageRecord]:
        """The tenant's rows in the ledger, once there are `count`; more are an error."""
        rows = await self.records_until(lambda rows: len(rows) >= count)
        assert len(rows) == count, rows
        return rows

    async def records_until(self, enough: Callable[[list[usage_pb2.UsageRecord]], bool]) -> list[usage_pb2.UsageRecord]:
        """The tenant's rows in the ledger, once they are `enough`."""
        request = usage_pb2.ExportUsageRequest(parent=self.project)
        credential = (("authorization", f"Bearer {self.fleet.api_key}"),)
        async with AsyncClient(self.fleet.address) as platform, asyncio.timeout(30):
            while True:
                rows = [row async for row in platform.usage_service.ExportUsage(request, timeout=20, metadata=credential)]
                if enough(rows):
                    return rows
                await asyncio.sleep(0.05)  # the ledger tells nobody when it settles


@dataclass
class Fleet:
    """A running `python -m tests.fleet.process` or `-m services.fleet`."""

    process: subprocess.Popen[str]
    address: str
    api_key: str
    metrics: str
    model: str
    home: Path

    def tenant(self, scopes: Sequence[str] = TENANT_SCOPES) -> Tenant:
        """A new project and a key of it."""
        with Client(self.address, self.api_key) as platform:
            project = platform.create_project(f"t-{uuid.uuid4().hex[:12]}").name
            issued: api_key_pb2.IssuedApiKey = platform.create_key(project, scopes)
        return Tenant(self, project, issued.secret, issued.api_key.name)

    def engines(self) -> list[psutil.Process]:
        """The engine processes, oldest first."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [child for child in children if "services.inference.engine" in _words(child)]
        return sorted(found, key=lambda child: child.create_time())

    async def truth(self, generations: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Tokens in and out, by generation, as they crossed the engines' borders; waits for the last of each."""
        async with asyncio.timeout(20):
            while True:
                lines = [line for line in _lines(self.home / "calls.jsonl") if line["generation"] in generations]
                if {line["generation"] for line in lines} >= set(generations):
                    break
                await asyncio.sleep(0.05)  # another process writes the file
        for line in lines:
            assert not line["done"] or (line["said_input"], line["said_output"]) == (line["input"], line["output"]), line
        return {
            generation: (
                sum(line["input"] for line in lines if line["generation"] == generation),
                sum(line["output"] for line in lines if line["generation"] == generation),
            )
            for generation in generations
        }

    async def spans(self, trace: str, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The spans of one trace, once `enough` are there."""
        async with asyncio.timeout(20):
            while True:
                found = [line for line in _lines(self.home / "spans.jsonl") if line["trace"] == trace]
                if enough(found):
                    return found
                await asyncio.sleep(0.1)  # another process writes the file

    def metric(self, name: str) -> float:
        """The sum of a metric's series, as Prometheus reads it."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Of a fleet of the tests: nothing of the caller's own settings, everything else as on this machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ARGOSY_", "OTEL_")) and name != "MODEL"}
    path = os.pathsep.join(str(ROOT / part) for part in (".", "clients/python", "clients/internal"))
    return (
        own
        | {
            "PYTHONPATH": path,
            "ARGOSY_HOME": str(home),
            "ARGOSY_ADDRESS": "127.0.0.1:0",
            "ARGOSY_ANNOUNCE_SECONDS": "0.1",
            "ARGOSY_TEST_TRUTH": str(home),
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        | variables
    )


@contextlib.contextmanager
def running(home: Path, model: str, module: str = "tests.fleet.process", **variables: str) -> Iterator[Fleet]:
    """Start a fleet, wait until it answers, and drain it at the end: exit status 0, or the test fails."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--json"],
            cwd=ROOT,
            env=environment(home, **variables),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        ready = next((found["ready"] for line in process.stdout if "ready" in (found := json.loads(line))), None)
        assert ready is not None, (home / "log").read_text(errors="replace")[-3_000:]
        yield Fleet(process, ready["address"], ready["api_key"], ready["metrics"], model, home)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            process.stdout.close()  # type: ignore[union-attr]
    assert process.returncode == 0, (home / "log").read_text(errors="replace")[-3_000:]


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for what no event tells: the state of another process."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        await asyncio.sleep(0.02)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _lines(file: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last may still be under way."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
