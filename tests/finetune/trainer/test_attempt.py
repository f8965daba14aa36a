import hashlib
import json
import threading

import pytest
import torch

from services.finetune.trainer.attempt import DONE, INPUT, LOST, TERMINATED, Attempt
from services.finetune.trainer.control import Action, Failure
from services.finetune.trainer.spec import EarlyStopping, Hyperparameters, Lora, Method
from services.finetune.trainer.train import Evaluation, Trainer
from tests.finetune.trainer import world


def attempt(plane, directory, boundary=lambda step: None, stop=None):
    return Attempt(plane, plane.objects, directory, stop or threading.Event(), interval_s=0.05, boundary=boundary)


def digests(plane):
    (outcome,) = plane.ends
    return {part.name: part.sha256 for part in outcome.parts}


@pytest.fixture(scope="module")
def straight(tiny_base):
    """Digests of a run that nothing interrupted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    plane = world.plane()
    assert attempt(plane, tiny_base).run() == DONE
    torch.set_num_threads(before)
    return digests(plane)


@pytest.mark.parametrize("method", [Method.CLASSIFY, Method.CHAT])
def test_trains_to_a_result_better_than_the_base(tiny_base, method):
    plane = world.plane(method, hyperparameters=Hyperparameters(learning_rate=1e-2, epochs=6, batch_size=8))
    assert attempt(plane, tiny_base).run() == DONE
    (outcome,) = plane.ends
    if method is Method.CLASSIFY:
        assert outcome.metrics["validation_accuracy"] > 0.9 > outcome.metrics["majority_accuracy"]
        assert outcome.labels == ("sport", "tech") and outcome.temperature > 0
        assert digests(plane).keys() == {"adapter.safetensors", "head.safetensors"}
    else:
        assert outcome.metrics["validation_loss"] < 0.7 * outcome.metrics["base_validation_loss"]
        assert digests(plane).keys() == {"adapter.safetensors"} and len(outcome.template_hash) == 64
    last = plane.reports[-1]
    assert last.step == last.target_step == outcome.step
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= {name for report in plane.reports for name, *_ in report.metrics}
    steps = [step for report in plane.reports for name, _, step in report.metrics if name == "loss"]
    assert steps == list(range(1, outcome.step + 1))  # every step, once


@pytest.mark.parametrize("method", [Method.CLASSIFY, Method.CHAT])
def test_T5_a_run_told_to_leave_resumes_to_the_same_bytes(tiny_base, method):
    straight = world.plane(method)
    assert attempt(straight, tiny_base).run() == DONE
    broken = world.plane(method)
    for at in (1, 3, 4):
        stop = threading.Event()
        assert attempt(broken, tiny_base, lambda step, at=at, stop=stop: stop.set() if step == at else None, stop).run() == TERMINATED
        assert broken.commits[-1][0] == at
    assert attempt(broken, tiny_base).run() == DONE
    assert digests(broken) == digests(straight)
    assert broken.ends[0].metrics == straight.ends[0].metrics


class Killed(BaseException):
    pass


def test_T5_a_run_killed_between_checkpoints_repeats_its_steps_to_the_same_bytes(tiny_base, straight):
    broken = world.plane(checkpoint_interval_steps=3)

    def die(step):
        if step == 5 and broken.fence == 1:
            raise Killed

    with pytest.raises(Killed):
        attempt(broken, tiny_base, die).run()
    assert [step for step, *_ in broken.commits] == [3]
    assert attempt(broken, tiny_base).run() == DONE
    assert digests(broken) == straight


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        ("adapter.safetensors", "truncate"),
        ("optimizer.safetensors", "flip"),
        ("random.bin", "remove"),
        ("state.json", "truncate"),
        ("manifest.json", "flip"),
        ("manifest.json", "remove"),
    ],
)
def test_T6_F27_a_damaged_checkpoint_is_passed_over_with_a_warning(tiny_base, straight, part, harm):
    broken, stop = world.plane(), threading.Event()
    assert attempt(broken, tiny_base, lambda step: stop.set() if step == 4 else None, stop).run() == TERMINATED
    (step, prefix, _) = broken.commits[-1]
    path = f"{prefix}{part}"
    data = broken.objects.get(path)
    if harm == "truncate":
        broken.objects.put(path, data[: len(data) // 2])
    elif harm == "remove":
        broken.objects.delete(path)
    else:
        broken.objects.put(path, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert attempt(broken, tiny_base).run() == DONE
    warned = [warning for report in broken.reports for warning in report.warnings]
    assert [(warning.rule, warning.count) for warning in warned] == [("checkpoint.damaged", step)]
    assert digests(broken) == straight


def test_T8_a_fenced_process_leaves_with_75_and_ends_nothing(tiny_base):
    plane = world.plane(fenced_at=1)
    assert attempt(plane, tiny_base).run() == LOST
    assert len(plane.commits) == 1 and not plane.ends


def test_pausing_commits_the_step_and_says_so(tiny_base):
    plane = world.plane(checkpoint_interval_steps=100)

    def pause(step):
        if step == 3:
            plane.action = Action.PAUSE
            while not any(report.step == 3 for report in plane.reports):
                threading.Event().wait(0.01)

    running = attempt(plane, tiny_base, pause)
    assert running.run() == DONE
    (end,) = plane.ends
    assert end[0] == "stopped" and end[1] == plane.commits[-1][0] >= 3


def test_cancelling_commits_nothing_more(tiny_base):
    plane = world.plane(checkpoint_interval_steps=100, action=Action.CANCEL)
    assert attempt(plane, tiny_base).run() == DONE
    assert plane.ends == [("stopped", 0)] and not plane.commits


def test_early_stopping_lowers_the_target_and_keeps_the_best(tiny_base):
    own = Hyperparameters(learning_rate=0.0, head_learning_rate=0.0, epochs=20, batch_size=8)
    plane = world.plane(hyperparameters=own, early_stopping=EarlyStopping(patience=2), lora=Lora(rank=2, dropout=0.0))
    assert attempt(plane, tiny_base).run() == DONE
    targets = [report.target_step for report in plane.reports if report.target_step]
    assert targets[-1] == plane.ends[0].step < targets[0] and plane.reports[-1].early_stopped


def test_what_is_published_is_the_best_by_the_validation_rows_not_the_last(tiny_base, monkeypatch):
    losses = iter([0.9, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer, examples=None: Evaluation(next(losses, 0.5)))
    own = Hyperparameters(learning_rate=1e-2, epochs=20, batch_size=8)
    changed = {"evaluation_interval_steps": 1, "checkpoint_interval_steps": 1, "early_stopping": EarlyStopping(patience=3)}
    plane = world.plane(Method.CHAT, hyperparameters=own, **changed)

    def committed(step):
        while step not in [number for number, *_ in plane.commits]:
            threading.Event().wait(0.01)

    assert attempt(plane, tiny_base, committed).run() == DONE
    stored = {step: hashlib.sha256(plane.objects.get(f"{prefix}adapter.safetensors")).hexdigest() for step, prefix, _ in plane.commits}
    assert list(stored) == [1, 2, 3, 4, 5] and len(set(stored.values())) == 5
    assert digests(plane)["adapter.safetensors"] == stored[2]
    assert plane.ends[0].step == 5


def _broken_row(data):
    lines = data.splitlines(keepends=True)
    return b"".join([*lines[:6], b'{"text": "a"}\n', *lines[6:]])


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"data": _broken_row(world.classify_rows())}, Failure("DATA_INVALID", "V5.missing", 7, "label")),
        ({"base_digest": "0" * 64}, Failure("BASE_CHANGED")),
        ({"seq_len": 1}, Failure("DATA_INVALID", "V9.none_left")),
        ({"lora": Lora(targets=("nothing",))}, Failure("DATA_INVALID", "spec.targets")),
        ({"hyperparameters": Hyperparameters(learning_rate=1e38, epochs=3)}, Failure("DIVERGED")),
    ],
)
def test_what_can_never_work_fails_for_good_and_says_where(tiny_base, change, failure):
    plane = world.plane(**change)
    assert attempt(plane, tiny_base).run() == INPUT
    assert plane.ends == [failure]


def test_rows_of_another_digest_are_not_read(tiny_base):
    plane = world.plane()
    claim = plane.claim
    plane.claim = lambda: (found := claim(), plane.objects.put(found.train.path, world.classify_rows(seed=2)))[0]
    assert attempt(plane, tiny_base).run() == INPUT
    assert plane.ends == [Failure("DATA_INVALID", "V1.digest")]


def test_a_row_longer_than_seq_len_is_dropped_and_counted(tiny_base):
    long = json.dumps({"text": "tech " * 200, "label": "tech"}).encode() + b"\n"
    plane = world.plane(data=long + world.classify_rows(), validation_fraction=0.0)
    assert attempt(plane, tiny_base).run() == DONE
    warned = [warning for report in plane.reports for warning in report.warnings]
    assert [(warning.rule, warning.line, warning.count) for warning in warned] == [("V9.too_long", 1, 1)]
    assert plane.ends[0].rows == {"train": 40, "validation": 0} and plane.ends[0].temperature == 1.0
