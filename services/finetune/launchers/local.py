"""Attempts as subprocesses of this machine: started once by name, stopped as a group, found again after a restart of the control plane.

An attempt is a folder. Whoever holds its `lock` is alive: the shell that starts the trainer inherits it, the trainer inherits it from
there, and the kernel lets go when the last of them is gone, so a reused process id is never taken for an attempt. The shell writes its
process id before the trainer starts and the exit status after it ends.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.finetune.jobs import Attempt, NameTaken, Seen, Where

__all__ = ["LocalLauncher"]

NAME = re.compile(r"ft-[0-9a-f-]{36}-a[0-9]{1,9}")
PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# A trap, since a shell that SIGTERM ends would not write down what became of the trainer; the trainer gets the signal from the group.
SHELL = """
trap : TERM
cd "$FOLDER" || exit 75
ulimit -c 0; ulimit -n 1024; [ -z "$LIMIT_KB" ] || ulimit -d "$LIMIT_KB"
unset LIMIT_KB FOLDER
echo $$ > pid.new && mv pid.new pid
"$@" > log 2>&1 < /dev/null
echo $? > exit.new && mv exit.new exit
"""
SIGNALLED = 128  # a shell's status of a process that signal n ended is 128 + n
KILLED = 137


@dataclass(eq=False)
class LocalLauncher:
    """See jobs.Launcher."""

    folder: Path  # of the attempts' folders
    address: str  # of TrainingService, host:port
    store_url: str
    directory: Callable[[str], Awaitable[Path]]  # models/{m} → where the base lies
    command: Sequence[str] = (sys.executable, "-m", "services.finetune.trainer")
    memory_bytes: int | None = None  # of an attempt's data segment
    environment: Mapping[str, str] = field(default_factory=dict)
    _ending: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    _children: set[int] = field(default_factory=set)
    # A look holds a lock for a moment, and a start has one that a child may inherit: neither beside another.
    _one: threading.Lock = field(default_factory=threading.Lock)

    async def ensure(self, attempt: Attempt) -> None:
        """See jobs.Launcher."""
        await asyncio.to_thread(self._ensure, attempt, await self.directory(attempt.base_model))

    def _ensure(self, attempt: Attempt, base: Path) -> None:
        folder = self._folder(attempt.name)
        digest = hashlib.sha256(f"{attempt.job_uid} {attempt.attempt} {attempt.spec_digest}".encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._one, _lock(folder) as lock:
            if lock is None:
                self._own(folder, digest)
                return  # it runs
            if (folder / "pid").exists():
                self._own(folder, digest)
                return  # it has run
            _write(folder / "token", attempt.token)
            _write(folder / "spec.json", json.dumps({"digest": digest}))
            self._start(folder, attempt, base, lock)

    def _own(self, folder: Path, digest: str) -> None:
        """Raise NameTaken unless the folder is of the same attempt."""
        try:
            found = json.loads((folder / "spec.json").read_text())["digest"]
        except (OSError, ValueError, KeyError):
            found = ""
        if found != digest:
            raise NameTaken(folder.name)

    def _start(self, folder: Path, attempt: Attempt, base: Path, lock: int) -> None:
        environ = {name: os.environ[name] for name in PASSED if name in os.environ} | {
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "ARGOSY_TRAINING_ADDRESS": self.address,
            "ARGOSY_JOB": attempt.job_uid,
            "ARGOSY_ATTEMPT": str(attempt.attempt),
            "ARGOSY_TOKEN_FILE": str(folder / "token"),
            "ARGOSY_STORE_URL": self.store_url,
            "ARGOSY_BASE_DIRECTORY": str(base),
            "FOLDER": str(folder),
            "LIMIT_KB": str(self.memory_bytes // 1024) if self.memory_bytes else "",
            **self.environment,
        }
        # Below the servers of this machine: training takes what serving leaves.
        words = ["/bin/sh", "-c", SHELL, "attempt", "nice", "-n", "5", *self.command]
        # Nothing of ours goes along but the lock: some libraries open sockets and files without close-on-exec.
        ours = {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, lock} if os.path.isdir("/proc/self/fd") else set()
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_CLOSE, number) for number in ours),
        ]
        os.set_inheritable(lock, True)
        default = [signal.SIGTERM, signal.SIGINT, signal.SIGPIPE]
        self._children.add(os.posix_spawn(words[0], words, environ, setsid=True, file_actions=actions, setsigdef=default))

    async def observe(self, name: str) -> Seen:
        """See jobs.Launcher."""
        return await asyncio.to_thread(self._observe, name)

    def _observe(self, name: str) -> Seen:
        folder = self._folder(name)
        for child in tuple(self._children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(child, os.WNOHANG) != (0, 0):
                    self._children.discard(child)
        if not folder.exists():
            return Seen(Where.ABSENT)
        with self._one, _lock(folder) as lock:
            if lock is None:
                return Seen(Where.RUNNING if (folder / "pid").exists() else Where.PENDING)
            if not (folder / "pid").exists():
                return Seen(Where.ABSENT)  # a crash between folder and process: it never ran
            try:
                code = int((folder / "exit").read_text())
            except (OSError, ValueError):
                code = KILLED  # its shell was ended, too
            return Seen(Where.EXITED, code, f"signal {code - SIGNALLED}" if code > SIGNALLED else "")

    async def stop(self, name: str, grace_s: float) -> None:
        """See jobs.Launcher."""
        if name in self._ending and not self._ending[name].done():
            return
        if self._signal(name, signal.SIGTERM):
            self._ending[name] = asyncio.create_task(self._end(name, grace_s), name=f"end {name}")

    async def _end(self, name: str, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        if (await self.observe(name)).where is Where.RUNNING:
            self._signal(name, signal.SIGKILL)

    def _signal(self, name: str, number: signal.Signals) -> bool:
        """Signal the attempt's whole session; False: it is not there. Its lock is held, so its process id is its own."""
        folder = self._folder(name)
        try:
            with self._one, _lock(folder) as lock:
                if lock is not None:
                    return False
                os.killpg(int((folder / "pid").read_text()), number)
        except (OSError, ValueError):
            return False
        return True

    async def reap(self, name: str) -> None:
        """See jobs.Launcher."""
        ending = self._ending.pop(name, None)
        if ending is not None:
            ending.cancel()
        await asyncio.to_thread(shutil.rmtree, self._folder(name), True)

    async def list(self) -> frozenset[str]:
        """See jobs.Launcher."""
        if not self.folder.exists():
            return frozenset()
        return frozenset(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def close(self) -> None:
        """Leave the attempts alone; only our own watches over endings are given up."""
        for task in self._ending.values():
            task.cancel()

    def _folder(self, name: str) -> Path:
        if NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no attempt's name")
        return self.folder / name


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int | None]:
    """The folder's lock; None: a living attempt has it."""
    try:
        number = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield number
    finally:
        os.close(number)


def _write(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
