"""The cgroups of one room: a branch of its own in every hierarchy, version 1 or 2, so that what is left can be found and removed."""

import errno
import os
from pathlib import Path

from tools.cluster.processes import wait_until

MOUNT = Path("/sys/fs/cgroup")
FIRST_KEPT = MOUNT / "argosy-outside"  # version 2 inside a container: processes must leave the root before it may have children with limits

# A branch competes with every single process of the machine's root, where the default would make a whole cluster weigh as much as one.
WEIGHT = 8


def make(name: str) -> None:
    """Make the branch, ready for a kubelet to grow pods under."""
    if (MOUNT / "cgroup.controllers").exists():
        _open_root()
        (MOUNT / name).mkdir(exist_ok=True)
        (MOUNT / name / "cpu.weight").write_text(str(WEIGHT * 100))
        return
    for branch in _branches(name):
        branch.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # empty in a new one, and then nothing may run in it
            if (branch / file).exists():
                (branch / file).write_text((branch.parent / file).read_text())
        if (branch / "cpu.shares").exists():
            (branch / "cpu.shares").write_text(str(WEIGHT * 1024))


def remove(name: str) -> None:
    """Remove the branch with all that grew under it; waits for processes that are still dying."""
    for branch in _branches(name):
        wait_until(lambda branch=branch: _removed(branch), 10)  # type: ignore[misc]


def _branches(name: str) -> list[Path]:
    if (MOUNT / "cgroup.controllers").exists():
        return [MOUNT / name]
    return [hierarchy / name for hierarchy in sorted(MOUNT.iterdir()) if hierarchy.is_dir() and not hierarchy.is_symlink()]


def _removed(branch: Path) -> bool:
    for folder, _, _ in os.walk(branch, topdown=False):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return not branch.exists()


def _open_root() -> None:
    """Version 2: let children of the root have limits."""
    wanted = " ".join(f"+{name}" for name in (MOUNT / "cgroup.controllers").read_text().split())
    try:
        (MOUNT / "cgroup.subtree_control").write_text(wanted)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        FIRST_KEPT.mkdir(exist_ok=True)
        for pid in (MOUNT / "cgroup.procs").read_text().split():
            try:
                (FIRST_KEPT / "cgroup.procs").write_text(pid)
            except ProcessLookupError:
                continue
        (MOUNT / "cgroup.subtree_control").write_text(wanted)
