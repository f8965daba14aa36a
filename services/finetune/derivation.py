"""A version's bytes made from another's: without the rows in error, or without the personal data in them."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from services.chassis.objects import SyncObjects
from services.finetune import pii
from services.finetune.records import CsvRecord, Line, csv_records, lines, parse_object
from services.finetune.rows import Layout


class Derived(msgspec.Struct, frozen=True):
    """The clean bytes that were made."""

    sha256: str
    total_bytes: int
    skipped_lines: list[int]  # the first thousand
    skipped_rows: int


def derive(store: SyncObjects, data: str, derived: str, layout: Layout, spans: "array[int]", bad: list[int], bad_rows: int) -> Derived:
    """Copy the rows without error, byte for byte, and the header of a CSV.

    Args:
        store: holds `data`.
        data: the object to copy from.
        derived: the object to make.
        layout: how rows are written.
        spans: [start, end) of what stays, in order.
        bad: lines that go, the first thousand.
        bad_rows: how many go.
    """
    if layout.encoding == "csv" and layout.header:
        header = next(record for record in csv_records(store.stream(data), layout.delimiter) if isinstance(record, CsvRecord))
        spans = array("Q", (header.offset, header.end)) + spans
    digest, total = hashlib.sha256(), 0
    with store.writing(derived) as writer:
        for piece in _spans(store.stream(data), spans):
            writer.write(piece)
            digest.update(piece)
            total += len(piece)
    return Derived(digest.hexdigest(), total, bad, bad_rows)


def _spans(pieces: Iterator[bytes], spans: "array[int]") -> Iterator[bytes]:
    """The bytes of `pieces` that lie in `spans`."""
    at, index = 0, 0
    for piece in pieces:
        end = at + len(piece)
        while index < len(spans) and spans[index] < end:
            yield piece[max(0, spans[index] - at) : spans[index + 1] - at]
            if spans[index + 1] > end:
                break
            index += 2
        at = end


def redact(store: SyncObjects, source: str, data: str, layout: Layout, kinds: Sequence[str], idle: Callable[[], None]) -> tuple[str, int]:
    """Make `data` from `source`, every text without the personal data of `kinds`. Returns SHA-256 and size."""
    digest, total = hashlib.sha256(), 0
    make = _redacted_csv if layout.encoding == "csv" else _redacted_json
    with store.writing(data) as writer:
        for piece in make(store.stream(source), layout, kinds):
            writer.write(piece)
            digest.update(piece)
            total += len(piece)
            idle()
    return digest.hexdigest(), total


def _redacted_json(pieces: Iterator[bytes], layout: Layout, kinds: Sequence[str]) -> Iterator[bytes]:
    for line in lines(pieces):
        if not isinstance(line, Line) or not line.data.strip(b" \t\r"):
            continue
        before = parse_object(line.data.decode())
        after = _without(before, kinds)
        yield (line.data if after == before else msgspec.json.encode(after)) + b"\n"


def _without(value: Any, kinds: Sequence[str]) -> Any:
    if isinstance(value, str):
        return pii.redact(value, kinds)
    if isinstance(value, dict):
        return {key: _without(each, kinds) for key, each in value.items()}
    return [_without(each, kinds) for each in value] if isinstance(value, list) else value


def _redacted_csv(pieces: Iterator[bytes], layout: Layout, kinds: Sequence[str]) -> Iterator[bytes]:
    for record in csv_records(pieces, layout.delimiter):
        if isinstance(record, CsvRecord):
            yield (layout.delimiter.join(_quoted(pii.redact(each, kinds), layout.delimiter) for each in record.fields) + "\n").encode()


def _quoted(text: str, delimiter: str) -> str:
    needs = any(each in text for each in (delimiter, '"', "\n", "\r"))
    return '"' + text.replace('"', '""') + '"' if needs else text
