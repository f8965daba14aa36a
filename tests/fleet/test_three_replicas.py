"""One model on three replicas: one engine is killed in the middle. Its streams end as lost, the others go on, and it comes back."""

import asyncio
from collections import Counter

import argosy
from argosy import AsyncClient
from argosy.errors import StreamLost
from tests.fleet.running import SETTLED, Tenant, until

TOKENS = 2_000  # long enough that no answer is over before the last has begun
CONFIG = argosy.config(temperature=1, seed=3, max_output_tokens=TOKENS, min_output_tokens=TOKENS)
CALLS = 9


async def test_F4_a_killed_engine_loses_its_own_streams_only_and_comes_back(tenant: Tenant) -> None:
    fleet = tenant.fleet
    before = fleet.engines()
    assert len(before) == 3
    await until(lambda: fleet.metric("argosy_replica_ready") == 3, 60)
    async with tenant.client() as client:
        began = [asyncio.Event() for _ in range(CALLS)]
        streams = [asyncio.ensure_future(_read(client, number, event)) for number, event in enumerate(began)]
        await asyncio.gather(*(event.wait() for event in began))
        before[0].kill()
        ends = await asyncio.gather(*streams)
        outcomes = Counter(outcome for outcome, _, _ in ends)
        assert set(outcomes) == {"done", "lost"}, "the calls are spread, so some are lost and some are not"
        # The fleet still answers, on what is left.
        assert (await client.generate("hello", config=argosy.config(max_output_tokens=4))).outputs
        rows = await tenant.records(CALLS + 1)
        by_generation = {row.generation_id: row for row in rows}
        truth = await fleet.truth([generation for _, generation, _ in ends])
        for outcome, generation, seen in ends:
            row = by_generation[generation]
            if outcome == "done":
                assert row.outcome == SETTLED.USAGE_OUTCOME_COMPLETED and row.usage.output_tokens == TOKENS
            else:
                assert row.outcome == SETTLED.USAGE_OUTCOME_LOST
                assert seen <= row.usage.output_tokens < TOKENS, "each text event holds a token at least"
            assert truth[generation] == (row.usage.input_tokens, row.usage.output_tokens), outcome
        # A new engine takes the dead one's place and is used.
        await until(lambda: len(fleet.engines()) == 3 and before[0] not in fleet.engines(), 60)
        await until(lambda: fleet.metric("argosy_replica_ready") == 3, 60)
        assert [outcome for outcome, _, _ in await asyncio.gather(*(_read(client, n, asyncio.Event()) for n in range(6)))] == ["done"] * 6


async def _read(client: AsyncClient, number: int, began: asyncio.Event) -> tuple[str, str, int]:
    """How an answer of TOKENS tokens ended, its generation, and how many texts came."""
    generation, seen = "", 0
    try:
        async with client.stream_generate(f"{number} ships", config=CONFIG) as stream:
            async for event in stream.events():
                generation = generation or event.started.generation_id
                if event.HasField("text"):
                    seen += 1
                    began.set()
    except StreamLost as lost:
        assert lost.last_sequence is not None and lost.last_sequence >= seen
        return "lost", generation, seen
    return "done", generation, seen
