"""Which parts of a passage may be an answer: an automaton over its characters (pure).

A span starts where a word starts and ends where a word ends; in scripts without blanks each character is a word.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Found", "Scored", "best", "logsumexp", "may_end", "word_starts"]

# One character of a script that is written without blanks, or a run of letters and digits with what joins them.
_WORD = re.compile(
    r"[\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:[-'’.,:/][^\W_]+)*|[$€£¥]?\d+%?"
)


def word_starts(text: str) -> list[int]:
    """Character offsets at which an answer may start."""
    return [match.start() for match in _WORD.finditer(text)]


def word_ends(text: str) -> frozenset[int]:
    """Character offsets at which an answer may end."""
    return frozenset(match.end() for match in _WORD.finditer(text))


def may_end(text: str, at: int) -> bool:
    """Whether a word of `text` ends at character `at`."""
    return at in word_ends(text)


def logsumexp(values: Sequence[float]) -> float:
    """log of the sum of exponentials, without overflow."""
    top = max(values)
    return top if math.isinf(top) else top + math.log(sum(math.exp(value - top) for value in values))


@dataclass(frozen=True, slots=True)
class Scored:
    """A span of a passage, in characters, and its log-odds against "no answer", in nats."""

    passage: int
    start: int
    end: int
    log_odds: float


@dataclass(frozen=True, slots=True)
class Found:
    """An answer and its probability."""

    passage: int
    start: int
    end: int
    probability: float


def best(candidates: Sequence[Scored], top_k: int) -> tuple[list[Found], float]:
    """The `top_k` best spans that do not overlap, best first, and the probability of no answer.

    All candidates and "no answer" share one distribution. No answers come back where "no answer" is the likelier.
    """
    unique: dict[tuple[int, int, int], float] = {}
    for one in candidates:
        key = (one.passage, one.start, one.end)
        unique[key] = max(unique.get(key, -math.inf), one.log_odds)
    total = logsumexp([0.0, *unique.values()])
    none = math.exp(-total)
    found: list[Found] = []
    if none <= 0.5:
        for (passage, start, end), log_odds in sorted(unique.items(), key=lambda item: (-item[1], item[0])):
            if len(found) == top_k:
                break
            if not any(other.passage == passage and start < other.end and other.start < end for other in found):
                found.append(Found(passage, start, end, math.exp(log_odds - total)))
    return found, none
