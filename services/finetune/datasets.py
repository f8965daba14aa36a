"""What a dataset may be, and what depends on one (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.chassis.errors import FieldInvalid
from services.finetune.rows import Layout


@dataclass(frozen=True)
class TrainingVersion:
    """A READY version as a job reads it."""

    name: str  # projects/{p}/datasets/{d}/versions/{n}
    uid: str
    dataset_uid: str
    path: str  # object of its bytes
    digests_path: str  # object of its rows' digests: 8 bytes each, in order of the rows
    sha256: str
    total_bytes: int
    layout: Layout
    rows: int  # without error; read_rows gives exactly these
    labels: Mapping[str, int]  # classify: rows by label, most frequent first
    tokens: Mapping[str, int]  # base model → tokens of all rows; empty where its tokenizer was not here
    longest: Mapping[str, int] = field(default_factory=dict)  # base model → tokens of the longest row


@dataclass(frozen=True)
class Erased:
    """What went with a dataset: resource names, object prefixes to be emptied, SHA-256 by name for the certificate."""

    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


class Dependants(Protocol):
    """Resources that were made from dataset versions: jobs, models. Each kind is asked in the transaction of the deletion."""

    async def of_versions(self, connection: Any, project_uid: str, version_uids: Sequence[str]) -> bool:
        """Whether any depends on one of the versions."""
        ...

    async def erase(self, connection: Any, project_uid: str, project: str, version_uids: Sequence[str]) -> Erased:
        """Cancel or delete all that do, so that no name reaches them any more."""
        ...


def check_layout(layout: Layout) -> None:
    """Refuse a layout that no row could follow.

    Raises:
        FieldInvalid: V1: CSV and columns are for `classify`; a column stands twice; a column number is none.
    """
    at = "dataset.layout."
    if layout.format != "classify":
        if layout.encoding == "csv":
            raise FieldInvalid(at + "encoding", "classify_only")
        if layout.text_columns or layout.label_column:
            raise FieldInvalid(at + ("text_columns" if layout.text_columns else "label_column"), "classify_only")
    if layout.encoding != "csv" and (layout.delimiter != "," or not layout.header):
        raise FieldInvalid(at + ("header" if layout.delimiter == "," else "delimiter"), "csv_only")
    if layout.label in layout.texts:
        raise FieldInvalid(at + "label_column", "repeated")
    if not layout.header:
        if not all(_number(name) for name in layout.texts):
            raise FieldInvalid(at + "text_columns", "column_number")
        if not _number(layout.label):
            raise FieldInvalid(at + "label_column", "column_number")


def _number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and not name.startswith("0")
