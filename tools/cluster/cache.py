"""What is built or fetched once and kept outside the tree: one folder a part, named after all it is made from."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.cluster.commands import say


def root() -> Path:
    """`ARGOSY_CLUSTER_CACHE`, else argosy/cluster under the user's cache folder."""
    if chosen := os.environ.get("ARGOSY_CLUSTER_CACHE"):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "argosy" / "cluster"


def digest(of: Iterable[bytes]) -> str:
    """A name for what is made from these bytes."""
    whole = hashlib.sha256()
    for part in of:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:16]


def kept(part: str, made_from: Iterable[bytes], make: Callable[[Path], None]) -> Path:
    """The folder of `part`, made by `make(folder)` where it is not there yet; a second maker of the same part waits for the first.

    It appears complete or not at all: whoever was killed on the way leaves only a folder under another name, which the next one removes.
    """
    cache = root()
    folder = cache / f"{part}-{digest(made_from)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{part}: somebody else is making it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            for half in cache.glob(f"{folder.name}.new-*"):
                shutil.rmtree(half, ignore_errors=True)
            fresh = Path(tempfile.mkdtemp(prefix=f"{folder.name}.new-", dir=cache))
            fresh.chmod(0o755)
            make(fresh)
            fresh.rename(folder)
    return folder
