"""The locks: every version and hash of every layer of packages, from pyproject.toml within constraints.txt."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.images.recipes import LOCKS, ROOT, SOURCES, Lock

__all__ = ["lock_all", "pins", "resolve"]

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)")
_RULES = (
    "--generate-hashes",
    "--no-header",
    "--no-annotate",
    "--python-version=3.11",
    "--python-platform=x86_64-manylinux_2_28",
    "--quiet",
)
HEAD = "# Made by `python -m tools.images lock` from pyproject.toml and constraints.txt; {what}.\n"


def pins(text: str) -> dict[str, str]:
    """Each pinned name, normalised, and its version."""
    found = (_PIN.match(line) for line in text.splitlines())
    return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in found if pin}


def _entries(text: str) -> dict[str, str]:
    """Each pin's lines, by name."""
    blocks = re.split(r"\n(?=\S)", text.strip())
    return {next(iter(pins(block))): block for block in blocks if pins(block)}


def resolve(name: str, lock: Lock) -> dict[str, str]:
    """The pins of everything the lock's extras need, with hashes, by name. Raises CalledProcessError where nothing fits."""
    with tempfile.TemporaryDirectory() as room:
        asked = Path(room) / "asked.in"
        project = "pyproject.toml"
        if lock.packages:
            asked.write_text("".join(f"{package}\n" for package in lock.packages))
            project = str(asked)
        command = [sys.executable, "-m", "uv", "pip", "compile", project, "-c", "constraints.txt", *_RULES]
        command += [f"--extra={extra}" for extra in lock.extras]
        if lock.find_links:
            command.append(f"--find-links={os.environ.get('PIP_FIND_LINKS', '.')}")
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return _entries(text)


def lock_all() -> list[Path]:
    """Write every lock: what a layer needs, less what the layers below it have. Without its local wheel a lock is left as it is."""
    written: list[Path] = []
    known: dict[str, set[str]] = {}
    for name, lock in LOCKS.items():
        target = SOURCES / f"{name}.lock"
        entries = resolve(name, lock)
        if lock.find_links and not any("+" in block.partition(" ")[0] for block in entries.values()):
            continue  # the index has the package too, of another kind
        for below in lock.below:
            entries = {pin: block for pin, block in entries.items() if pin not in known[below]}
        entries = {pin: block for pin, block in entries.items() if pin not in lock.without}
        known[name] = set(entries)
        what = f"less {' and '.join(f'{below}.lock' for below in lock.below)}" if lock.below else "every image begins with it"
        target.write_text(HEAD.format(what=what) + "".join(f"{block}\n" for block in entries.values()))
        written.append(target)
    return written
