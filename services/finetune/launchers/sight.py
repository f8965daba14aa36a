"""What a Job and its pods say about an attempt (pure)."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from services.finetune.jobs import Seen, Waits, Where

__all__ = ["finished", "seen_in"]

Body = dict[str, Any]

OVERDUE: Final = timedelta(seconds=15)  # a pod that is still there so long after its grace has no kubelet to end it
IMAGE: Final = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"})
SAID = 200  # characters of a reason


def seen_in(job: Body | None, pods: Sequence[Body], now: datetime) -> Seen:
    """One look.

    Args:
        job: the Job (or JobSet), None where there is none.
        pods: those of the attempt that exist.
        now: UTC.
    """
    left = [pod for pod in pods if not _ended(pod)]
    lost = any(_overdue(pod, now) for pod in left)
    if job is None:
        return Seen(Where.RUNNING, waits=Waits.NODE_LOST if lost else None) if left else Seen(Where.ABSENT)
    done = finished(job)
    if done is not None and not left:
        return _exited(done, pods)
    if lost:
        return Seen(Where.RUNNING, reason="its node does not answer", waits=Waits.NODE_LOST)
    if job["metadata"].get("deletionTimestamp"):
        return Seen(Where.RUNNING, reason="ending")
    if any(pod["status"].get("phase") == "Running" for pod in left):
        return Seen(Where.RUNNING)
    return _pending(job, left)


def finished(job: Body) -> Body | None:
    """The condition that says so; None: it is not."""
    return _condition(job, "Complete", "Completed", "Failed")


def _exited(done: Body, pods: Sequence[Body]) -> Seen:
    reason = "" if done["type"] in ("Complete", "Completed") else str(done.get("reason") or "")
    newest = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""), default=None)
    if newest is None:
        return Seen(Where.EXITED, 0 if not reason else None, reason)
    ended = _terminated(newest)
    disrupted = _met(newest, "DisruptionTarget") is not None
    if ended is None:
        return Seen(Where.EXITED, None, str(newest["status"].get("reason") or reason), disrupted)
    said = _said(ended.get("message") or "") or (ended.get("reason") if ended.get("reason") not in ("Error", "Completed") else "") or reason
    return Seen(Where.EXITED, ended.get("exitCode"), str(said)[:SAID], disrupted)


def _said(message: str) -> str:
    """What the trainer left: one JSON line with a `reason`; anything else is not ours to repeat."""
    try:
        found = json.loads(message)
    except ValueError:
        return ""
    return str(found.get("reason") or "")[:SAID] if isinstance(found, dict) else ""


def _pending(job: Body, pods: Sequence[Body]) -> Seen:
    if job["spec"].get("suspend"):
        return Seen(Where.PENDING, reason="suspended", waits=Waits.SUSPENDED)
    for pod in pods:
        placed = _met(pod, "PodScheduled", "False")
        if placed is not None:
            waits = Waits.UNSCHEDULABLE if placed.get("reason") == "Unschedulable" else Waits.STARTING
            return Seen(Where.PENDING, reason=str(placed.get("message") or "")[:SAID], waits=waits)
        for status in pod["status"].get("containerStatuses") or ():
            waiting = (status.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in IMAGE:
                return Seen(Where.PENDING, reason=f"{waiting['reason']}: {waiting.get('message') or ''}"[:SAID], waits=Waits.IMAGE)
    if pods:
        return Seen(Where.PENDING, waits=Waits.STARTING)
    return Seen(Where.PENDING, reason="no pod was made for it", waits=Waits.NO_POD)


def _ended(pod: Body) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def _overdue(pod: Body, now: datetime) -> bool:
    """A deletion timestamp is when the grace ends."""
    due = pod["metadata"].get("deletionTimestamp")
    return bool(due) and now > datetime.fromisoformat(due) + OVERDUE


def _terminated(pod: Body) -> Body | None:
    for status in pod["status"].get("containerStatuses") or ():
        ended = (status.get("state") or {}).get("terminated")
        if ended and status["name"] == "trainer":
            return dict(ended)
    return None


def _condition(thing: Body, *kinds: str) -> Body | None:
    return next((found for kind in kinds if (found := _met(thing, kind)) is not None), None)


def _met(thing: Body, kind: str, status: str = "True") -> Body | None:
    for each in (thing.get("status") or {}).get("conditions") or ():
        if each.get("type") == kind and each.get("status") == status:
            return dict(each)
    return None
