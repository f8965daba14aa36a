"""Duplicate and lost jobs where the control plane dies, or stalls, while it starts an attempt (F22, F23, F24).

python -m benchmarks.crash_points --runs 100 [--launcher cluster]
Each run queues one job on the embedded PostgreSQL, starts a control plane in a process of its own that ends at the named point, then a
second one that is left alone. The attempt is a real process that writes down each of its starts; or, in the cluster of KUBECONFIG, a Job
whose pods are counted by the cluster's own events.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Self
from uuid import uuid4

from benchmarks.record import header, table
from services.chassis.cluster import Api, connect
from services.chassis.errors import StoreUnavailable
from services.finetune import crash, reconciler, sql_jobs
from services.finetune.jobs import State, Where, attempt_name
from services.finetune.launchers.cluster import ClusterLauncher, Place
from services.finetune.launchers.job_manifest import Terms
from services.finetune.launchers.local import LocalLauncher
from services.finetune.queries import Record
from services.finetune.reconciler import Reconciler, wanted
from services.finetune.settings import JobQuotas, JobSettings
from services.finetune.store import FineTuneStore, open_store
from services.finetune.tokens import TokenMint
from services.postgres import embedded_postgres

WRONG = ("duplicate", "lost", "gap in the log", "left behind")
POINTS = ("attempt-written", "attempt-launched", "any moment", "stalled")
OWNER_SECONDS = 0.3  # after which a stalled control plane's jobs are another's
CRASHED = 86
MINT = TokenMint(bytes(32))


def queued(project: str) -> dict[str, object]:
    """A job's row with what has no default."""
    return {
        "project_uid": project, "project": "p", "key_id": "k", "spec": b"", "resolved_spec": b"", "spec_digest": "d", "quote": b"",
        "model": "projects/p/models/m", "base_model": "models/b", "train_uid": str(uuid4()), "currency": "USD", "nanos_per_second": 1,
    }  # fmt: skip


class Processes:
    """Attempts of this machine, which write down that they started, and wait."""

    fate_s = 0.08  # "any moment" and "stalled" lie within the time that a start takes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left."""

    def launcher(self, folder: Path) -> LocalLauncher:
        async def directory(name: str) -> Path:
            return folder

        script = f'echo "$ARGOSY_JOB" >> {folder}/started; exec sleep 120'
        return LocalLauncher(folder / "runs", "127.0.0.1:1", "memory://", directory, command=("/bin/sh", "-c", script))

    def starts(self, folder: Path, uid: str) -> int:
        return (folder / "started").read_text().count(uid) if (folder / "started").exists() else 0

    def left(self, folder: Path, uid: str) -> bool:
        return any((folder / "runs").glob("ft-*"))


class Pods:
    """Attempts as Jobs, in a namespace of their own."""

    fate_s = 0.3

    def __init__(self) -> None:
        self.namespace = f"argosy-crash-{uuid4().hex[:8]}"
        self.path = f"/api/v1/namespaces/{self.namespace}"

    def __enter__(self) -> Self:
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        Api(connect()).ask("POST", "/api/v1/namespaces", body)
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "argosy-trainer"}}
        Api(connect()).ask("POST", f"{self.path}/serviceaccounts", account)
        return self

    def __exit__(self, *_: object) -> None:
        Api(connect()).ask("DELETE", self.path)

    def launcher(self, folder: Path) -> ClusterLauncher:
        spec = {"serviceAccountName": "argosy-trainer", "containers": [{"name": "trainer", "image": "localhost/argosy-trainer:0.1.0"}]}
        (folder / "pool.yaml").write_text(json.dumps({"metadata": {"annotations": {"fake.argosy.dev/run-seconds": "never"}}, "spec": spec}))
        terms = Terms(owner="crash", address="finetune:8601", store_url="memory://", grace_s=1)
        made = ClusterLauncher(Api(connect()), Place(folder, "pool", (self.namespace,)), terms)
        made.start()
        return made

    def starts(self, folder: Path, uid: str) -> int:
        """Pods that the Job controller made for the job, by its events."""
        found = Api(connect()).ask("GET", f"{self.path}/events")["items"]
        made = [each for each in found if each["reason"] == "SuccessfulCreate" and uid in each["involvedObject"]["name"]]
        return sum(int(each.get("count") or 1) for each in made)

    def left(self, folder: Path, uid: str) -> bool:
        query = (("labelSelector", f"argosy.dev/job-id={uid}"),)
        jobs = Api(connect()).ask("GET", f"/apis/batch/v1/namespaces/{self.namespace}/jobs", None, query)["items"]
        return bool(jobs or Api(connect()).ask("GET", f"{self.path}/configmaps", None, query)["items"])


Ground = Processes | Pods


async def plane(ground: Ground, url: str, folder: Path, uid: str, *, to_the_end: bool) -> None:
    """A control plane: until the job's attempt runs or, `to_the_end`, until the job was cancelled and nothing is left of it."""
    reconciler.OWNER_SECONDS = OWNER_SECONDS
    there = ground.launcher(folder)
    async with open_store(url, 2) as store:
        work = Reconciler(store, there, MINT, JobSettings(poll_seconds=0.02), JobQuotas())
        store.ready.set()
        row = await until(work, store, uid, lambda row: row["launch_time"] is not None)
        if not to_the_end:
            await asyncio.sleep(OWNER_SECONDS)
            return
        name = attempt_name(uid, row["attempt"])
        while (await there.observe(name)).where is not Where.RUNNING or ground.starts(folder, uid) == 0:
            await asyncio.sleep(0.05)
        await asyncio.sleep(OWNER_SECONDS)  # a stalled one goes on meanwhile, and may do what harm it can
        async with store.transaction() as connection:
            found = await sql_jobs.any_job(connection, uid, lock=True)
            assert found is not None
            await wanted(connection, found, State.CANCELLING, "CALLER")
        await until(work, store, uid, lambda row: row["state"] == "CANCELLED" and row["reaped"])
    there.close()


async def until(work: Reconciler, store: FineTuneStore, uid: str, done: object) -> Record:
    """Look again and again until the row is so."""
    async with asyncio.timeout(30):
        while True:
            try:
                await work.once(patient=True)
            except StoreUnavailable:
                print("store away", file=sys.stderr, flush=True)  # Reconciler.run waits, too
            async with store.transaction() as connection:
                row = await sql_jobs.any_job(connection, uid)
            assert row is not None
            if done(row):  # type: ignore[operator]
                return row
            await asyncio.sleep(0.01)


def forked(ground: Ground, url: str, folder: Path, uid: str, point: str, *, to_the_end: bool) -> int:
    """A process of its own, without the price of starting Python anew; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        crash._asked, crash._left[0] = point, 1
        asyncio.run(plane(ground, url, folder, uid, to_the_end=to_the_end))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def one(ground: Ground, url: str, folder: Path, uid: str, point: str) -> bool:
    """Let one control plane die or stall at `point`, and another go on to the end; whether the first met its fate."""
    first = forked(ground, url, folder, uid, point, to_the_end=False)
    if point in ("any moment", "stalled"):
        time.sleep(random.uniform(0.0, ground.fate_s))
        os.kill(first, signal.SIGKILL if point == "any moment" else signal.SIGSTOP)
    if point == "stalled":
        time.sleep(OWNER_SECONDS)
        met = True
    else:
        _, status = os.waitpid(first, 0)
        met = status == (signal.SIGKILL if point == "any moment" else CRASHED << 8)
    second = forked(ground, url, folder, uid, "", to_the_end=True)
    if point == "stalled":
        time.sleep(OWNER_SECONDS)
        os.kill(first, signal.SIGCONT)
        os.waitpid(first, 0)
    os.waitpid(second, 0)
    return met


async def queue(url: str) -> str:
    async with open_store(url, 2, wait=True) as store, store.transaction() as connection:
        return str((await sql_jobs.add(connection, queued(str(uuid4()))))["uid"])


async def judged(ground: Ground, url: str, folder: Path, uid: str) -> list[str]:
    """What went wrong."""
    async with open_store(url, 2) as store, store.transaction() as connection:
        row = await sql_jobs.any_job(connection, uid)
        log = await sql_jobs.events_after(connection, uid, 0, 1_000)
    starts = ground.starts(folder, uid)
    assert row is not None
    wrong = []
    if starts > 1 or row["attempt"] > 1:
        wrong.append("duplicate")
    if starts == 0 or row["state"] != "CANCELLED":
        wrong.append("lost")
    if [event.sequence for event in log] != list(range(1, len(log) + 1)):
        wrong.append("gap in the log")
    if row["reaped"] is False or ground.left(folder, uid):
        wrong.append("left behind")
    return wrong


def measure(ground: Ground, point: str, runs: int) -> list[object]:
    """All runs of one point, on a database of its own: whose reconcilers are about, take every job they find."""
    with ground, tempfile.TemporaryDirectory(prefix="argosy-crash-") as scratch:
        here = Path(scratch)
        ready, leave = os.pipe(), os.pipe()
        server = os.fork()  # so that the processes we fork share no loop and no thread with it
        if server == 0:
            os.close(leave[1])
            asyncio.run(serve(here, ready[1], leave[0]))
            os._exit(0)
        url = os.read(ready[0], 4096).decode()
        wrong: Counter[str] = Counter()
        began = time.monotonic()
        met = 0
        for number in range(runs):
            folder = here / str(number)
            folder.mkdir()
            uid = asyncio.run(queue(url))
            met += one(ground, url, folder, uid, point)
            found = asyncio.run(judged(ground, url, folder, uid))
            wrong.update(found)
            if found:
                print(point, number, found, file=sys.stderr, flush=True)
        os.close(leave[1])
        os.waitpid(server, 0)
    return [point, runs, met, *(wrong[name] for name in WRONG), round(time.monotonic() - began)]


async def serve(here: Path, ready: int, leave: int) -> None:
    async with embedded_postgres(here / "postgres") as url:
        os.write(ready, url.encode())
        await asyncio.to_thread(os.read, leave, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--launcher", choices=("local", "cluster"), default="local")
    asked = parser.parse_args()
    runs = asked.runs
    header()
    print("\nPoints are run side by side; a named point ends the process by `os._exit`, the others by SIGKILL and SIGSTOP.\n")
    told, tell = os.pipe()
    workers = []
    for point in POINTS:
        if (worker := os.fork()) == 0:
            code = 1
            try:
                os.write(tell, json.dumps(measure(Pods() if asked.launcher == "cluster" else Processes(), point, runs)).encode() + b"\n")
                code = 0
            finally:
                os._exit(code)
        workers.append(worker)
    os.close(tell)
    with os.fdopen(told) as answers:
        rows = sorted((json.loads(line) for line in answers), key=lambda row: POINTS.index(row[0]))
    for worker in workers:
        os.waitpid(worker, 0)
    table(["point", "runs", "met", *WRONG, "seconds"], *rows)
    sys.exit(len(rows) < len(POINTS) or any(row[1] != row[2] or any(row[3:-1]) for row in rows))


if __name__ == "__main__":
    main()
