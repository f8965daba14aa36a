"""Follows what finetune says that jobs and evaluations owe, and settles it in the books: behind a cursor that the books keep.

Several gateways may do it at once: a charge has one name, and is settled under it once. A project that has used up its day has its jobs
paused; who may start one is judged before, from what the books have left (see `ledger.JobBooks.allowed`).
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any

import grpc
import grpc.aio

from argosy_internal.registry.v1 import registry_pb2, registry_pb2_grpc
from services.chassis import status
from services.chassis.channel import streaming
from services.chassis.errors import StoreUnavailable
from services.gateway.ledger import Charge, JobBooks, Outcome
from services.gateway.registry import ASK_S, BACKOFF_CAP_S, BACKOFF_S, EOF, Upstream, fleet_caller

log = logging.getLogger(__name__)

OUTCOMES = {
    registry_pb2.CHARGE_OUTCOME_DONE: Outcome.DONE,
    registry_pb2.CHARGE_OUTCOME_CANCELLED: Outcome.CANCELLED,
    registry_pb2.CHARGE_OUTCOME_DEADLINE: Outcome.DEADLINE,
    registry_pb2.CHARGE_OUTCOME_FAILED: Outcome.FAILED,
}


class OtherCurrency(Exception):
    """The feed is priced in another currency than the books: nothing is settled until an operator has made them agree."""


class Billing:
    """Follows the feed of charges for as long as it is entered."""

    def __init__(self, finetune: Upstream, books: JobBooks | None) -> None:
        """`books` None: nobody keeps any."""
        self._finetune = finetune
        self._books = books
        self._stub: Any = None if finetune.off else registry_pb2_grpc.RegistryServiceStub(finetune.channel)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow while inside; where fine-tuning is off there is nothing to follow."""
        books = self._books
        follower = None if self._finetune.off or books is None else asyncio.create_task(self._follow(books), name="charges")
        try:
            yield
        finally:
            if follower is not None:
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)

    async def _follow(self, books: JobBooks) -> None:
        failures = 0
        while True:
            try:
                request = registry_pb2.WatchChargesRequest(after_sequence=await books.cursor())
                async with streaming(self._stub.WatchCharges(request, metadata=self._finetune.metadata(fleet_caller()))) as events:
                    while (event := await events.read()) is not EOF:
                        if event.WhichOneof("event") == "charge":
                            await self._settle(books, event)
                        failures = 0
            except grpc.aio.AioRpcError as error:
                info = status.error_info(error)
                if info is not None and info.reason == "EVENT_SEQUENCE_AHEAD":  # another log than the one we read: names tell what is new
                    await _forget(books)
                elif failures == 1 and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    log.warning("the feed of charges is lost: %s", error.code().name)
            except StoreUnavailable:
                if failures == 1:
                    log.warning("charges wait for the books")
            except OtherCurrency as other:
                if not failures:
                    log.error("charges are in %s, the books in %s: nothing is settled", other, books.currency)
            except Exception:  # nothing behind a charge may be settled before it, so it is tried again
                log.exception("a charge was not settled")
            failures += 1
            await asyncio.sleep(min(BACKOFF_CAP_S, BACKOFF_S * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0))

    async def _settle(self, books: JobBooks, event: registry_pb2.ChargeEvent) -> None:
        charge = charge_from(event)
        if charge.currency != books.currency:
            raise OtherCurrency(charge.currency)
        for key_uid in await books.settle(charge):
            await self._pause(charge, key_uid)

    async def _pause(self, charge: Charge, key_uid: str) -> None:
        metadata = self._finetune.metadata(fleet_caller(charge.project_uid, charge.project))
        try:
            await self._stub.PauseJobs(registry_pb2.PauseJobsRequest(key_uid=key_uid), timeout=ASK_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:  # its next charge says it again
            log.warning("jobs over their budget were not paused: %s", error.code().name)


async def _forget(books: JobBooks) -> None:
    try:
        await books.reset()
    except StoreUnavailable:
        log.warning("charges wait for the books")


def charge_from(event: registry_pb2.ChargeEvent) -> Charge:
    """The message as a value."""
    said = event.charge
    return Charge(
        sequence=event.sequence,
        project_uid=said.project_uid,
        project=said.project,
        key_uid=said.key_uid,
        work_uid=said.work_uid,
        number=said.number,
        method=said.method,
        model=said.model,
        version=said.version,
        currency=said.cost.currency_code,
        nanos=said.cost.nanos,
        device_seconds=said.device_seconds,
        outcome=OUTCOMES.get(said.outcome),
        time=said.time.ToDatetime(UTC),
    )
