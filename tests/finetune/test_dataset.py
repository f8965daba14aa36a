"""DatasetService over real gRPC, on a real PostgreSQL and a real folder."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest

from argosy.v1 import dataset_pb2 as pb
from tests.finetune.served import Served, datasets_served

ROWS = b"".join(b'{"text":"Story %d about %s","label":"%s"}\n' % (i, topic, topic) for i in range(10) for topic in (b"sport", b"weather"))


@pytest.fixture
async def served(finetune_url: str, tmp_path) -> AsyncIterator[Served]:
    async with datasets_served(finetune_url, tmp_path / "objects") as found:
        yield found


async def test_upload_to_ready(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    version = await tenant.version(dataset.name, ROWS)
    assert version.state == version.STATE_READY
    assert version.name == f"{dataset.name}/versions/1"
    assert (version.sha256, version.total_bytes, version.validated_bytes) == (hashlib.sha256(ROWS).hexdigest(), len(ROWS), len(ROWS))
    assert (version.report.rows, version.report.valid_rows, version.report.errors) == (20, 20, 0)
    assert {count.label: count.rows for count in version.report.labels} == {"sport": 10, "weather": 10}
    shown = await tenant("GetDataset", pb.GetDatasetRequest(name=dataset.name))
    assert shown.latest_version == version.name
    served.eraser.wake()
    async with asyncio.timeout(20):
        while [path async for path, _ in served.objects.list(f"uploads/{tenant.uid}")]:
            await asyncio.sleep(0.02)
