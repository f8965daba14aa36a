"""Running other programs, with a line now and then while they take long."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

STARTED = time.monotonic()
TICK_SECONDS = 30.0  # of silence, at most, while something runs
TAIL_BYTES = 3000  # of what a failed command said


class CommandFailed(RuntimeError):
    """A program of somebody else's ended badly; carries the end of what it said."""


def say(text: str) -> None:
    """One line of progress on stderr, with the seconds since the start; stdout is for results."""
    print(f"cluster {time.monotonic() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def run(argv: Sequence[str] | Sequence[str | Path], what: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run to the end and return the standard output; `what` is said at the start and every half minute.

    Raises:
        CommandFailed: it ended with another code than 0, or is not there.
    """
    say(what)
    begun = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **(env or {})}, cwd=cwd
            )
        except OSError as error:
            raise CommandFailed(f"{what}: {argv[0]}: {error.strerror}") from error
        with process:
            try:
                while True:
                    try:
                        process.wait(TICK_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        say(f"{what}: {time.monotonic() - begun:.0f} s so far")
            except BaseException:
                process.kill()
                raise
        out.seek(0)
        err.seek(0)
        said = out.read().decode(errors="replace")
        if process.returncode:
            raise CommandFailed(
                f"{what}: {argv[0]} ended with {process.returncode}: {(said + err.read().decode(errors='replace'))[-TAIL_BYTES:]}"
            )
    return said
