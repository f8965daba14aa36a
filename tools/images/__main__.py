"""`python -m tools.images build NAME... [--out DIR]` packs images; `lock` renews the locks they are made from.

NAME is gateway, finetune, inference, trainer or weights. Inference and trainer come with the CPU's torch, whose wheel
PIP_FIND_LINKS holds; `--torch cuda` takes the index's. Each image is one line of JSON on stdout.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from services.pretrained.weights import cache_directory
from tools.images.build import build
from tools.images.lock import lock_all
from tools.images.recipes import IMAGES, ROOT

NAMES = ("gateway", "finetune", "inference", "trainer", "weights")
HINT = "The wheel of torch-cpu.lock is in no index: PIP_FIND_LINKS names the folder that has it."


def main() -> int:
    """Run one of the commands; 1 where a tool it needs failed, which has then said why."""
    words = argparse.ArgumentParser(
        prog="python -m tools.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = words.add_subparsers(dest="command", required=True)
    builds = commands.add_parser("build", help="pack images")
    builds.add_argument("names", nargs="+", choices=NAMES, metavar="NAME")
    builds.add_argument("--out", type=Path, help="folder of the archives; default: in the cache")
    builds.add_argument("--torch", choices=("cpu", "cuda"), default="cpu")
    commands.add_parser("lock", help="renew deploy/images/*.lock, with uv")
    asked = words.parse_args()
    try:
        if asked.command == "lock":
            _lock()
        else:
            _build(asked.names, asked.out, asked.torch)
    except subprocess.CalledProcessError as error:
        said = error.stderr or b""
        print(said.decode() if isinstance(said, bytes) else said, file=sys.stderr)
        print(f"{Path(str(error.cmd[0])).name} ended with {error.returncode}. {HINT}", file=sys.stderr)
        return 1
    return 0


def _lock() -> None:
    for path in lock_all():
        print(path.relative_to(ROOT))


def _build(names: list[str], out: Path | None, torch: str) -> None:
    cache = cache_directory(os.environ.get("ARGOSY_CACHE_DIR")) / "images"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in names:
        full = f"{name}-cpu" if torch == "cpu" and f"{name}-cpu" in IMAGES else name
        print(build(full, out or cache, cache, version).line(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
