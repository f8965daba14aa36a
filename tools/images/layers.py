"""The layers of an image, each from the cache if what it is made from is unchanged."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.images.archive import EPOCH, Layer, Owner, pack
from tools.images.debian import Base
from tools.images.recipes import HOME, ROOT, SITE, SOURCES, USER

__all__ = ["base_layer", "code_layer", "lock_layer", "made"]

KEPT = 2
FORMAT = 1  # raised when layers are packed in another way
INSTALL = SOURCES / "install.py"
OWNERS = {
    "tmp": Owner(0, 0o1777),
    HOME[1:]: Owner(USER, 0o755),
}


def made(
    cache: Path, name: str, inputs: bytes, fill: Callable[[Path], None], components: Callable[[Path], list[dict[str, str]]] | None = None
) -> Layer:
    """The layer `name` of `inputs`: `fill` writes its files into an empty folder, `components` lists what they are."""
    rules = INSTALL.read_bytes() + f"{FORMAT} {EPOCH}".encode()
    key = f"{name}-{hashlib.sha256(rules + inputs).hexdigest()[:32]}"
    tar, about = cache / "layers" / f"{key}.tar", cache / "layers" / f"{key}.json"
    if tar.exists() and about.exists():
        known: dict[str, Any] = json.loads(about.read_text())
        return Layer(tar, known["digest"], known["size"], name, tuple(known["components"]))
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tar.parent) as room:
        root = Path(room) / "root"
        root.mkdir()
        fill(root)
        layer = dataclasses.replace(pack(root, tar, name, OWNERS), components=tuple(components(root) if components else ()))
    record = {"digest": layer.digest, "size": layer.size, "components": list(layer.components)}
    about.write_text(json.dumps(record))
    _forget(tar, name)
    return layer


def _forget(newest: Path, name: str) -> None:
    """Leave the newest two of a layer: gigabytes would gather, and who goes back and forth needs two."""
    digest = "[0-9a-f]" * 32
    found = sorted(newest.parent.glob(f"{name}-{digest}.tar"), key=lambda path: path.stat().st_mtime)
    for old in found[:-KEPT]:
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def base_layer(cache: Path, base: Base) -> Layer:
    """Debian and its bytecode."""

    def fill(root: Path) -> None:
        shutil.copytree(base.root, root, symlinks=True, dirs_exist_ok=True)
        subprocess.run(
            [
                *base.python,
                "-m",
                "compileall",
                "-q",
                "--invalidation-mode",
                "unchecked-hash",
                "-s",
                root,
                "-p",
                "/",
                root / "usr/lib/python3.11",
            ],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )

    return made(cache, "base", base.key.encode(), fill, lambda root: list(base.components))


def lock_layer(cache: Path, name: str, base: Base) -> Layer:
    """The packages of deploy/images/{name}.lock."""
    lock = SOURCES / f"{name}.lock"

    def fill(root: Path) -> None:
        subprocess.run([sys.executable, INSTALL, "packages", lock, root, *base.python], check=True)

    return made(cache, name, base.key.encode() + lock.read_bytes(), fill, _installed)


def code_layer(cache: Path, base: Base) -> Layer:
    """Our own code: the same for every service, and the last layer, since it changes most."""
    inputs = hashlib.sha256(base.key.encode())
    for path in sorted([*(ROOT / "services").rglob("*"), *(ROOT / "clients").rglob("*"), ROOT / "pyproject.toml"]):
        if path.is_file() and "__pycache__" not in path.parts:
            inputs.update(str(path.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())

    def fill(root: Path) -> None:
        subprocess.run([sys.executable, INSTALL, "code", ROOT, root, *base.python], check=True)

    return made(cache, "argosy", inputs.digest(), fill, _installed)


def _installed(root: Path) -> list[dict[str, str]]:
    found = []
    for distribution in importlib.metadata.distributions(path=[str(root / SITE[1:])]):
        name, version = distribution.metadata["Name"], distribution.version
        license_ = next(iter(distribution.metadata.get_all("License-Expression") or [""]))
        found.append({"name": name, "version": version, "purl": f"pkg:pypi/{name.lower()}@{version}", "license": license_})
    return sorted(found, key=lambda component: component["purl"])
