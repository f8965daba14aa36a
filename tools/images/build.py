"""An image from its recipe: layers, archive, bill of materials, and one line of figures."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.pretrained.weights import cache_directory, digest, prepare
from tools.images import layers
from tools.images.archive import Layer, write
from tools.images.bill import bill
from tools.images.debian import base
from tools.images.recipes import ENVIRONMENT, IMAGES, USER

__all__ = ["Built", "build", "service", "weights"]

REGISTRY = "localhost"


@dataclass(frozen=True)
class Built:
    """An image on disk."""

    reference: str  # by which a pod names it
    archive: Path
    digest: str  # of the manifest, sha256, hex
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """Bytes unpacked, as a node's disk holds them."""
        return sum(layer.size for layer in self.layers)

    def line(self) -> str:
        """One line of JSON."""
        parts = {layer.comment: layer.size for layer in self.layers}
        return json.dumps(
            {"image": self.reference, "archive": str(self.archive), "digest": f"sha256:{self.digest}", "bytes": self.size, "layers": parts}
        )


def build(name: str, out: Path, cache: Path, version: str) -> Built:
    """The image `name`: a service of recipes.py, or `weights`."""
    if name == "weights":
        return weights("default", out, cache, version)
    return service(name, out, cache, version)


def service(name: str, out: Path, cache: Path, version: str) -> Built:
    """A service's image."""
    image = IMAGES[name]
    root = base(cache)
    made = [layers.base_layer(cache, root), *(layers.lock_layer(cache, lock, root) for lock in image.locks), layers.code_layer(cache, root)]
    settings = {
        "Entrypoint": image.entrypoint,
        "Env": [f"{key}={value}" for key, value in ENVIRONMENT.items()],
        "User": f"{USER}:{USER}",
        "WorkingDir": "/",
        "StopSignal": "SIGTERM",
    }
    return _written(image.name, version, out, made, settings)


def weights(model: str, out: Path, cache: Path, version: str) -> Built:
    """A model's prepared files at the root of an image that starts nothing: a pod mounts it as a volume."""
    own = cache_directory(os.environ.get("ARGOSY_CACHE_DIR"))
    directory = prepare(model, own)
    known = digest(directory, own)
    name = directory.name.rpartition("-")[0] if model == "default" else directory.name

    def fill(root: Path) -> None:
        for path in sorted(directory.iterdir()):
            if path.is_file():
                _linked(path.resolve(), root / path.name)

    made = layers.made(cache, name, known.encode(), fill)
    return _written(f"argosy-weights-{name}", version, out, [made], {}, {"dev.argosy.model.digest": f"sha256:{known}"})


def _linked(source: Path, target: Path) -> None:
    """The same file under another name; on another disk, a copy of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _written(
    name: str, version: str, out: Path, made: Sequence[Layer], settings: Mapping[str, object], more: dict[str, str] | None = None
) -> Built:
    out.mkdir(parents=True, exist_ok=True)
    reference = f"{REGISTRY}/{name}:{version}"
    labels = {"org.opencontainers.image.title": name, "org.opencontainers.image.version": version, **(more or {})}
    digest_ = write(out / f"{name}.tar", reference, made, settings, labels)
    components = [component for layer in made for component in layer.components]
    if components:
        (out / f"{name}.cdx.json").write_text(bill(name, version, digest_, components))
    return Built(reference, out / f"{name}.tar", digest_, tuple(made))
