from collections import Counter

import hypothesis.strategies as st
from hypothesis import given, settings

from services.inference.engine.blocks import Blocks, blocks_for, child_key, root_key
from services.inference.engine.step import BLOCK_SIZE

ROOT = root_key(b"salt", "tenant", "digest")


def chain(tokens: list[int], root: bytes = ROOT) -> list[bytes]:
    keys = [root]
    for i in range(len(tokens) // BLOCK_SIZE):
        keys.append(child_key(keys[-1], tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]))
    return keys[1:]


def fill(blocks: Blocks, keys: list[bytes], tenant: str = "tenant") -> list[int]:
    table = blocks.take_many(len(keys))
    for block, key in zip(table, keys, strict=True):
        blocks.publish(block, key, tenant)
    return table


def test_blocks_for_counts_whole_blocks():
    assert [blocks_for(n) for n in (0, 1, 15, 16, 17, 32, 33)] == [0, 1, 1, 1, 2, 2, 3]


def test_A27_a_key_depends_on_salt_tenant_model_adapter_and_every_token_before():
    roots = {
        root_key(b"salt", "tenant", "digest"),
        root_key(b"other", "tenant", "digest"),
        root_key(b"salt", "other", "digest"),
        root_key(b"salt", "tenant", "other"),
        root_key(b"salt", "tenant", "digest", "adapter"),
    }
    assert len(roots) == 5
    tokens = list(range(48))
    for changed in range(48):
        other = [*tokens[:changed], 99, *tokens[changed + 1 :]]
        pairs = zip(chain(tokens), chain(other), strict=True)
        assert [a == b for a, b in pairs] == [(i + 1) * BLOCK_SIZE <= changed for i in range(3)]


def test_a_prefix_is_found_by_its_keys_and_shared():
    blocks = Blocks(8, 8)
    keys = chain(list(range(48)))
    table = fill(blocks, keys)
    assert blocks.hold(keys) == table
    assert blocks.hold([keys[0], b"unknown", keys[2]]) == table[:1]
    for references, held in ((table, 3), (table, 1), (table[:1], 0)):
        blocks.release(references)
        assert blocks.held == held
    assert blocks.held == 0
    assert blocks.idle_of("tenant") == 3
    assert blocks.hold(keys) == table  # idle content is still there


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    blocks = Blocks(4, 4)
    keys = chain(list(range(64)))
    blocks.release(fill(blocks, keys))
    assert blocks.take() is not None
    assert len(blocks.hold(keys)) == 3


def test_the_least_recently_used_prefix_is_evicted_first():
    blocks = Blocks(3, 3)
    first, second, third = (chain([n] * BLOCK_SIZE) for n in range(3))
    for keys in (first, second, third):
        blocks.release(fill(blocks, keys))
    blocks.release(blocks.hold(first))  # used again
    blocks.take()
    assert [len(blocks.hold(keys)) for keys in (first, second, third)] == [1, 0, 1]


def test_A27_a_flood_evicts_the_floods_own_prefixes():
    blocks = Blocks(16, 4)
    mine = chain(list(range(64)))
    blocks.release(fill(blocks, mine, "light"))
    for n in range(100):
        blocks.release(fill(blocks, chain([n + 100] * 2 * BLOCK_SIZE), "heavy"))
    assert blocks.idle_of("heavy") == 4
    assert len(blocks.hold(mine)) == 4


def test_what_a_failing_call_wrote_is_not_found_again():
    blocks = Blocks(4, 4)
    keys = chain(list(range(32)))
    table = fill(blocks, keys)
    shared = blocks.hold(keys[:1])
    blocks.release(table, suspect=True)
    assert blocks.hold(keys) == []
    assert blocks.held == 1
    blocks.release(shared)
    assert (blocks.held, blocks.idle_of("tenant"), blocks.available) == (0, 0, 4)


def test_a_twin_stays_unknown_and_is_freed():
    blocks = Blocks(4, 4)
    keys = chain(list(range(16)))
    first, second = fill(blocks, keys), fill(blocks, keys)
    assert blocks.hold(keys) == first
    blocks.release(second)
    assert blocks.idle_of("tenant") == 0


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 12),
    st.lists(st.tuples(st.sampled_from(["open", "close", "suspect"]), st.integers(0, 5), st.sampled_from("ab")), max_size=60),
)
def test_I7_counts_are_exact_whatever_comes(count: int, quota: int, moves: list[tuple[str, int, str]]):
    blocks = Blocks(count, quota)
    tables: list[list[int]] = []
    for move, number, tenant in moves:
        if move == "open":
            keys = chain([number] * BLOCK_SIZE * (number % 3 + 1), tenant.encode() * 16)
            table = blocks.hold(keys)
            if blocks.available < len(keys) - len(table):
                blocks.release(table)
                continue
            for key in keys[len(table) :]:
                block = blocks.take()
                assert block is not None
                blocks.publish(block, key, tenant)
                table.append(block)
            tables.append(table)
        elif tables:
            blocks.release(tables.pop(number % len(tables)), suspect=move == "suspect")
        references = Counter(block for table in tables for block in table)
        assert blocks.held == len(references)
        assert blocks.available == count - len(references)
        assert max(blocks.idle_of("a"), blocks.idle_of("b")) <= quota
    for table in tables:
        blocks.release(table)
    assert blocks.held == 0
    assert len(set(blocks.take_many(count))) == count  # every block is there once
    assert blocks.take() is None
