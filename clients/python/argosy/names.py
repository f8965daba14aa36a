"""Resource names from what people type: `news` for `projects/p/models/news`, `gemma-3-270m` for `models/gemma-3-270m`."""

import re
from pathlib import Path

_UNFIT = re.compile(r"[^a-z0-9]+")


def base(name: str) -> str:
    """The shared base of that name."""
    return name if "/" in name else f"models/{name}"


def own(project: str, collection: str, name: str) -> str:
    """A project's own resource: a full name stays as it is, a bare one or one within the collection is completed."""
    if name.startswith("projects/"):
        return name
    return f"{project}/{name}" if name.startswith(f"{collection}/") else f"{project}/{collection}/{name}"


def version(project: str, collection: str, name: str) -> str:
    """A version: `news/3` and `news/versions/3` are completed as `own` does. Raises ValueError where no version is named."""
    whole = own(project, collection, name)
    if "/versions/" not in whole:
        parent, _, number = whole.rpartition("/")
        if not number.isdigit() or parent.count("/") < 3:
            raise ValueError(f"{name} names no version: say {name}/1")
        whole = f"{parent}/versions/{number}"
    return whole


def parent(name: str) -> str:
    """What a resource stands in: `projects/p/models/news` of `projects/p/models/news/versions/3`."""
    return name.rsplit("/", 2)[0]


def last(name: str) -> str:
    """The last segment."""
    return name.rpartition("/")[2]


def segment(path: Path) -> str:
    """A name for what a file holds: its stem in letters that a name may have. Raises ValueError where none is left."""
    found = _UNFIT.sub("-", path.name.partition(".")[0].lower()).strip("-")[:63].strip("-")
    if not found:
        raise ValueError(f"{path.name} gives no name of a-z, 0-9 and -: choose one")
    return found
