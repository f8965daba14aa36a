"""One real node."""

import os
import shutil
import sys


def lacking() -> str:
    """Why this machine cannot run a real node; empty where it can."""
    if sys.platform != "linux":
        return "a real node needs Linux"
    if os.geteuid() != 0:
        return "a real node needs root: namespaces, mounts and cgroups"
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    return f"a real node needs {', '.join(missing)}" if missing else ""
