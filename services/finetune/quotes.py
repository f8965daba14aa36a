"""What a job will do and take, before it does: every automatic value made concrete, and a quote with an interval (pure).

The rule version goes into the digest of the spec: a later rule never changes a job that was made under an earlier one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RULES = "1"
# Full fine-tuning's rate of small models times ten, as LoRA wants it; a head starts from nothing and brings its own rate.
LEARNING_RATE = {"CLASSIFY": 5e-4, "CHAT": 2e-4, "PREFERENCE": 2e-5}
PRIVATE_RATE = 1e-3
WEIGHT_DECAY, WARMUP_RATIO, MAX_GRAD_NORM = 0.0, 0.03, 1.0
PATIENCE = 3  # evaluations without gain
BATCH = {"CLASSIFY": 16, "CHAT": 8, "PREFERENCE": 8}
EPOCHS = 3.0
SMALL_ROWS = 20_000  # from here on one pass over the rows is enough to start with
SPREAD_KNOWN, SPREAD_UNKNOWN = 1.6, 5.0  # how far a quote may be off, as a factor, with and without a measured rate
SPREAD_OWN = 1.25  # and with the rate of the job's own first steps
PROBE_STEPS = 3  # whose rate narrows a job's quote
UNMEASURED = 250.0  # tokens/s of 270 M parameters on two cores; scaled by the base's size
LOADING_SECONDS = 6.0
MAX_INDEXED = 20_000  # rows, as `nearest.MAX_ROWS`
LEAST_INDEXED = 65_536  # tokens, as the trainer's `neighbours.LEAST_TOKENS`
BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Work:
    """What there is to learn from."""

    rows: int
    tokens: int  # of all rows of the train version
    validation_rows: int  # of a version of its own; 0: a share of the rows


@dataclass(frozen=True)
class Plan:
    """A resolved job's size."""

    rows: int
    steps: int
    tokens: int  # learnt from, over all epochs
    measured_tokens: int  # of the validation rows, each time they are measured
    indexed_tokens: int = 0  # of the rows, read once more at the end: their neighbours can be asked for


@dataclass(frozen=True)
class Range:
    """Low and high."""

    low: float
    high: float


@dataclass(frozen=True)
class Rate:
    """How fast training of this kind was."""

    tokens_per_second: float
    known: bool
    own: bool = False  # of this job's own rows and batch, on its own device

    @property
    def spread(self) -> float:
        """How far a quote that rests on it may be off, as a factor."""
        return SPREAD_OWN if self.own else SPREAD_KNOWN if self.known else SPREAD_UNKNOWN


def plan(work: Work, epochs: float, batch: int, max_steps: int | None, fraction: float) -> Plan:
    """The steps of a job, as the trainer counts them."""
    rows = work.rows if work.validation_rows else max(1, work.rows - math.floor(work.rows * fraction))
    steps = max(1, min(max_steps or 2**31, math.ceil(epochs * -(-rows // batch))))
    seen = min(epochs * rows, float(steps * batch))
    each = work.tokens / max(1, work.rows)
    measured = round(each * (work.rows - rows + work.validation_rows))
    return Plan(rows, steps, round(each * seen), measured, round(min(each * min(rows, MAX_INDEXED), max(each * seen, LEAST_INDEXED))))


def epochs_for(rows: int) -> float:
    """Passes over the rows where nothing was asked for: three, fewer of many."""
    return EPOCHS if rows < SMALL_ROWS else max(1.0, round(EPOCHS * SMALL_ROWS / rows, 1))


def checkpoint_interval(steps: int) -> int:
    """Steps between checkpoints: at least four a job, at most each 200."""
    return max(1, min(200, -(-steps // 4)))


def rate(measured: float | None, weights: int) -> Rate:
    """Tokens a second, as measured, or by the size of the base."""
    if measured:
        return Rate(measured, known=True)
    return Rate(UNMEASURED * 270e6 / max(1, weights), known=False)


def own_rate(step_rates: Sequence[float]) -> Rate:
    """The rate of a job's own steps, each of about as many tokens; of the first, which is slow, only where it is alone."""
    counted = [rate for rate in (step_rates[1:] or step_rates) if rate > 0]
    return Rate(len(counted) / sum(1 / rate for rate in counted), known=True, own=True)


def seconds(size: Plan, speed: Rate, evaluations: int) -> Range:
    """Seconds of the device, loading and evaluations included."""
    # A forward pass alone is a third of a step.
    forward = (size.measured_tokens * evaluations + size.indexed_tokens) / 3
    middle = LOADING_SECONDS + (size.tokens + forward) / speed.tokens_per_second
    return Range(middle / speed.spread, middle * speed.spread)


def peak_bytes(weights: int, rank: int, step_tokens: int) -> Range:
    """Bytes at the peak: the weights, the adapter's moments, and activations of one step."""
    learnt = weights * min(1.0, rank / 256)
    still = BYTES_PER_WEIGHT * (weights + 3 * learnt)
    active = step_tokens * 600_000.0 * math.sqrt(weights / 270e6)
    return Range(still, still + 2 * active)
