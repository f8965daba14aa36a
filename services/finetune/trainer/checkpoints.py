"""Checkpoints: parts in safetensors and JSON, a manifest of their digests, and the way back. Nothing is unpickled, ever."""

import hashlib
import json
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from services.chassis.objects import ObjectMissing, SyncObjects
from services.finetune.trainer.control import Part, ResumePoint
from services.finetune.trainer.parts import store
from services.finetune.trainer.train import Best, Trainer

__all__ = ["Damaged", "Saved", "Writer", "capture", "manifest", "read", "read_result", "restore", "store"]

log = logging.getLogger(__name__)
_HEAD = "head."
_FORMAT = 1  # of state.json


class Damaged(Exception):
    """A checkpoint that is not what its manifest says; the one before is as good as new."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Everything that the next step depends on, copied at a step's boundary. `state` is JSON."""

    step: int
    trained: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    best: Mapping[str, torch.Tensor]  # of the best evaluation; empty: none yet, or the trained ones
    random: bytes  # torch's generator, and then CUDA's where there is one
    state: Mapping[str, Any]


def capture(trainer: Trainer, seconds: float, numbers: Mapping[str, float] | None = None) -> Saved:
    """Copy a trainer's state. `seconds` of training so far, over all attempts."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "format": _FORMAT,
        "step": trainer.done,
        "target_step": trainer.target,
        "epoch": trainer.done // trainer.per_epoch,
        "position": trainer.done % trainer.per_epoch,
        "examples": len(trainer.examples),
        "best": {"loss": _number(trainer.best.loss), "step": trainer.best.step, "worse": trainer.best.worse},
        "python_random": [version, list(internal), gauss],
        "numpy_random": [str(kind), np.asarray(keys).tolist(), *rest],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "metrics": dict(numbers or {}),
    }
    words = [torch.get_rng_state()]
    if trainer.base.device.type == "cuda":
        words.append(torch.cuda.get_rng_state(trainer.base.device))
    best = {} if trainer.best.step == trainer.done else trainer.best.tensors
    return Saved(trainer.done, trainer.snapshot(), trainer.moments(), dict(best), b"".join(bytes(word.numpy()) for word in words), state)


def restore(trainer: Trainer, saved: Saved) -> float:
    """Put a captured state into a fresh trainer of the same spec and rows; the seconds trained before.

    Raises Damaged where it does not fit: another number of rows, other tensors.
    """
    state = saved.state
    if state.get("format") != _FORMAT or state["examples"] != len(trainer.examples):
        raise Damaged("it was made by another trainer or from other rows")
    try:
        trainer.put(saved.trained)
        trainer.put_moments(saved.moments)
    except (ValueError, KeyError) as error:
        raise Damaged("its tensors are not those of this run") from error
    own = state["best"]
    loss = float("inf") if own["loss"] is None else float(own["loss"])
    trainer.best = Best(loss, own["step"], own["worse"], dict(saved.best))
    if own["step"] == saved.step and own["step"]:
        trainer.best.tensors = trainer.snapshot()
    trainer.done, trainer.target = saved.step, state["target_step"]
    version, internal, gauss = state["python_random"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy_random"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    words = torch.frombuffer(bytearray(saved.random), dtype=torch.uint8)
    size = torch.get_rng_state().numel()
    torch.set_rng_state(words[:size])
    if trainer.base.device.type == "cuda":
        torch.cuda.set_rng_state(words[size:], trainer.base.device)
    return float(state["seconds"])


def parts(saved: Saved) -> dict[str, bytes]:
    """The files of a checkpoint."""
    body = {name: tensor for name, tensor in saved.trained.items() if not name.startswith(_HEAD)}
    head = {name[len(_HEAD) :]: tensor for name, tensor in saved.trained.items() if name.startswith(_HEAD)}
    found = {"adapter.safetensors": save(body), "optimizer.safetensors": save(dict(saved.moments)), "random.bin": saved.random}
    if head:
        found["head.safetensors"] = save(head)
    if saved.best:
        found["best.safetensors"] = save(dict(saved.best))
    found["state.json"] = json.dumps(saved.state).encode()
    return found


def manifest(
    found: Sequence[Part], *, job: str, attempt: int, fence: int, step: int, spec_digest: str, previous: str, metrics: Mapping[str, float]
) -> bytes:
    """`manifest.json`: CheckpointManifest in proto-JSON."""
    body = {
        "job": job,
        "attempt": attempt,
        "fence": str(fence),
        "step": str(step),
        "spec_digest": spec_digest,
        "previous_digest": previous,
        "parts": [asdict(part) | {"total_bytes": str(part.total_bytes)} for part in found],
        "metrics": dict(metrics),
    }
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def read(objects: SyncObjects, point: ResumePoint, spec_digest: str) -> Saved:
    """A committed checkpoint, every byte checked against its digests before it is parsed. Raises Damaged, ObjectsUnavailable."""
    try:
        written = objects.get(f"{point.prefix}manifest.json")
        if hashlib.sha256(written).hexdigest() != point.manifest_digest:
            raise Damaged("its manifest is not the one committed")
        described = json.loads(written)
        if described["spec_digest"] != spec_digest or int(described["step"]) != point.step:
            raise Damaged("it belongs to another run")
        files: dict[str, bytes] = {}
        for part in described["parts"]:
            data = objects.get(f"{point.prefix}{part['name']}")
            if len(data) != int(part["total_bytes"]) or hashlib.sha256(data).hexdigest() != part["sha256"]:
                raise Damaged(f"{part['name']} is not what was committed")
            files[part["name"]] = data
        trained = load(files["adapter.safetensors"])
        if "head.safetensors" in files:
            trained |= {f"{_HEAD}{name}": tensor for name, tensor in load(files["head.safetensors"]).items()}
        best = load(files["best.safetensors"]) if "best.safetensors" in files else {}
        moments = load(files["optimizer.safetensors"])
        return Saved(point.step, trained, moments, best, files["random.bin"], json.loads(files["state.json"]))
    except ObjectMissing as error:
        raise Damaged("a part of it is gone") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"it does not parse ({type(error).__name__})") from error


def read_result(files: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """The tensors of a result's files, named as `Trainer.put` takes them."""
    head = load(files["head.safetensors"]) if "head.safetensors" in files else {}
    return load(files["adapter.safetensors"]) | {f"{_HEAD}{name}": tensor for name, tensor in head.items()}


class Writer:
    """Stores and commits in a thread, one checkpoint at a time and in order, while the next steps run."""

    def __init__(self, work: Callable[[Saved], None]) -> None:
        """`work` stores and commits; what it raises comes out of the next call."""
        self._work = work
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether one is under way."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, saved: Saved) -> None:
        """Start with `saved`; waits for the one before. Raises what that one raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(saved,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way. Raises what the last one raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, saved: Saved) -> None:
        try:
            self._work(saved)
        except BaseException as error:
            self._error = error


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None
