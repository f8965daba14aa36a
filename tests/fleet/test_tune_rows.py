"""Rows on their way to a real fleet: connections that break, a process that is killed, lines that are wrong."""

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from argosy import AsyncClient, aio_tuning, errors
from argosy.v1 import dataset_pb2
from tests.faults.proxy import fault_proxy
from tests.fleet.running import ROOT, Fleet, environment, until

MIB = 1 << 20
SCOPES = ("datasets.read", "datasets.write", "datasets.content")


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """22 MiB of valid rows, few and long, so that checking them takes no time."""
    seeded = random.Random(24)
    file = tmp_path / "long.jsonl"
    with file.open("w") as out:
        for number in range(120):
            words = " ".join(f"{seeded.getrandbits(2_048):0512x}" for _ in range(365))
            out.write(json.dumps({"text": words, "label": "odd" if number % 2 else "even"}) + "\n")
    return file


async def test_an_upload_goes_on_after_every_reset(tiny: Fleet, long_rows: Path) -> None:
    key = tiny.tenant(SCOPES).key
    told: list[int] = []
    async with fault_proxy(tiny.address) as proxy, AsyncClient(proxy.address, key) as client:
        await client.datasets.create("long", "classify")
        proxy.up.reset_at = 10 * MIB  # of each connection
        made = await client.datasets.upload("long", long_rows, progress=lambda done, _: told.append(done))
        proxy.up.reset_at = None
        assert proxy.accepted >= 3
        assert made.sha256 == hashlib.sha256(long_rows.read_bytes()).hexdigest() and made.total_bytes == long_rows.stat().st_size
        assert proxy.up.passed < 2.5 * long_rows.stat().st_size  # it went on, and did not begin anew each time
        assert (await client.datasets.wait(made.name)).state == made.STATE_READY
        again = b"".join([part async for part in client.datasets.read("long/1")])
    assert again == long_rows.read_bytes() and told[-1] == len(again)


async def test_a_killed_command_is_gone_on_with_by_the_next(tiny: Fleet, long_rows: Path, tmp_path: Path) -> None:
    key = tiny.tenant(SCOPES).key
    async with fault_proxy(tiny.address) as proxy, AsyncClient(tiny.address, key) as client:
        variables = {"ARGOSY_ADDRESS": proxy.address, "ARGOSY_API_KEY": key, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = (sys.executable, "-m", "argosy", "tune", str(long_rows), "--base", "tiny", "--method", "classify", "--quote", "--json")

        async def started() -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                *command,
                cwd=ROOT,
                env=environment(tmp_path) | variables | {"PATH": os.environ.get("PATH", "")},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )

        proxy.up.bytes_per_s = 24 * MIB
        child = await started()
        name = await _upload_of(tmp_path / "cache" / "argosy" / "uploads.json")
        async with asyncio.timeout(30):
            while (await _upload(client, name)).persisted_bytes < 8 * MIB:
                await asyncio.sleep(0.02)  # the fleet tells nobody how far an upload is
        child.send_signal(signal.SIGKILL)
        await child.communicate()
        await until(lambda: proxy.connections == 0)
        broken = await _upload(client, name)
        assert broken.state == dataset_pb2.Upload.STATE_OPEN and 0 < broken.persisted_bytes < long_rows.stat().st_size
        before = proxy.up.passed
        proxy.up.bytes_per_s = None
        child = await started()
        async with asyncio.timeout(60):
            said, _ = await child.communicate()
        version = json.loads(said.splitlines()[0])["dataset_version"]
        assert version["sha256"] == hashlib.sha256(long_rows.read_bytes()).hexdigest()
        assert (await _upload(client, name)).state == dataset_pb2.Upload.STATE_FINALIZED
        assert proxy.up.passed - before < long_rows.stat().st_size - broken.persisted_bytes + 2 * MIB


async def test_bad_rows_are_found_where_they_stand(tiny: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "opinions.csv"
    file.write_bytes('label,text\ngood,Fine\nbad,\n坏,"two\nlines"\n'.encode() + b"bad,\xff\xfe\n")
    async with AsyncClient(tiny.address, tiny.tenant(SCOPES).key) as client:
        with pytest.raises(errors.ArgosyError) as caught:
            await aio_tuning.prepared(client, file, "classify")
        assert isinstance(caught.value, errors.DatasetRejected | errors.UnsupportedFormat)
        file.write_bytes('label,text\ngood,Fine\nbad,\n坏,"two\nlines"\n坏,Sad\n'.encode())
        with pytest.raises(errors.DatasetRejected) as rejected:
            await aio_tuning.prepared(client, file, "classify")
        found = rejected.value.row_errors
        assert [(each.line, each.byte_offset, each.field) for each in found] == [(3, 21, "text")] and found[0].rule.startswith("V7")
        clean = await aio_tuning.prepared(client, file, "classify", skip_bad_rows=True)
        assert list(clean.skipped_lines) == [3] and clean.report.rows == 3


async def _upload_of(file: Path) -> str:
    async with asyncio.timeout(30):
        while not (file.exists() and json.loads(file.read_text())):
            await asyncio.sleep(0.02)  # another process writes the file
    return str(next(iter(json.loads(file.read_text()).values())))


async def _upload(client: AsyncClient, name: str) -> dataset_pb2.Upload:
    return await client.call(client.dataset_service.GetUpload, dataset_pb2.GetUploadRequest(name=name))
