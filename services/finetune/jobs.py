"""A job, its states and its moves as data, and what to do next, decided from the row and what the launcher sees (pure).

`decide` is level-triggered: the same row and the same sight give the same action, so a step may be repeated and may be cut off anywhere.
"""

import enum
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol


class State(enum.StrEnum):
    """Where a job is; CANCELLED, SUCCEEDED and FAILED are for good."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"  # an attempt was asked for
    RUNNING = "RUNNING"  # and has claimed the run
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


S = State
TERMINAL: Final = frozenset({S.CANCELLED, S.SUCCEEDED, S.FAILED})
LIVE: Final = frozenset(State) - TERMINAL
WORKING: Final = frozenset({S.PREPARING, S.RUNNING, S.PAUSING, S.CANCELLING})  # an attempt may be there
MOVES: Final[dict[State, frozenset[State]]] = {
    S.QUEUED: frozenset({S.PREPARING, S.CANCELLED, S.PAUSED, S.FAILED}),
    S.PREPARING: frozenset({S.RUNNING, S.QUEUED, S.CANCELLING, S.PAUSING, S.FAILED}),
    S.RUNNING: frozenset({S.QUEUED, S.SUCCEEDED, S.CANCELLING, S.PAUSING, S.FAILED}),
    S.PAUSING: frozenset({S.PAUSED, S.SUCCEEDED, S.CANCELLING, S.FAILED}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    S.CANCELLED: frozenset(),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
}


class Where(enum.StrEnum):
    """What a launcher sees of an attempt."""

    ABSENT = "absent"
    PENDING = "pending"
    RUNNING = "running"
    EXITED = "exited"  # and nothing of it is left running


class Waits(enum.StrEnum):
    """What an attempt that does not run, or its launcher, waits for; for people, who may have to help."""

    SUSPENDED = "SUSPENDED"  # a queue's turn
    UNSCHEDULABLE = "UNSCHEDULABLE"  # a place on a node
    IMAGE = "IMAGE"  # its image, or a setting of its container
    NO_POD = "NO_POD"  # the cluster makes no pod for it: a quota or a policy refuses it, or it is not yet its time
    STARTING = "STARTING"
    NODE_LOST = "NODE_LOST"  # its node to come back, or to be given up: before that nobody may start another
    LAUNCHER_AWAY = "LAUNCHER_AWAY"  # an answer from where attempts run
    LAUNCHER_REFUSED = "LAUNCHER_REFUSED"  # the right to ask there, or a template that fits


@dataclass(frozen=True, slots=True)
class Seen:
    """One look. `code` is an exit status if one is known; `disrupted`: it was taken away, through no fault of its own."""

    where: Where
    code: int | None = None
    reason: str = ""
    disrupted: bool = False
    waits: Waits | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a launcher is asked to run. Two asks of one name and digest are one attempt."""

    name: str  # ft-<job uid>-a<attempt>
    job_uid: str
    attempt: int
    project_uid: str
    base_model: str
    token: str
    spec_digest: str


class NameTaken(Exception):
    """Something else has this attempt's name; nobody may touch it."""


class LauncherUnavailable(Exception):
    """Where attempts run does not answer, or refuses; nothing is known and nothing is lost. The text is for the operator."""

    def __init__(self, why: str, waits: Waits = Waits.LAUNCHER_AWAY) -> None:
        """`waits`: what has to change."""
        super().__init__(why)
        self.waits = waits


class Launcher(Protocol):
    """Where attempts run. Every method may be repeated and may be cut off, and may raise LauncherUnavailable."""

    async def ensure(self, attempt: Attempt) -> None:
        """Have it running or ended: started at most once by its name. Raises NameTaken if the name is another's."""
        ...

    async def observe(self, name: str) -> Seen:
        """Look at it."""
        ...

    async def stop(self, name: str, grace_s: float) -> None:
        """Ask it to end, and end it after `grace_s`; returns at once."""
        ...

    async def reap(self, name: str) -> None:
        """Clear away what is left of an ended one."""
        ...

    async def list(self) -> frozenset[str]:
        """Names of everything that is ours."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """The part of a job that decisions need."""

    uid: str
    state: State
    attempt: int
    launched: bool  # `ensure` has returned for this attempt
    reaped: bool
    claimed: bool
    lease_time: datetime | None  # unheard of since then, it is lost
    update_time: datetime
    deadline: datetime | None = None
    expire_time: datetime | None = None  # of a pause

    @property
    def name(self) -> str:
        """Of the current attempt."""
        return attempt_name(self.uid, self.attempt)


class Do(enum.Enum):
    """One step."""

    WAIT = enum.auto()
    START = enum.auto()  # QUEUED → PREPARING with a new attempt
    ENSURE = enum.auto()  # ask the launcher again
    STOP = enum.auto()  # ask the attempt to end
    HOLD = enum.auto()  # it waits for a place: its lease begins anew
    LOST = enum.auto()  # → QUEUED, or FAILED when the budget is spent
    PAUSED = enum.auto()
    CANCELLED = enum.auto()
    FAIL_DEADLINE = enum.auto()
    REAP = enum.auto()


@dataclass(frozen=True, slots=True)
class Step:
    """What to do, and whether the attempt's end was nobody's fault."""

    do: Do
    disrupted: bool = False
    why: str = ""


HOLD_WITHIN = timedelta(seconds=60)  # a lease that ends sooner is renewed for an attempt that waits
STOP_AFTER = timedelta(seconds=60)  # a pause that the attempt does not hear of is made by a signal


def attempt_name(uid: str, attempt: int) -> str:
    """The one name of an attempt, wherever it runs."""
    return f"ft-{uid}-a{attempt}"


def allowed(before: State, after: State) -> bool:
    """Whether a job may go from one to the other."""
    return after in MOVES[before]


def decide(job: Job, seen: Seen | None, now: datetime) -> Step:
    """What to do with a job next.

    Args:
        job: its row.
        seen: the launcher's look at its attempt; None where there was none to look at.
        now: by the database's clock, as are the job's times.
    """
    gone = seen is None or seen.where in (Where.ABSENT, Where.EXITED)
    if job.state in TERMINAL or job.state is S.PAUSED:
        if not job.reaped:
            return Step(Do.REAP) if gone else Step(Do.STOP)
        expired = job.state is S.PAUSED and job.expire_time is not None and job.expire_time <= now
        return Step(Do.CANCELLED, why="PAUSE_EXPIRED") if expired else Step(Do.WAIT)
    if job.state is S.QUEUED and not job.reaped:
        return Step(Do.REAP) if gone else Step(Do.STOP)
    if job.deadline is not None and job.deadline <= now and job.state in (S.QUEUED, S.PREPARING, S.RUNNING):
        return Step(Do.FAIL_DEADLINE)
    if job.state is S.QUEUED:
        return Step(Do.START)
    if job.state is S.CANCELLING:
        return Step(Do.CANCELLED) if gone else Step(Do.STOP)
    if job.state is S.PAUSING:
        if gone:
            return Step(Do.PAUSED)
        return Step(Do.STOP) if not job.claimed or job.update_time + STOP_AFTER <= now else Step(Do.WAIT)
    # PREPARING or RUNNING.
    if seen is None or seen.where is Where.ABSENT:
        return Step(Do.LOST, disrupted=True, why="gone") if job.launched else Step(Do.ENSURE)
    if seen.where is Where.EXITED:
        return Step(Do.LOST, seen.disrupted or seen.code in (75, 143), f"exit {seen.code}" if seen.code is not None else seen.reason)
    if not job.launched:
        return Step(Do.ENSURE)
    if seen.where is Where.PENDING:  # nobody is there who could renew a lease
        return Step(Do.HOLD) if job.lease_time is not None and job.lease_time <= now + HOLD_WITHIN else Step(Do.WAIT)
    if job.lease_time is not None and job.lease_time <= now:
        return Step(Do.STOP, why="lease")
    return Step(Do.WAIT)
