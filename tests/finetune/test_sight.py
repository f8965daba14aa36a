"""What is read from a Job and its pods: pure."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from services.finetune.jobs import Seen, Waits, Where
from services.finetune.launchers.sight import SAID, seen_in

NOW = datetime(2026, 11, 25, 8, 0, 0, tzinfo=UTC)
RUNNING, ABSENT, PENDING, EXITED = Where.RUNNING, Where.ABSENT, Where.PENDING, Where.EXITED
COMPLETE = {"type": "Complete", "status": "True"}


def failed(reason: str) -> dict[str, str]:
    return {"type": "Failed", "status": "True", "reason": reason}


def job(*conditions: dict[str, str], suspend: bool = False, deleted: bool = False) -> dict[str, Any]:
    metadata = {"name": "ft", **({"deletionTimestamp": "2026-11-25T07:59:59Z"} if deleted else {})}
    return {"metadata": metadata, "spec": {"suspend": suspend}, "status": {"conditions": list(conditions)}}


def pod(phase: str, *conditions: dict[str, str], deleted: str = "", made: str = "2026-11-25T07:00:00Z", **state: Any) -> dict[str, Any]:
    metadata = {"creationTimestamp": made, **({"deletionTimestamp": deleted} if deleted else {})}
    containers = [{"name": "sidecar", "state": {"terminated": {"exitCode": 9}}}, {"name": "trainer", "state": state}]
    return {"metadata": metadata, "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": containers}}


def ended(code: int, phase: str = "Failed", *conditions: dict[str, str], **more: Any) -> dict[str, Any]:
    made = more.pop("made", "2026-11-25T07:00:00Z")
    return pod(phase, *conditions, made=made, terminated={"exitCode": code, **more})


DISRUPTED = {"type": "DisruptionTarget", "status": "True"}
NO_PLACE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/7 nodes are available"}
GATED = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (seen_in(None, [], NOW), Seen(ABSENT)),
        (seen_in(None, [ended(1)], NOW), Seen(ABSENT)),
        (seen_in(None, [pod("Running")], NOW), Seen(RUNNING)),  # the Job is gone, and its pod not yet: nobody may start another
        (seen_in(job(), [], NOW), Seen(PENDING, reason="no pod was made for it", waits=Waits.NO_POD)),
        (seen_in(job(suspend=True), [], NOW), Seen(PENDING, reason="suspended", waits=Waits.SUSPENDED)),
        (seen_in(job(), [pod("Pending", NO_PLACE)], NOW), Seen(PENDING, reason="0/7 nodes are available", waits=Waits.UNSCHEDULABLE)),
        (seen_in(job(), [pod("Pending", GATED)], NOW), Seen(PENDING, waits=Waits.STARTING)),
        (seen_in(job(), [pod("Pending")], NOW), Seen(PENDING, waits=Waits.STARTING)),
        (
            seen_in(job(), [pod("Pending", waiting={"reason": "ImagePullBackOff", "message": "no such image"})], NOW),
            Seen(PENDING, reason="ImagePullBackOff: no such image", waits=Waits.IMAGE),
        ),
        (seen_in(job(), [pod("Pending", waiting={"reason": "ContainerCreating"})], NOW), Seen(PENDING, waits=Waits.STARTING)),
        (seen_in(job(), [ended(143), pod("Running")], NOW), Seen(RUNNING)),  # replaced after a disruption
        (seen_in(job(failed("x")), [pod("Running")], NOW), Seen(RUNNING)),  # decided, and its pod not yet gone
        (seen_in(job(deleted=True), [pod("Running", deleted="2026-11-25T08:00:20Z")], NOW), Seen(RUNNING, reason="ending")),
        (
            seen_in(job(deleted=True), [pod("Running", deleted="2026-11-25T07:59:00Z")], NOW),
            Seen(RUNNING, reason="its node does not answer", waits=Waits.NODE_LOST),
        ),
        (seen_in(None, [pod("Running", deleted="2026-11-25T07:59:00Z")], NOW), Seen(RUNNING, waits=Waits.NODE_LOST)),
        (seen_in(job(COMPLETE), [ended(0, "Succeeded", reason="Completed")], NOW), Seen(EXITED, 0)),
        (seen_in(job(COMPLETE), [], NOW), Seen(EXITED, 0)),
        (seen_in(job(failed("DeadlineExceeded")), [], NOW), Seen(EXITED, None, "DeadlineExceeded")),
        (seen_in(job(failed("PodFailurePolicy")), [ended(65, reason="Error")], NOW), Seen(EXITED, 65, "PodFailurePolicy")),
        (seen_in(job(failed("x")), [ended(137, reason="OOMKilled")], NOW), Seen(EXITED, 137, "OOMKilled")),
        (seen_in(job(failed("x")), [ended(143, "Failed", DISRUPTED)], NOW), Seen(EXITED, 143, "x", disrupted=True)),
        (seen_in(job(failed("x")), [pod("Failed")], NOW), Seen(EXITED, None, "x")),
    ],
)
def test_what_is_seen(seen: Seen, expected: Seen) -> None:
    assert seen == expected


def test_of_two_pods_the_newer_says_how_it_ended() -> None:
    pods = [ended(1, made="2026-11-25T07:05:00Z"), ended(143, "Failed", DISRUPTED, made="2026-11-25T07:00:00Z")]
    for given in (pods, pods[::-1]):
        assert seen_in(job(failed("x")), given, NOW) == Seen(EXITED, 1, "x")


@pytest.mark.parametrize(
    ("message", "reason"),
    [(json.dumps({"reason": "INPUT"}), "INPUT"), ("a row of somebody's", "x"), ("[1]", "x"), ("{}", "x"), ("", "x"),
     (json.dumps({"reason": "y" * 10_000}), "y" * SAID)],
)  # fmt: skip
def test_only_our_own_line_is_repeated_and_it_has_a_bound(message: str, reason: str) -> None:
    assert seen_in(job(failed("x")), [ended(65, message=message)], NOW).reason == reason
