"""Fills a layer: the packages of a lock, or our own code. The Dockerfile and tools/images both run it, so that both make the same.

    python install.py packages LOCK LAYER [PYTHON...]      wheels by hash alone, stripped and compiled
    python install.py code SOURCE LAYER [PYTHON...]        services and stubs, with the name and version of the distribution

PYTHON is the command of the interpreter that will run them, this one if none is given. PIP_FIND_LINKS may hold wheels that no index has.
"""

import csv
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

VENV = "opt/argosy"
SITE = f"{VENV}/lib/python3.11/site-packages"
# pip does not derive the older platforms that a newer C library also runs.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)] + ["manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"]
# Sources of what is already compiled, and stubs for checkers. Triton and the CUDA build of torch compile at run time with their headers.
STRIPPED = ("*.pyi", "*.pyx", "*.pxd", "*.pxi", "*.c", "*.cpp", "*.cc", "*.h", "*.hpp", "*.cu", "*.cuh", "*.a", "*.cmake")
COMPILES = ("triton", "torch", "nvidia")
# Two thousand modules that are imported by name when first used; who uses two of them compiles two.
UNCOMPILED = "kubernetes/client/(api|models)/"
BESIDES = ("torch/include", "torch/share")  # of a torch that never compiles
UNUSED = ("kubernetes/aio",)  # the same client once more, 68 MB, for another event loop
CODE = ("services", "clients/python/argosy", "clients/internal/argosy_internal")
CODE_FILES = {".py", ".toml", ".mako", ".c", ".h", ".json", ".typed"}


def packages(lock: Path, layer: Path) -> None:
    """Install every pin of the lock. Raises CalledProcessError where a hash differs or a wheel is missing."""
    site = layer / SITE
    command = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", "--only-binary=:all:", "--no-compile"]
    command += ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore", "--target", str(site), "-r", str(lock)]
    command += ["--implementation=cp", "--python-version=3.11", *(f"--platform={name}" for name in PLATFORMS)]
    subprocess.run(command, check=True)
    strip(site)


def strip(site: Path) -> None:
    """Remove what no service reads: tests, stubs, sources of compiled modules, scripts."""
    shutil.rmtree(site / "bin", ignore_errors=True)
    for top in sorted(path for path in site.iterdir() if path.is_dir()):
        for tests in sorted(path for path in top.rglob("tests") if path.is_dir()):
            shutil.rmtree(tests, ignore_errors=True)
        if top.name not in COMPILES:
            for pattern in STRIPPED:
                for path in top.rglob(pattern):
                    path.unlink()
    for name in UNUSED:
        shutil.rmtree(site / name, ignore_errors=True)
    if (site / "torch").is_dir() and not (site / "triton").is_dir():
        for name in BESIDES:
            shutil.rmtree(site / name, ignore_errors=True)
        for path in (site / "torch").rglob("*.pyi"):
            path.unlink()
    for record in site.glob("*.dist-info/RECORD"):
        recorded(record)


def recorded(record: Path) -> None:
    """Leave in a RECORD what is still there. Scripts name the interpreter that ran pip: their hashes would differ from place to place."""
    with record.open(newline="") as file:
        rows = [row for row in csv.reader(file) if (record.parents[1] / row[0]).exists()]
    with record.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def code(source: Path, layer: Path) -> None:
    """Our packages as they lie in the repository, without tests, and who they are."""
    site = layer / SITE
    for name in CODE:
        top = source / name
        for path in sorted(top.rglob("*")):
            if path.suffix in CODE_FILES and "__pycache__" not in path.parts:
                target = site / top.name / path.relative_to(top)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    about = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")


def compiled(layer: Path, python: list[str], *, whole: bool) -> None:
    """Bytecode beside every module: a read-only root keeps none, and a cold start would compile all of it each time.

    `whole`: a module that does not compile is an error; packages bring modules for newer Pythons along.
    """
    command = [*python, "-m", "compileall", "-q" if whole else "-qq", "--invalidation-mode", "unchecked-hash"]
    # A set in a constant is written in the order of its hashes.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    subprocess.run([*command, "-x", UNCOMPILED, "-s", str(layer), "-p", "/", str(layer)], check=whole, env=environment)


def main() -> None:
    """Fill one layer."""
    kind, source, layer, *python = sys.argv[1:]
    {"packages": packages, "code": code}[kind](Path(source), Path(layer))
    compiled(Path(layer), python or [sys.executable], whole=kind == "code")


if __name__ == "__main__":
    main()
