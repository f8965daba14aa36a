"""A job's log as one thing to look at: what it adds up to, and how that is drawn while it grows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from argosy.v1 import finetune_pb2, usage_pb2

Job = finetune_pb2.FineTuneJob
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48  # characters of a curve


def state(value: int) -> str:
    """`RUNNING` of the enum's number; a state newer than this library is its number."""
    return Job.State.Name(Job.State.ValueType(value)).removeprefix("STATE_") if value in Job.State.values() else str(value)


def reason(value: int) -> str:
    """`COST_LIMIT` of the enum's number, empty for none."""
    if not value or value not in finetune_pb2.JobReason.values():
        return ""
    return finetune_pb2.JobReason.Name(finetune_pb2.JobReason.ValueType(value)).removeprefix("JOB_REASON_")


def phase(value: int) -> str:
    """`training` of the enum's number, empty for none."""
    if not value or value not in finetune_pb2.JobPhase.values():
        return ""
    return finetune_pb2.JobPhase.Name(finetune_pb2.JobPhase.ValueType(value)).removeprefix("JOB_PHASE_").lower()


def money(cost: usage_pb2.Cost) -> str:
    """`0.000123 USD`, with as many digits as a small sum needs."""
    amount = cost.nanos / 1e9
    return f"{amount:.2f} {cost.currency_code}" if amount >= 1 or not cost.nanos else f"{amount:.6f} {cost.currency_code}"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s`, `4.2 s`."""
    if seconds >= 3_600:
        return f"{int(seconds // 3_600)} h {int(seconds % 3_600 // 60):02} min"
    return f"{int(seconds // 60)} min {int(seconds % 60):02} s" if seconds >= 60 else f"{seconds:.1f} s"


def moment(stamp: Timestamp) -> str:
    """`2026-11-25 03:05` in universal time, empty for none."""
    return stamp.ToJsonString()[:16].replace("T", " ") if stamp.seconds else ""


def curve(points: list[tuple[int, float]], width: int = _WIDTH) -> str:
    """A series as one line of bars, the mean of each stretch of it."""
    values = [value for _, value in points]
    if not values:
        return ""
    stretch = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for at in range(0, len(values), stretch) if (part := values[at : at + stretch])]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


@dataclass
class Story:
    """What the events of one job add up to."""

    name: str = ""
    state: int = Job.STATE_QUEUED
    reason: int = 0
    phase: int = 0
    attempt: int = 0
    step: int = 0
    target_step: int = 0
    epoch: float = 0.0
    tokens_per_second: float = 0.0
    end: datetime | None = None
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by metric: step and value
    evaluation: Mapping[str, float] = field(default_factory=dict)
    spent: usage_pb2.Cost | None = None
    device_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    servable: finetune_pb2.JobServable | None = None
    failure: str = ""

    def take(self, event: finetune_pb2.JobEvent) -> None:
        """Add the next event; one of a kind that is not known here changes nothing."""
        match event.WhichOneof("event"):
            case "state":
                self.state, self.reason, self.attempt = event.state.state, event.state.reason, event.state.attempt
                self.failure = event.state.error.message
                if event.state.state != Job.STATE_RUNNING:
                    self.phase, self.end = 0, None
            case "progress":
                told = event.progress
                self.phase, self.step, self.target_step, self.epoch = told.phase, told.step, told.target_step, told.epoch
                self.tokens_per_second = told.tokens_per_second
                self.end = _time(told.estimated_end_time) if told.HasField("estimated_end_time") else None
            case "metric":
                self.series.setdefault(event.metric.name, []).append((event.metric.step, event.metric.value))
            case "evaluation":
                self.evaluation = dict(event.evaluation.metrics)
                for name, value in self.evaluation.items():
                    points = self.series.setdefault(name, [])
                    if not points or points[-1][0] != event.evaluation.step:
                        points.append((event.evaluation.step, value))
            case "cost":
                self.spent = event.cost.spent if event.cost.HasField("spent") else None
                self.device_seconds = event.cost.device_seconds
            case "warning":
                told_warning = event.warning
                where = f" from line {told_warning.line}" if told_warning.line else ""
                self.warnings.append(f"{told_warning.rule}: {told_warning.message or 'see the rule'} ({told_warning.count:,} times{where})")
            case "servable":
                self.servable = event.servable

    @property
    def headline(self) -> str:
        """`RUNNING, training` and why, if there is a reason."""
        return ", ".join(part for part in (state(self.state), phase(self.phase), reason(self.reason), self.failure) if part)

    def __rich__(self) -> Any:
        """As it stands, for a live view."""
        facts = Table.grid(padding=(0, 2))
        facts.add_row("job", self.name.rpartition("/")[2], Text(self.headline, style="bold"))
        parts: list[Any] = [facts]
        if self.target_step:
            row = Table.grid(padding=(0, 2))
            left = f"{duration(max(0.0, (self.end - datetime.now(UTC)).total_seconds()))} left" if self.end else ""
            speed = f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
            bar = ProgressBar(total=self.target_step, completed=min(self.step, self.target_step), width=_WIDTH)
            row.add_row(bar, f"{self.step:,}/{self.target_step:,} steps", f"epoch {self.epoch:.2f}", speed, left)
            parts.append(row)
        if self.series:
            curves = Table.grid(padding=(0, 2))
            for name, points in list(self.series.items()):  # drawn by another thread than the one that adds
                if name != "learning_rate":
                    curves.add_row(name, f"{points[-1][1]:.4g}", curve(points))
            parts.append(curves)
        if self.spent is not None:
            parts.append(Text(f"{money(self.spent)} for {duration(self.device_seconds)}", style="dim"))
        parts += [Text(warning, style="yellow") for warning in self.warnings[-3:]]
        return Group(*parts)


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)
