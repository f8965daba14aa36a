"""What every result says of itself: the command, the commit, the hardware, and each figure with its spread."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def header() -> None:
    """Print the circumstances of this run."""
    module = getattr(sys.modules["__main__"].__spec__, "name", Path(sys.argv[0]).name)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("grpcio", "protobuf", "torch"))
    print(f"- command: `python -m {' '.join([module, *sys.argv[1:]])}`")
    print(f"- commit: {_commit()}")
    print(f"- hardware: {_processor()}, {os.cpu_count()} cores shared by all processes, {_memory_gib():.0f} GiB, no GPU used")
    print(f"- software: {platform.system()} {platform.release()}, Python {platform.python_version()}, {versions}")
    print(f"- load average before: {', '.join(f'{load:.2f}' for load in os.getloadavg())}", flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, max(0, -(-int(share * 1_000) * len(values) // 1_000) - 1))]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median, and in brackets the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def table(*rows: Sequence[object]) -> None:
    """Print rows as Markdown; the first is the head."""
    head, *body = ([str(cell) for cell in row] for row in rows)
    for row in (head, ["---"] * len(head), *body):
        print(f"| {' | '.join(row)} |", flush=True)


def _commit() -> str:
    git = ("git", "-C", str(ROOT))
    try:
        commit = subprocess.run((*git, "rev-parse", "--short=12", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run((*git, "status", "--porcelain", "services", "clients"), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, with {len(changed.splitlines())} uncommitted files" if changed else commit


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
