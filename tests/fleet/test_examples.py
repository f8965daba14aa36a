"""Every example runs, as a user runs it: a file, an address and a key."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.fleet.running import ROOT, TUNER_SCOPES, Fleet, environment

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TUNING = [path for path in EXAMPLES if "client.tune(" in path.read_text()]  # minutes on the real weights, seconds on tiny ones
ASKING = [path for path in EXAMPLES if path not in TUNING]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", ASKING, ids=lambda path: path.stem)
async def test_an_example_runs(real: Fleet, tmp_path: Path, example: Path) -> None:
    await _run(real, tmp_path, example)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", TUNING, ids=lambda path: path.stem)
async def test_an_example_tunes(tiny: Fleet, tmp_path: Path, example: Path) -> None:
    await _run(tiny, tmp_path, example)


async def _run(fleet: Fleet, tmp_path: Path, example: Path) -> str:
    variables = {"ARGOSY_ADDRESS": fleet.address, "ARGOSY_API_KEY": fleet.tenant(TUNER_SCOPES).key}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", str(example)),
        cwd=tmp_path,
        env=environment(tmp_path) | variables | {"PYTHONIOENCODING": "utf-8", "PATH": os.environ.get("PATH", "")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(200):
            said, failed = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 0, failed.decode()
    assert said.strip()
    return said.decode()


def test_examples_are_short_and_many() -> None:
    assert len(EXAMPLES) >= 15
    assert [path.name for path in EXAMPLES if len(path.read_text().splitlines()) > 40] == []
