"""Tuning jobs: ask for one, follow it, stop it. `jobs.py` is made from this file by tools/gen_sync_client.py.

A watch survives whatever ends its stream: it asks again after the last event it has seen, so that none comes twice and none is missed.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from argosy import errors, names, requests
from argosy.specs import PRIORITIES, Money, cost
from argosy.v1 import deletion_pb2, finetune_pb2

if TYPE_CHECKING:
    from argosy.aio import AsyncClient

Job = finetune_pb2.FineTuneJob
ENDED = (Job.STATE_SUCCEEDED, Job.STATE_FAILED, Job.STATE_CANCELLED)
STREAM_TIMEOUT_S = 300.0  # the fleet's cap
BREAKS = (errors.Unavailable, errors.DeadlineExceeded, errors.Cancelled, errors.SlowConsumer)


class AsyncJobs:
    """The project's tuning jobs: `client.jobs`. A job may be called by its UUID alone."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client
        self._stub = client.finetune_service

    async def _own(self, name: str) -> str:
        return names.own(await self._client.project(), "fineTuneJobs", name)

    async def create(
        self,
        spec: finetune_pb2.FineTuneSpec,
        model: str,
        *,
        display_name: str = "",
        max_cost: Money | None = None,
        deadline_s: float | None = None,
        priority: str = "normal",
        quote_only: bool = False,
    ) -> finetune_pb2.FineTuneJob:
        """Queue a job whose version goes to `model`, which is made if it is not there.

        `max_cost`, as `2.5` or `"2.5 EUR"`, pauses it; `deadline_s` from now fails it. With `quote_only` nothing is written: the reply has
        the quote and every value that was chosen.
        """
        project = await self._client.project()
        job = Job(
            spec=spec,
            model=names.own(project, "models", model),
            display_name=display_name,
            max_cost=None if max_cost is None else cost(max_cost),
            priority=PRIORITIES[priority],
        )
        if deadline_s is not None:
            job.deadline.FromDatetime(datetime.now(UTC) + timedelta(seconds=deadline_s))
        request = finetune_pb2.CreateFineTuneJobRequest(
            parent=project, fine_tune_job=job, validate_only=quote_only, request_id=requests.request_id()
        )
        return await self._client.call(self._stub.CreateFineTuneJob, request)

    async def get(self, name: str) -> finetune_pb2.FineTuneJob:
        """One job as it stands."""
        return await self._client.call(self._stub.GetFineTuneJob, finetune_pb2.GetFineTuneJobRequest(name=await self._own(name)))

    async def list(self, *, filter: str = "") -> AsyncIterator[finetune_pb2.FineTuneJob]:
        """The project's jobs; `filter` as `state = RUNNING`."""
        request = finetune_pb2.ListFineTuneJobsRequest(parent=await self._client.project(), filter=filter, order_by="create_time desc")
        async for found in self._client.pages(self._stub.ListFineTuneJobs, request, "fine_tune_jobs"):
            yield found

    async def cancel(self, name: str) -> finetune_pb2.FineTuneJob:
        """End a job for good; its checkpoints stay."""
        request = finetune_pb2.CancelFineTuneJobRequest(name=await self._own(name), request_id=requests.request_id())
        return await self._client.call(self._stub.CancelFineTuneJob, request)

    async def pause(self, name: str) -> finetune_pb2.FineTuneJob:
        """Commit a checkpoint and free the device."""
        request = finetune_pb2.PauseFineTuneJobRequest(name=await self._own(name), request_id=requests.request_id())
        return await self._client.call(self._stub.PauseFineTuneJob, request)

    async def resume(self, name: str, *, max_cost: Money | None = None) -> finetune_pb2.FineTuneJob:
        """Go on from the last checkpoint, perhaps with a raised limit."""
        request = finetune_pb2.ResumeFineTuneJobRequest(
            name=await self._own(name), max_cost=None if max_cost is None else cost(max_cost), request_id=requests.request_id()
        )
        return await self._client.call(self._stub.ResumeFineTuneJob, request)

    async def delete(self, name: str) -> deletion_pb2.Deletion:
        """Erase a job that has ended, with its checkpoints; the version it made stays."""
        request = finetune_pb2.DeleteFineTuneJobRequest(name=await self._own(name), request_id=requests.request_id())
        return await self._client.call(self._stub.DeleteFineTuneJob, request)

    async def checkpoints(self, name: str) -> AsyncIterator[finetune_pb2.Checkpoint]:
        """A job's committed checkpoints, newest first."""
        request = finetune_pb2.ListCheckpointsRequest(parent=await self._own(name))
        async for found in self._client.pages(self._stub.ListCheckpoints, request, "checkpoints"):
            yield found

    async def events(self, name: str, *, after: int = 0) -> AsyncIterator[finetune_pb2.JobEvent]:
        """What has happened so far, after that sequence."""
        request = finetune_pb2.ListFineTuneJobEventsRequest(parent=await self._own(name), after_sequence=after, page_size=1_000)
        async for found in self._client.pages(self._stub.ListFineTuneJobEvents, request, "events"):
            yield found

    async def watch(self, name: str, *, after: int = 0, patience_s: float = 120.0) -> AsyncIterator[finetune_pb2.JobEvent]:
        """What has happened after that sequence, then what happens, until the job's log is complete: ended, and servable if it SUCCEEDED.

        A stream that breaks is opened again at the cursor; after `patience_s` seconds without a word the last error is raised.
        """
        whole, heard, failures = await self._own(name), time.monotonic(), 0
        while True:
            request = finetune_pb2.WatchFineTuneJobRequest(name=whole, after_sequence=after)
            trouble: errors.ArgosyError | None = None
            try:
                async for message in self._client.stream(self._stub.WatchFineTuneJob, request, timeout_s=STREAM_TIMEOUT_S):
                    heard, failures = time.monotonic(), 0
                    if message.HasField("bookmark"):
                        after = max(after, message.bookmark.sequence)
                        if message.bookmark.final:
                            return
                    elif message.event.sequence > after:
                        after = message.event.sequence
                        yield message.event
            except BREAKS as error:
                trouble = error
            if time.monotonic() - heard > patience_s:
                raise trouble or errors.StreamLost("The job's log says no more", reason="STREAM_LOST", last_sequence=after)
            failures += 1  # of an orderly end, too: a draining gateway must not be asked without a pause
            await asyncio.sleep((trouble and trouble.retry_after_s) or min(5.0, 0.05 * 2**failures))

    async def wait(self, name: str, *, seen: Callable[[finetune_pb2.JobEvent], None] | None = None) -> finetune_pb2.FineTuneJob:
        """The job once its log is complete; `seen` is told each event. Raises JobFailed unless it SUCCEEDED."""
        async for event in self.watch(name):
            if seen:
                seen(event)
        job = await self.get(name)
        if job.state != Job.STATE_SUCCEEDED:
            raise errors.JobFailed.of(job)
        return job
