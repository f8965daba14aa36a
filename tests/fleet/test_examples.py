"""Every example runs, as a user runs it: a file, an address and a key."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.fleet.running import ROOT, Fleet, environment

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
async def test_an_example_runs(real: Fleet, tmp_path: Path, example: Path) -> None:
    variables = {"ARGOSY_ADDRESS": real.address, "ARGOSY_API_KEY": real.tenant().key}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", str(example)),
        cwd=tmp_path,
        env=environment(tmp_path) | variables | {"PYTHONIOENCODING": "utf-8", "PATH": os.environ.get("PATH", "")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(100):
            said, failed = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 0, failed.decode()
    assert said.strip()


def test_examples_are_short_and_many() -> None:
    assert len(EXAMPLES) >= 15
    assert [path.name for path in EXAMPLES if len(path.read_text().splitlines()) > 40] == []
