"""What a unit is worth, and whether its worth can be believed (pure). All scores are log-probabilities in nats."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Curves", "by_unit", "curves", "faithfulness", "log_softmax"]

SHARES = (0.25, 0.5)  # of the units left out at the points of a deletion curve between its first and its last
FLAT = 1e-6  # of the highest probability: an area smaller than this is no curve


@dataclass(frozen=True, slots=True)
class Curves:
    """What to leave out for a deletion test: at each count of units, those that weigh most, and two random choices."""

    counts: tuple[int, ...]
    heaviest: tuple[frozenset[int], ...]
    random: tuple[tuple[frozenset[int], frozenset[int]], ...]

    @property
    def deletions(self) -> list[frozenset[int]]:
        """All of them, the heaviest of each count first, then the random ones: what has to be scored, in this order."""
        return [*self.heaviest, *(one for pair in self.random for one in pair)]


def curves(weights: Sequence[float], seed: int = 0) -> Curves | None:
    """The points of a deletion test; None where there are too few units to have an order (fewer than 3).

    The random choices are the beginnings of one shuffled order and of the same order reversed: together they leave every unit out equally
    often, which halves the variance of two independent ones.
    """
    count = len(weights)
    if count < 3:
        return None
    counts = tuple(sorted({min(count - 1, max(2, round(share * count))) for share in SHARES}))
    ranked = sorted(range(count), key=lambda place: -weights[place])
    shuffled = list(range(count))
    random.Random(seed).shuffle(shuffled)
    pairs = tuple((frozenset(shuffled[:k]), frozenset(shuffled[::-1][:k])) for k in counts)
    return Curves(counts, tuple(frozenset(ranked[:k]) for k in counts), pairs)


def faithfulness(target: float, baseline: float, without: Sequence[float], weights: Sequence[float], points: Curves,
                 scores: Sequence[float]) -> float:  # fmt: skip
    """How much sooner the target's probability falls when units go in the order of their weights than in random order; 0..1.

        F = max(0, 1 - A_weights / A_random)

    A is the area between a deletion curve and the lowest probability seen, over the share of units left out, by trapezes. The curves
    begin at exp(target) and end at exp(baseline), all divided by the largest. One unit left out is known from `without`, of random order
    exactly, as its mean; `scores` are those of `points.deletions`. 0: no better than random, or nothing falls; 1: at once to the lowest.

    The deletion curve is that of Petsiuk et al., "RISE", BMVC 2018; measuring it against random order follows Samek et al., "Evaluating
    the visualization of what a deep neural network has learned", IEEE TNNLS 2017. Deleting text is ERASER's comprehensiveness (DeYoung et
    al., ACL 2020).
    """
    size, steps = len(weights), len(points.counts)
    top = max(target, baseline, *without, *scores)  # F does not change with the scale, and a long continuation's is beyond a float's

    def likely(values: Sequence[float]) -> list[float]:
        return [math.exp(value - top) for value in values]

    heaviest = max(range(size), key=lambda place: weights[place])
    chosen, pairs = likely([without[heaviest], *scores[:steps]]), likely(scores[steps:])
    drawn = [sum(likely(without)) / size, *((a + b) / 2 for a, b in zip(pairs[::2], pairs[1::2], strict=True))]
    first, last = likely((target, baseline))
    lowest = min(first, last, *chosen, *drawn)
    at = [0.0, *(count / size for count in (1, *points.counts)), 1.0]
    area = _area(at, [value - lowest for value in (first, *drawn, last)])
    if area < FLAT:
        return 0.0
    return min(1.0, max(0.0, 1.0 - _area(at, [value - lowest for value in (first, *chosen, last)]) / area))


def _area(at: Sequence[float], values: Sequence[float]) -> float:
    points = list(zip(at, values, strict=True))
    return sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairwise(points))


def by_unit(spans: Sequence[tuple[int, int]], weights: Sequence[float], units: Sequence[tuple[int, int]]) -> list[float]:
    """Weights of tokens as weights of units; a token over a border is shared by the units it touches, by its length in each.

    Both kinds of range are half-open in the same measure and in order; a token outside every unit is dropped.
    """
    found = [0.0] * len(units)
    at = 0
    for (first, last), weight in zip(spans, weights, strict=True):
        while at < len(units) and units[at][1] <= first:
            at += 1
        shared: dict[int, int] = {}
        for place in range(at, len(units)):
            length = min(last, units[place][1]) - max(first, units[place][0])
            if length <= 0:
                break
            shared[place] = length
        for place, length in shared.items():
            found[place] += weight * length / sum(shared.values())
    return found


def log_softmax(scores: Sequence[float]) -> list[float]:
    """Log-probabilities, without overflow."""
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]
