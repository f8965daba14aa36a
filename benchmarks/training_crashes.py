"""Duplicate and lost work where TrainingService dies around each of its commits (F23, F26), and where one create is sent often (F25).

    python -m benchmarks.training_crashes --runs 25

Each run has one job, a trainer's client that repeats its calls as every trainer does, and a service that ends at the named point by
`os._exit`; another takes its port. The result is a real adapter, verified, signed and published. F25 is 100 creates at once with one
request id, through the whole service.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf import json_format

from argosy.v1 import dataset_pb2, finetune_pb2
from argosy_internal.training.v1 import training_pb2, training_pb2_grpc
from benchmarks.crash_points import CRASHED, MINT, queued
from benchmarks.record import header, table
from services.chassis.interceptors import Policy
from services.chassis.objects import open_objects, open_objects_sync
from services.chassis.server import Listener, serve
from services.finetune import crash, sql_jobs, sql_models
from services.finetune.jobs import State
from services.finetune.lineage import Signer
from services.finetune.servicers import training
from services.finetune.settings import JobSettings
from services.finetune.store import open_store
from services.finetune.trainer.control import Outcome, Report
from services.finetune.trainer.parts import store as store_parts
from services.finetune.trainer.wire import WireControl
from services.postgres import embedded_postgres
from tests.finetune.adapters import MODULES, file, lora

POINTS = (
    "run-claiming", "run-claimed", "checkpoint-verified", "checkpoint-committing", "checkpoint-committed", "result-prepared",
    "result-publishing", "result-published",
)  # fmt: skip
WRONG = ("duplicate", "lost", "told twice", "gap in the log")
STEPS, CREATES = 2, 100
SPEC = finetune_pb2.FineTuneSpec(
    base_model="models/b", method=finetune_pb2.TUNE_METHOD_CHAT, train_version="projects/p/datasets/d/versions/1",
    lora=finetune_pb2.Lora(rank=2, alpha=4.0, targets=["q_proj", "v_proj"]),
)  # fmt: skip
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


class Servicer(training.TrainingServicer):
    """The service as it is, but for the rows, which play no part here."""

    async def _grant(self, connection: Any, project_uid: str, name: str) -> training_pb2.DataGrant:
        return training_pb2.DataGrant(dataset_version=name, sha256="a" * 64, format=dataset_pb2.DATASET_FORMAT_CHAT)


class Bases:
    async def get(self, name: str, field: str = "") -> Any:
        return SimpleNamespace(digest="b" * 64, modules=MODULES)


async def service(url: str, folder: Path, port: int) -> None:
    """Until it is ended."""
    async with open_store(url, 2) as store:
        store.ready.set()
        servicer = Servicer(store, open_objects(f"file://{folder}"), JobSettings(), Signer(KEY, "k"), Bases())  # type: ignore[arg-type]
        add = partial(training_pb2_grpc.add_TrainingServiceServicer_to_server, servicer)
        policy = Policy(authenticate=training.bearer(MINT))
        async with serve(Listener(address=f"127.0.0.1:{port}"), add, [training.SERVICE], policy=policy) as serving:
            await serving.ready()
            await asyncio.Event().wait()


def trainer(folder: Path, port: int, uid: str, project: str, token: str) -> None:
    """A run of two steps, from claim to result."""
    objects = open_objects_sync(f"file://{folder}")
    control = WireControl(f"127.0.0.1:{port}", uid, 1, token, patience_s=90)
    claim = control.claim()
    previous = ""
    for step in range(1, STEPS + 1):
        control.report(Report(step=step, target_step=STEPS, device_seconds=float(step), tokens=10 * step))
        prefix = f"{claim.prefix}step-{step}/"
        (part,) = store_parts(objects, prefix, {"adapter.safetensors": b"step %d" % step})
        made = training_pb2.CheckpointManifest(
            job=uid, attempt=1, fence=claim.fence, step=step, spec_digest=claim.spec_digest, previous_digest=previous,
            parts=[training_pb2.Part(name=part.name, sha256=part.sha256, total_bytes=part.total_bytes)],
        )  # fmt: skip
        written = json.dumps(json_format.MessageToDict(made, preserving_proto_field_name=True)).encode()
        objects.put(f"{prefix}manifest.json", written)
        control.commit(written)
        previous = hashlib.sha256(written).hexdigest()
    parts = store_parts(objects, f"{claim.prefix}result/", {"adapter.safetensors": file(lora())})
    control.succeed(Outcome("b" * 64, ("q_proj", "v_proj"), parts, 0.0, 0, "c" * 64, {"train": 1}, (), {"loss": 1.0}, 2.0, STEPS))
    control.close()


def forked(work: Callable[[], object], point: str = "") -> int:
    """A process of its own, without the price of starting Python anew; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        crash._asked, crash._left[0] = point, 1
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


async def prepared(url: str, project: str) -> tuple[str, str]:
    """A job whose attempt is about to claim; its uid and token."""
    spec = SPEC.SerializeToString()
    async with open_store(url, 2, wait=True) as store, store.transaction() as connection:
        values = queued(project) | {"spec": spec, "resolved_spec": spec, "spec_digest": "5" * 64}
        row = await sql_jobs.add(connection, values)
        salt = MINT.salt()
        row = await sql_jobs.move(connection, row, State.PREPARING, attempt=1, salt=salt, reaped=False)
        return row["uid"], MINT.token(row["uid"], 1, salt)


async def judged(url: str, project: str, uid: str) -> list[str]:
    """What went wrong."""
    async with open_store(url, 2) as store, store.transaction() as connection:
        row = await sql_jobs.any_job(connection, uid)
        log = await sql_jobs.events_after(connection, uid, 0, 1_000)
        kept = await sql_jobs.checkpoints_of(connection, uid)
        model = await sql_models.model(connection, project, "m")
        numbers = [] if model is None else [await sql_models.version(connection, project, model["uid"], number) for number in (1, 2)]
    assert row is not None
    wrong = []
    ready = [each for each in numbers if each is not None and each["state"] == "READY"]
    if row["fence"] != 1 or sum(each is not None for each in numbers) > 1:
        wrong.append("duplicate")
    if row["state"] != "SUCCEEDED" or len(ready) != 1 or [each["step"] for each in kept] != [*range(STEPS, 0, -1)]:
        wrong.append("lost")
    kinds = Counter(event.WhichOneof("event") for event in log)
    if kinds["checkpoint"] != STEPS or kinds["state"] != 4:
        wrong.append("told twice")
    if [event.sequence for event in log] != list(range(1, len(log) + 1)):
        wrong.append("gap in the log")
    return wrong


def one(url: str, folder: Path, point: str) -> tuple[bool, list[str]]:
    """A run; whether its service met its fate, and what went wrong."""
    project = str(uuid4())
    uid, token = asyncio.run(prepared(url, project))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = forked(lambda: asyncio.run(service(url, folder, port)), point)
    working = forked(lambda: trainer(folder, port, uid, project, token))
    _, status = os.waitpid(first, 0)
    second = forked(lambda: asyncio.run(service(url, folder, port)))
    _, ended = os.waitpid(working, 0)
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)
    wrong = asyncio.run(judged(url, project, uid))
    return status == CRASHED << 8, wrong + ["lost"] * (ended != 0)


def measure(url: str, point: str, runs: int) -> list[object]:
    """All runs of one point."""
    wrong: Counter[str] = Counter()
    met, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="argosy-crash-") as scratch:
        for number in range(runs):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            fate, found = one(url, folder, point)
            met += fate
            wrong.update(set(found))
            if found:
                print(point, number, found, file=sys.stderr, flush=True)
    return [point, runs, met, *(wrong[name] for name in WRONG), round(time.monotonic() - began)]


async def creates(url: str, runs: int) -> list[object]:
    """F25: one request id, a hundred times at once, through the whole service; each caller repeats while another is in flight."""
    import grpc

    from argosy.v1.finetune_pb2 import ListFineTuneJobsRequest
    from tests.finetune.test_control_plane import house, reason
    from tests.finetune.trainer import world

    wrong: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="argosy-creates-") as scratch:
        base = await asyncio.to_thread(world.base, Path(scratch) / "base")
        async with house(url, base, Path(scratch), jobs_per_project=0) as there:
            for number in range(1, runs + 1):
                asked = there.asked()
                asked.request_id = str(uuid4())

                async def create(asked: Any = asked) -> str:
                    while True:
                        try:
                            return str((await there("CreateFineTuneJob", asked)).name)
                        except grpc.aio.AioRpcError as error:
                            # Who had no answer asks again, as whoever meets another's call under way.
                            if reason(error) != "REQUEST_IN_FLIGHT" and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                                raise
                            await asyncio.sleep(0.05)

                names = set(await asyncio.gather(*(create() for _ in range(CREATES))))
                listed = await there(
                    "ListFineTuneJobs", ListFineTuneJobsRequest(parent=f"projects/{there.tenant.project}", page_size=1_000)
                )
                wrong.update(["duplicate"] * (len(names) != 1 or len(listed.fine_tune_jobs) > number))
                wrong.update(["lost"] * (len(listed.fine_tune_jobs) < number))
    return [f"{CREATES} creates at once", runs, runs, *(wrong[name] for name in WRONG), round(time.monotonic() - began)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--side-by-side", type=int, default=2, help="points at once")
    parser.add_argument("--points", nargs="*", default=[*POINTS, "creates"])
    asked = parser.parse_args()
    header()
    print("\nA service ends by `os._exit` at the point, and another takes its port.\n", flush=True)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="argosy-crash-db-") as scratch:
        ready, leave = os.pipe(), os.pipe()
        server = forked(partial(_postgres, Path(scratch), ready[1], leave[0], leave[1]))
        url = os.read(ready[0], 4096).decode()
        told, tell = os.pipe()
        for at in range(0, len(asked.points), asked.side_by_side):
            workers = [forked(partial(_told, tell, url, point, asked.runs)) for point in asked.points[at : at + asked.side_by_side]]
            for worker in workers:
                os.waitpid(worker, 0)
        os.close(tell)
        with os.fdopen(told) as answers:
            rows = [json.loads(line) for line in answers]
        os.close(leave[1])
        os.waitpid(server, 0)
    table(["point", "runs", "met", *WRONG, "seconds"], *rows)
    sys.exit(len(rows) < len(asked.points) or any(row[1] != row[2] or any(row[3:-1]) for row in rows))


def _told(tell: int, url: str, point: str, runs: int) -> None:
    row = asyncio.run(creates(url, runs)) if point == "creates" else measure(url, point, runs)
    os.write(tell, json.dumps(row).encode() + b"\n")


def _postgres(here: Path, ready: int, leave: int, other: int) -> None:
    os.close(other)

    async def run() -> None:
        async with embedded_postgres(here / "postgres") as url:
            os.write(ready, url.encode())
            await asyncio.to_thread(os.read, leave, 1)

    asyncio.run(run())


if __name__ == "__main__":
    main()
