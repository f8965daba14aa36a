"""A cluster as a folder: what runs, how to reach it, and how to leave nothing of it."""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.cluster import cache, control_plane, fake_nodes
from tools.cluster.api import Api
from tools.cluster.commands import say
from tools.cluster.processes import ClusterFailed, Processes
from tools.cluster.toolbox import Toolbox

ROOT = Path(__file__).resolve().parent.parent.parent
NODES_READY_SECONDS = 60.0
DEFAULT_NAME = "argosy"


def folder_of(name: str) -> Path:
    """Where a cluster of that name keeps itself."""
    return cache.root() / "clusters" / name


@dataclass(frozen=True)
class Facts:
    """What a user of the cluster needs to know; cluster.json in its folder."""

    tier: int
    kubeconfig: str
    server: str


class Cluster:
    """One cluster by its folder; the folder is all its state, so any process may end what another started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder)

    @property
    def facts(self) -> Facts | None:
        """What it is, or None where it is not (completely) up."""
        try:
            return Facts(**json.loads((self.folder / "cluster.json").read_text()))
        except FileNotFoundError:
            return None

    def alive(self) -> bool:
        """Whether it was started and every part of it still runs."""
        return self.facts is not None and all(process.alive for process in self.processes.all())

    def up(self, tier: int, toolbox: Toolbox) -> Facts:
        """Start it; one that runs already is left as it is.

        Raises:
            ClusterFailed: something did not come up; what did is down again.
            ToolMissing: a program it needs is not here and cannot be had.
        """
        facts = self.facts
        if facts and facts.tier == tier and self.alive():
            return facts
        programs = toolbox.control_plane
        self.down()
        self.folder.mkdir(parents=True, mode=0o700)
        began = time.monotonic()
        try:
            facts = self._up(tier, programs)
        except BaseException:
            self.down(keep_logs=True)
            raise
        (self.folder / "cluster.json").write_text(json.dumps(vars(facts)))
        say(f"tier {tier} is up after {time.monotonic() - began:.1f} s: {self.folder}")
        return facts

    def down(self, keep_logs: bool = False) -> None:
        """End every process and remove the folder; nothing is left but, if asked for, the logs."""
        # The store goes with the cluster, so nobody needs to end in order; and an API server with open watches takes a minute to.
        for process in self.processes.all():
            process.stop()
        for path in sorted(self.folder.glob("*")) if keep_logs else [self.folder]:
            if path.name != "log" and path.is_dir():
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def _up(self, tier: int, programs: Path) -> Facts:
        if tier != 1:
            raise ClusterFailed(f"there is no tier {tier} to bring up")
        plane = control_plane.start(self.folder, programs, self.processes, "127.0.0.1", control_plane.free_ports())
        api = Api(plane.kubeconfig)
        argv = [sys.executable, "-m", "tools.cluster.fake_nodes", str(plane.kubeconfig)]
        kubelets = self.processes.start("fake-nodes", argv, {"PYTHONPATH": str(ROOT)})
        self.processes.await_ready(kubelets, lambda: ready_nodes(api) >= len(fake_nodes.POOLS), NODES_READY_SECONDS)
        return Facts(tier, str(plane.kubeconfig), plane.server)


def ready_nodes(api: Api) -> int:
    """How many nodes are Ready and may be scheduled on."""
    nodes = api.get("/api/v1/nodes")["items"]
    taints = [{taint["key"] for taint in node["spec"].get("taints", [])} for node in nodes]
    ready = [any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", [])) for node in nodes]
    return sum(is_ready and "node.kubernetes.io/not-ready" not in keys for is_ready, keys in zip(ready, taints, strict=True))
