"""How a file's rows are written and where in them text and label stand, told by its name and its first line."""

import csv
from collections.abc import Sequence
from pathlib import Path

from argosy.v1 import dataset_pb2, finetune_pb2

METHODS = {
    "classify": finetune_pb2.TUNE_METHOD_CLASSIFY,
    "chat": finetune_pb2.TUNE_METHOD_CHAT,
    "preference": finetune_pb2.TUNE_METHOD_PREFERENCE,
}
FORMATS = {
    "classify": dataset_pb2.DATASET_FORMAT_CLASSIFY,
    "chat": dataset_pb2.DATASET_FORMAT_CHAT,
    "preference": dataset_pb2.DATASET_FORMAT_PREFERENCE,
}
_DELIMITERS = {".tsv": "\t", ".tab": "\t", ".csv": ","}
_SPELLED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
_FIRST_LINE = 262_144  # bytes; a longer line is refused by the service anyway


def _columns(path: Path, delimiter: str) -> list[str]:
    with path.open("rb") as file:
        line = file.readline(_FIRST_LINE).decode("utf-8", errors="replace").removeprefix("\ufeff").rstrip("\r\n")
    return next(csv.reader([line], delimiter=delimiter), [])


def layout_of(
    path: Path,
    *,
    text_columns: Sequence[str] = (),
    label_column: str = "",
    delimiter: str = "",
    header: bool | None = None,
) -> dataset_pb2.RowLayout:
    """The layout of a file, by its suffix unless `delimiter` says otherwise; JSONL for any but .csv, .tsv and .tab.

    Raises ValueError where a column is named that the first line lacks, with the columns that it has.
    """
    delimiter = _SPELLED.get(delimiter, delimiter) or _DELIMITERS.get(path.suffix.lower(), "")
    layout = dataset_pb2.RowLayout(text_columns=text_columns, label_column=label_column)
    if not delimiter:
        layout.encoding = dataset_pb2.DATASET_ENCODING_JSONL
        return layout
    layout.encoding, layout.delimiter = dataset_pb2.DATASET_ENCODING_CSV, delimiter
    if header is not None:
        layout.header = header
    columns = _columns(path, delimiter)
    if header is False:
        columns = [str(number) for number in range(1, len(columns) + 1)]
    missing = [name for name in (*(text_columns or ("text",)), label_column or "label") if name not in columns]
    if missing:
        raise ValueError(f"{path.name} has no column {missing[0]!r} but {', '.join(columns)}: name the columns of text and label")
    return layout
