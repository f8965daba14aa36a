"""How good a classifier's probabilities are, and the temperature that makes them honest: accuracy, macro-F1, calibration error."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

__all__ = ["accuracy", "calibration_error", "macro_f1", "majority", "temperature"]

_LEAST, _MOST = 0.05, 20.0  # temperatures


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest logit is the label's: logits [n, labels], labels [n]."""
    return float((logits.argmax(1) == labels).double().mean())


def majority(labels: Sequence[int]) -> float:
    """Share of the commonest label: what always guessing it would get right."""
    return max(Counter(labels).values()) / len(labels)


def macro_f1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of the labels' F1 over those that occur or are guessed."""
    guessed = logits.argmax(1)
    scores = []
    for label in range(logits.shape[1]):
        right = int(((guessed == label) & (labels == label)).sum())
        all_of_it = int((guessed == label).sum()) + int((labels == label).sum())
        if all_of_it:
            scores.append(2 * right / all_of_it)
    return math.fsum(scores) / len(scores)


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, heat: float = 1.0, bins: int = 15) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over `bins` equal ranges of confidence, by rows."""
    sure, guessed = torch.softmax(logits.double() / heat, 1).max(1)
    right = (guessed == labels).double()
    places = (sure * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, sure - right)
    return float(gaps.abs().sum() / len(labels))


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature of least loss over the rows, 0.05 to 20; 1 where there is none to find.

    In 1 / temperature the loss is convex, so Newton's method with a bracket finds the one minimum.
    """
    if len(labels) == 0:
        return 1.0
    scores = logits.double()
    chosen = scores.gather(1, labels[:, None])[:, 0]
    low, high, cold = 1 / _MOST, 1 / _LEAST, 1.0
    for _ in range(50):
        weights = torch.softmax(scores * cold, 1)
        mean = (weights * scores).sum(1)
        slope = float((mean - chosen).mean())
        bend = float(((weights * scores.square()).sum(1) - mean.square()).mean())
        low, high = (cold, high) if slope < 0 else (low, cold)
        wanted = cold - slope / bend if bend > 0 else cold
        wanted = wanted if low < wanted < high else (low + high) / 2
        if abs(wanted - cold) < 1e-9:
            break
        cold = wanted
    return 1.0 / cold
