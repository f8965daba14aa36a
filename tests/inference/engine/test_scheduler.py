import hypothesis.strategies as st
from hypothesis import given, settings

from services.inference.engine.blocks import Blocks
from services.inference.engine.calls import Limits, Sampling, WorkClass
from services.inference.engine.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, REMEMBERED, Counters, Turns
from services.inference.engine.scheduler import Plan, Scheduler
from services.inference.engine.sequence import Sequence, State
from services.inference.engine.step import BLOCK_SIZE, Draw

ROOT = b"r" * 16
KEY = 0


def sequence(prompt: int = 8, output: int = 4, tenant: str = "a", work_class: WorkClass = WorkClass.INTERACTIVE) -> Sequence:
    """Its prompt is its own: nothing is shared by chance."""
    global KEY
    KEY += 1
    draw = Draw(Sampling(seed=0), 0, 0, (), prompt)
    tokens = [KEY * 10_000 + i for i in range(prompt)]
    limits = Limits(output, ())
    return Sequence(KEY, tokens, tenant=tenant, work_class=work_class, root=ROOT, draw=draw, limits=limits)


def scheduler(blocks: int = 64, budget: int = 32, most_running: int = 8) -> Scheduler:
    return Scheduler(Blocks(blocks, blocks), budget, most_running)


def step(s: Scheduler) -> Plan:
    """Plan and succeed: each that reaches its end draws a token."""
    plan = s.plan()
    for each, count in plan:
        s.advance(each, count)
        if not each.pending and each.append(1) is not None:
            s.remove(each)
    return plan


def names(plan: Plan) -> list[tuple[int, int]]:
    return [(each.key, count) for each, count in plan]


def test_every_decoding_sequence_gets_its_token_and_prefill_the_rest():
    s = scheduler(budget=10)
    first, second = sequence(8), sequence(20)
    s.add(first)
    s.add(second)
    assert names(step(s)) == [(first.key, 8), (second.key, 2)]
    assert names(step(s)) == [(first.key, 1), (second.key, 9)]
    assert names(step(s)) == [(first.key, 1), (second.key, 9)]
    assert names(step(s)) == [(first.key, 1), (second.key, 1)]


def test_classes_come_before_age():
    s = scheduler(budget=8)
    explain, batch, interactive = (sequence(8, 1, work_class=c) for c in reversed(WorkClass))
    for each in (explain, batch, interactive):
        s.add(each)
    assert [names(step(s))[0][0] for _ in range(3)] == [interactive.key, batch.key, explain.key]


def test_tenants_take_turns_and_inside_a_tenant_age_decides():
    s = scheduler(budget=8)
    heavy = [sequence(8, 1, "heavy") for _ in range(3)]
    light = [sequence(8, 1, "light") for _ in range(3)]
    for each in (*heavy, *light):
        s.add(each)
    order = [names(step(s))[0][0] for _ in range(6)]
    assert order == [heavy[0].key, light[0].key, heavy[1].key, light[1].key, heavy[2].key, light[2].key]


def test_a_newcomer_starts_at_the_current_minimum():
    counters = Counters()
    for tenant in ("a", "b"):
        counters.enter(tenant)
    counters.charge("a", 100)
    counters.charge("b", 70)
    counters.enter("new")
    assert counters["new"] == 70
    counters.leave("a")
    counters.enter("a")
    assert counters["a"] == 100  # leaving buys nothing


def test_an_idle_engine_forgives_nobody_less_than_a_stranger():
    counters = Counters()
    counters.enter("a")
    counters.charge("a", 100)
    counters.leave("a")
    counters.enter("new")
    assert counters["new"] == counters["a"] == 100


def test_counters_of_tenants_at_rest_are_bounded():
    counters = Counters()
    for number in range(3 * REMEMBERED):
        counters.enter(str(number))
        counters.leave(str(number))
    assert len(counters._served) <= REMEMBERED


def test_the_youngest_of_the_lowest_class_is_preempted_and_keeps_its_tokens():
    s = scheduler(blocks=4, budget=64)
    old = sequence(BLOCK_SIZE, 40)
    batch = sequence(BLOCK_SIZE - 1, 40, work_class=WorkClass.BATCH)
    young = sequence(BLOCK_SIZE - 1, 40)
    for each in (old, batch, young):
        s.add(each)
    while not s.preemptions:
        step(s)
    assert (old.state, batch.state, young.state) == (State.DECODING, State.WAITING, State.DECODING)
    assert batch.blocks == [] and batch.produced > 1 and len(batch.tokens) == batch.prompt_length + batch.produced
    finished = []
    while plan := step(s):
        finished += [each for each, _ in plan if each.state is State.ENDED]
    assert finished == [old, young, batch]
    assert s.blocks.held == 0


def test_a_higher_class_pushes_a_lower_one_out_but_not_its_own():
    s = scheduler(blocks=4, budget=64)
    batch = sequence(3 * BLOCK_SIZE, 10, work_class=WorkClass.BATCH)
    s.add(batch)
    step(s)
    same, urgent = sequence(3 * BLOCK_SIZE, 10, work_class=WorkClass.BATCH), sequence(3 * BLOCK_SIZE, 10)
    s.add(same)
    assert names(step(s)) == [(batch.key, 1)]
    s.add(urgent)
    assert names(step(s)) == [(urgent.key, 3 * BLOCK_SIZE)]
    assert batch.state is State.WAITING


def test_nothing_overtakes_the_one_that_does_not_fit():
    s = scheduler(blocks=4, budget=64)
    first = sequence(2 * BLOCK_SIZE, 3)
    large, small = sequence(4 * BLOCK_SIZE, 1), sequence(4, 1)
    for each in (first, large, small):
        s.add(each)
    served = [key for _ in range(5) for key, _ in names(step(s))]
    assert served == [first.key, first.key, first.key, large.key, small.key]


def test_a_prefill_that_holds_blocks_goes_on_while_another_waits_for_some():
    s = scheduler(blocks=4, budget=16)
    long = sequence(3 * BLOCK_SIZE, 1, "a")
    s.add(long)
    step(s)
    other = sequence(2 * BLOCK_SIZE, 1, "b")
    s.add(other)  # its tenant has the smaller counter, but it cannot start
    assert names(step(s)) == [(long.key, 16)]
    assert names(step(s)) == [(long.key, 16)]
    assert names(step(s)) == [(other.key, 16)]


def test_a_step_that_failed_is_planned_again():
    s = scheduler(budget=20)
    first, second = sequence(16), sequence(16)
    s.add(first)
    s.add(second)
    counter = s.counters["a"]
    plan = s.plan()
    s.give_back(plan)
    assert s.counters["a"] == counter
    assert names(s.plan()) == names(plan)


def test_a_budget_below_the_decoding_ones_serves_them_in_turn():
    s = scheduler(budget=64)
    sequences = [sequence(4, 100) for _ in range(5)]
    for each in sequences:
        s.add(each)
    step(s)
    s.budget = 2
    served = [key for _ in range(5) for key, _ in names(step(s))]
    assert sorted(served) == sorted(2 * [each.key for each in sequences])


def test_the_number_of_running_sequences_is_bounded():
    s = scheduler(most_running=3)
    for _ in range(9):
        s.add(sequence(2, 5))
    most = 0
    while step(s):
        most = max(most, s.running)
    assert most == 3


def test_a_shared_prefix_is_found():
    s = scheduler(budget=100)
    tokens = list(range(40))
    first = Sequence(-2, tokens, tenant="a", root=ROOT)
    second = Sequence(-1, tokens, tenant="a", root=ROOT)
    s.add(first)
    ((_, count),) = s.plan()
    s.advance(first, count)
    s.add(second)
    plan = s.plan()
    assert (second, 8) in plan
    assert second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    for each in (first, second):
        s.remove(each)
        s.remove(each)  # twice is once
    assert s.blocks.held == 0


TENANTS = st.sampled_from("abc")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(TENANTS, st.integers(1, 60), st.integers(1, 12)), min_size=30, max_size=120),
    st.integers(4, 64),
    st.integers(1, 6),
)
def test_the_gap_between_backlogged_tenants_is_bounded(arrivals: list[tuple[str, int, int]], budget: int, most_running: int):
    """VTC's promise: served tokens of two tenants that both wait differ by a constant, however unequal what they ask."""
    s = scheduler(blocks=1000, budget=budget, most_running=most_running)
    waiting: dict[str, set[Sequence]] = {"a": set(), "b": set(), "c": set()}
    for tenant, prompt, output in arrivals:
        each = sequence(prompt, output, tenant)
        waiting[tenant].add(each)
        s.add(each)
    bound = INPUT_WEIGHT * 60 + OUTPUT_WEIGHT * 12 * most_running
    while step(s):
        waiting = {tenant: {each for each in queue if each.state is State.WAITING} for tenant, queue in waiting.items()}
        backlogged = [s.counters[tenant] for tenant in waiting if waiting[tenant]]
        if backlogged:
            assert max(backlogged) - min(backlogged) <= bound


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "front", "call", "remove"]), TENANTS, st.integers(0, 9)), max_size=80))
def test_turns_agree_with_a_sorted_list(moves: list[tuple[str, str, int]]):
    counters = Counters()
    turns = Turns(counters)
    model: dict[str, list[Sequence]] = {"a": [], "b": [], "c": []}
    for move, tenant, number in moves:
        queue = model[tenant]
        if move in ("push", "front"):
            each = sequence(tenant=tenant)
            counters.enter(tenant)
            turns.push(each, front=move == "front")
            queue.insert(0 if move == "front" else len(queue), each)
        elif move == "remove" and queue:
            assert turns.remove(queue.pop(number % len(queue)))
        elif move == "call":
            called = turns.call()
            expected = [(counters[name], q[0]) for name, q in model.items() if q]
            if called is None:
                assert not expected
                continue
            assert counters[called.tenant] == min(counter for counter, _ in expected)
            assert called is model[called.tenant][0]
            counters.charge(called.tenant, number)
            turns.enter(called.tenant)
        assert len(turns) == sum(map(len, model.values()))
