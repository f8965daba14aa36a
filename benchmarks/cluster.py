"""How long the cluster harness takes from its cache: `python -m benchmarks.cluster [--rounds N] [--tiers 1,2]`.

A round brings one cluster of each tier up and takes it down again; seconds as the caller sees them.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from tools.cluster.cluster import Cluster
from tools.cluster.toolbox import Toolbox


def round_of(tier: int, toolbox: Toolbox) -> tuple[float, float]:
    """Seconds up and down; up ends with every node Ready and, in tier 2, its GPUs and the database there."""
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as folder:
        Path(folder).chmod(0o711)  # the database's account passes through
        cluster = Cluster(Path(folder) / "cluster")
        began = time.monotonic()
        cluster.up(tier, toolbox)
        up = time.monotonic() - began
        cluster.down()
        return up, time.monotonic() - began - up


def main() -> None:
    """Print a line a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiers", default="1,2")
    arguments = parser.parse_args()
    toolbox = Toolbox()
    tiers = [int(tier) for tier in arguments.tiers.split(",")]
    for _ in range(arguments.rounds):
        for tier in tiers:
            up, down = round_of(tier, toolbox)
            print(f"tier {tier}: up {up:.1f} s, down {down:.1f} s, load {os.getloadavg()[0]:.0f}", flush=True)


if __name__ == "__main__":
    main()
