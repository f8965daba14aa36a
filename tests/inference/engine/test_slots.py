import math
from collections import defaultdict

import hypothesis.strategies as st
from hypothesis import given

from services.inference.engine.calls import WorkClass
from services.inference.engine.sequence import Sequence
from services.inference.engine.slots import SLICE_S, Slots


def sequence(key: int, adapter: str, tenant: str = "t", work_class: WorkClass = WorkClass.INTERACTIVE) -> Sequence:
    return Sequence(key, [1], tenant=tenant, adapter=adapter, work_class=work_class)


def holders(slots: Slots) -> dict[str, int]:
    return {adapter: holder.slot for adapter, holder in slots._holders.items()}


def test_slots_are_given_low_first_and_in_the_order_of_asking():
    slots = Slots(2)
    assert [slots.enter(sequence(key, name)) for key, name in enumerate("abc")] == [False] * 3
    turns = slots.rotate(0.0)
    assert [(turn.adapter, turn.slot) for turn in turns] == [("a", 1), ("b", 2)]
    assert [one.key for turn in turns for one in turn.started] == [0, 1]
    assert [one.adapter for one in slots.parked] == ["c"]


def test_work_of_a_holder_runs_at_once_with_its_slot():
    slots = Slots(1)
    slots.enter(sequence(0, "a"))
    slots.rotate(0.0)
    second = sequence(1, "a")
    assert slots.enter(second) and second.slot == 1


def test_the_longest_idle_adapter_leaves_and_nobody_is_displaced():
    slots = Slots(2)
    first, second = sequence(0, "a"), sequence(1, "b")
    slots.enter(first), slots.enter(second)
    slots.rotate(0.0)
    slots.leave(second)
    slots.leave(first)
    slots.enter(sequence(2, "c"))
    (turn,) = slots.rotate(0.0)
    assert (turn.adapter, turn.slot, turn.displaced) == ("c", 2, [])
    assert "a" in slots and "b" not in slots


def test_an_adapter_with_work_keeps_its_slot_for_a_slice_and_then_yields():
    slots = Slots(1)
    old = sequence(0, "a")
    slots.enter(old)
    slots.rotate(0.0)
    slots.enter(sequence(1, "b"))
    assert slots.rotate(SLICE_S - 0.01) == []
    (turn,) = slots.rotate(SLICE_S)
    assert (turn.adapter, turn.displaced) == ("b", [old])
    assert slots.parked == [old]


def test_urgent_work_does_not_wait_for_the_slice_of_less_urgent_work_and_is_not_displaced_by_it():
    slots = Slots(1)
    explained = sequence(0, "a", work_class=WorkClass.EXPLAIN)
    slots.enter(explained)
    slots.rotate(0.0)
    slots.enter(sequence(1, "b"))
    (turn,) = slots.rotate(0.0)
    assert turn.displaced == [explained]
    assert slots.rotate(10 * SLICE_S) == []


def test_the_tenant_that_was_served_least_goes_first():
    served = {"heavy": 100, "light": 1}
    slots = Slots(1, served=served.__getitem__)
    slots.enter(sequence(0, "a", "heavy"))
    slots.enter(sequence(1, "b", "light"))
    assert [turn.adapter for turn in slots.rotate(0.0)] == ["b"]


def test_a_forgotten_adapter_frees_its_slot():
    slots = Slots(1)
    only = sequence(0, "a")
    slots.enter(only)
    slots.rotate(0.0)
    slots.leave(only)
    assert slots.forget("a") == 1
    assert slots.forget("a") is None
    slots.enter(sequence(1, "b"))
    assert [turn.slot for turn in slots.rotate(0.0)] == [1]


@given(adapters=st.integers(1, 12), count=st.integers(1, 5), tick_s=st.sampled_from([0.1, 0.7, 2.0]))
def test_work_without_end_starves_no_adapter(adapters: int, count: int, tick_s: float):
    """Each of n adapters of one tenant gets a slot again within ceil(n / count) slices, and a tick for each turn."""
    slots = Slots(count)
    for key in range(adapters):
        slots.enter(sequence(key, f"a{key}"))
    bound = math.ceil(adapters / count) * (SLICE_S + tick_s)
    parked_at = {f"a{key}": 0.0 for key in range(adapters)}
    for tick in range(math.ceil(4 * bound / tick_s)):
        now = tick * tick_s
        for turn in slots.rotate(now):
            assert now - parked_at.pop(turn.adapter) <= bound
            for one in turn.displaced:
                parked_at[one.adapter] = now
    assert all(4 * bound - since <= bound + tick_s for since in parked_at.values())


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(0, 5), st.sampled_from(list(WorkClass)), st.booleans()),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(st.just("rotate"), st.floats(0, 5)),
        st.tuples(st.just("forget"), st.integers(0, 5)),
    ),
    max_size=60,
)


@given(count=st.integers(1, 3), operations=OPERATIONS)
def test_every_sequence_is_in_one_place_and_every_slot_has_one_adapter(count: int, operations: list[tuple[object, ...]]):
    slots, here, running = Slots(count), dict[int, Sequence](), set[int]()
    now, keys = 0.0, 0
    for operation in operations:
        match operation:
            case ("enter", int(adapter), WorkClass() as work_class, bool(front)):
                one = here[keys] = sequence(keys, f"a{adapter}", work_class=work_class)
                if slots.enter(one, front):
                    running.add(keys)
                keys += 1
            case ("leave", int(key)) if key in here:
                slots.leave(here.pop(key))
                running.discard(key)
            case ("rotate", float(seconds)):
                now += seconds
                for turn in slots.rotate(now):
                    assert {one.key for one in turn.displaced} <= running
                    running -= {one.key for one in turn.displaced}
                    assert all(one.slot == turn.slot for one in turn.started)
                    running |= {one.key for one in turn.started}
                assert not slots.parked or len(holders(slots)) == count  # a free slot is never left while one waits
            case ("forget", int(adapter)) if not any(here[key].adapter == f"a{adapter}" for key in running):
                slots.forget(f"a{adapter}")
        held = holders(slots)
        assert len(held) <= count and len(set(held.values())) == len(held)
        assert {one.key for one in slots.parked} == here.keys() - running
        assert all(here[key].slot == held[here[key].adapter] for key in running)
        waiting = defaultdict(set)
        for one in slots.parked:
            waiting[one.adapter].add(one.key)
        assert not waiting.keys() & held.keys()
