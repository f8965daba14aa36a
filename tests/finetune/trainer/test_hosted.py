"""The wrapper around a trainer of the operator's own: what it lays out, and what it believes of what the command leaves."""

import json
import sys
import threading

import numpy as np
import pytest

from services.finetune.bases import linear_layers
from services.finetune.trainer.control import DONE, INPUT, LOST, TERMINATED, Action, Fenced
from services.finetune.trainer.hosted import UNFINISHED, Callback, Hosted, finished
from services.finetune.trainer.spec import Lora, Method, Privacy
from tests.finetune.adapters import file, lora
from tests.finetune.trainer import world

STOPPER = {"EarlyStoppingCallback": {"args": {"early_stopping_patience": 2}, "attributes": {"early_stopping_patience_counter": 2}}}
# What the command does: leave `result`'s files, and the state that it is told.
COMMAND = """
import json, os, shutil, sys
output, spec = os.environ["ARGOSY_OUTPUT_DIRECTORY"], json.load(open(os.environ["ARGOSY_SPEC_FILE"]))
rows = [json.loads(line) for line in open(os.environ["ARGOSY_TRAIN_FILE"])]
assert rows and all(set(row) == {"messages"} for row in rows) and spec["method"] == "chat"
assert not any(name.startswith(("AWS_", "ARGOSY_STORE", "ARGOSY_TOKEN")) for name in os.environ)
assert os.environ["KUBEFLOW_TRAINER_SERVER_URL"].startswith("https://finetune:8602/jobs/")
shutil.copytree(sys.argv[1], output, dirs_exist_ok=True)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def plane(tmp_path):
    return world.plane(Method.CHAT, f"file://{tmp_path}/store", lora=Lora(rank=2, alpha=4.0), data=world.chat_rows(20))


@pytest.fixture
def result(tiny_base, tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    modules = linear_layers(tiny_base)
    targets = sorted({path.rpartition(".")[2] for path in modules})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(file(lora(3, 2, modules)))
    state = {"global_step": 5, "max_steps": 5, "log_history": [{"loss": 2.0, "step": 1}, {"eval_loss": 1.5}, {"train_loss": 1.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def hosted(plane, base, tmp_path, *words, stop=None, interval_s=0.05):
    token = tmp_path / "token"
    token.write_text("t")
    words = words or ("-c", "pass")
    callback = Callback("https://finetune:8602", token)
    event = stop or threading.Event()
    return Hosted(plane, plane.objects, base, event, (sys.executable, *words), callback, world.JOB, 1, interval_s)


def test_what_it_leaves_is_checked_rewritten_and_a_result(plane, tiny_base, result, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert hosted(plane, tiny_base, tmp_path, "-c", COMMAND, str(result), "0").run() == DONE
    (outcome,) = plane.ends
    assert (outcome.step, outcome.metrics) == (5, {"loss": 2.0, "validation_loss": 1.5, "train_loss": 1.0})
    assert [part.name for part in outcome.parts] == ["adapter.safetensors"] and not outcome.temperature
    assert (plane.reports[-1].step, plane.reports[-1].target_step, plane.reports[-1].early_stopped) == (5, 5, False)
    assert not plane.reports[0].step and outcome.rows["train"] + outcome.rows["validation"] == 20


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"global_step": 5, "max_steps": 5}, (5, False)),
        ({"global_step": 3, "max_steps": 5}, None),
        ({"global_step": 3, "max_steps": 5, "stateful_callbacks": STOPPER}, (3, True)),
        ({"global_step": 3, "max_steps": 5, "stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": True}}}}, None),
        ({"global_step": 0, "max_steps": 0}, None),
        ({}, None),
    ],
)
def test_T7_an_end_is_the_steps_that_were_meant_or_a_spent_patience(state, found):
    assert finished(state) == found


@pytest.mark.parametrize(("step", "code", "ends"), [(3, 0, UNFINISHED), (5, 3, 3), (5, 75, UNFINISHED), (5, 143, UNFINISHED)])
def test_T7_exit_0_before_the_last_step_and_any_crash_are_no_result(plane, tiny_base, result, tmp_path, step, code, ends):
    (result / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 5}))
    assert hosted(plane, tiny_base, tmp_path, "-c", COMMAND, str(result), str(code)).run() == ends
    assert not plane.ends


@pytest.mark.parametrize("spoilt", ["rank", "nan", "missing", "code"])
def test_A16_files_that_do_not_fit_fail_the_job(plane, tiny_base, result, tmp_path, spoilt):
    config = json.loads((result / "adapter_config.json").read_text())
    modules = linear_layers(tiny_base)
    if spoilt == "rank":
        config["r"] = 4
        (result / "adapter_model.safetensors").write_bytes(file(lora(3, 4, modules)))
    elif spoilt == "nan":
        tensors = lora(3, 2, modules)
        name = next(iter(tensors))
        tensors[name] = np.full_like(tensors[name], np.nan)
        (result / "adapter_model.safetensors").write_bytes(file(tensors))
    elif spoilt == "missing":
        (result / "adapter_model.safetensors").unlink()
    else:
        config["auto_mapping"] = {"parent_library": "os"}
    (result / "adapter_config.json").write_text(json.dumps(config))
    assert hosted(plane, tiny_base, tmp_path, "-c", COMMAND, str(result), "0").run() == INPUT
    (failure,) = plane.ends
    assert failure.rule.startswith("hosted.")


def test_a_private_job_is_not_handed_to_a_trainer_that_nobody_vouches_for(tiny_base, tmp_path):
    plane = world.plane(Method.CHAT, f"file://{tmp_path}/store", privacy=Privacy(8.0, 1e-5))
    assert hosted(plane, tiny_base, tmp_path).run() == INPUT
    assert plane.ends[0].rule == "hosted.private"


def test_told_to_pause_the_command_is_ended(plane, tiny_base, tmp_path):
    plane.action = Action.PAUSE
    assert hosted(plane, tiny_base, tmp_path, "-c", "import threading; threading.Event().wait()").run() == DONE
    assert plane.ends == [("stopped", 0)]


def test_a_signal_ends_both_and_nothing_is_claimed_of_it(plane, tiny_base, tmp_path):
    stop = threading.Event()
    stop.set()
    assert hosted(plane, tiny_base, tmp_path, "-c", "import threading; threading.Event().wait()", stop=stop).run() == TERMINATED
    assert not plane.ends


def test_F24_fenced_the_command_is_ended(plane, tiny_base, tmp_path):
    taken, report = threading.Event(), plane.report

    def fenced(said):
        if taken.is_set():
            raise Fenced
        taken.set()
        return report(said)

    plane.report = fenced
    assert hosted(plane, tiny_base, tmp_path, "-c", "import threading; threading.Event().wait()").run() == LOST
