"""The cluster's processes: each in a session of its own, with a log and a note of who it is, so that a later command can end it."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG_TAIL_BYTES = 3000
POLL_SECONDS = 0.1


class ClusterFailed(RuntimeError):
    """A part of the cluster did not come up; carries the end of its log."""


@dataclass(frozen=True)
class Process:
    """One running program: pid and start time together, since a pid alone may be another's by now."""

    name: str
    pid: int
    born: str  # in the kernel's ticks

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return _born(self.pid) == self.born

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; gone is fine."""
        if self.alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def stop(self, grace_seconds: float = 0) -> None:
        """Ask it to end for `grace_seconds`, then kill it, and wait until it is gone."""
        if grace_seconds:
            self.signal(signal.SIGTERM)
            wait_until(lambda: not self.alive, grace_seconds)
        self.signal(signal.SIGKILL)
        wait_until(lambda: not self.alive, 10)


class Processes:
    """The processes of one cluster, remembered in its folder."""

    def __init__(self, folder: Path) -> None:
        self._logs, self._notes = folder / "log", folder / "run"

    def start(
        self, name: str, argv: Sequence[str] | Sequence[str | Path], env: Mapping[str, str] | None = None, enters: bool = False
    ) -> Process:
        """Start a program that outlives us. With `enters`, `argv` begins with a program that forks the real one: that child is noted."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._notes.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            started = subprocess.Popen(
                [str(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
                start_new_session=True,  # Ctrl-C in a test run does not reach it
                cwd="/",
            )
        # Somebody must bury it if it dies while we live; nobody waits for it if it does not.
        threading.Thread(target=started.wait, name=f"buries {name}", daemon=True).start()
        pid = started.pid
        if enters:
            children = Path(f"/proc/{pid}/task/{pid}/children")
            wait_until(lambda: started.poll() is not None or children.read_text().strip() != "", 10)
            if started.poll() is not None:
                raise ClusterFailed(f"{name} did not start: {self.tail(name)}")
            pid = int(children.read_text().split()[0])
        process = Process(name, pid, _born(pid))
        again = {"argv": [str(word) for word in argv], "env": dict(env or {}), "enters": enters}
        (self._notes / f"{name}.json").write_text(json.dumps({"pid": process.pid, "born": process.born, "again": again}))
        return process

    def restart(self, name: str) -> Process:
        """Kill one and start it again as it was started: for tests of what the others do meanwhile.

        Raises:
            ClusterFailed: none of that name was started.
        """
        self.named(name).stop()
        return self.start(name, **json.loads((self._notes / f"{name}.json").read_text())["again"])

    def all(self) -> list[Process]:
        """Every process that was started, alive or not."""
        notes = {path.stem: json.loads(path.read_text()) for path in sorted(self._notes.glob("*.json"))}
        return [Process(name, note["pid"], note["born"]) for name, note in notes.items()]

    def named(self, name: str) -> Process:
        """One of them.

        Raises:
            ClusterFailed: none of that name was started.
        """
        for process in self.all():
            if process.name == name:
                return process
        raise ClusterFailed(f"no process {name} was started")

    def log(self, name: str) -> Path:
        """Where a process writes what it says."""
        return self._logs / f"{name}.log"

    def tail(self, name: str) -> str:
        """The end of its log."""
        log = self.log(name)
        return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if log.exists() else ""

    def await_ready(self, process: Process, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready()`.

        Raises:
            ClusterFailed: time ran out, or this process or another of the cluster ended.
        """
        ended: list[Process] = []

        def settled() -> bool:
            ended[:] = [one for one in self.all() if not one.alive]
            return bool(ended) or ready()

        came = wait_until(settled, seconds)
        if ended or not came:
            culprit = ended[0].name if ended else process.name
            state = "ended" if ended else f"is not ready after {seconds:.0f} s"
            raise ClusterFailed(f"{culprit} {state}; the end of {self.log(culprit)}:\n{self.tail(culprit)}")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _born(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
