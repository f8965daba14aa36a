"""A project asks what it used: the sums are the engines' own counts, over whatever its calls came to."""

import asyncio
from collections import Counter

import argosy
from argosy import AsyncClient
from argosy.errors import ArgosyError
from tests.fleet.running import SETTLED, Tenant

SHORT = argosy.config(temperature=1, max_output_tokens=20)
LONG = argosy.config(temperature=1, max_output_tokens=4_000, min_output_tokens=4_000)


async def _leave(client: AsyncClient) -> None:
    async with client.stream_chat("Say much", config=LONG) as stream:
        async for event in stream.events():
            if event.HasField("text"):
                break


async def _refused(client: AsyncClient) -> None:
    try:
        await client.generate("hello " * 9_000, config=SHORT)
    except ArgosyError as error:
        assert error.reason in ("PROMPT_TOO_LONG", "FIELD_OUT_OF_RANGE"), error
    else:
        raise AssertionError("a prompt over the context was taken")


async def test_I4_the_sum_of_the_ledger_is_the_engines_count(tenant: Tenant) -> None:
    async with tenant.client() as client:
        calls = []
        for number in range(6):
            calls += [
                client.generate(f"Ship number {number}", config=SHORT),
                client.chat(f"Ship number {number}", config=argosy.config(n=2, max_output_tokens=12)),
                client.classify([f"hello {number}", "world"], ["tech", "sport"]),
                client.embed([f"hello {number}", "the world"]),
                _leave(client),
            ]
        await asyncio.gather(*calls)
        await _refused(client)
        rows = await tenant.records_until(lambda rows: sum(row.outcome != SETTLED.USAGE_OUTCOME_REFUSED for row in rows) >= 30)
        done = [row for row in rows if row.outcome != SETTLED.USAGE_OUTCOME_REFUSED]
        assert Counter(row.outcome for row in done) == {SETTLED.USAGE_OUTCOME_COMPLETED: 24, SETTLED.USAGE_OUTCOME_CANCELLED: 6}
        assert all(not row.usage.output_tokens for row in rows if row not in done)
        truth = await tenant.fleet.truth([row.generation_id for row in done])
        assert truth == {row.generation_id: (row.usage.input_tokens, row.usage.output_tokens) for row in done}
        (total,) = [found async for found in client.usage(tenant.project)]
        assert total.usage.input_tokens == sum(row.usage.input_tokens for row in rows)
        assert total.usage.output_tokens == sum(row.usage.output_tokens for row in rows)
        assert total.usage.output_tokens == sum(output for _, output in truth.values())


async def test_one_request_can_be_looked_up(tenant: Tenant) -> None:
    async with tenant.client() as client:
        result = await client.generate("hello", config=SHORT)
        await tenant.records(1)
        found = await client.request_usage(tenant.project, result.started.request_id)
    assert [record.generation_id for record in found.records] == [result.started.generation_id]
    assert found.records[0].usage.output_tokens == result.completed.usage.output_tokens
