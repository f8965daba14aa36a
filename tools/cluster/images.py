"""The images of a node without a registry: archives, and the one image that every pod needs."""

import json
import shutil
import sys
from pathlib import Path

from tools.cluster.commands import run
from tools.cluster.node import PAUSE, ROOT
from tools.images.archive import pack, write


def built(names: list[str]) -> dict[str, Path]:
    """Pack our images (tools.images), or find them packed: reference → archive."""
    said = run([sys.executable, "-m", "tools.images", "build", *names], f"packing images: {', '.join(names)}", cwd=ROOT)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {line["image"]: Path(line["archive"]) for line in lines}


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
