"""How long Helm takes to render models: `python -m benchmarks.render`."""

import json
import os
import subprocess
import time
from typing import Any

from benchmarks.record import ROOT, header, spread, table
from tools.cluster.toolbox import Toolbox

COUNTS = (1, 10, 100)
ROUNDS = 5
DIGEST = "sha256:" + "0" * 64
POOLS: dict[str, Any] = {
    name: {
        "providerPool": name,
        "nodes": 200,
        "gpu": {"perNode": 8},
        "taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}],
    }
    for name in ("h100", "h200", "l4", "spare")
}


def values(count: int) -> str:
    """A release of so many models, a quarter of them with a fallback and half of them scaled."""
    models = {}
    for number in range(count):
        entry: dict[str, Any] = {"weights": {"ref": f"registry/model-{number}", "digest": DIGEST}}
        entry |= {"pools": ["h100", "spare"]} if number % 4 == 0 else {"pool": ("h100", "h200", "l4")[number % 3]}
        entry |= {"autoscaling": {"min": 2, "max": 4}} if number % 2 else {"replicas": 2}
        models[f"model-{number}"] = entry
    shared = {"tls": {"mode": "existingSecret", "existingSecret": "t"}, "keys": {"existingSecret": "k"}, "nodePools": POOLS}
    return json.dumps({"global": shared, "models": models})


def main() -> None:
    """Print a table."""
    header()
    helm, chart = Toolbox().helm, ROOT / "deploy" / "helm" / "models"
    version = subprocess.run([helm, "version", "--short"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"- helm: {version}\n")
    rows: list[tuple[object, ...]] = [("models", "objects", "seconds", "of one core", "MiB of manifests")]
    for count in COUNTS:
        seconds, processor, objects, size = [], [], 0, 0
        for _ in range(ROUNDS):
            began, used = time.perf_counter(), os.times().children_user
            done = subprocess.run(
                [helm, "template", "argosy", chart, "-f", "-"], input=values(count), capture_output=True, text=True, check=True
            )
            seconds.append(time.perf_counter() - began)
            processor.append(os.times().children_user - used)
            objects, size = done.stdout.count("\nkind: "), len(done.stdout)
        rows.append((count, objects, spread(seconds), spread(processor), f"{size / 2**20:.2f}"))
    table(*rows)


if __name__ == "__main__":
    main()
