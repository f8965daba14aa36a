"""Write the Python stubs of protos/ into clients/: `python tools/gen_protos.py [--check]`.

The generator lives in a virtual environment of its own, `.venv-protos`, because its pins stay one protobuf major behind ours.
Two passes: the public one does not see protos/internal, so a public file that imports an internal one does not compile.
With `--check` nothing is written: any difference from what is committed is printed, and the exit status is 1.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tools" / "protos-requirements.txt"
ENVIRONMENT = ROOT / ".venv-protos"
PUBLIC, INTERNAL, THIRD_PARTY = (ROOT / "protos" / name for name in ("public", "internal", "third_party"))
PASSES = (  # sources, what they may import, where the stubs go
    (PUBLIC, (PUBLIC, THIRD_PARTY), Path("clients/python")),
    (INTERNAL, (INTERNAL, PUBLIC, THIRD_PARTY), Path("clients/internal")),
)
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generator() -> Path:
    """The pinned environment's python; made anew whenever the pins have changed."""
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "pins.sha256"
    pins = hashlib.sha256(PINS.read_bytes()).hexdigest()
    if not (python.exists() and stamp.exists() and stamp.read_text() == pins):
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", PINS], check=True)
        stamp.write_text(pins)
    return python


def generate(into: Path) -> None:
    """Write every stub below `into`, in the places it has below the repository's root."""
    python = generator()
    environment = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}  # protoc finds its plugins on PATH
    for sources, imports, target in PASSES:
        out = into / target
        out.mkdir(parents=True, exist_ok=True)
        protoc: list[str | Path] = [python, "-m", "grpc_tools.protoc", *(f"-I{path}" for path in imports)]
        protos = sorted(sources.rglob("*.proto"))
        services = [path for path in protos if "\nservice " in path.read_text("utf-8")]
        subprocess.run([*protoc, f"--python_out={out}", f"--mypy_out=quiet:{out}", *protos], check=True, env=environment)
        subprocess.run([*protoc, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services], check=True, env=environment)


def stubs(below: Path) -> dict[Path, bytes]:
    """Every stub below `below`, by its path from there."""
    found = (path for _, _, target in PASSES for glob in STUBS for path in (below / target).rglob(glob))
    return {path.relative_to(below): path.read_bytes() for path in found}


def main() -> int:
    """0: written, or nothing differs. 1: `--check` found a difference."""
    options = argparse.ArgumentParser(description="Write the Python stubs of protos/ into clients/.")
    options.add_argument("--check", action="store_true", help="write nothing; fail if what is committed differs")
    check: bool = options.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        new, old = stubs(Path(directory)), stubs(ROOT)
    different = sorted(path for path in new.keys() | old.keys() if new.get(path) != old.get(path))
    for path in different:
        what = "differs" if path in new and path in old else "is missing" if path in new else "has no proto"
        if check:
            print(f"{path} {what}", file=sys.stderr)
        elif path in new:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_bytes(new[path])
        else:
            (ROOT / path).unlink()
    if check and different:
        print("the stubs are not those of protos/: run `make protos`", file=sys.stderr)
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
