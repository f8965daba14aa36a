"""The CPU kernels: C source, and how it becomes a loaded library.

Compiled at first use with whatever C compiler there is, for this machine's instructions, and kept in the cache by the digest of source,
compiler and CPU. The source depends on the C library and POSIX threads only, so any C11 compiler for x86-64 will do.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from services.inference.engine.kernels.layout import declare

SOURCES = ("kernels.c", "adapt.h", "crew.h", "int8.h", "lanes.h", "model.h", "screen.h", "step.h")
# No contraction: a fused multiply-add chosen by one compiler and not by another would change bits.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC")
NEEDED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
COMPILE_SECONDS = 180


class Unsupported(Exception):
    """The fused kernels cannot run here, or not this model; one sentence. The eager path can."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets this machine reports; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def load(cache_dir: Path) -> ctypes.CDLL:
    """The library, compiled if this source, compiler and CPU have not met before. Raises Unsupported."""
    missing = NEEDED - cpu_flags()
    if missing:
        raise Unsupported(f"The fused kernels need {', '.join(sorted(missing))}, which this CPU does not report.")
    here = Path(__file__).parent
    source = b"".join((here / name).read_bytes() for name in SOURCES)
    compiler = find_compiler()
    version = _run([*compiler, "--version"])
    known = "\n".join([*compiler, version, *FLAGS, *sorted(cpu_flags())]).encode()
    target = cache_dir / "kernels" / f"{hashlib.sha256(source + known).hexdigest()[:24]}.so"
    if not target.exists():
        _compile(compiler, here / "kernels.c", target)
    try:
        return declare(ctypes.CDLL(str(target)))
    except (OSError, AttributeError) as error:
        raise Unsupported(f"The compiled kernels do not load: {error}.") from error


def find_compiler() -> list[str]:
    """The first of $ARGOSY_CC, cc, gcc, clang and the ziglang wheel, as an argument list. Raises Unsupported."""
    if asked := os.environ.get("ARGOSY_CC"):
        return shlex.split(asked)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise Unsupported("The fused kernels need a C compiler: set ARGOSY_CC, or install gcc, clang or the ziglang package.")


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as room:
        made = Path(room) / target.name
        _run([*compiler, *FLAGS, str(source), "-o", str(made), "-lpthread", "-lm"])
        os.replace(made, target)  # two processes may both compile: each puts a whole file there


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
    except subprocess.CalledProcessError as error:
        raise Unsupported(f"{command[0]} failed on the fused kernels: {error.stderr.strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"The C compiler {command[0]} did not run: {error}.") from error
    return done.stdout
