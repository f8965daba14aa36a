"""From stored bytes to records: physical lines, strict JSON objects, values between delimiters (pure; rules V2, V3 and V4).

A physical line ends at byte 0x0A and at nothing else: U+2028, form feeds and lone carriage returns end none. Memory is bounded by the
longest line allowed, whatever the size of the chunks.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec

MAX_LINE_BYTES = 256 << 10
MAX_DEPTH = 8
INTEGERS = range(-(1 << 63), 1 << 64)  # what 64 bits can hold, with or without a sign
BOM = b"\xef\xbb\xbf"

_SURROGATE = re.compile("[\ud800-\udfff]")
_CSV_QUOTED = re.compile(r'"((?:[^"]|"")*+)"')  # possessive: the first quote of a pair never closes

Severity = Literal["error", "warning"]


class RowError(msgspec.Struct, frozen=True, gc=False):
    """One finding: where, and which rule; never content.

    `line` counts from 1, `byte_offset` from 0: of the record's first byte, or of the offence where it is known. `field` is a path within
    the row, empty for the row as a whole. `rule` is `V5.missing` and the like. A finding with `line` 0 is about all rows together.
    """

    line: int
    byte_offset: int
    field: str
    rule: str
    severity: Severity = "error"


class Line(NamedTuple):
    """One physical line without its line feed; `end` is the offset behind that."""

    number: int
    offset: int
    data: bytes
    end: int


class Refused(Exception):
    """A record that is none. `at` counts characters from its beginning."""

    def __init__(self, rule: str, field: str = "", at: int = 0) -> None:
        super().__init__(rule)
        self.rule, self.field, self.at = rule, field, at


def lines(chunks: Iterable[bytes]) -> Iterator[Line | RowError]:
    """The physical lines of concatenated `chunks`; a line over 256 KiB ends them with V3.line_bytes."""
    number, offset, rest = 0, 0, b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for data in whole:
            number += 1
            if len(data) > MAX_LINE_BYTES:
                yield RowError(number, offset, "", "V3.line_bytes")
                return
            end = offset + len(data) + 1
            yield Line(number, offset, data, end)
            offset = end
        if len(rest) > MAX_LINE_BYTES:
            break
    if len(rest) > MAX_LINE_BYTES:
        yield RowError(number + 1, offset, "", "V3.line_bytes")
    elif rest:
        yield Line(number + 1, offset, rest, offset + len(rest))


def filled_lines(chunks: Iterable[bytes]) -> Iterator[Line | RowError]:
    """`lines` without blank ones, each of which is a warning V4.blank unless it is the last."""
    blank: Line | None = None
    for line in lines(chunks):
        if blank is not None:
            yield RowError(blank.number, blank.offset, "", "V4.blank", "warning")
            blank = None
        if isinstance(line, Line) and not line.data.strip(b" \t\r"):
            blank = line
        else:
            yield line


def text_of(line: Line) -> str | RowError:
    """A line's text without its line ending, or what of V2 it breaks, at the offending byte."""
    data = line.data.removesuffix(b"\r")
    if line.offset == 0 and data.startswith(BOM):
        return RowError(line.number, 0, "", "V2.bom")
    for byte, rule in ((b"\0", "V2.nul"), (b"\r", "V2.carriage_return")):
        if (at := data.find(byte)) >= 0:
            return RowError(line.number, line.offset + at, "", rule)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return RowError(line.number, line.offset + error.start, "", "V2.utf8")


# --- JSON -------------------------------------------------------------------------------------------------------------------------------


def json_object(line: Line) -> dict[str, Any] | RowError:
    """A line as a JSON object that every reader would read alike, or which of V2 and V4 it breaks."""
    text = text_of(line)
    if isinstance(text, RowError):
        return text
    try:
        return parse_object(text)
    except Refused as error:
        return RowError(line.number, line.offset + len(text[: error.at].encode()), error.field, error.rule)


def parse_object(text: str) -> dict[str, Any]:
    """One JSON object. Raises Refused with a rule of V4, or V2.nul for an escaped NUL."""
    try:
        found = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant, parse_int=_integer, parse_float=_number)
    except json.JSONDecodeError as error:
        raise Refused("V4.json", at=error.pos) from error
    except RecursionError as error:
        raise Refused("V4.depth") from error
    if not isinstance(found, dict):
        raise Refused("V4.object")
    _walk(found, "", 1)
    return found


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("V4.duplicate_key")
    return found


def _no_constant(_: str) -> float:
    raise Refused("V4.number")


def _integer(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in INTEGERS:
        raise Refused("V4.integer")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused("V4.number")
    return value


def _walk(value: Any, path: str, depth: int) -> None:
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise Refused("V4.surrogate", path)
        if "\0" in value:
            raise Refused("V2.nul", path)
    elif isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise Refused("V4.depth")
        if isinstance(value, list):
            for index, each in enumerate(value):
                _walk(each, f"{path}[{index}]", depth + 1)
            return
        for key, each in value.items():
            _walk(key, path, depth + 1)
            _walk(each, f"{path}.{key}" if path else key, depth + 1)


# --- CSV --------------------------------------------------------------------------------------------------------------------------------


class CsvRecord(NamedTuple):
    """One record, which may span lines: `line` and `offset` are of its first."""

    line: int
    offset: int
    end: int
    fields: list[str]


def csv_records(chunks: Iterable[bytes], delimiter: str) -> Iterator[CsvRecord | RowError]:
    """Records as RFC 4180 has them. A bad one is one finding at its first line; reading goes on behind it."""
    unquoted = re.compile(f'[^"{re.escape(delimiter)}]*+')
    blank: Line | None = None
    spanning: _Spanning | None = None
    for line in lines(chunks):
        if isinstance(line, RowError):
            yield line
            return
        if spanning is not None:
            if spanning.adds(line):
                yield spanning.record(delimiter, unquoted)
                spanning = None
            elif spanning.size > MAX_LINE_BYTES:
                yield RowError(spanning.first.number, spanning.first.offset, "", "V3.record_bytes")
                return
            continue
        if blank is not None:
            yield RowError(blank.number, blank.offset, "", "V4.blank", "warning")
        blank = None if line.data.strip(b" \t\r") else line
        if blank is not None:
            continue
        text = text_of(line)
        if isinstance(text, RowError):
            yield text
        elif '"' not in text:
            yield CsvRecord(line.number, line.offset, line.end, text.split(delimiter))
        elif (fields := _fields(text, delimiter, unquoted)) != []:
            yield _record(line, line.end, fields)
        else:
            spanning = _Spanning(line)
    if spanning is not None:
        yield RowError(spanning.first.number, spanning.first.offset, "", "V4.csv")


class _Spanning:
    """A record whose quoted field has not ended with its first line."""

    def __init__(self, first: Line) -> None:
        self.first, self.size = first, 0
        self._parts: list[str] = []
        self._bad: RowError | None = None
        self._quotes, self._end = 0, first.end
        self.adds(first)

    def adds(self, line: Line) -> bool:
        """Take one more line; True: it was the last, for every quote has its partner."""
        text = text_of(line)
        if isinstance(text, RowError):
            self._bad = self._bad or text
        else:
            self._parts.append(text + "\r" * line.data.endswith(b"\r"))
        self._quotes += line.data.count(b'"')
        self.size += len(line.data) + 1
        self._end = line.end
        return self._quotes % 2 == 0

    def record(self, delimiter: str, unquoted: re.Pattern[str]) -> CsvRecord | RowError:
        """The whole."""
        return self._bad or _record(self.first, self._end, _fields("\n".join(self._parts).removesuffix("\r"), delimiter, unquoted))


def _record(first: Line, end: int, fields: list[str] | None) -> CsvRecord | RowError:
    if not fields:
        return RowError(first.number, first.offset, "", "V4.csv")
    return CsvRecord(first.number, first.offset, end, fields)


def _fields(text: str, delimiter: str, unquoted: re.Pattern[str]) -> list[str] | None:
    """A record's values; none at all: a quoted one does not end here; None: this is no record."""
    found: list[str] = []
    at = 0
    while True:
        if text.startswith('"', at):
            match = _CSV_QUOTED.match(text, at)
            if match is None:
                return []
            found.append(match.group(1).replace('""', '"'))
        else:
            match = unquoted.match(text, at)
            assert match is not None  # it may be empty
            found.append(match.group())
        at = match.end()
        if at == len(text):
            return found
        if text[at] != delimiter:
            return None
        at += 1
