"""What a job will be, before it is one: every automatic value made concrete, its quote, and whether its project may have it (pure).

It reads and makes the spec's message, since that is what is kept, signed and shown.
"""

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from argosy.v1 import finetune_pb2 as pb
from services.chassis.errors import FieldInvalid, FieldOutOfRange, ModelCapability, QuotaExceeded
from services.chassis.identity import Caller
from services.finetune import events, quotes
from services.finetune.datasets import TrainingVersion

METHODS = {pb.TUNE_METHOD_CLASSIFY: "CLASSIFY", pb.TUNE_METHOD_CHAT: "CHAT", pb.TUNE_METHOD_PREFERENCE: "PREFERENCE"}
STEP_TOKENS = 2_048  # of one forward pass
SPEC = "fine_tune_job.spec"


class Base(Protocol):
    """What of a base decides."""

    @property
    def context(self) -> int:
        """Tokens it can see."""
        ...

    @property
    def weights(self) -> int:
        """How many there are."""
        ...


def resolved(
    spec: pb.FineTuneSpec, base: Base, train: TrainingVersion, held: TrainingVersion | None
) -> tuple[pb.FineTuneSpec, quotes.Plan]:
    """The spec with every automatic value made concrete, and the size of the job.

    Raises:
        FieldInvalid, FieldOutOfRange: it contradicts itself, or the base.
        ModelCapability: what is asked is not done here.
    """
    made = pb.FineTuneSpec()
    made.CopyFrom(spec)
    private = spec.HasField("privacy")
    if spec.WhichOneof("adapter") == "full":
        if private:
            raise FieldInvalid(f"{SPEC}.privacy", "full")
        raise ModelCapability(f"{SPEC}.full", "full_tune")  # no replica could serve what it makes
    _choose_adapter(made.lora, private)
    if private and not spec.privacy.HasField("delta"):
        made.privacy.delta = 1.0 / (10 * max(1, train.rows))
    if not made.HasField("seed"):
        made.seed = secrets.randbits(31)
    if not made.HasField("packing"):
        made.packing = not private
    own = made.hyperparameters
    _choose_hyperparameters(own, METHODS[spec.method], train.rows, private)
    longest = train.longest.get(spec.base_model, 0)
    if not made.HasField("seq_len"):
        made.seq_len = min(base.context, max(64, 1 << math.ceil(math.log2(max(longest + 64, 64)))), 2048)
    elif made.seq_len > base.context:
        raise FieldOutOfRange(f"{SPEC}.seq_len", made.seq_len, base.context, "tokens")
    if held is None and not made.HasField("validation_fraction"):
        made.validation_fraction = 0.1 if train.rows >= 20 else 0.0
    tokens = train.tokens.get(spec.base_model) or train.total_bytes // 3
    work = quotes.Work(train.rows, tokens, held.rows if held is not None else 0)
    size = quotes.plan(work, own.epochs, own.batch_size, own.max_steps or None, made.validation_fraction)
    if (held is not None or made.validation_fraction > 0) and not private:
        stopping = made.early_stopping
        stopping.SetInParent()
        stopping.patience = stopping.patience or quotes.PATIENCE
        stopping.min_delta = stopping.min_delta
        stopping.interval_steps = stopping.interval_steps or -(-size.rows // own.batch_size)
    if not made.HasField("checkpoint_interval_steps"):
        made.checkpoint_interval_steps = quotes.checkpoint_interval(size.steps)
    return made, size


def _choose_adapter(lora: pb.Lora, private: bool) -> None:
    lora.SetInParent()
    if not lora.HasField("rank"):
        lora.rank = 8 if private else 16
    if not lora.HasField("alpha"):
        lora.alpha = 2.0 * lora.rank
    if private and not lora.targets:
        lora.targets.extend(("q_proj", "v_proj"))
    lora.dropout, lora.rslora, lora.dora = lora.dropout, lora.rslora, lora.dora  # zero and false, said aloud


def _choose_hyperparameters(own: pb.Hyperparameters, method: str, rows: int, private: bool) -> None:
    own.SetInParent()
    if not own.HasField("learning_rate"):
        own.learning_rate = quotes.PRIVATE_RATE if private else quotes.LEARNING_RATE[method]
    if not own.HasField("epochs"):
        own.epochs = quotes.epochs_for(rows)
    if not own.HasField("batch_size"):
        own.batch_size = max(1, min(quotes.BATCH[method], rows))
    chosen = pb.Hyperparameters(weight_decay=quotes.WEIGHT_DECAY, warmup_ratio=quotes.WARMUP_RATIO, max_grad_norm=quotes.MAX_GRAD_NORM)
    chosen.MergeFrom(own)
    own.CopyFrom(chosen)


def quote(spec: pb.FineTuneSpec, base: Base, size: quotes.Plan, speed: quotes.Rate, price: int, currency: str, device: str) -> pb.Quote:
    """What a resolved job will take. `price` in 1e-9 of the currency's unit a second of the device."""
    evaluations = max(1, math.ceil(2 * spec.hyperparameters.epochs)) + 1
    took = quotes.seconds(size, speed, evaluations)
    memory = quotes.peak_bytes(base.weights, spec.lora.rank, STEP_TOKENS)
    stops = 0.5 if spec.HasField("early_stopping") else 1.0  # early stopping may end it at half
    return pb.Quote(
        tokens=pb.Estimate(low=size.tokens * 0.9 * stops, high=size.tokens * 1.1),
        steps=pb.Estimate(low=math.floor(size.steps * stops), high=size.steps),
        device_seconds=pb.Estimate(low=took.low * stops, high=took.high),
        peak_bytes=pb.Estimate(low=memory.low, high=memory.high),
        low_cost=events.money(currency, math.floor(took.low * stops * price)),
        high_cost=events.money(currency, math.ceil(took.high * price)),
        device=device,
    )


def held(quote: pb.Quote, max_nanos: int | None, price: int, charged_nanos: int, charged_seconds: float) -> tuple[int, float]:
    """What a job may still take at most, in nanos and seconds of the device: its quote's upper end or its limit, less the charges."""
    nanos, seconds = quote.high_cost.nanos, quote.device_seconds.high
    if max_nanos is not None:
        nanos = min(nanos, max_nanos)
        seconds = min(seconds, max_nanos / price) if price else seconds
    return max(0, nanos - charged_nanos), max(0.0, seconds - charged_seconds)


def less_begun(who: Caller, begun: Iterable[Mapping[str, Any]]) -> Caller:
    """The caller, with less left of the day by what jobs that were begun (`sql_jobs.begun`) may still take: no charge tells of it yet."""
    nanos, seconds = 0, 0.0
    for row in begun:
        quoted = pb.Quote.FromString(row["quote"])
        most = held(quoted, row["max_nanos"], row["nanos_per_second"], row["charged_nanos"], row["charged_seconds"])
        # What is left in money may be the key's alone, so that another key's jobs do not count in it; seconds are the project's.
        nanos += most[0] if row["key_id"] == who.key_id else 0
        seconds += most[1]
    return replace(
        who,
        job_nanos_left=None if who.job_nanos_left is None else max(0, who.job_nanos_left - nanos),
        job_seconds_left=None if who.job_seconds_left is None else max(0, math.floor(who.job_seconds_left - seconds)),
    )


def affordable(who: Caller, nanos: int = 0, seconds: float = 0.0) -> None:
    """Return if the day's budget and device time, as the gateway knows them, leave room for work that costs at least this.

    Raises:
        QuotaExceeded: nothing is left, or less than that.
    """
    for subject, asked, left in (("cost_per_day", nanos, who.job_nanos_left), ("gpu_seconds_per_day", seconds, who.job_seconds_left)):
        if left is not None and (left <= 0 or asked > left):
            raise QuotaExceeded(subject, round(asked), left)
