"""A user leaves in the middle: the engine stops within a step, and the bill is what the engine had written by then."""

import asyncio

import argosy
from argosy import AsyncClient
from argosy.errors import DeadlineExceeded
from tests.fleet.running import SETTLED, Tenant

LONG = argosy.config(temperature=1, seed=1, max_output_tokens=4_000, min_output_tokens=4_000)


async def _leave_after(client: AsyncClient, pieces: int) -> str:
    """Read so many pieces of an answer of 4,000 tokens, then go; the generation's id."""
    generation, seen = "", 0
    async with client.stream_generate("One, two,", config=LONG) as stream:
        async for event in stream.events():
            generation = generation or event.started.generation_id
            seen += event.HasField("text")
            if seen == pieces:
                break
    return generation


async def test_A5_leaving_a_stream_stops_the_engine_and_the_bill(tenant: Tenant) -> None:
    async with tenant.client() as client:
        generation = await _leave_after(client, 5)
    (row,) = await tenant.records(1)
    assert (row.generation_id, row.outcome) == (generation, SETTLED.USAGE_OUTCOME_CANCELLED)
    billed = (row.usage.input_tokens, row.usage.output_tokens)
    assert 5 <= billed[1] < 4_000, "it would have gone on for seconds"
    assert await tenant.fleet.truth([generation]) == {generation: billed}


async def test_I4_twelve_leave_at_once_and_each_pays_for_its_own(tenant: Tenant) -> None:
    async with tenant.client() as client:
        left = await asyncio.gather(*(_leave_after(client, 1 + number % 4) for number in range(12)))
    rows = await tenant.records(12)
    billed = {row.generation_id: (row.usage.input_tokens, row.usage.output_tokens) for row in rows}
    assert set(billed) == set(left)
    assert await tenant.fleet.truth(left) == billed


async def test_a_deadline_ends_the_engine_too(tenant: Tenant) -> None:
    async with tenant.client() as client:
        try:
            await client.generate("One, two,", config=LONG, timeout_s=1.5)
        except DeadlineExceeded:
            pass
        else:
            raise AssertionError("4,000 tokens in 1.5 s")
    (row,) = await tenant.records(1)
    assert row.outcome == SETTLED.USAGE_OUTCOME_DEADLINE and row.usage.output_tokens < 4_000
    assert await tenant.fleet.truth([row.generation_id]) == {row.generation_id: (row.usage.input_tokens, row.usage.output_tokens)}
