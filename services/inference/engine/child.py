"""What every engine's process does besides its work: dies with its parent, ignores the group's signals, logs without content."""

import ctypes
import json
import logging
import os
import signal
import sys
import traceback

PR_SET_PDEATHSIG = 1
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}  # attributes that every record has


class JsonLines(logging.Formatter):
    """One object a line; of an exception, where it was raised but not what it says."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info is not None and record.exc_info[1] is not None:
            line |= at(record.exc_info[1])
        return json.dumps(line, default=str)


def at(failure: BaseException) -> dict[str, object]:
    """Which kind of exception, and from where. Its text may quote what it was given, so it is left out."""
    frames = traceback.extract_tb(failure.__traceback__)[-6:]
    return {"failure": type(failure).__name__, "where": [f"{frame.filename}:{frame.lineno}" for frame in frames]}


def log_as_json() -> None:
    """Every log of this process as JSON lines on its standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def ignore_signals() -> None:
    """A terminal or a supervisor signals the whole group; the parent decides what that means for us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, however that happens. Elsewhere than on Linux the socket's end tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(0)
