"""The root file system below every image: a few Debian packages from apt's own sources, unpacked and not configured."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.images.recipes import BASE_PACKAGES, HOME, USER, VENV

__all__ = ["Base", "base"]

PYTHON = "usr/bin/python3.11"
_FORMAT = "1"  # raised when the files written here change
_DROPPED = ("usr/share/man", "usr/share/lintian", "usr/share/locale", "usr/share/info", "usr/share/python3/runtime.d", "usr/share/pixmaps")
_FILES = {
    "etc/passwd": f"root:x:0:0:root:/:/sbin/nologin\nargosy:x:{USER}:{USER}:argosy:{HOME}:/sbin/nologin\n",
    "etc/group": f"root:x:0:\nargosy:x:{USER}:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    f"{VENV[1:]}/pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n",
}
_LINKS = {"usr/bin/python3": "python3.11", f"{VENV[1:]}/bin/python": "/usr/bin/python3.11", f"{VENV[1:]}/bin/python3": "python"}


@dataclass(frozen=True)
class Base:
    """An unpacked root file system."""

    root: Path
    key: str  # of what it is made from
    components: tuple[dict[str, str], ...]  # name, version, purl

    @property
    def python(self) -> list[str]:
        """Its own interpreter as a command of this machine, without chroot: its bytecode is then its own."""
        libraries = f"{self.root}/lib/x86_64-linux-gnu:{self.root}/usr/lib/x86_64-linux-gnu"
        loader = str(self.root / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
        home = f"PYTHONHOME={self.root}/usr"
        return ["env", home, loader, "--library-path", libraries, str(self.root / PYTHON), "-I"]


def base(cache: Path) -> Base:
    """The file system, from the cache if its packages are unchanged. Raises CalledProcessError where apt knows no such package."""
    listed = subprocess.run(["apt-get", "download", "--print-uris", *BASE_PACKAGES], check=True, capture_output=True, text=True).stdout
    # 'address' file size digest: the address is the machine's own business.
    packages = sorted(" ".join(line.split()[1:]) for line in listed.splitlines() if line.startswith("'"))
    key = hashlib.sha256("\n".join([_FORMAT, *packages, repr(_FILES), repr(_LINKS), repr(_DROPPED)]).encode()).hexdigest()[:32]
    root = cache / "base" / key
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as room:
            _fill(Path(room))
            os.replace(Path(room) / "root", root)
    components = tuple(_component(path) for path in sorted((root / "var/lib/dpkg/status.d").iterdir()))
    return Base(root, key, components)


def _fill(room: Path) -> None:
    root, packages = room / "root", room / "packages"
    packages.mkdir()
    subprocess.run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *BASE_PACKAGES], cwd=packages, check=True)
    for package in sorted(packages.iterdir()):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
        control = subprocess.run(["dpkg-deb", "--field", package], check=True, capture_output=True, text=True).stdout
        # One file a package, where scanners look for them in images that have no dpkg.
        about = root / "var/lib/dpkg/status.d" / package.name.partition("_")[0]
        about.parent.mkdir(parents=True, exist_ok=True)
        about.write_text(control)
    for name in _DROPPED:
        shutil.rmtree(root / name, ignore_errors=True)
    for path in (root / "usr/share/doc").rglob("*"):
        if path.is_file() and path.name != "copyright":
            path.unlink()
    certificates = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_text("".join(path.read_text() for path in certificates))
    for name, text in _FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, target in _LINKS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)
    (root / HOME[1:]).mkdir(parents=True)


def _component(about: Path) -> dict[str, str]:
    fields = dict(line.split(": ", 1) for line in about.read_text().splitlines() if ": " in line and not line.startswith(" "))
    name, version = fields["Package"], fields["Version"]
    return {"name": name, "version": version, "purl": f"pkg:deb/debian/{name}@{version}?arch={fields['Architecture']}"}
