"""A trainer of the operator's own, run under this wrapper: it claims, keeps the lease, and says what the run came to.

The command finds its rows, spec and base by environment variables, and leaves in `ARGOSY_OUTPUT_DIRECTORY` what `Trainer.save_model()` of a
PEFT model and `Trainer.save_state()` write: `adapter_config.json`, `adapter_model.safetensors`, `trainer_state.json`, and for a classifier
`head.safetensors` (`weight` [labels, width], `bias` [labels]). Its live progress goes to the callback endpoint, which transformers finds by
the variables set here. An exit code is no success: the steps done must be the steps meant. Nothing is resumed: a paused or lost attempt
begins again, since checkpoints of another trainer are files that we would have to believe.
"""

import json
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from services.chassis.objects import ObjectsUnavailable, SyncObjects
from services.finetune import imports
from services.finetune.bases import linear_layers
from services.finetune.rows import Row
from services.finetune.tensors import Refused as Misfit
from services.finetune.trainer.control import (
    DONE,
    INPUT,
    LOST,
    TERMINATED,
    Action,
    Claim,
    Control,
    Failure,
    Fenced,
    Outcome,
    Part,
    Refused,
    Report,
    Unanswered,
    failed,
)
from services.finetune.trainer.grants import Unusable, divided, near_overlap, same_base
from services.finetune.trainer.parts import store
from services.finetune.trainer.spec import Method
from services.pretrained.fingerprint import fingerprint
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer

__all__ = ["Callback", "Hosted", "finished"]

log = logging.getLogger(__name__)

INTERVAL_S = 4.0  # between reports; a lease of 30 s survives several lost ones
GRACE_S = 20.0  # from SIGTERM to SIGKILL of the command
UNFINISHED = 1  # exit code of an attempt whose command left without a result
# What the command may know of our environment: nothing of the store, which it does not need.
PASSED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONUNBUFFERED")
FAMILIES = ("OMP_", "MKL_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "TORCH", "TRITON_", "XDG_")


@dataclass(frozen=True)
class Callback:
    """Where live progress goes; `url` is empty where nobody takes it."""

    url: str
    token_file: Path
    ca: Path | None = None


def finished(state: Mapping[str, Any]) -> tuple[int, bool] | None:
    """Steps done and whether early stopping ended them, from `trainer_state.json`; None: it left before its end.

    A trainer told to leave by a signal exits with 0 and a state that says so: its steps are not those meant, and no patience was spent.
    """
    done, meant = state.get("global_step"), state.get("max_steps")
    if not isinstance(done, int) or not isinstance(meant, int) or done < 1:
        return None
    if done == meant:
        return done, False
    callbacks = state.get("stateful_callbacks")
    stopper = callbacks.get("EarlyStoppingCallback") if isinstance(callbacks, dict) else None
    for each in stopper if isinstance(stopper, list) else [stopper]:
        if not isinstance(each, dict):
            continue
        patience = each.get("args", {}).get("early_stopping_patience")
        spent = each.get("attributes", {}).get("early_stopping_patience_counter")
        if isinstance(patience, int) and isinstance(spent, int) and spent >= patience >= 1:
            return done, True
    return None


@dataclass(slots=True)
class Hosted:
    """One process's work, as `attempt.Attempt` for our own loop. `stop` is set by SIGTERM."""

    control: Control
    objects: SyncObjects
    directory: Path
    stop: threading.Event
    command: Sequence[str]
    callback: Callback
    job: str
    attempt: int
    interval_s: float = INTERVAL_S

    def run(self) -> int:
        """Have the command train, and judge what it leaves; the exit code."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                return self._claimed(self.control.claim(), Path(folder))
        except Unusable as unusable:
            return failed(self.control, unusable.failure)
        except Misfit as misfit:
            log.error("the command's files are refused", extra={"rule": misfit.rule})
            return failed(self.control, Failure("INTERNAL", f"hosted.{misfit.rule}"[:64]))
        except (Fenced, Unanswered, Refused, ObjectsUnavailable) as error:
            log.warning("gave up", extra={"failure": type(error).__name__})
            return LOST

    def _claimed(self, claim: Claim, folder: Path) -> int:
        began = time.monotonic()
        if claim.spec.privacy is not None:
            raise Unusable(Failure("PRIVACY_GUARD", "hosted.private"))  # nobody here could vouch for its noise
        if claim.spec.lora is None:
            raise Unusable(Failure("DATA_INVALID", "spec.adapter"))
        digest = same_base(self.directory, claim)
        train, held = divided(self.objects, claim)
        near = near_overlap(train, held) if held else None
        self.control.report(Report(phase="loading", warnings=(near,) if near is not None else ()))
        labels = tuple(sorted({row.label for row in train})) if claim.spec.method is Method.CLASSIFY else ()
        held = [row for row in held if not labels or row.label in labels]
        environment = self._laid_out(folder, claim, train, held, labels)
        code = self._watched(environment, began)
        if code is not None:
            return code
        output = folder / "output"
        state = _json(output / "trainer_state.json")
        ended = finished(state)
        if ended is None:
            log.error("the command ended before its last step", extra={"step": state.get("global_step"), "of": state.get("max_steps")})
            return UNFINISHED
        step, early = ended
        outcome = self._outcome(claim, output, digest, labels, {"train": len(train), "validation": len(held)}, state, step)
        seconds = time.monotonic() - began
        final = Report(phase="committing", step=step, target_step=step, early_stopped=early, device_seconds=seconds)
        self.control.report(final)
        self.control.succeed(replace(outcome, seconds=seconds))
        return DONE

    def _laid_out(self, folder: Path, claim: Claim, train: list[Row], held: list[Row], labels: tuple[str, ...]) -> dict[str, str]:
        """Rows and spec as files, and the variables that name them."""
        (folder / "output").mkdir()
        files = {"train": folder / "train.jsonl", "validation": folder / "validation.jsonl", "spec": folder / "spec.json"}
        for name, rows in (("train", train), ("validation", held)):
            with files[name].open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
        files["spec"].write_text(json.dumps(asdict(claim.spec) | {"labels": labels, "method": claim.spec.method.value}))
        ours = {name: value for name, value in os.environ.items() if name in PASSED or name.startswith(FAMILIES)}
        made = ours | {
            "ARGOSY_TRAIN_FILE": str(files["train"]),
            "ARGOSY_VALIDATION_FILE": str(files["validation"]) if held else "",
            "ARGOSY_SPEC_FILE": str(files["spec"]),
            "ARGOSY_BASE_DIRECTORY": str(self.directory),
            "ARGOSY_OUTPUT_DIRECTORY": str(folder / "output"),
            "HF_HUB_OFFLINE": "1",
        }
        if self.callback.url:
            made["KUBEFLOW_TRAINER_SERVER_URL"] = f"{self.callback.url}/jobs/{self.job}/attempts/{self.attempt}/status"
            made["KUBEFLOW_TRAINER_SERVER_TOKEN"] = str(self.callback.token_file)
            if self.callback.ca is not None:
                made["KUBEFLOW_TRAINER_SERVER_CA_CERT"] = str(self.callback.ca)
        return made

    def _watched(self, environment: Mapping[str, str], began: float) -> int | None:
        """Run the command and keep the lease; the exit code where it did not end by itself and well, else None."""
        # In our process group: who signals the attempt signals it, too.
        child = subprocess.Popen(list(self.command), env=dict(environment), stdin=subprocess.DEVNULL)
        try:
            while True:
                try:
                    code = child.wait(self.interval_s)
                except subprocess.TimeoutExpired:
                    code = None
                if self.stop.is_set():
                    return TERMINATED
                if code is not None:
                    return None if code == 0 else _crashed(code)
                action = self.control.report(Report(phase="training", device_seconds=time.monotonic() - began))
                if action is not Action.CONTINUE:
                    _ended(child)
                    self.control.stopped(0)
                    return DONE
        finally:
            _ended(child)

    def _outcome(
        self, claim: Claim, output: Path, digest: str, labels: tuple[str, ...], rows: dict[str, int], state: Mapping[str, Any], step: int
    ) -> Outcome:
        """Check what the command left as an import is checked, and store it anew as the result. Raises tensors.Refused."""
        modules = linear_layers(self.directory)
        width = next((shape[1] for path, shape in modules.items() if path.endswith("q_proj")), 0)
        for theirs, ours in (("adapter_config.json", "config.json"), ("adapter_model.safetensors", "weights.safetensors")):
            if not (output / theirs).is_file():
                raise Misfit(f"{ours.partition('.')[0]}.missing")
            (output / theirs).rename(output / ours)
        method = "CLASSIFY" if labels else "CHAT"
        checked = imports.check_files(output, imports.Order(method, labels, modules, width))
        asked = claim.spec.lora
        assert asked is not None
        if (checked.rank, checked.alpha, checked.rslora, checked.dora) != (asked.rank, asked.alpha, asked.rslora, asked.dora):
            raise Misfit("config.differs")
        names = {"adapter.safetensors": "adapter.safetensors"} | ({"head.safetensors": "head.out"} if labels else {})
        files = {name: (output / path).read_bytes() for name, path in names.items()}
        parts: tuple[Part, ...] = store(self.objects, f"{claim.prefix}result/", files)
        tokenizer = Tokenizer.from_directory(self.directory)
        template = load_template(self.directory, tokenizer, tokenizer.prefix)
        return Outcome(
            base_digest=digest,
            targets=checked.targets,
            parts=parts,
            temperature=1.0 if labels else 0.0,  # nobody has calibrated it
            max_tokens=claim.spec.seq_len if labels else 0,
            template_hash="" if labels else fingerprint(self.directory, tokenizer, template),
            rows=rows,
            labels=labels,
            metrics=_numbers(state),
            seconds=0.0,
            step=step,
            precision="not said",
        )


def _plain(row: Row) -> dict[str, Any]:
    if row.messages:
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in row.messages]}
    if row.prompt:
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    return {"text": row.text, "label": row.label}


def _json(path: Path) -> Mapping[str, Any]:
    """An object from a file, empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """The last of each measured number, under our names."""
    found: dict[str, float] = {}
    history = state.get("log_history")
    for entry in history if isinstance(history, list) else []:
        for name, value in entry.items() if isinstance(entry, dict) else ():
            known = name in ("loss", "train_loss") or name.startswith("eval_")
            if known and isinstance(value, int | float) and not isinstance(value, bool):
                found[name.replace("eval_", "validation_", 1)[:64]] = float(value)
    return dict(list(found.items())[:64])


def _crashed(code: int) -> int:
    """A command's exit code as ours: 128 + n for signal n, as a shell says it; never one that means something here."""
    code = 128 - code if code < 0 else code
    return UNFINISHED if code in (LOST, TERMINATED, INPUT) else code


def _ended(child: "subprocess.Popen[bytes]") -> None:
    """Have it gone."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
