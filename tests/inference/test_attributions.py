"""Weights, and whether they can be believed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference import attributions


def additive(effects, gone):
    """A score to which each unit adds its effect."""
    return sum(effect for place, effect in enumerate(effects) if place not in gone)


def judged(effects, weights, score=additive):
    points = attributions.curves(weights)
    everything = range(len(effects))
    return attributions.faithfulness(
        score(effects, ()),
        score(effects, everything),
        [score(effects, {place}) for place in everything],
        weights,
        points,
        [score(effects, gone) for gone in points.deletions],
    )


EFFECTS = [3.0, 0.1, 0.0, 1.5, 0.2, -0.3, 0.0, 0.6, 0.1, 0.05]


def test_the_right_order_is_faithful_and_the_reverse_is_not():
    right, wrong = judged(EFFECTS, EFFECTS), judged(EFFECTS, [-effect for effect in EFFECTS])
    assert 0.5 < right <= 1
    assert wrong == 0.0


def test_an_order_that_says_nothing_is_worth_nothing():
    """Where all units weigh the same, no order is better than another."""
    assert judged([1.0] * 10, list(range(10))) == pytest.approx(0, abs=1e-9)


def test_one_decisive_unit_is_wholly_faithful():
    effects = [0.0] * 9 + [20.0]
    assert judged(effects, effects) > 0.8
    assert judged(effects, [-effect for effect in effects]) == 0.0


def test_faithfulness_does_not_depend_on_how_unlikely_the_target_is():
    """A long continuation has a probability that no float can hold."""

    def unlikely(effects, gone):
        return additive(effects, gone) - 5_000.0

    assert judged(EFFECTS, EFFECTS, unlikely) == pytest.approx(judged(EFFECTS, EFFECTS))


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=30), st.randoms(use_true_random=False))
def test_faithfulness_is_a_share(effects, chance):
    shuffled = list(effects)
    chance.shuffle(shuffled)
    assert 0.0 <= judged(effects, shuffled) <= 1.0


def test_a_flat_score_is_not_faithful():
    assert judged([0.0] * 5, [5.0, 4.0, 3.0, 2.0, 1.0]) == 0.0


def test_curves_are_nested_and_leave_every_unit_out_equally_often():
    points = attributions.curves([float(place) for place in range(20)])
    assert points.counts == (5, 10)
    assert points.heaviest[0] == frozenset(range(15, 20))
    for count, (one, other) in zip(points.counts, points.random, strict=True):
        assert len(one) == len(other) == count
    assert points.random[1][0] | points.random[1][1] == frozenset(range(20))
    assert len(points.deletions) == 6
    assert attributions.curves([1.0, 2.0]) is None
    assert attributions.curves([1.0, 2.0, 3.0]).counts == (2,)


def test_tokens_become_units_by_their_share():
    found = attributions.by_unit([(0, 2), (2, 6), (6, 9), (9, 12)], [1.0, 2.0, 4.0, 8.0], [(0, 4), (4, 8)])
    assert found == [2.0, 5.0]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.integers(1, 7))
def test_no_weight_is_lost_between_tokens_and_units(weights, size):
    spans = [(3 * place, 3 * place + 3) for place in range(len(weights))]
    end = spans[-1][1]
    units = [(first, min(end, first + size)) for first in range(0, end, size)]
    assert sum(attributions.by_unit(spans, weights, units)) == pytest.approx(sum(weights), abs=1e-9)


def test_log_softmax():
    assert sum(map(math.exp, attributions.log_softmax([1_000.0, 999.0, -5.0]))) == pytest.approx(1)
