"""What a job will do and take, before it does: every automatic value made concrete, and a quote with an interval (pure).

The rule version goes into the digest of the spec: a later rule never changes a job that was made under an earlier one.
"""

import math
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
UNMEASURED = 250.0  # tokens/s of 270 M parameters on two cores; scaled by the base's size
LOADING_SECONDS = 6.0
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


def plan(work: Work, epochs: float, batch: int, max_steps: int | None, fraction: float) -> Plan:
    """The steps of a job, as the trainer counts them."""
    rows = work.rows if work.validation_rows else max(1, work.rows - math.floor(work.rows * fraction))
    steps = max(1, min(max_steps or 2**31, math.ceil(epochs * -(-rows // batch))))
    seen = min(epochs * rows, float(steps * batch))
    each = work.tokens / max(1, work.rows)
    return Plan(rows, steps, round(each * seen), round(each * (work.rows - rows + work.validation_rows)))


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


def seconds(size: Plan, speed: Rate, evaluations: int) -> Range:
    """Seconds of the device, loading and evaluations included."""
    spread = SPREAD_KNOWN if speed.known else SPREAD_UNKNOWN
    # A forward pass alone is a third of a step.
    middle = LOADING_SECONDS + (size.tokens + size.measured_tokens * evaluations / 3) / speed.tokens_per_second
    return Range(middle / spread, middle * spread)


def peak_bytes(weights: int, rank: int, step_tokens: int) -> Range:
    """Bytes at the peak: the weights, the adapter's moments, and activations of one step."""
    learnt = weights * min(1.0, rank / 256)
    still = BYTES_PER_WEIGHT * (weights + 3 * learnt)
    active = step_tokens * 600_000.0 * math.sqrt(weights / 270e6)
    return Range(still, still + 2 * active)
