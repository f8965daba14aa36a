from collections import Counter, defaultdict
from collections.abc import Sequence
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from services.inference.engine.blocks import blocks_for
from services.inference.engine.calls import (
    Abort,
    Call,
    Done,
    Drain,
    Embed,
    Embedded,
    Ended,
    FinishReason,
    FromEngine,
    Generate,
    Limits,
    Load,
    PromptScored,
    Sampling,
    Score,
    Scored,
    Stop,
    ToEngine,
    Token,
    Usage,
    WorkClass,
)
from services.inference.engine.engine import ERRORS, GROW_AFTER_STEPS, Engine, offered
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import DeviceLost, Row
from tests.fakes.runner import HELLO, FakeRunner, alone, embedding, history_of, logprob, next_token

GREEDY = Sampling(seed=0, temperature=0.0)
ENDS = (0, 1)
POISON = 999  # a token that the scripted forward cannot bear


class Clock:
    """Time that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An engine over a fake runner, and all that it said."""

    def __init__(self, runner: FakeRunner | None = None, **asked: Any) -> None:
        self.runner = runner or FakeRunner()
        self.clock = Clock()
        self.engine = Engine(self.runner, HELLO, EngineSettings(**asked), self.clock)
        self.events: list[FromEngine] = []
        self.loads: list[Load] = []

    def take(self, *messages: ToEngine) -> "Bench":
        for message in messages:
            self.engine.take(message)
        return self

    def step(self, count: int = 1) -> list[FromEngine]:
        new: list[FromEngine] = []
        for _ in range(count):
            events = self.engine.step()
            self.loads += [event for event in events if isinstance(event, Load)]
            new += [event for event in events if not isinstance(event, Load)]
        self.events += new
        return new

    def finish(self) -> "Bench":
        """Step until idle; then nothing may be left behind (I7)."""
        while not self.engine.idle:
            self.step()
        assert self.engine.blocks.held == 0
        assert self.runner._means == {}
        assert self.engine._present == 0 and not self.engine._scheduler.counters._present
        assert self.engine._scheduler.running == self.engine._scheduler.decoding == 0
        return self

    def tokens(self, id: str, index: int = 0) -> list[int]:
        return [e.token_id for e in self.events if isinstance(e, Token) and (e.id, e.index) == (id, index)]

    def reason(self, id: str, index: int = 0) -> FinishReason:
        (ended,) = [e for e in self.events if isinstance(e, Ended) and (e.id, e.index) == (id, index)]
        return ended.reason

    def done(self, id: str) -> Done:
        (done,) = [e for e in self.events if isinstance(e, Done) and e.id == id]
        return done


def prompt(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(2 + (salt * 37 + i * 11) % 900 for i in range(length))


def generate(id: str, tokens: Sequence[int] = prompt(20), count: int = 5, **changes: Any) -> Generate:
    limits = changes.pop("limits", Limits(count, ENDS, ignore_end_token=True))
    fields: dict[str, Any] = {"sampling": GREEDY, "limits": limits, "deadline_s": 100.0, "tenant": "t", "cache_salt": b"salt"}
    return Generate(id, tuple(tokens), **(fields | changes))


def score(id: str, prefix: Sequence[int], continuations: Sequence[Sequence[int]], **changes: Any) -> Score:
    fields: dict[str, Any] = {"deadline_s": 100.0, "tenant": "t", "cache_salt": b"salt"}
    return Score(id, tuple(prefix), tuple(map(tuple, continuations)), **(fields | changes))


def embed(id: str, *inputs: Sequence[int], **changes: Any) -> Embed:
    return Embed(id, tuple(map(tuple, inputs)), **({"deadline_s": 100.0, "tenant": "t", "cache_salt": b"salt"} | changes))


def cannot_bear(token: int, rows: Sequence[Row]) -> None:
    if any(token in row.tokens for row in rows):
        raise ValueError(f"cannot bear {token}")


def poisoned(rows: Sequence[Row]) -> None:
    cannot_bear(POISON, rows)


# Generate


def test_an_output_is_what_the_model_says_alone():
    b = Bench().take(generate("a", count=5)).finish()
    assert b.tokens("a") == alone(prompt(20), GREEDY, 0, 5, 1000)
    assert b.reason("a") is FinishReason.LENGTH
    assert b.done("a").usage == Usage(20, 0, 5)
    assert b.done("a").error is None
    assert isinstance(b.events[-1], Done)


def test_a_long_prompt_is_computed_in_chunks():
    runner = FakeRunner()
    b = Bench(runner, max_step_tokens=7).take(generate("a", prompt(50))).finish()
    assert b.tokens("a") == alone(prompt(50), GREEDY, 0, 5, 1000)
    assert runner.widest == 7
    assert runner.computed == 50 + 4  # the last token drawn is never computed


def test_an_end_token_ends_it_and_is_billed_but_not_sent():
    said = alone(prompt(20), GREEDY, 0, 9, 1000)
    b = Bench().take(generate("a", limits=Limits(9, (said[3],)))).finish()
    assert b.tokens("a") == said[:3]
    assert b.reason("a") is FinishReason.END_TOKEN
    assert b.done("a").usage.output_tokens == 4


def test_outputs_share_the_full_blocks_of_their_prompt():
    runner = FakeRunner()
    sampled = Sampling(seed=5)
    b = Bench(runner).take(generate("a", prompt(40), 6, outputs=4, sampling=sampled)).finish()
    for index in range(4):
        assert b.tokens("a", index) == alone(prompt(40), sampled, index, 6, 1000)
    assert len({tuple(b.tokens("a", index)) for index in range(4)}) == 4
    assert runner.computed == 40 + 3 * 8 + 4 * 5
    assert b.done("a").usage == Usage(40, 0, 24)


def test_a_prompt_seen_before_is_taken_from_the_cache():
    b = Bench().take(generate("a", prompt(50))).finish().take(generate("b", prompt(50))).finish()
    assert b.tokens("b") == b.tokens("a")
    assert b.done("b").usage == Usage(50, 48, 5)
    assert b.engine.load().cached_tokens == 48


def test_A27_no_tenant_finds_what_another_computed():
    b = Bench()
    hits = {True: 0, False: 0}
    for number in range(100):
        shared, others = f"t{number % 2}", f"t{(number + 1) % 2}"
        tokens = prompt(40, number)
        for id, tenant in (("warm", shared), ("same", shared), ("cross", others)):
            b.take(generate(id + str(number), tokens, 1, tenant=tenant, cache_salt=tenant.encode())).finish()
        hits[True] += b.done(f"same{number}").usage.cached_input_tokens > 0
        hits[False] += b.done(f"cross{number}").usage.cached_input_tokens > 0
    assert hits == {True: 100, False: 0}


def test_a_prompt_is_scored_even_when_it_is_cached():
    tokens = prompt(40)
    expected = tuple(logprob(history_of(tokens[:i]), tokens[i]) for i in range(1, 40))
    b = Bench(max_step_tokens=9).take(generate("warm", tokens)).finish()
    b.take(generate("a", tokens, outputs=2, prompt_logprobs=True, top_logprobs=2)).finish()
    (scored,) = [e for e in b.events if isinstance(e, PromptScored)]
    assert scored.logprobs == expected
    assert scored.top[0] == tuple((i, logprob(history_of(tokens[:1]), i)) for i in range(2))
    assert len(scored.top) == 39
    assert b.done("a").usage == Usage(40, 0, 10)
    first = next(e for e in b.events if isinstance(e, Token) and e.id == "a")
    assert b.events.index(scored) < b.events.index(first)
    assert first.logprob == logprob(history_of(tokens), first.token_id)
    assert len(first.top) == 2


def test_a_prompt_of_one_token_has_no_scores():
    b = Bench().take(generate("a", prompt(1), prompt_logprobs=True)).finish()
    assert [e.logprobs for e in b.events if isinstance(e, PromptScored)] == [()]


def test_a_stop_ends_one_output_before_the_next_step():
    b = Bench().take(generate("a", prompt(40), 50, outputs=2))
    b.step(5)
    said = len(b.tokens("a", 0))
    b.take(Stop("a", 0), Stop("a", 0), Stop("a", 9), Stop("unknown", 0)).finish()
    assert (len(b.tokens("a", 0)), b.reason("a", 0)) == (said, FinishReason.STOPPED)
    assert (len(b.tokens("a", 1)), b.reason("a", 1)) == (50, FinishReason.LENGTH)
    assert b.done("a").usage == Usage(40, 0, said + 50)


def test_the_next_output_takes_over_from_one_that_stopped_early():
    b = Bench(max_step_tokens=10).take(generate("a", prompt(40), 3, outputs=3, prompt_logprobs=True))
    b.step()
    b.take(Stop("a", 0)).finish()
    assert [len(b.tokens("a", i)) for i in range(3)] == [0, 3, 3]
    (scored,) = [e for e in b.events if isinstance(e, PromptScored)]
    assert len(scored.logprobs) == 39
    assert b.done("a").usage == Usage(40, 0, 6)


def test_A5_an_abort_costs_no_further_step():
    runner = FakeRunner()
    b = Bench(runner, max_step_tokens=8).take(generate("a", prompt(30), 50), generate("b", prompt(30, 1), 50))
    b.step(2)
    computed = runner.computed
    b.take(Abort(("a", "unknown")), Abort(("a",)))
    assert b.engine.blocks.held == blocks_for(30) - blocks_for(30) or b.engine.blocks.held <= blocks_for(30)
    b.take(Abort(("b",))).finish()
    assert runner.computed == computed == 16
    assert b.reason("a") is b.reason("b") is FinishReason.CANCELLED
    assert b.done("a").usage.input_tokens + b.done("b").usage.input_tokens == computed
    assert b.done("a").error is None


def test_A5_ten_thousand_hang_ups_leave_nothing():
    b = Bench(max_waiting=20_000)
    for number in range(10_000):
        b.take(generate(str(number), count=50))
        if number % 4 == 0:
            b.step()
        b.take(Abort((str(number),)))
    b.finish()
    assert sum(isinstance(e, Done) for e in b.events) == 10_000
    assert sum(e.usage.output_tokens for e in b.events if isinstance(e, Done)) == b.runner.drawn
    assert len(b.engine._alarms) <= 64


def test_a_time_limit_keeps_what_was_said_and_a_deadline_is_hard():
    b = Bench().take(generate("soft", count=50, time_limit_s=5.0), generate("hard", prompt(9), 50, deadline_s=7.0))
    b.take(score("scored", prompt(5), [prompt(600)], deadline_s=-1.0), embed("embedded", prompt(600), deadline_s=0.0))
    b.step(3)
    assert (b.done("scored").error, b.done("embedded").error) == ("deadline", "deadline")
    assert b.done("embedded").usage == Usage(0, 0, 0)
    b.clock.now += 5.0
    b.step(2)
    assert b.reason("soft") is FinishReason.TIME_LIMIT
    assert len(b.tokens("soft")) == 3 == b.done("soft").usage.output_tokens
    assert b.done("soft").error is None
    b.clock.now += 2.0
    b.finish()
    assert b.reason("hard") is FinishReason.DEADLINE
    assert len(b.tokens("hard")) == 5


def test_timings_add_up():
    b = Bench(max_step_tokens=10).take(generate("a", prompt(20), 3))
    b.clock.now += 1.0
    while not b.engine.idle:
        b.step()
        b.clock.now += 2.0
    timings = b.done("a").timings
    assert (timings.queue_s, timings.prefill_s, timings.decode_s) == (1.0, 2.0, 4.0)


# Score and Embed


def test_continuations_are_scored_from_one_prefix():
    runner = FakeRunner()
    prefix, labels = prompt(40), [prompt(3, 1), prompt(1, 2), (), prompt(20, 3)]
    b = Bench(runner, max_step_tokens=16).take(score("a", prefix, labels, probes=(5, 6), first_probes=(7, 8))).finish()
    (scored,) = [e for e in b.events if isinstance(e, Scored)]
    for label, found in zip(labels, scored.continuations, strict=True):
        states = [history_of(prefix + label[:i]) for i in range(len(label) + 1)]
        assert found.logprobs == tuple(logprob(state, token) for state, token in zip(states, label, strict=False))
        assert found.probes == tuple((logprob(state, 5), logprob(state, 6)) for state in states)
    assert scored.first_probes == (logprob(history_of(prefix), 7), logprob(history_of(prefix), 8))
    assert b.done("a").usage == Usage(40 + 24, 0, 0)
    assert runner.computed == 40 + 24 + 3 * 8  # the prefix once, but for its last, partial block


def test_without_probes_the_last_token_is_not_computed():
    runner = FakeRunner()
    prefix, labels = prompt(33), [prompt(2, 1), prompt(1, 2)]
    b = Bench(runner).take(score("a", prefix, labels)).finish()
    (scored,) = [e for e in b.events if isinstance(e, Scored)]
    assert [len(c.logprobs) for c in scored.continuations] == [2, 1]
    assert [c.probes for c in scored.continuations] == [(), ()]
    assert runner.computed == 34 + 1
    assert b.done("a").usage == Usage(36, 0, 0)


@pytest.mark.parametrize("continuations", [[], [()], [(), ()]])
def test_first_probes_need_no_continuation(continuations: list[tuple[int, ...]]):
    b = Bench().take(score("a", prompt(5), continuations, first_probes=(7,)), score("b", prompt(5), continuations)).finish()
    first, second = (e for e in b.events if isinstance(e, Scored))
    by_id = {first.id: first, second.id: second}
    assert by_id["a"].first_probes == (logprob(history_of(prompt(5)), 7),)
    assert by_id["b"].first_probes == ()
    assert [c.logprobs for c in by_id["a"].continuations] == [()] * len(continuations)


def test_a_prefix_scored_before_is_taken_from_the_cache():
    b = Bench().take(score("a", prompt(50), [(2,)])).finish().take(score("b", prompt(50), [(3,)])).finish()
    assert b.done("b").usage == Usage(51, 48, 0)


def test_inputs_are_pooled_over_chunks():
    inputs = (prompt(30), prompt(1, 1), prompt(17, 2))
    b = Bench(max_step_tokens=7).take(embed("a", *inputs), embed("b")).finish()
    vectors = {e.id: e.vectors for e in b.events if isinstance(e, Embedded)}
    assert vectors == {"a": tuple(map(embedding, inputs)), "b": ()}
    assert b.done("a").usage == Usage(48, 0, 0)


def test_a_preempted_input_is_pooled_from_the_start():
    runner = FakeRunner(blocks=4)
    b = Bench(runner, max_step_tokens=8).take(embed("a", prompt(60), work_class=WorkClass.BATCH))
    b.step(3)
    b.take(generate("b", prompt(60, 1), 1)).finish()
    assert b.engine._scheduler.preemptions == 1
    (embedded,) = [e for e in b.events if isinstance(e, Embedded)]
    assert embedded.vectors == (embedding(prompt(60)),)
    assert b.done("a").usage == Usage(60, 0, 0)


# Refusals


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (generate("a", ()), "empty_input"),
        (generate("a", (5, 1000)), "token_out_of_range"),
        (generate("a", (5, -1)), "token_out_of_range"),
        (generate("a", sampling=Sampling(seed=0, logit_bias=((1000, 1.0),))), "token_out_of_range"),
        (generate("a", outputs=5), "out_of_bounds"),
        (generate("a", outputs=0), "out_of_bounds"),
        (generate("a", count=0), "out_of_bounds"),
        (generate("a", top_logprobs=6), "out_of_bounds"),
        (generate("a", sampling=Sampling(seed=0, temperature=float("nan"))), "out_of_bounds"),
        (generate("a", sampling=Sampling(seed=0, temperature=float("inf"))), "out_of_bounds"),
        (generate("a", sampling=Sampling(seed=0, top_p=0.0)), "out_of_bounds"),
        (generate("a", sampling=Sampling(seed=0, repetition=0.0)), "out_of_bounds"),
        (generate("a", sampling=Sampling(seed=0, logit_bias=((1, float("inf")),))), "out_of_bounds"),
        (generate("a", prompt(100), 101), "over_context"),
        (score("a", (), [(2,)]), "empty_input"),
        (score("a", (2,), [(1000,)]), "token_out_of_range"),
        (score("a", (2,), [(3,)], probes=(1000,)), "token_out_of_range"),
        (score("a", prompt(100), [(2,), prompt(101)]), "over_context"),
        (embed("a", (2,), ()), "empty_input"),
        (embed("a", prompt(201)), "over_context"),
    ],
)
def test_A2_what_cannot_run_is_refused_with_a_word(call: Call, word: str):
    b = Bench(FakeRunner(context=200)).take(call).finish()
    assert b.done("a").error == word
    assert word in ERRORS
    assert b.done("a").usage == Usage(0, 0, 0)
    assert b.runner.steps == 0
    if isinstance(call, Generate):
        assert {e.reason for e in b.events if isinstance(e, Ended)} <= {FinishReason.ERROR}


def test_what_can_never_fit_the_pool_is_refused_and_what_just_fits_is_not():
    b = Bench(FakeRunner(blocks=4, context=1000)).take(generate("fits", prompt(60), 4)).finish()
    assert b.done("fits").error is None
    b.take(generate("over", prompt(60), 5)).finish()
    assert b.done("over").error == "over_context"  # the pool is what is offered as context
    assert offered(HELLO, b.runner).context == 64


def test_a_full_queue_refuses():
    b = Bench(max_waiting=3, max_sequences=1, max_step_tokens=8)
    b.take(*(generate(str(n), count=2) for n in range(5))).finish()
    assert [b.done(str(n)).error for n in range(5)] == [None, None, None, "queue_full", "queue_full"]


def test_a_drain_finishes_what_runs_and_takes_no_more():
    b = Bench().take(generate("a")).take(Drain(), generate("b")).finish()
    assert (b.reason("a"), b.done("b").error) == (FinishReason.LENGTH, "draining")


# Faults


def test_A20_F9_a_request_that_raises_hurts_no_neighbour():
    b = Bench(FakeRunner(fails=poisoned))
    neighbours = [f"n{n}" for n in range(9)]
    b.take(*(generate(id, prompt(18, n)) for n, id in enumerate(neighbours[:5])))
    b.step(2)
    b.take(generate("evil", (*prompt(3), POISON)), *(generate(id, prompt(18, n + 5)) for n, id in enumerate(neighbours[5:]))).finish()
    assert (b.reason("evil"), b.done("evil").error) == (FinishReason.ERROR, "step_failed")
    for n, id in enumerate(neighbours):
        assert b.tokens(id) == alone(prompt(18, n), GREEDY, 0, 5, 1000)
        assert b.done(id).usage == Usage(18, 0, 5)


def test_A20_the_engine_survives_a_thousand():
    b = Bench(FakeRunner(fails=poisoned)).take(generate("good", prompt(18), 300))
    for n in range(1000):
        b.take(generate(f"evil{n}", (*prompt(n % 20), POISON), outputs=1 + n % 4))
        if n % 4 == 3:
            b.step()
    b.finish()
    assert b.tokens("good") == alone(prompt(18), GREEDY, 0, 300, 1000)
    assert Counter(e.error for e in b.events if isinstance(e, Done)) == {None: 1, "step_failed": 1000}


def test_A20_a_call_with_several_rows_ends_once():
    b = Bench(FakeRunner(fails=poisoned)).take(
        score("evil", prompt(5), [(POISON, 3), (2, 3), (POISON, 4)]), embed("worse", (POISON,), (2,), (POISON, 3)), generate("good")
    )
    b.finish()
    assert (b.done("evil").error, b.done("worse").error, b.done("good").error) == ("step_failed", "step_failed", None)


def test_F9_a_fault_of_one_step_hurts_nobody():
    failed = []

    def fails(rows: Sequence[Row]) -> None:
        if len(rows) > 1 and not failed:
            failed.append(len(rows))
            raise RuntimeError("once")

    b = Bench(FakeRunner(fails=fails)).take(*(generate(str(n), prompt(18, n)) for n in range(6))).finish()
    assert failed == [6]
    assert all(b.done(str(n)).error is None for n in range(6))


def test_a_row_that_answers_nan_ends_alone_and_is_not_cached():
    b = Bench(FakeRunner(spoils=lambda row: row.draw is not None and 333 in row.draw.history))
    evil = (333, *prompt(40))
    b.take(generate("evil", evil, outputs=2), generate("good")).finish()
    assert (b.reason("evil", 0), b.reason("evil", 1), b.done("evil").error) == (FinishReason.ERROR, FinishReason.ERROR, "nan")
    assert b.reason("good") is FinishReason.LENGTH
    b.runner.spoils = None
    b.take(generate("again", evil)).finish()
    assert b.done("again").usage == Usage(41, 0, 5)


def test_F8_memory_that_runs_out_shrinks_the_step_and_fails_nobody():
    runner = FakeRunner(most_tokens=20)
    b = Bench(runner, max_step_tokens=512).take(*(generate(str(n), prompt(50, n), 30) for n in range(4))).finish()
    for n in range(4):
        assert b.tokens(str(n)) == alone(prompt(50, n), GREEDY, 0, 30, 1000)
    assert runner.widest <= 20
    assert b.engine._scheduler.budget < 512
    runner.most_tokens = None
    b.take(generate("long", prompt(8), 8 * GROW_AFTER_STEPS)).finish()
    assert b.engine._scheduler.budget == 512  # grown back


def test_F8_only_what_fails_alone_with_one_token_is_failed():
    def fails(rows: Sequence[Row]) -> None:
        if any(row.start >= 30 for row in rows):
            raise MemoryError

    b = Bench(FakeRunner(fails=fails)).take(generate("long", prompt(29), 5), generate("short", prompt(5, 1), 10)).finish()
    assert (b.done("long").error, b.done("short").error) == ("out_of_memory", None)
    assert b.tokens("short") == alone(prompt(5, 1), GREEDY, 0, 10, 1000)


def test_a_lost_device_is_not_blamed_on_a_call():
    def fails(rows: Sequence[Row]) -> None:
        raise DeviceLost

    b = Bench(FakeRunner(fails=fails)).take(generate("a"))
    with pytest.raises(DeviceLost):
        b.step()


# Load


def test_load_says_what_waits_and_what_was_measured():
    b = Bench(max_step_tokens=30, max_sequences=2).take(*(generate(str(n), prompt(20, n), 10) for n in range(3)))

    class Ticking(Clock):
        def __call__(self) -> float:
            b.clock.now += 0.01
            return b.clock.now

    b.engine._clock = Ticking()
    b.step()
    load = b.loads[-1]
    assert (load.waiting_sequences, load.running_sequences, load.batch, load.steps) == (1, 2, 2, 1)
    assert load.queued_tokens == 10 + 20
    assert load.running_tokens == 9 + 10
    assert (load.free_blocks, load.total_blocks) == (60, 64)
    assert load.prefill_tokens_per_s == pytest.approx(30 / load.step_s)
    b.finish()
    last = b.loads[-1]
    assert (last.waiting_sequences, last.running_sequences, last.queued_tokens, last.running_tokens) == (0, 0, 0, 0)
    assert last.free_blocks == 64
    assert last.decode_tokens_per_s > 0


# Whatever comes

CALLS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["generate"] * 5 + ["score", "embed"]),
        "length": st.integers(1, 70),
        "salt": st.integers(0, 3),
        "count": st.integers(1, 30),
        "least": st.integers(0, 6),
        "outputs": st.integers(1, 4),
        "seed": st.integers(0, 3),
        "tenant": st.sampled_from("abc"),
        "work_class": st.sampled_from(WorkClass),
        "ends": st.booleans(),
        "logprobs": st.booleans(),
        "poison": st.sampled_from([False] * 9 + [True]),
    }
)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("call"), CALLS),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("stop"), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=24,
)
VOCABULARY = 40  # small, so that end tokens come
EVIL = VOCABULARY  # never drawn


def build_call(id: str, asked: dict[str, Any]) -> Call:
    tokens = tuple(2 + (asked["salt"] * 7 + i * 3) % (VOCABULARY - 2) for i in range(asked["length"]))
    if asked["poison"]:
        tokens = (*tokens, EVIL)
    shared = {"tenant": asked["tenant"], "cache_salt": asked["tenant"].encode(), "work_class": asked["work_class"]}
    if asked["kind"] == "score":
        return score(id, tokens, [tokens[: n % 3] for n in range(asked["outputs"])], probes=(3,) if asked["logprobs"] else (), **shared)
    if asked["kind"] == "embed":
        return embed(id, *(tokens[n % len(tokens) :] for n in range(asked["outputs"])), **shared)
    limits = Limits(asked["count"], ENDS, min(asked["least"], asked["count"]), not asked["ends"])
    sampling = Sampling(seed=asked["seed"], temperature=float(asked["seed"] > 0))
    return generate(
        id, tokens, limits=limits, sampling=sampling, outputs=asked["outputs"], prompt_logprobs=asked["logprobs"], top_logprobs=1, **shared
    )


def said_alone(call: Generate, index: int) -> tuple[list[int], FinishReason]:
    """What the fake says to this call with nobody else there, and why it ends."""
    limits, said = call.limits, list[int]()
    while len(said) < limits.max_output_tokens:
        barred = ENDS if len(said) < limits.min_output_tokens and not limits.ignore_end_token else ()
        token = next_token(history_of((*call.prompt, *said)), call.sampling, index, len(said), VOCABULARY, barred)
        if token in ENDS and not limits.ignore_end_token:
            return said, FinishReason.END_TOKEN
        said.append(token)
    return said, FinishReason.LENGTH


def check_generate(b: Bench, call: Generate, stopped: set[tuple[str, int]], aborted: set[str]) -> None:
    done, billed, finished = b.done(call.id), 0, 0
    for index in range(call.outputs):
        said, reason = b.tokens(call.id, index), b.reason(call.id, index)
        expected, natural = said_alone(call, index)
        billed += len(said) + (reason is FinishReason.END_TOKEN)
        finished += reason is natural
        assert said == expected if reason is natural else said == expected[: len(said)]
        match reason:
            case FinishReason.STOPPED:
                assert (call.id, index) in stopped
            case FinishReason.CANCELLED:
                assert call.id in aborted
            case FinishReason.ERROR:
                assert done.error == "step_failed" and EVIL in call.prompt
            case _:
                assert reason is natural and EVIL not in call.prompt
    usage, whole = done.usage, len(call.prompt)
    assert usage.output_tokens == billed
    assert 0 <= usage.cached_input_tokens <= usage.input_tokens <= whole
    if finished:
        assert usage.input_tokens == whole
    if finished and call.prompt_logprobs:
        (scored,) = [e for e in b.events if isinstance(e, PromptScored) and e.id == call.id]
        assert list(scored.logprobs) == [logprob(history_of(call.prompt[:i]), call.prompt[i]) for i in range(1, whole)]


@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    moves=MOVES,
    blocks=st.integers(7, 24),
    budget=st.integers(1, 64),
    most_running=st.integers(1, 8),
    quota=st.floats(0, 1),
    memory=st.one_of(st.none(), st.integers(1, 40)),
)
def test_I7_whatever_comes_tokens_are_exact_and_nothing_is_lost(moves: list[tuple[str, Any]], **world: Any):
    weather(moves, **world)


def test_I7_in_crowded_pools_tokens_are_exact_and_nothing_is_lost():
    """As above, at sizes that a shrinking search does not reach: many calls at once, and preemptions all the time."""
    preemptions = hits = 0
    for seed in range(120):
        draw = Random(seed)
        moves: list[tuple[str, Any]] = []
        for _ in range(draw.randint(10, 60)):
            kind = draw.choice(["call", "call", "step", "step", "abort", "stop"])
            moves.append((kind, some_call(draw) if kind == "call" else draw.randint(1, 6) if kind == "step" else draw.randint(0, 20)))
        memory = draw.choice([None, None, draw.randint(1, 40)])
        b = weather(moves, draw.randint(7, 24), draw.randint(1, 64), draw.randint(1, 12), draw.random(), memory)
        preemptions += b.engine._scheduler.preemptions
        hits += sum(e.usage.cached_input_tokens > 0 for e in b.events if isinstance(e, Done))
    assert preemptions > 100 and hits > 50  # or this proves little


def some_call(draw: Random) -> dict[str, Any]:
    return {
        "kind": draw.choice(["generate"] * 5 + ["score", "embed"]),
        "length": draw.randint(1, 70),
        "salt": draw.randint(0, 3),
        "count": draw.randint(1, 30),
        "least": draw.randint(0, 6),
        "outputs": draw.randint(1, 4),
        "seed": draw.randint(0, 3),
        "tenant": draw.choice("abc"),
        "work_class": draw.choice(list(WorkClass)),
        "ends": draw.random() < 0.5,
        "logprobs": draw.random() < 0.3,
        "poison": draw.random() < 0.1,
    }


def weather(moves: list[tuple[str, Any]], blocks: int, budget: int, most_running: int, quota: float, memory: int | None) -> Bench:
    runner = FakeRunner(blocks, VOCABULARY + 1, spoken=VOCABULARY, most_tokens=memory, fails=lambda rows: cannot_bear(EVIL, rows))
    b = Bench(runner, max_step_tokens=budget, max_sequences=most_running, prefix_quota=quota)
    calls: dict[str, Call] = {}
    aborted: set[str] = set()
    stopped: set[tuple[str, int]] = set()
    for move, value in moves:
        if move == "call":
            id = str(len(calls))
            calls[id] = build_call(id, value)
            b.take(calls[id])
        elif move == "step":
            b.step(value)
        elif calls:
            id = str(value % len(calls))
            if move == "abort":
                aborted.add(id)
                b.take(Abort((id,)))
            else:
                stopped.add((id, value % 4))
                b.take(Stop(id, value % 4))
    b.finish()
    after_done: dict[str, bool] = defaultdict(bool)
    for event in b.events:
        assert not isinstance(event, Load)
        assert not after_done[event.id]  # type: ignore[union-attr]
        after_done[event.id] = isinstance(event, Done)  # type: ignore[union-attr]
    assert set(after_done) == set(calls) and all(after_done.values())
    for call in calls.values():
        if isinstance(call, Generate):
            check_generate(b, call, stopped, aborted)
        elif b.done(call.id).error is None:
            check_answer(b, call)
        else:
            assert b.done(call.id).error in ("step_failed", "cancelled")
    assert sum(e.usage.output_tokens for e in b.events if isinstance(e, Done)) == runner.drawn
    return b


def check_answer(b: Bench, call: Call) -> None:
    usage = b.done(call.id).usage
    if isinstance(call, Embed):
        (embedded,) = [e for e in b.events if isinstance(e, Embedded) and e.id == call.id]
        assert embedded.vectors == tuple(map(embedding, call.inputs))
        assert usage == Usage(sum(map(len, call.inputs)), 0, 0)
    elif isinstance(call, Score):
        (scored,) = [e for e in b.events if isinstance(e, Scored) and e.id == call.id]
        for label, found in zip(call.continuations, scored.continuations, strict=True):
            states = [history_of(call.prefix + label[:i]) for i in range(len(label) + 1)]
            assert found.logprobs == tuple(logprob(s, t) for s, t in zip(states, label, strict=False))
            assert found.probes == (tuple((logprob(s, 3),) for s in states) if call.probes else ())
        assert usage.input_tokens == len(call.prefix) + sum(map(len, call.continuations))
