"""The images of a node without a registry: archives, and the one image that every pod needs."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.cluster.commands import CommandFailed, run, say
from tools.cluster.node import PAUSE, ROOT, Node
from tools.images.archive import pack, write


@dataclass(frozen=True)
class Image:
    """One of our images, packed."""

    reference: str  # by which a pod names it
    archive: Path
    digest: str


def built(names: list[str]) -> list[Image]:
    """Pack our images (tools.images), or find them packed.

    Raises:
        CommandFailed: one could not be packed.
    """
    command = [sys.executable, "-m", "tools.images", "build", *names]
    try:
        said = run(command, f"packing images: {', '.join(names)}", cwd=ROOT)
    except CommandFailed as error:
        say(f"{error}\nWithout the CPU's torch: trying the index's own, which is larger and computes the same here")
        said = run([*command, "--torch", "cuda"], f"packing images: {', '.join(names)}", cwd=ROOT)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return [Image(line["image"], Path(line["archive"]), line["digest"]) for line in lines]


def load(node: Node, images: list[Image]) -> list[str]:
    """Import what the node does not have yet in this very version; returns all references."""
    there = node.images()
    missing = [image.archive for image in images if there.get(image.reference) != image.digest]
    if missing:
        say(f"loading {len(missing)} images into the node")
        node.import_images(missing)
    return [image.reference for image in images]


def pause(program: Path, folder: Path) -> Path:
    """The sandbox image of every pod: one static program. Returns its archive."""
    root = folder / "pause-root"
    root.mkdir(parents=True)
    shutil.copy2(program, root / "pause")
    layer = pack(root, folder / "pause.layer", "pause")
    archive = folder / "pause.tar"
    write(archive, PAUSE, [layer], {"Entrypoint": ["/pause"], "User": "65532:65532", "WorkingDir": "/"}, {})
    shutil.rmtree(root)
    layer.path.unlink()
    return archive
