"""A trainer that is taken away goes on from its last checkpoint, and ends with the very bytes of one that was left alone (F26)."""

import os

import pytest

from tests.deploy.faults.training import EVERY, STEPS, Run, evict, found, kill, trainer, tune
from tests.deploy.node.installed import Installed

ROUNDS = int(os.environ.get("ARGOSY_TEST_EVICTIONS", "1"))  # of each kind


@pytest.fixture(scope="module")
def undisturbed(installed: Installed) -> Run:
    """What it would have become."""
    run = tune(installed)
    assert run.job.attempt == 1 and run.job.step == STEPS
    return run


def replaced(installed: Installed, job: str) -> None:
    """Evict the trainer; its successor is of the same Job, which counts no failure."""
    before = trainer(installed, job)
    evict(installed, before)
    installed.node.wait(installed.jobs, f"pod/{before}", "jsonpath={.status.phase}=Failed", 120)
    gone = found(installed, "pods", job)[before]
    assert [each["reason"] for each in gone["status"]["conditions"] if each["type"] == "DisruptionTarget"] == ["EvictionByEvictionAPI"]
    assert trainer(installed, job) != before
    jobs = found(installed, "jobs", job)
    assert list(jobs) == [f"ft-{job}-a1"] and "failed" not in jobs[f"ft-{job}-a1"]["status"]


@pytest.mark.timeout(900 * (1 + ROUNDS))
@pytest.mark.parametrize("times", [1, 2])
def test_F26_an_evicted_trainer_ends_equal(installed: Installed, undisturbed: Run, times: int) -> None:
    for _ in range(ROUNDS):
        run = tune(installed, *[lambda job: replaced(installed, job)] * times)
        print(f"evicted {times} times: checkpoints {run.checkpoints}, attempts {run.job.attempt}, {run.trained}")
        assert run.trained == undisturbed.trained
        assert run.job.attempt == 1 and run.job.step == STEPS
        assert run.checkpoints == sorted(set(run.checkpoints))


@pytest.mark.timeout(900 * (1 + ROUNDS))
def test_F26_a_killed_trainer_is_the_next_attempt_and_ends_equal(installed: Installed, undisturbed: Run) -> None:
    for _ in range(ROUNDS):
        run = tune(installed, kill)
        print(f"killed: checkpoints {run.checkpoints}, attempts {run.job.attempt}, {run.trained}")
        assert run.trained == undisturbed.trained
        assert run.job.attempt == 2 and run.job.step == STEPS
        assert max(after - before for before, after in zip([0, *run.checkpoints], run.checkpoints, strict=False)) <= 2 * EVERY


@pytest.mark.timeout(900)
def test_F26_an_eviction_and_a_kill_of_one_job_end_equal(installed: Installed, undisturbed: Run) -> None:
    run = tune(installed, lambda job: replaced(installed, job), kill)
    assert run.trained == undisturbed.trained and run.job.attempt == 2
