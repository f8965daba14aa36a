"""What the measuring process is asked: rows, a base, and the versions to try on them (pure)."""

import msgspec

from services.finetune.rows import Layout


class Examinee(msgspec.Struct, frozen=True):
    """A version under test, or the base, which has no `place`."""

    name: str  # candidate, current or base
    place: str = ""  # of its parts in the object store
    parts: dict[str, str] = {}  # file name → SHA-256
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    dora: bool = False
    labels: tuple[str, ...] = ()
    temperature: float = 1.0
    max_tokens: int = 0  # of one window of a text


class Task(msgspec.Struct, frozen=True):
    """What to measure."""

    store_url: str
    base_directory: str
    data: str  # object of the rows
    sha256: str
    layout: Layout
    examinees: tuple[Examinee, ...]
    max_rows: int | None = None  # drawn by `seed`; None: all
    seed: int = 0
    threads: int | None = None  # of the CPU; None: those it may run on
