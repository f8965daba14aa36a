"""The control plane dies or stalls while it starts an attempt; `benchmarks/crash_points.py` does the same a hundred times a point."""

import subprocess
import sys
from pathlib import Path


def test_F22_F23_F24_no_attempt_is_started_twice_or_never() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.crash_points", "--runs", "1"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("| 1 | 1 | 0 | 0 | 0 | 0 |") == 4
