"""TrainingService dies around each of its commits; `benchmarks/training_crashes.py` does the same 25 times a point, and F25 with it."""

import subprocess
import sys
from pathlib import Path

from benchmarks.training_crashes import POINTS


def test_F23_F26_what_a_trainer_repeats_counts_once_and_nothing_is_lost() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_crashes", "--runs", "1", "--points", *POINTS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("| 1 | 1 | 0 | 0 | 0 | 0 |") == len(POINTS)
