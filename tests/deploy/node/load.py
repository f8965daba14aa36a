"""Streams from a client that never stops asking, and what became of each."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import argosy
from argosy import AsyncClient
from argosy.errors import ArgosyError, Unavailable
from argosy.v1 import stream_pb2

TOKENS = 400  # of each answer: seconds on the tiny model, so that every step of a rollout meets streams in flight
WAIT_SECONDS = 240
SHED = "SHED"  # admission would not take it: the queue is longer than the deadline


@dataclass
class Load:
    """The account of streams, in the order in which they ended."""

    started: int = 0
    whole: int = 0  # ended by themselves with every token
    refused: int = 0  # before they began, with a time to ask again: the fleet's right, and no stream is lost
    broken: list[str] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def open(self) -> int:
        """Streams in flight."""
        return self.started - self.whole - self.refused - len(self.broken)

    def line(self, what: str) -> str:
        """The account in words, for who asks pytest for it (-rP)."""
        return f"{what}: {self.started} streams of {TOKENS} tokens, {self.whole} whole, {self.refused} refused, {len(self.broken)} broken"

    async def more(self, whole: int) -> None:
        """Wait until so many more streams have ended whole, or one has not."""
        target = self.whole + whole
        async with self.changed, asyncio.timeout(WAIT_SECONDS):
            await self.changed.wait_for(lambda: self.whole >= target or bool(self.broken))


@contextlib.asynccontextmanager
async def streaming(client: AsyncClient, streams: int) -> AsyncIterator[Load]:
    """So many streams at any time; at the end of the block the last ones may finish."""
    load, leaving = Load(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(_ask(client, load, leaving, number))
        try:
            yield load
        finally:
            leaving.set()


async def _ask(client: AsyncClient, load: Load, leaving: asyncio.Event, number: int) -> None:
    turn = 0
    while not leaving.is_set():
        turn += 1
        seed = 1_000 * number + turn
        config = argosy.config(temperature=1, seed=seed, max_output_tokens=TOKENS, min_output_tokens=TOKENS)
        load.started += 1
        fault, begun, again_s = "", False, 0.0
        try:
            async with client.stream_generate(f"{number}, {turn},", config=config) as stream:
                async for _ in stream.events():
                    begun = True
            fault = _fault(stream.result)
        except Unavailable as error:
            if begun or error.reason != SHED:
                fault = f"{type(error).__name__}: {error}"
            again_s = 0.0 if fault else (error.retry_after_s or 0.1)
        except ArgosyError as error:
            fault = f"{type(error).__name__}: {error}"
        async with load.changed:
            if fault:
                load.broken.append(f"stream {number}.{turn}: {fault}")
            elif again_s:
                load.refused += 1
            else:
                load.whole += 1
            load.changed.notify_all()
        if again_s:
            await asyncio.sleep(again_s)  # as told


def _fault(result: stream_pb2.GenerationResult) -> str:
    """What a stream lacks that ended without an error."""
    reasons = [output.finished.reason for output in result.outputs]
    if reasons != [stream_pb2.FINISH_REASON_LENGTH]:
        return f"ended for {reasons}"
    billed = result.completed.usage.output_tokens
    return "" if billed == TOKENS else f"{billed} tokens of {TOKENS}"
