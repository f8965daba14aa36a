import pytest

from services.inference.engine.calls import FinishReason, Limits, Sampling
from services.inference.engine.sequence import Report, Sequence, State
from services.inference.engine.step import BLOCK_SIZE, Draw

END = 7


def sequence(prompt: int = 4, **limits: object) -> Sequence:
    resolved = Limits(**({"max_output_tokens": 3, "end_token_ids": (END, 8)} | limits))
    draw = Draw(Sampling(seed=0), 0, 0, (), prompt)
    return Sequence(0, range(100, 100 + prompt), tenant="t", root=b"r" * 16, draw=draw, limits=resolved)


def test_it_ends_at_its_length():
    s = sequence()
    assert [s.append(1), s.append(2), s.append(3)] == [None, None, FinishReason.LENGTH]
    assert s.tokens[4:] == [1, 2, 3]
    assert s.produced == 3


def test_an_end_token_is_counted_but_not_kept():
    s = sequence()
    assert [s.append(1), s.append(8)] == [None, FinishReason.END_TOKEN]
    assert (s.tokens[4:], s.produced) == ([1], 2)


def test_an_end_token_on_the_last_place_is_an_end_token():
    s = sequence(max_output_tokens=1)
    assert s.append(END) is FinishReason.END_TOKEN


def test_end_tokens_are_barred_until_the_minimum():
    s = sequence(max_output_tokens=5, min_output_tokens=2)
    assert s.draw is not None
    barred = []
    for token in (1, 2, 3):
        barred.append(s.draw.barred)
        assert s.append(token) is None
    assert barred == [(END, 8), (END, 8), ()]
    assert s.append(END) is FinishReason.END_TOKEN


def test_end_tokens_may_be_ignored():
    s = sequence(ignore_end_token=True, min_output_tokens=2)
    assert s.draw is not None and s.draw.barred == ()
    assert [s.append(END), s.append(8), s.append(END)] == [None, None, FinishReason.LENGTH]
    assert s.tokens[4:] == [END, 8, END]


def test_the_draw_follows_the_output():
    s = sequence()
    assert s.draw is not None and s.draw.history is s.tokens
    for token in (1, 2):
        s.append(token)
    assert (s.draw.position, s.draw.prompt_length) == (2, 4)


def test_a_decoding_row_is_reused_and_moves():
    s = sequence(prompt=4, max_output_tokens=9)
    s.admit([5], 0)
    row = s.row(4)
    assert (list(row.tokens), row.start, row.draw) == ([100, 101, 102, 103], 0, s.draw)
    s.advance(4)
    s.state = State.DECODING
    s.append(1)
    first = s.row(1)
    assert (list(first.tokens), first.start, list(first.blocks)) == ([1], 4, [5])
    s.advance(1)
    s.append(2)
    assert s.row(1) is first
    assert (list(first.tokens), first.start) == ([2], 5)


def test_a_preemption_keeps_the_tokens_and_the_bill():
    s = sequence(prompt=20, max_output_tokens=9)
    s.admit([3, 4], 1)
    assert (s.computed, s.cached, s.state) == (16, 16, State.PREFILLING)
    s.advance(4)
    s.append(1)
    assert s.withdraw(State.WAITING) == [3, 4]
    assert (s.computed, s.reached, s.pending, s.blocks) == (0, 20, 21, [])
    s.admit([8, 9], 0)
    assert (s.cached, s.row(21).start, list(s.row(21).tokens)[-1]) == (16, 0, 1)


@pytest.mark.parametrize(("length", "shared"), [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_the_last_token_is_never_taken_from_the_cache(length: int, shared: int):
    assert sequence(prompt=length).shareable() == shared


def test_positions_with_results_are_never_taken_from_the_cache():
    report = Report(20, [1, 2, None])
    s = Sequence(0, range(60), tenant="t", root=b"r" * 16, report=report)
    assert s.shareable() == 1
    report.given = 3
    assert s.shareable() == 3
    assert Sequence(0, range(60), tenant="t", pool=True).shareable() == 0
    assert Sequence(0, range(60), tenant="t", root=None).shareable() == 0


def test_a_probe_is_split_over_chunks():
    report = Report(3, [4, 5, 6, None], probes=(1,), first_probes=(2,), top=1)
    s = Sequence(0, range(7), tenant="t", root=b"r" * 16, report=report)
    s.admit([0], 0)
    assert s.row(3).probe is None
    s.advance(3)
    probe = s.row(2).probe
    assert probe is not None
    assert (list(probe.targets), probe.probes, probe.first_probes, probe.top) == ([(0, 4), (1, 5)], (1,), (2,), 1)
    s.advance(2)
    report.given += 2
    probe = s.row(2).probe
    assert probe is not None
    assert (list(probe.targets), probe.first_probes) == ([(0, 6), (1, None)], ())
    s.withdraw(State.WAITING)
    s.admit([0], 0)
    probe = s.row(7).probe
    assert probe is not None
    assert list(probe.targets) == [(5, 6), (6, None)]  # what was given is not asked again


def test_keys_chain_over_full_blocks_only():
    s = sequence(prompt=BLOCK_SIZE * 2 + 3)
    keys = s.chain(2)
    assert len(set(keys)) == 2
    assert s.chain(1) == keys[:1]
