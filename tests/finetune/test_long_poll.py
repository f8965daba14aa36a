import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration

from argosy.v1 import finetune_pb2 as pb
from services.chassis.channel import DEADLINE
from services.chassis.lists import PageTokens
from services.finetune import sql_jobs
from services.finetune.feed import Feed
from services.finetune.servicers.finetune import FineTuneServicer
from services.finetune.servicers.resources import Desk
from services.finetune.settings import JobQuotas
from tests.finetune.adapters import called, tenant

JOB = "projects/news/fineTuneJobs/5f0c3f64-6d2b-4f4e-9a40-6f8f1c3b2a10"


class NoStore:
    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        yield None


async def test_a_long_poll_answers_before_the_deadline_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def job(connection: Any, project_uid: str, uid: str, *, lock: bool = False) -> dict[str, Any]:
        return {"uid": uid, "last_sequence": 0, "state": "RUNNING"}

    async def events_after(connection: Any, uid: str, after: int, limit: int) -> list[pb.JobEvent]:
        return []

    monkeypatch.setattr(sql_jobs, "job", job)
    monkeypatch.setattr(sql_jobs, "events_after", events_after)
    desk = Desk(cast("Any", NoStore()), PageTokens(b"t" * 32))
    servicer = FineTuneServicer(desk, cast("Any", None), Feed(), JobQuotas(), cast("Any", None))
    token = DEADLINE.set(asyncio.get_running_loop().time() + 1.0)
    try:
        with called(tenant("news")):
            async with asyncio.timeout(20):
                asked = pb.ListFineTuneJobEventsRequest(parent=JOB, wait=Duration(seconds=30))
                reply = await servicer.ListFineTuneJobEvents(asked, None)
    finally:
        DEADLINE.reset(token)
    assert list(reply.events) == []
