"""The trainer as a process: `python -m services.finetune.trainer`. SIGTERM commits a checkpoint at the next step's end and exits 143.

Exit codes only choose the retry: 0 the control plane took the end of the run, 65 an input that can never work, 75 the run is another
process's or the store is gone, 143 told to leave and saved, 2 an unusable environment, and anything else a crash.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from services.chassis import settings as environment
from services.chassis.certificates import ClientTls
from services.chassis.objects import ObjectsUnavailable, SyncObjects, open_objects_sync
from services.chassis.telemetry import TelemetrySettings, configure_logs
from services.finetune.trainer.control import DONE, INPUT, LOST, TERMINATED, Control

REASONS = {DONE: "DONE", INPUT: "INPUT", LOST: "LOST", TERMINATED: "TERMINATED"}

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The variables of one attempt; everything else comes with the claim."""

    training_address: str  # of the TrainingService, host:port
    job: str  # its UUID
    attempt: int = field(metadata={"minimum": 1})
    token_file: Path  # of the attempt's token
    store_url: str
    base_directory: Path  # the base's weights, tokenizer and template
    tls: ClientTls = field(default_factory=ClientTls)
    termination_file: Path = Path("/dev/termination-log")  # where there is one, it gets a JSON line about the end: a container's last word
    threads: int | None = field(default=None, metadata={"minimum": 1})  # of the CPU; None: those it may run on
    trainer_command: tuple[str, ...] = ()  # words of a trainer of the operator's own, run under our wrapper; empty: our loop
    callback_url: str = ""  # where that trainer's live progress is posted, as https://host:port; empty: nowhere


@dataclass(frozen=True)
class Environment:
    """Every variable of the process."""

    trainer: TrainerSettings
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)


def keep_memory() -> None:
    """Have glibc keep what is freed: logits of 100 MB come and go each step, and fresh pages cost as much as computing on them."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, -1)


def train(own: TrainerSettings, stop: threading.Event) -> int:
    """One attempt; its exit code."""
    from services.finetune.trainer.wire import WireControl

    control = WireControl(own.training_address, own.job, own.attempt, own.token_file, certificates=own.tls.certificates())
    try:
        objects = open_objects_sync(own.store_url)
    except ObjectsUnavailable:
        return LOST
    try:
        return _work(own, control, objects, stop)
    finally:
        control.close()


def _work(own: TrainerSettings, control: Control, objects: SyncObjects, stop: threading.Event) -> int:
    """Our loop, or the wrapper around the operator's own trainer, which may be of any library: torch is not read for it."""
    if own.trainer_command:
        from services.finetune.trainer.hosted import Callback, Hosted

        callback = Callback(own.callback_url, own.token_file, own.tls.tls_ca)
        return Hosted(control, objects, own.base_directory, stop, own.trainer_command, callback, own.job, own.attempt).run()
    import torch

    from services.finetune.trainer.attempt import Attempt

    keep_memory()
    torch.set_num_threads(own.threads or len(os.sched_getaffinity(0)))
    return Attempt(control, objects, own.base_directory, stop).run()


def main() -> int:
    """Read the environment, train, exit."""
    try:
        read = environment.read(Environment, os.environ)
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logs(read.telemetry.log_level)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        code = train(read.trainer, stop)
    except BaseException as error:
        leave(read.trainer.termination_file, 1, type(error).__name__)
        raise
    leave(read.trainer.termination_file, code, REASONS.get(code, "OTHER"))
    return code


def leave(file: Path, code: int, reason: str) -> None:
    """Say how it ended. Never more than a word: whoever runs the container may read it, and rows are not for them."""
    if file.exists():
        with contextlib.suppress(OSError):
            file.write_text(json.dumps({"code": code, "reason": reason}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
