"""The control plane as plain processes: etcd, the API server, the controllers and the scheduler."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.cluster.api import Api, ApiFailed
from tools.cluster.certificates import Authority
from tools.cluster.processes import Process, Processes

READY_SECONDS = 90.0  # three to five on two quiet cores
SERVICES = "10.96.0.0/16"
# A node is lost after 16 s without a lease instead of 40 s, so that a test of it is short; fake nodes renew every 2 s.
NODE_GRACE_SECONDS = 16
SERVICE_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost")


@dataclass(frozen=True)
class Ports:
    """Where each listens, on the cluster's own address."""

    etcd: int = 2379
    etcd_peer: int = 2380
    api: int = 6443


def free_ports() -> Ports:
    """Ports that nobody has right now; somebody may take one before we do, and then the start fails and says so."""
    with contextlib.ExitStack() as held:
        taken = [held.enter_context(contextlib.closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(3)]
        return Ports(*(listener.getsockname()[1] for listener in taken))


@dataclass(frozen=True)
class ControlPlane:
    """A control plane that was started: how to reach it, and what else can be given rights to it."""

    kubeconfig: Path  # of an administrator
    server: str
    authority: Authority


def start(
    folder: Path,
    programs: Path,
    processes: Processes,
    address: str,
    ports: Ports,
    inside: Callable[[Sequence[str | Path]], list[str | Path]] | None = None,
    services: str = SERVICES,
) -> ControlPlane:
    """Start everything and return when the API server is ready and the controllers run.

    Args:
        folder: of the cluster, fresh.
        programs: the folder of `Toolbox.control_plane`.
        address: where all of it listens; loopback unless there is a real node.
        services: the range of addresses that Services get.
        inside: what makes a command run where `address` is; None for right here.

    Raises:
        ClusterFailed: with the log of what did not come up.
    """
    authority = Authority(folder / "pki", "argosy-test-ca")
    server = f"https://{address}:{ports.api}"
    first_service = str(ipaddress.ip_network(services)[1])  # the API server's own
    listener = authority.server("kube-apiserver", [*SERVICE_NAMES, first_service, "127.0.0.1", address])
    to_kubelet = authority.client("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters")
    tokens = authority.signing_key("service-accounts")
    admin = authority.kubeconfig(server, authority.client("admin", "admin", "system:masters"), folder / "kubeconfig")
    configs = {
        name: authority.kubeconfig(server, authority.client(name, f"system:{name}"), folder / f"{name}.kubeconfig")
        for name in ("kube-controller-manager", "kube-scheduler")
    }

    def launch(name: str, *arguments: str) -> None:
        argv: list[str | Path] = [programs / name, *arguments]
        started[name] = processes.start(name, inside(argv) if inside else argv, enters=inside is not None)

    started: dict[str, Process] = {}
    store, peer = f"http://127.0.0.1:{ports.etcd}", f"http://127.0.0.1:{ports.etcd_peer}"
    launch(
        "etcd", f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync", f"--listen-client-urls={store}", f"--advertise-client-urls={store}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}", "--log-level=warn",
    )  # fmt: skip
    launch(
        "kube-apiserver",
        f"--etcd-servers={store}",
        f"--bind-address={address}",
        f"--advertise-address={address}",
        f"--secure-port={ports.api}",
        f"--service-cluster-ip-range={services}",
        f"--tls-cert-file={listener.certificate}",
        f"--tls-private-key-file={listener.key}",
        f"--client-ca-file={authority.certificate}",
        f"--kubelet-client-certificate={to_kubelet.certificate}",
        f"--kubelet-client-key={to_kubelet.key}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={tokens.certificate}",
        f"--service-account-signing-key-file={tokens.key}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        # The endpoints of the service `kubernetes` may not be loopback; where pods are real they need them.
        f"--endpoint-reconciler-type={'lease' if inside else 'none'}",
        "--shutdown-delay-duration=0s",
        "--feature-gates=HPAScaleToZero=true",
    )
    api = Api(admin)
    processes.await_ready(started["kube-apiserver"], api.ready, READY_SECONDS)
    launch(
        "kube-controller-manager",
        f"--kubeconfig={configs['kube-controller-manager']}",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={tokens.key}",
        f"--root-ca-file={authority.certificate}",
        "--leader-elect=false",
        "--allocate-node-cidrs=false",
        f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
        "--node-monitor-period=2s",
        "--secure-port=0",
        "--feature-gates=HPAScaleToZero=true",
    )
    launch("kube-scheduler", f"--kubeconfig={configs['kube-scheduler']}", "--leader-elect=false", "--secure-port=0")
    # The first thing the controllers make, and nothing can be created in a namespace without it.
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    processes.await_ready(started["kube-controller-manager"], lambda: _there(api, account), READY_SECONDS)
    return ControlPlane(admin, server, authority)


def _there(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except (OSError, ApiFailed):
        return False
    return True
