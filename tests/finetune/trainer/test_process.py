"""The trainer as its launcher sees it: an environment, signals, an exit code."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from services.finetune.trainer.attempt import DONE, LOST, TERMINATED, Attempt
from services.finetune.trainer.wire import WireControl
from tests.finetune.trainer import world
from tests.finetune.trainer.service import TOKEN, Service, serving, spec


@pytest.fixture
def service(tmp_path):
    plane = world.plane(store=f"file://{tmp_path}/store", data=world.classify_rows(80))
    return Service(plane, spec())


def start(service, port, directory, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(["clients/python", "clients/internal"]),
        "OMP_NUM_THREADS": "1",
        "ARGOSY_TRAINING_ADDRESS": f"127.0.0.1:{port}",
        "ARGOSY_JOB": world.JOB,
        "ARGOSY_ATTEMPT": str(service.plane.fence + 1),
        "ARGOSY_TOKEN_FILE": str(token),
        "ARGOSY_STORE_URL": f"file://{tmp_path}/store",
        "ARGOSY_BASE_DIRECTORY": str(directory),
        "ARGOSY_THREADS": "1",
    }
    with (tmp_path / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "services.finetune.trainer"], env=environment, stderr=log)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.002)


def test_F26_T5_killed_and_told_to_leave_it_ends_with_the_same_bytes(service, tiny_base, tmp_path):
    with serving(service) as port:
        control = WireControl(f"127.0.0.1:{port}", world.JOB, 1, TOKEN)
        assert Attempt(control, service.plane.objects, tiny_base, threading.Event()).run() == DONE
        control.close()
        straight = service.plane.ends.pop().result
        service.plane.commits.clear()
        first = start(service, port, tiny_base, tmp_path)
        until(lambda: service.plane.commits)
        first.send_signal(signal.SIGKILL)
        assert first.wait(60) == -signal.SIGKILL
        kept = len(service.plane.commits)
        second = start(service, port, tiny_base, tmp_path)
        until(lambda: len(service.plane.commits) > kept)
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) == TERMINATED and not service.plane.ends
        assert start(service, port, tiny_base, tmp_path).wait(60) == DONE
    again = service.plane.ends.pop().result
    assert {part.name: part.sha256 for part in again.parts} == {part.name: part.sha256 for part in straight.parts}
    assert again.metrics == straight.metrics and again.temperature == straight.temperature


def test_fenced_it_exits_with_75(service, tiny_base, tmp_path):
    service.plane.fenced_at = 0
    with serving(service) as port:
        process = start(service, port, tiny_base, tmp_path)
        assert process.wait(60) == LOST, (tmp_path / "log").read_text()
    assert not service.plane.ends


def test_an_environment_that_lacks_a_variable_is_named():
    process = subprocess.run(
        [sys.executable, "-m", "services.finetune.trainer"], env={"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and "ARGOSY_JOB must be set" in process.stderr
