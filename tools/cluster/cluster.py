"""A cluster as a folder: what runs, how to reach it, and how to leave nothing of it."""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tools.cluster import cache, cgroups, control_plane, fake_nodes, images, network, node
from tools.cluster.api import Api, ApiFailed
from tools.cluster.commands import say
from tools.cluster.packages import ToolMissing
from tools.cluster.processes import ClusterFailed, Processes
from tools.cluster.toolbox import NodePrograms, Toolbox

ROOT = Path(__file__).resolve().parent.parent.parent
NODES_READY_SECONDS = 60.0
DATABASE_SECONDS = 90.0  # its first start also makes the cluster of files
DEFAULT_NAME = "argosy"
CLAIM = "argosy-store"


def folder_of(name: str) -> Path:
    """Where a cluster of that name keeps itself."""
    return cache.root() / "clusters" / name


@dataclass(frozen=True)
class Facts:
    """What a user of the cluster needs to know; cluster.json in its folder."""

    tier: int
    kubeconfig: str
    server: str
    address: str = "127.0.0.1"  # of the node; its database listens here too
    machine: str = "127.0.0.1"  # this machine, as pods see it
    database_url: str = ""
    store: str = ""  # a folder that pods of tier 2 may mount by a claim


class Cluster:
    """One cluster by its folder; the folder is all its state, so any process may end what another started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder)

    @property
    def installed(self) -> Path:
        """Where what is installed on it keeps itself."""
        return self.folder / "installed"

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
        if tier == 2 and (reason := node.lacking()):
            raise ToolMissing(reason)
        kubernetes, programs = toolbox.control_plane, toolbox.node if tier == 2 else None
        self.down()
        self.folder.mkdir(parents=True, mode=0o711)  # the database's account passes through; the keys have modes of their own
        began = time.monotonic()
        try:
            facts = self._real(kubernetes, programs) if programs else self._fake(kubernetes)
        except BaseException:
            self.down(keep_logs=True)
            raise
        (self.folder / "cluster.json").write_text(json.dumps(vars(facts)))
        say(f"tier {tier} is up after {time.monotonic() - began:.1f} s: {self.folder}")
        return facts

    def down(self, keep_logs: bool = False) -> None:
        """End every process and remove the folder; nothing is left but, if asked for, the logs."""
        # The store goes with the cluster, so nobody needs to end in order; and an API server with open watches takes a minute to.
        # The first process of a room takes everything in the room with it.
        for process in sorted(self.processes.all(), key=lambda process: process.name != "room"):
            process.stop()
        for process in Processes(self.installed).all():
            process.stop()
        if (self.folder / "cgroup").exists():
            cgroups.remove((self.folder / "cgroup").read_text())
        for path in sorted(self.folder.glob("*")) if keep_logs else [self.folder]:
            if path.name != "log" and path.is_dir():
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def _fake(self, kubernetes: Path) -> Facts:
        plane = control_plane.start(self.folder, kubernetes, self.processes, "127.0.0.1", control_plane.free_ports())
        api = Api(plane.kubeconfig)
        argv = [sys.executable, "-m", "tools.cluster.fake_nodes", str(plane.kubeconfig)]
        kubelets = self.processes.start("fake-nodes", argv, {"PYTHONPATH": str(ROOT)})
        self.processes.await_ready(kubelets, lambda: ready_nodes(api) >= len(fake_nodes.POOLS), NODES_READY_SECONDS)
        return Facts(1, str(plane.kubeconfig), plane.server)

    def _real(self, kubernetes: Path, programs: NodePrograms) -> Facts:
        room = network.build(self.processes, programs.pause, self.folder / "kubelet")
        at = room.addresses
        (self.folder / "cgroup").write_text(at.cable)
        real = node.Node(self.folder, room, self.processes, programs, kubernetes)
        real.start_runtime()
        store = self.folder / "store"
        store.mkdir(mode=0o777)
        store.chmod(0o777)  # pods of any user write here
        argv = room.enter([sys.executable, "-m", "tools.cluster.database", str(self.folder / "database"), at.node])
        database = self.processes.start("database", argv, {"PYTHONPATH": str(ROOT)}, enters=True)
        plane = control_plane.start(self.folder, kubernetes, self.processes, at.node, control_plane.Ports(), room.enter, at.services)
        say("control plane ready")
        real.import_images([images.pause(programs.pause, self.folder / "images")])
        real.start_kubelet(plane.authority, plane.server, Api(plane.kubeconfig))
        url = self.folder / "database" / "url"
        self.processes.await_ready(database, url.exists, DATABASE_SECONDS)
        return Facts(2, str(plane.kubeconfig), plane.server, at.node, at.machine, url.read_text(), str(store))

    def claim(self, namespace: str) -> None:
        """Make the namespace where it is not there, and in it a claim on the folder that all pods of the node may share.

        Raises:
            ClusterFailed: there is no such folder, because there is no real node.
        """
        if self.facts is None or not self.facts.store:
            raise ClusterFailed("this cluster has no folder to share: it has no real node")
        api = Api(self.folder / "kubeconfig")
        size = {"storage": "100Gi"}  # asked for and never measured: it is a folder
        for path, body in (
            ("/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": namespace}}),
            (
                "/api/v1/persistentvolumes",
                {
                    "kind": "PersistentVolume",
                    "metadata": {"name": f"{CLAIM}-{namespace}"},
                    "spec": {
                        "capacity": size,
                        "accessModes": ["ReadWriteMany"],
                        "persistentVolumeReclaimPolicy": "Retain",
                        "hostPath": {"path": self.facts.store},
                        "claimRef": {"namespace": namespace, "name": CLAIM},
                    },
                },
            ),
            (
                f"/api/v1/namespaces/{namespace}/persistentvolumeclaims",
                {
                    "kind": "PersistentVolumeClaim",
                    "metadata": {"name": CLAIM},
                    "spec": {
                        "accessModes": ["ReadWriteMany"],
                        "storageClassName": "",
                        "volumeName": f"{CLAIM}-{namespace}",
                        "resources": {"requests": size},
                    },
                },
            ),
        ):
            try:
                api.create(path, {"apiVersion": "v1", **body})
            except ApiFailed as error:
                if error.status != 409:  # already there is success
                    raise ClusterFailed(f"no claim in {namespace}: {error}") from error

    def node(self, toolbox: Toolbox) -> node.Node:
        """The running real node, to load images into it or to hurt it.

        Raises:
            ClusterFailed: there is none.
        """
        if not (self.folder / "cgroup").exists():
            raise ClusterFailed("this cluster has no real node")
        number = int((self.folder / "cgroup").read_text().removeprefix("argosy"))
        room = network.Room(self.processes.named("room"), network.Addresses(number))
        return node.Node(self.folder, room, self.processes, toolbox.node, toolbox.control_plane)


def ready_nodes(api: Api) -> int:
    """How many nodes are Ready and may be scheduled on."""
    nodes = api.get("/api/v1/nodes")["items"]
    taints = [{taint["key"] for taint in node["spec"].get("taints", [])} for node in nodes]
    ready = [any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", [])) for node in nodes]
    return sum(is_ready and "node.kubernetes.io/not-ready" not in keys for is_ready, keys in zip(ready, taints, strict=True))
