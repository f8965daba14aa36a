"""What the trainer and the control plane say to each other, as values; `wire` turns them into messages (pure)."""

import enum
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.finetune.rows import Layout
from services.finetune.trainer.spec import Spec

__all__ = [
    "DONE",
    "INPUT",
    "LOST",
    "TERMINATED",
    "Action",
    "Claim",
    "Control",
    "Failure",
    "Fenced",
    "Grant",
    "Outcome",
    "Part",
    "Refused",
    "Report",
    "ResumePoint",
    "Unanswered",
    "Warned",
    "code_version",
    "failed",
]

DONE, INPUT, LOST, TERMINATED = 0, 65, 75, 143  # exit codes; they choose the retry, success is the control plane's word


def code_version() -> str:
    """What trains."""
    return f"argosy {importlib.metadata.version('argosy-platform')}"


class Fenced(Exception):
    """Another process has the run, or the run is over for this one: write nothing more."""


class Unanswered(Exception):
    """The control plane did not answer for as long as this process waits."""


class Refused(Exception):
    """The control plane does not permit what was asked for, such as more of a privacy budget."""


class Action(enum.Enum):
    """What a running process is to do."""

    CONTINUE = enum.auto()
    PAUSE = enum.auto()  # commit a checkpoint, then end
    CANCEL = enum.auto()  # end at once


@dataclass(frozen=True, slots=True)
class Grant:
    """Rows that the run may read."""

    dataset_version: str
    path: str  # in the object store
    sha256: str
    total_bytes: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A committed checkpoint; `prefix` ends with a slash."""

    step: int
    prefix: str
    manifest_digest: str


@dataclass(frozen=True, slots=True)
class Claim:
    """The run, as taken over. `prefix`, with a slash behind, is where this process may write."""

    job: str
    attempt: int
    fence: int
    project_uid: str
    model: str
    base_model: str
    base_digest: str  # empty: whatever is there
    spec: Spec
    spec_digest: str
    train: Grant
    validation: Grant | None
    resume: tuple[ResumePoint, ...]  # newest first
    prefix: str
    target_step: int  # 0: not known yet
    epsilon_left: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One stored object of a checkpoint or result."""

    name: str
    sha256: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Warned:
    """Something to know: a rule, a line of the training rows or 0, and how often."""

    rule: str
    line: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Report:
    """How far the run is. `metrics` are (name, value, step)."""

    phase: str = "training"  # loading, training, evaluating, committing
    step: int = 0
    target_step: int = 0  # 0: not known yet
    early_stopped: bool = False
    epoch: float = 0.0
    tokens: int = 0  # of this attempt
    device_seconds: float = 0.0  # of this attempt
    metrics: tuple[tuple[str, float, int], ...] = ()
    evaluation: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[Warned, ...] = ()
    epsilon_charged: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run failed for good. `reason` is a JobReason without its prefix."""

    reason: str
    rule: str = ""
    line: int = 0
    field: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A result, for the manifest that the control plane completes and signs."""

    base_digest: str
    targets: tuple[str, ...]
    parts: tuple[Part, ...]
    temperature: float  # 0: no head
    max_tokens: int  # 0: no head
    template_hash: str
    rows: Mapping[str, int]  # by use: `train`, `validation`
    labels: tuple[str, ...]
    metrics: Mapping[str, float]
    seconds: float  # over all attempts
    step: int
    precision: str = "float32"  # of products with frozen weights
    epsilon: float | None = None
    accountant: str = ""
    nearest: str = ""  # what is promised of the index of its rows; empty: there is none


class Control(Protocol):
    """The control plane of one run. Every method retries what may be repeated, and raises Fenced or Unanswered."""

    def claim(self) -> Claim:
        """Take the run over. Once a process."""
        ...

    def report(self, report: Report) -> Action:
        """Tell progress, renew the lease."""
        ...

    def commit(self, manifest: bytes) -> Action:
        """Make a stored checkpoint count; `manifest` as stored."""
        ...

    def succeed(self, outcome: Outcome) -> None:
        """End the run with a result."""
        ...

    def fail(self, failure: Failure) -> None:
        """End the run for good."""
        ...

    def stopped(self, step: int) -> None:
        """End because told to."""
        ...


def failed(control: Control, failure: Failure) -> int:
    """End the run for good; the exit code, which is another where nobody takes the word of this process any more."""
    try:
        control.fail(failure)
    except (Fenced, Unanswered):
        return LOST
    return INPUT
