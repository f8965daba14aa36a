"""A job's log as messages: one constructor a kind. Payloads hold numbers, rule ids and names, never rows."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from argosy.v1 import error_pb2, usage_pb2
from argosy.v1 import finetune_pb2 as pb
from services.finetune.jobs import State

__all__ = [
    "checkpoint",
    "cost",
    "evaluation",
    "failure",
    "metric",
    "money",
    "phase",
    "progress",
    "quoted",
    "reason",
    "servable",
    "state",
    "state_value",
    "warning",
]

THINNED = frozenset({"progress", "metric"})  # kinds of which a long log keeps every other one


def reason(name: str) -> pb.JobReason.ValueType:
    """The enum behind a stored reason; empty: none."""
    return pb.JobReason.Value(f"JOB_REASON_{name or 'UNSPECIFIED'}")


def state_value(name: str) -> pb.FineTuneJob.State.ValueType:
    """The enum behind a stored state."""
    return pb.FineTuneJob.State.Value(f"STATE_{name}")


def phase(name: str) -> pb.JobPhase.ValueType:
    """The enum behind a stored phase."""
    return pb.JobPhase.Value(f"JOB_PHASE_{name}")


def money(currency: str, nanos: int) -> usage_pb2.Cost:
    """An amount."""
    return usage_pb2.Cost(currency_code=currency, nanos=nanos)


def failure(stored: Mapping[str, Any] | None) -> error_pb2.Failure | None:
    """A stored failure as its message."""
    if stored is None:
        return None
    reason = error_pb2.ErrorReason.Value(f"ERROR_REASON_{stored['reason']}")
    return error_pb2.Failure(reason=reason, message=stored.get("message", ""), metadata=stored.get("metadata", {}))


def state(to: State, why: str = "", attempt: int = 0, error: Mapping[str, Any] | None = None, version: str = "") -> pb.JobEvent:
    """The job has moved."""
    return pb.JobEvent(
        state=pb.StateChanged(state=state_value(to), reason=reason(why), attempt=attempt, error=failure(error), model_version=version)
    )


def progress(phase: int, step: int, target: int, epoch: float, tokens: int, rate: float, ends: datetime | None) -> pb.JobEvent:
    """How far it is."""
    said = pb.JobProgress(phase=phase, step=step, target_step=target, epoch=epoch, tokens=tokens, tokens_per_second=rate)  # type: ignore[arg-type]
    if ends is not None:
        said.estimated_end_time.FromDatetime(ends)
    return pb.JobEvent(progress=said)


def metric(name: str, value: float, step: int) -> pb.JobEvent:
    """One number."""
    return pb.JobEvent(metric=pb.JobMetric(name=name, value=value, step=step))


def checkpoint(name: str, step: int) -> pb.JobEvent:
    """A checkpoint counts."""
    return pb.JobEvent(checkpoint=pb.CheckpointCommitted(checkpoint=name, step=step))


def evaluation(step: int, metrics: Mapping[str, float], best: bool) -> pb.JobEvent:
    """The validation rows, measured."""
    return pb.JobEvent(evaluation=pb.JobEvaluated(step=step, metrics=metrics, best=best))


def cost(currency: str, nanos: int, seconds: float) -> pb.JobEvent:
    """What it has cost so far."""
    return pb.JobEvent(cost=pb.CostChanged(spent=money(currency, nanos), device_seconds=seconds))


def warning(rule: str, line: int, count: int) -> pb.JobEvent:
    """Something to know."""
    return pb.JobEvent(warning=pb.JobWarning(rule=rule, line=line, count=max(1, count), message=WARNINGS.get(rule, "")))


def quoted(quote: pb.Quote, step: int, rate: float) -> pb.JobEvent:
    """The quote, narrower, by the rate of the first steps."""
    return pb.JobEvent(quoted=pb.JobQuoted(quote=quote, step=step, tokens_per_second=rate))


def servable(version: str, replicas: int, elapsed_s: float, load_s: float | None = None) -> pb.JobEvent:
    """Replicas hold it."""
    said = pb.JobServable(model_version=version, replicas=replicas)
    said.elapsed.FromTimedelta(timedelta(seconds=max(0.0, elapsed_s)))
    if load_s is not None:
        said.load.FromTimedelta(timedelta(seconds=load_s))
    return pb.JobEvent(servable=said)


WARNINGS = {
    "checkpoint.damaged": "A checkpoint did not match its digests; the one before it was used.",
    "attempt.suspended": "The attempt waits for its turn in the cluster's queue.",
    "attempt.unschedulable": "The attempt waits for a free place in the cluster.",
    "attempt.image": "The attempt cannot start: the cluster cannot get or configure its image. The operator has to help.",
    "attempt.no_pod": "The attempt waits: the cluster makes no pod for it, for a quota or a policy. The operator may have to help.",
    "attempt.node_lost": "The attempt's machine does not answer. Another starts once the cluster gives that machine up.",
    "attempt.launcher_away": "The cluster does not answer for now. What runs goes on; what is to start waits.",
    "attempt.launcher_refused": "The cluster refuses to run the attempt. The operator has to help; the job waits.",
    "early.stopped": "The validation rows stopped to gain: the job ends here, and its best state is kept.",
    "V7.label_not_in_train": "Validation rows have labels that no training row has; they were left out.",
    "V12.near_rows": "Rows that are measured on are nearly alike rows that are learnt from: what is measured may be too good.",
    "V9.too_long": "Rows are longer than seq_len after the template; they were left out.",
}
