"""One real node: containerd, a kubelet, kube-proxy, a bridge for pods, names, and fake GPUs."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.cluster import cgroups
from tools.cluster.api import Api, ApiFailed
from tools.cluster.certificates import Authority
from tools.cluster.network import Room
from tools.cluster.processes import Process, Processes
from tools.cluster.toolbox import NodePrograms

NAME = "node1"
GPUS = 2
LABELS = {
    "argosy.dev/pool": "h100",
    "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    "topology.kubernetes.io/zone": "zone-a",
}
SOCKET = "/run/containerd/containerd.sock"
READY_SECONDS = 60.0
IMPORT_SECONDS = 900.0  # of one archive: a gigabyte and more is unpacked, on a disk that others use
ROOT = Path(__file__).resolve().parent.parent.parent
PAUSE = "localhost/pause:1"


def lacking() -> str:
    """Why this machine cannot run a real node; empty where it can."""
    if sys.platform != "linux":
        return "a real node needs Linux"
    if os.geteuid() != 0:
        return "a real node needs root: namespaces, mounts and cgroups"
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"a real node needs {', '.join(missing)}"
    if not os.access(cgroups.MOUNT, os.W_OK):
        return f"a real node needs to write to {cgroups.MOUNT}"
    # Root of a container may be less than root: what decides is whether the kernel lets it.
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True, check=False
    )
    return f"a real node needs namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Node:
    """Starts and describes the node of one room."""

    folder: Path  # the cluster's
    room: Room
    processes: Processes
    programs: NodePrograms
    kubernetes: Path  # the folder with kubelet and kube-proxy

    @property
    def cgroup(self) -> str:
        """The branch under which its pods grow."""
        return self.room.addresses.cable

    def start_runtime(self) -> None:
        """containerd, without any image yet."""
        (self.folder / "cni").mkdir()
        (self.folder / "cni" / "10-argosy.conflist").write_text(json.dumps(self._network()))
        config = self.folder / "containerd.toml"
        config.write_text(self._runtime_config())
        runtime = self._start("containerd", self.programs.containerd, "--config", config)
        # The socket lives in the room's /run; /proc shows it from here.
        socket = Path("/proc", str(self.room.first.pid), "root", SOCKET.lstrip("/"))
        self.processes.await_ready(runtime, socket.is_socket, READY_SECONDS)

    def import_images(self, archives: list[Path]) -> None:
        """Load image archives; whatever is there already is left."""
        for archive in archives:
            command = (self.programs.ctr, "--address", SOCKET, "--namespace", "k8s.io", "images", "import", archive)
            self.room.run(*command, seconds=IMPORT_SECONDS)

    def images(self) -> dict[str, str]:
        """What is loaded: reference → digest of its manifest."""
        lines = self.room.run(self.programs.ctr, "--address", SOCKET, "--namespace", "k8s.io", "images", "list").splitlines()[1:]
        return {line.split()[0]: line.split()[2] for line in lines}

    def start_kubelet(self, authority: Authority, server: str, api: Api, gpus: int = GPUS) -> None:
        """The kubelet and what makes its node useful; returns when the node is Ready and has its GPUs."""
        at = self.room.addresses
        cgroups.make(self.cgroup)
        serving = authority.server("kubelet", [NAME, at.node, "127.0.0.1"])
        kubeconfig = authority.kubeconfig(
            server, authority.client(NAME, f"system:node:{NAME}", "system:nodes"), self.folder / "kubelet.kubeconfig"
        )
        config = self.folder / "kubelet.json"
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "kubelet.config.k8s.io/v1beta1",
                    "kind": "KubeletConfiguration",
                    "failCgroupV1": False,  # since 1.35 the default refuses version 1
                    "cgroupDriver": "cgroupfs",
                    "cgroupRoot": f"/{self.cgroup}",
                    "containerRuntimeEndpoint": f"unix://{SOCKET}",
                    "address": at.node,
                    "authentication": {
                        "anonymous": {"enabled": False},
                        "webhook": {"enabled": True},
                        "x509": {"clientCAFile": str(authority.certificate)},
                    },
                    "authorization": {"mode": "Webhook"},
                    "tlsCertFile": str(serving.certificate),
                    "tlsPrivateKeyFile": str(serving.key),
                    "failSwapOn": False,
                    "clusterDomain": "cluster.local",
                    "clusterDNS": [at.node],
                    "resolvConf": "",
                    "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
                    "imageGCHighThresholdPercent": 100,  # never collect: there is no registry to pull from again
                    "imageGCLowThresholdPercent": 99,
                    "podLogsDir": str(self.folder / "pod-logs"),
                    "nodeStatusUpdateFrequency": "2s",
                    "syncFrequency": "10s",  # a changed Secret reaches its files within this and its cache
                    "configMapAndSecretChangeDetectionStrategy": "Watch",
                }
            )
        )
        labels = ",".join(f"{key}={value}" for key, value in LABELS.items())
        kubelet = self._start(
            "kubelet", self.kubernetes / "kubelet", f"--config={config}", f"--kubeconfig={kubeconfig}", "--root-dir=/var/lib/kubelet",
            f"--hostname-override={NAME}", f"--node-ip={at.node}", f"--node-labels={labels}",
        )  # fmt: skip
        self._python("fake-gpus", "tools.cluster.fake_gpus", str(gpus))
        self._python("names", "tools.cluster.names", str(self.folder / "kubeconfig"), at.node)
        self._start_proxy(authority, server)
        self.processes.await_ready(kubelet, lambda: _ready(api, gpus), READY_SECONDS)

    def _start_proxy(self, authority: Authority, server: str) -> None:
        kubeconfig = authority.kubeconfig(
            server, authority.client("kube-proxy", "system:kube-proxy"), self.folder / "kube-proxy.kubeconfig"
        )
        config = self.folder / "kube-proxy.json"
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                    "kind": "KubeProxyConfiguration",
                    "mode": "nftables",
                    "clientConnection": {"kubeconfig": str(kubeconfig)},
                    "clusterCIDR": self.room.addresses.pods,
                    "hostnameOverride": NAME,
                    "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
                    "nftables": {"minSyncPeriod": "0s"},
                    "metricsBindAddress": "127.0.0.1:10249",
                    "nodePortAddresses": [f"{self.room.addresses.node}/32"],
                }
            )
        )
        self._start("kube-proxy", self.kubernetes / "kube-proxy", f"--config={config}")

    def _start(self, name: str, *argv: str | Path) -> Process:
        return self.processes.start(name, self.room.enter(argv), self.programs.environment, enters=True)

    def _python(self, name: str, module: str, *arguments: str) -> None:
        argv = self.room.enter([sys.executable, "-m", module, *arguments])
        self.processes.start(name, argv, {"PYTHONPATH": str(ROOT)}, enters=True)

    def _network(self) -> dict[str, object]:
        addresses = {"type": "host-local", "ranges": [[{"subnet": self.room.addresses.pods}]], "routes": [{"dst": "0.0.0.0/0"}]}
        addresses["dataDir"] = str(self.folder / "cni-addresses")
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": addresses}
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "1.0.0", "name": "argosy", "plugins": [bridge, ports]}

    def _runtime_config(self) -> str:
        # Overlays do not stack on an overlay, which is what a container's own root usually is.
        snapshots = "native" if _file_system(self.folder) == "overlay" else "overlayfs"
        return f"""
version = 3
root = "{self.folder / "containerd"}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = "{SOCKET}"
[ttrpc]
  address = "{SOCKET}.ttrpc"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "{snapshots}"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "{PAUSE}"
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE no score may be lowered, and every pod dies with "can't get final child's PID from pipe: EOF".
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["{self.programs.plugins}"]
    conf_dir = "{self.folder / "cni"}"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = "{self.programs.runc}"
      SystemdCgroup = false
"""


def _ready(api: Api, gpus: int) -> bool:
    try:
        status = api.get(f"/api/v1/nodes/{NAME}")["status"]
    except (ApiFailed, OSError):
        return False
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", []))
    return ready and status.get("allocatable", {}).get("nvidia.com/gpu") == str(gpus)


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, by the longest mount point above it."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point, found = line.split()[1:3]
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind
