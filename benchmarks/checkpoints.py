"""What checkpoints cost, and whether a killed run ends with the same bytes.

    python -m benchmarks.checkpoints [--kills 20] [--steps 20] [--interval 10]

Cost: the default model, LoRA r16 on every linear layer with AdamW's moments, into a directory, every `interval` steps. Kills: the
trainer's own process on a tiny seeded base with dropout, over gRPC, killed at a random moment by SIGKILL or SIGTERM and started again;
the result's digests must be those of a run that nothing interrupted.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import header, spread, table
from benchmarks.training import rendered
from services.chassis.objects import open_objects_sync
from services.finetune.trainer import checkpoints
from services.finetune.trainer.__main__ import keep_memory
from services.finetune.trainer.model import load
from services.finetune.trainer.spec import Hyperparameters, Lora, Method, Spec
from services.finetune.trainer.train import Trainer
from services.pretrained import weights
from tests.finetune.trainer import world
from tests.finetune.trainer.service import TOKEN, Service, serving
from tests.finetune.trainer.service import spec as wire_spec


def cost(steps: int, interval: int, folder: Path) -> None:
    """Seconds of the loop and of the writer's thread, as shares of a run's wall time."""
    directory = weights.prepare("default", weights.cache_directory(None))
    objects = open_objects_sync(f"file://{folder}/store")
    own = Hyperparameters(epochs=100, batch_size=8)
    trainer = Trainer(
        Spec(Method.CHAT, Lora(dropout=0.1), own, precision="auto"), load(directory, torch.device("cpu")), rendered(directory, 16)
    )
    stored: list[tuple[float, float, int]] = []

    def write(saved: checkpoints.Saved) -> None:
        began, used = time.perf_counter(), time.thread_time()
        found = checkpoints.store(objects, f"jobs/bench/step-{saved.step}/", checkpoints.parts(saved))
        stored.append((time.perf_counter() - began, time.thread_time() - used, sum(part.total_bytes for part in found)))

    writer = checkpoints.Writer(write)
    trainer.step()
    blocked, began = [], time.perf_counter()
    for _ in range(steps):
        trainer.step()
        if trainer.done % interval == 0:
            entered = time.perf_counter()
            writer.begin(checkpoints.capture(trainer, 0.0))
            blocked.append(time.perf_counter() - entered)
    loop = time.perf_counter() - began
    writer.wait()
    table(
        (
            "a step",
            "a checkpoint",
            "loop held up",
            "writing, wall",
            "writing, CPU-s",
            "loop held up, of wall",
            "all of it on the loop, of wall",
        ),
        (
            f"{loop / steps:.2f} s",
            f"{stored[0][2] / 1e6:.1f} MB",
            f"{spread([1e3 * each for each in blocked], '.0f')} ms",
            f"{spread([each[0] for each in stored])} s",
            f"{spread([each[1] for each in stored])}",
            f"{sum(blocked) / loop:.2%}",
            f"{(sum(blocked) + sum(each[0] for each in stored)) / loop:.2%}",
        ),
    )


def start(service: Any, port: int, base: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The trainer as its launcher starts it."""
    (folder / "token").write_text(TOKEN)
    own = {
        "TRAINING_ADDRESS": f"127.0.0.1:{port}",
        "JOB": world.JOB,
        "ATTEMPT": str(service.plane.fence + 1),
        "TOKEN_FILE": str(folder / "token"),
        "STORE_URL": f"file://{folder}/store",
        "BASE_DIRECTORY": str(base),
        "THREADS": "1",
    }
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "clients/python:clients/internal", "OMP_NUM_THREADS": "1"}
    environment |= {f"ARGOSY_{name}": value for name, value in own.items()}
    return subprocess.Popen([sys.executable, "-m", "services.finetune.trainer"], env=environment, stderr=subprocess.DEVNULL)


def finished(service: Any, port: int, base: Path, folder: Path) -> dict[str, str]:
    """Run to the end; the result's digests."""
    if start(service, port, base, folder).wait(300):
        raise SystemExit("a run did not end well")
    return {part.name: part.sha256 for part in service.plane.ends.pop().result.parts}


def kills(count: int, folder: Path) -> None:
    """Kill, start again, compare; several kills may meet one run."""
    source = random.Random(7)
    base = world.base(folder / "base")
    plane = world.plane(store=f"file://{folder}/store", data=world.classify_rows(400))
    service = Service(plane, wire_spec())
    same, lost, codes = 0, [], []
    with serving(service) as port:
        expected = finished(service, port, base, folder)
        total = plane.commits[-1][0]
        for number in range(count):
            plane.commits.clear()
            process = start(service, port, base, folder)
            moment = source.randrange(total // 2 - 1)  # commits before the kill: every second step is one
            while len(plane.commits) < moment and process.poll() is None:
                threading.Event().wait(0.001)
            threading.Event().wait(source.uniform(0.0, 0.05))
            if moment == 0:
                while not any(type(request).__name__ == "ReportProgressRequest" and request.target_step for request in service.requests):
                    threading.Event().wait(0.005)
            process.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
            codes.append(process.wait(120))
            lost.append(plane.commits[-1][0] if plane.commits else 0)
            service.requests.clear()
            same += finished(service, port, base, folder) == expected
            print(
                f"kill {number + 1}: exit {codes[-1]}, resumed from step {lost[-1]} of {total}, {same} of {number + 1} the same", flush=True
            )
    print(f"\n{same} of {count} killed runs end with an uninterrupted one's digests; resumed from step {spread(lost, '.0f')} of {total}.")
    if same != count:
        raise SystemExit(1)


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    header()
    keep_memory()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.steps:
            cost(options.steps, options.interval, Path(folder))
        if options.kills:
            print(flush=True)
            kills(options.kills, Path(folder))


if __name__ == "__main__":
    main()
