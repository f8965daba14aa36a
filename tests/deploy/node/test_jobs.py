"""A training job from the gateway to a served version, every part of it a pod."""

import json
from typing import Any

import pytest

from argosy.v1 import finetune_pb2
from tests.deploy.node.installed import MODEL, Installed
from tools.cluster.cluster import ROOT

DATA = ROOT / "examples" / "data"
STEPS = 6
Job = finetune_pb2.FineTuneJob


def pods_of(installed: Installed, job: str) -> list[dict[str, Any]]:
    """The job's attempts as the cluster sees them."""
    found = installed.node.kubectl("get", "jobs", "-n", installed.jobs, "-l", f"argosy.dev/job-id={job}", "-o", "json")
    items: list[dict[str, Any]] = json.loads(found)["items"]
    return items


@pytest.mark.timeout(900)
def test_job_end_to_end(installed: Installed) -> None:
    seen: list[finetune_pb2.JobEvent] = []
    jobs: list[dict[str, Any]] = []
    with installed.blocking() as client:

        def watch(event: finetune_pb2.JobEvent) -> None:
            seen.append(event)
            if event.HasField("metric") and not jobs:
                jobs.extend(pods_of(installed, tuning.job.uid))

        choices: dict[str, Any] = {"max_steps": STEPS, "batch_size": 16, "rank": 4, "seed": 5}
        tuning = client.tune(DATA / "sentences.tsv", base=MODEL, method="classify", held_out=DATA / "heldout.tsv", **choices)
        version = tuning.wait(seen=watch)
        assert tuning.job.step == tuning.job.target_step == STEPS
        states = [Job.State.Name(event.state.state).removeprefix("STATE_") for event in seen if event.HasField("state")]
        assert (states[0], states[-1]) == ("QUEUED", "SUCCEEDED") and "RUNNING" in states
        (job,) = jobs
        assert job["metadata"]["name"] == f"ft-{tuning.job.uid}-a1"
        assert job["spec"]["template"]["spec"]["containers"][0]["image"].startswith("localhost/argosy-trainer:")
        reply = client.classify("银行下调存款利率", model=version.name)
        assert reply.model.version == version.name
        assert sum(label.probability for label in reply.results[0].labels) == pytest.approx(1, abs=1e-4)
