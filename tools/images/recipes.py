"""What each image holds and starts. The Dockerfile says the same, and a test holds the two together."""

from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BASE_PACKAGES",
    "ENVIRONMENT",
    "HOME",
    "IMAGES",
    "LOCKS",
    "ROOT",
    "SITE",
    "SOURCES",
    "USER",
    "VENV",
    "Image",
    "Lock",
]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "deploy" / "images"
USER = 65532  # and group: nobody's number on a node
HOME = "/tmp/home"  # on an emptyDir where the root is read-only
VENV = "/opt/argosy"
SITE = f"{VENV}/lib/python3.11/site-packages"
# Python without a shell, a package manager or a compiler: what is not there cannot be run.
BASE_PACKAGES = (
    "base-files",
    "ca-certificates",
    "gcc-12-base",
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libsqlite3-0",
    "libssl3",
    "libstdc++6",
    "libuuid1",
    "media-types",
    "python3.11-minimal",
    "zlib1g",
)
ENVIRONMENT = {
    "PATH": f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": HOME,
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
}


@dataclass(frozen=True)
class Lock:
    """One layer of packages: what is asked for, less what the layers below it bring."""

    extras: tuple[str, ...] = ()  # of pyproject.toml
    packages: tuple[str, ...] = ()  # alone, in place of the project
    below: tuple[str, ...] = ()  # locks
    find_links: bool = False  # PIP_FIND_LINKS has a wheel that the index has not
    without: tuple[str, ...] = ()  # asked for by a part of a package that no image has


# What kubernetes.aio alone imports, which install.py leaves out.
AIO = ("aiohappyeyeballs", "aiohttp", "aiohttp-retry", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl")
LOCKS = {
    "core": Lock(),
    "torch-cpu": Lock(packages=("torch",), below=("core",), find_links=True),
    "torch-cuda": Lock(packages=("torch",), below=("core",)),
    "gateway": Lock(extras=("gateway",), below=("core",), without=AIO),
    "finetune": Lock(extras=("finetune",), below=("core",), without=AIO),
    "inference": Lock(extras=("inference",), below=("core", "torch-cuda")),
    "trainer": Lock(extras=("trainer",), below=("core", "torch-cuda")),
}


@dataclass(frozen=True)
class Image:
    """A service's image: layers of packages from the bottom, our code on top."""

    module: str  # that the entrypoint runs
    locks: tuple[str, ...]
    name: str  # without registry and tag

    @property
    def entrypoint(self) -> list[str]:
        """The command, by a name on PATH."""
        return ["python", "-m", self.module]


IMAGES = {
    "gateway": Image("services.gateway", ("core", "gateway"), "argosy-gateway"),
    "finetune": Image("services.finetune", ("core", "finetune"), "argosy-finetune"),
    "inference": Image("services.inference", ("core", "torch-cuda", "inference"), "argosy-inference"),
    "inference-cpu": Image("services.inference", ("core", "torch-cpu", "inference"), "argosy-inference"),
    "trainer": Image("services.finetune.trainer", ("core", "torch-cuda", "trainer"), "argosy-trainer"),
    "trainer-cpu": Image("services.finetune.trainer", ("core", "torch-cpu", "trainer"), "argosy-trainer"),
}
