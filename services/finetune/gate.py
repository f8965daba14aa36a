"""The gate of a promotion: does a candidate beat what it would replace, on rows none of them was trained on? (pure but for numpy)

Accuracy is compared by McNemar's exact test, which looks at the rows where the two differ and at nothing else. A score without right and
wrong, such as a chat's negative log-likelihood, is compared by the lower bound of a paired bootstrap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Metric = Literal["ACCURACY", "LOSS"]
Test = Literal["MCNEMAR_EXACT", "PAIRED_BOOTSTRAP"]

ALPHA = 0.05  # a difference this unlikely by chance counts
ROWS = 10  # fewer can prove nothing, whatever they say
RESAMPLES = 4_000  # the 5 % point of their means is stable to a fraction of its own error
DRAWS = 1 << 22  # row indices held at once


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What one model did on every held-out row, in the rows' order.

    `values` are 1 and 0 for ACCURACY, and nats of negative log-likelihood for LOSS; `weights` are supervised tokens, 1 a row where unset.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def mean(self) -> float:
        """Share of right rows, or nats a token."""
        weights = self.weights or (1.0,) * len(self.values)
        return math.fsum(self.values) / math.fsum(weights)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against one opponent. `difference` is in the metric's unit and above 0 where the candidate is better."""

    opponent: str  # "current" or "base"
    test: Test
    rows: int
    candidate: float
    other: float
    difference: float
    p_value: float  # McNemar, two-sided; or the share of resamples in which the candidate is no better
    lower_bound: float  # bootstrap, 5 % point of the difference
    only_candidate_right: int | None
    only_other_right: int | None
    beats: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says: passed only if every opponent is beaten by the margin."""

    metric: Metric
    margin: float
    passed: bool
    comparisons: tuple[Comparison, ...]

    def as_json(self) -> dict[str, Any]:
        """For the signed statement; without what is not known."""
        comparisons = [{name: value for name, value in asdict(each).items() if value is not None} for each in self.comparisons]
        return {"metric": self.metric, "margin": self.margin, "alpha": ALPHA, "passed": self.passed, "comparisons": comparisons}


def mcnemar(only_candidate: int, only_other: int) -> float:
    """The two-sided p-value of McNemar's exact test on the rows where exactly one of two models is right; 1 without any."""
    differing = only_candidate + only_other
    if differing == 0:
        return 1.0
    tail = sum(math.comb(differing, k) for k in range(min(only_candidate, only_other) + 1))
    return min(1.0, 2.0 * tail / (1 << differing))


def resampled(gains: Sequence[float], weights: Sequence[float], seed: int) -> npt.NDArray[np.float64]:
    """Mean gains over resamples of the rows, sorted; [RESAMPLES].

    Args:
        gains: for each row, by how much the candidate is better, summed over its tokens; [rows].
        weights: tokens of each row; [rows].
        seed: the same seed gives the same means.
    """
    gain, weight = np.asarray(gains, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means: list[npt.NDArray[np.float64]] = []
    at_once = max(1, min(RESAMPLES, DRAWS // len(gain)))
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(0, len(gain), size=(min(at_once, RESAMPLES - start), len(gain)))
        means.append(gain[drawn].sum(axis=1) / weight[drawn].sum(axis=1))
    return np.sort(np.concatenate(means))


def lower_bound(means: npt.NDArray[np.float64], alpha: float = ALPHA) -> float:
    """The `alpha` quantile of resampled means."""
    return float(np.quantile(means, alpha))


def judge(metric: Metric, candidate: Outcomes, others: Mapping[str, Outcomes], margin: float = 0.0, seed: int = 0) -> Verdict:
    """Compare a candidate with every opponent.

    Args:
        metric: what `candidate` and `others` hold.
        candidate: its outcomes.
        others: opponent's name → its outcomes on the same rows.
        margin: by how much it must be better, in the metric's unit; at least 0.
        seed: of the bootstrap.

    Raises:
        ValueError: rows do not match, hold other values than the metric's, or there is no opponent.
    """
    if not others or margin < 0 or not math.isfinite(margin):
        raise ValueError("a gate has an opponent and a margin of at least 0")
    for outcomes in (candidate, *others.values()):
        if len(outcomes.values) != len(candidate.values) or outcomes.weights != candidate.weights or not outcomes.values:
            raise ValueError("models are compared on the same rows")
        if metric == "ACCURACY" and (outcomes.weights or not set(outcomes.values) <= {0.0, 1.0}):
            raise ValueError("an answer is right or wrong")
        if not all(map(math.isfinite, outcomes.values)):
            raise ValueError("an outcome is not finite")
    compare = _by_mcnemar if metric == "ACCURACY" else _by_bootstrap
    comparisons = tuple(compare(name, candidate, other, margin, seed) for name, other in others.items())
    return Verdict(metric, margin, all(each.beats for each in comparisons), comparisons)


def _by_mcnemar(opponent: str, candidate: Outcomes, other: Outcomes, margin: float, seed: int) -> Comparison:
    pairs = list(zip(candidate.values, other.values, strict=True))
    ours, theirs = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    difference = (ours - theirs) / len(pairs)
    p_value = mcnemar(ours, theirs)
    bound = lower_bound(resampled([a - b for a, b in pairs], (1.0,) * len(pairs), seed))  # said beside it, decides nothing
    beats = len(pairs) >= ROWS and difference > 0 and difference >= margin and p_value < ALPHA
    means = candidate.mean(), other.mean()
    return Comparison(opponent, "MCNEMAR_EXACT", len(pairs), *means, difference, p_value, bound, ours, theirs, beats)


def _by_bootstrap(opponent: str, candidate: Outcomes, other: Outcomes, margin: float, seed: int) -> Comparison:
    gains = [b - a for a, b in zip(candidate.values, other.values, strict=True)]  # a loss: less is better
    drawn = resampled(gains, candidate.weights or (1.0,) * len(gains), seed)
    bound, p_value = lower_bound(drawn), max(1.0, float((drawn <= 0).sum())) / len(drawn)
    means = candidate.mean(), other.mean()
    beats = len(gains) >= ROWS and bound > 0 and bound >= margin
    return Comparison(opponent, "PAIRED_BOOTSTRAP", len(gains), *means, means[1] - means[0], p_value, bound, None, None, beats)
