"""From stored bytes to the rows of a format: what validation checks is what training reads (pure; rules V2-V8 but for sets of rows)."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import msgspec

from services.finetune.records import CsvRecord, Line, RowError, csv_records, filled_lines, json_object

__all__ = ["DELIMITERS", "FORMATS", "Layout", "Row", "RowError", "Turn", "read_rows"]

Format = Literal["chat", "classify", "preference"]
FORMATS: tuple[Format, ...] = ("chat", "classify", "preference")
ROLES = frozenset({"system", "user", "assistant", "tool"})
DELIMITERS = frozenset(",;|\t")
MAX_TURNS = 1_024
MAX_LABEL_BYTES = 256

_KEY = re.compile(rb'"[ \t\r]*:')  # stands behind every key of a JSON object, and seldom elsewhere
_FIELDS: Mapping[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "classify": ("text", "label"),
    "preference": ("prompt", "chosen", "rejected"),
}


class Layout(msgspec.Struct, frozen=True):
    """How rows are written. What is read by name only (`text_columns`, `label_column`) leaves other columns unread."""

    format: Format
    encoding: Literal["jsonl", "csv"] = "jsonl"
    text_columns: tuple[str, ...] = ()  # classify: their values, joined by a line feed, are the text; empty: `text`
    label_column: str = ""  # classify; empty: `label`
    delimiter: str = ","  # csv
    header: bool = True  # csv: the first line names the columns; else they are `1`, `2` …

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text."""
        return self.text_columns or ("text" if self.header else "1",)

    @property
    def label(self) -> str:
        """The column of the label."""
        return self.label_column or ("label" if self.header else "2")


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One turn of a chat. `role` is system, user, assistant or tool."""

    role: str
    content: str


class Row(msgspec.Struct, frozen=True):
    """One usable row; which fields are filled follows from the format. `end_offset` is behind its line feed."""

    line: int
    byte_offset: int
    end_offset: int
    text: str = ""
    label: str = ""
    messages: tuple[Turn, ...] = ()
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""

    @property
    def digest(self) -> bytes:
        """SHA-256 of what must not stand on both sides of a split: a text whatever its label, a prompt, a whole chat."""
        if self.messages:
            return _digest("chat", *(part for turn in self.messages for part in (turn.role, turn.content)))
        return _digest("preference", self.prompt) if self.prompt else _digest("classify", self.text)

    @property
    def content_digest(self) -> bytes:
        """SHA-256 of the whole row: equal for exact duplicates, however they are spelled."""
        if self.messages:
            return self.digest
        if self.prompt:
            return _digest("preference", self.prompt, self.chosen, self.rejected)
        return _digest("classify", self.text, self.label)

    @property
    def said(self) -> tuple[str, ...]:
        """Every text of the row, label left out."""
        if self.messages:
            return tuple(turn.content for turn in self.messages)
        return (self.prompt, self.chosen, self.rejected) if self.prompt else (self.text,)


def _digest(*parts: str) -> bytes:
    data = [part.encode() for part in parts]
    return hashlib.sha256(b"%s:%s" % (b",".join([b"%d" % len(each) for each in data]), b"".join(data))).digest()


def read_rows(chunks: Iterable[bytes], layout: Layout) -> Iterator[Row | RowError]:
    """Rows and findings, in the order of their lines. A record with a finding of severity error gives no row.

    V3 (a line over 256 KiB) and a CSV header without the wanted columns end the reading. Memory does not grow with the number of rows.
    """
    return _csv_rows(chunks, layout) if layout.encoding == "csv" else _json_rows(chunks, layout)


# --- JSONL ------------------------------------------------------------------------------------------------------------------------------


class _Chat(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: tuple[Turn, ...]


class _Preference(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    prompt: str
    chosen: str
    rejected: str


def _json_rows(chunks: Iterable[bytes], layout: Layout) -> Iterator[Row | RowError]:
    quickly = _quick(layout)
    for line in filled_lines(chunks):
        if isinstance(line, RowError):
            yield line
            continue
        row = quickly(line)
        if row is not None:
            yield row
            continue
        found = json_object(line)
        if isinstance(found, RowError):
            yield found
            continue
        yield from _judged(found, layout, line.number, line.offset, line.end)


def _quick(layout: Layout) -> Callable[[Line], Row | None]:
    """A reader for rows without fault, some ten times as fast as the careful one; None: read it carefully."""
    if layout.format == "chat":
        decode: Callable[[bytes], Any] = msgspec.json.Decoder(_Chat).decode
    elif layout.format == "preference":
        decode = msgspec.json.Decoder(_Preference).decode
    else:
        columns = (*dict.fromkeys((*layout.texts, layout.label)),)
        names = {f"c{index}": column for index, column in enumerate(columns)}
        kind = msgspec.defstruct("_Classify", [(name, str) for name in names], rename=names, forbid_unknown_fields=True, gc=False)
        decode = msgspec.json.Decoder(kind).decode
        places = [f"c{columns.index(column)}" for column in layout.texts]
        label = f"c{columns.index(layout.label)}"

    def quickly(line: Line) -> Row | None:
        data = line.data
        if data.find(b"\r", 0, -1) >= 0 or b"\\u0000" in data:
            return None
        try:
            found = decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if layout.format == "chat":
            keys = 1 + 2 * len(found.messages)
            row = Row(line.number, line.offset, line.end, messages=found.messages)
        elif layout.format == "preference":
            keys = 3
            row = Row(line.number, line.offset, line.end, prompt=found.prompt, chosen=found.chosen, rejected=found.rejected)
        else:
            keys = len(columns)
            text = "\n".join([getattr(found, place) for place in places])
            row = Row(line.number, line.offset, line.end, text=text, label=getattr(found, label))
        if len(_KEY.findall(data)) != keys:
            return None  # a key stands twice, or a text looks like one
        return None if _breaches(row, layout) else row

    return quickly


def _judged(found: Mapping[str, Any], layout: Layout, line: int, offset: int, end: int) -> Iterator[Row | RowError]:
    problems = list(_schema(found, layout))
    if not problems:
        row = _row(found, layout, line, offset, end)
        problems = _breaches(row, layout)
        if not problems:
            yield row
            return
    for field, rule in problems:
        yield RowError(line, offset, field, rule)


def _row(found: Mapping[str, Any], layout: Layout, line: int, offset: int, end: int) -> Row:
    if layout.format == "chat":
        return Row(line, offset, end, messages=tuple(Turn(each["role"], each["content"]) for each in found["messages"]))
    if layout.format == "preference":
        return Row(line, offset, end, prompt=found["prompt"], chosen=found["chosen"], rejected=found["rejected"])
    return Row(line, offset, end, text="\n".join(found[column] for column in layout.texts), label=found[layout.label])


def _schema(found: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, str]]:
    """What of V5 a JSON object breaks: (field, rule)."""
    mapped = bool(layout.text_columns or layout.label_column)
    wanted = (*layout.texts, layout.label) if layout.format == "classify" else _FIELDS[layout.format]
    for name in dict.fromkeys(wanted):
        if name not in found:
            yield name, "V5.missing"
        elif layout.format == "chat":
            yield from _turns(found[name])
        elif not isinstance(found[name], str):
            yield name, "V5.type"
    if not mapped:
        yield from ((_shown(name), "V5.unknown") for name in found if name not in wanted)


def _turns(messages: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(messages, list):
        yield "messages", "V5.type"
        return
    for index, turn in enumerate(messages):
        at = f"messages[{index}]"
        if not isinstance(turn, dict):
            yield at, "V5.type"
            continue
        for name in ("role", "content"):
            if name not in turn:
                yield f"{at}.{name}", "V5.missing"
            elif not isinstance(turn[name], str):
                yield f"{at}.{name}", "V5.type"
        yield from ((f"{at}.{_shown(name)}", "V5.unknown") for name in turn if name not in ("role", "content"))


def _shown(name: str) -> str:
    """A field's name as a finding may hold it: one the owner made up could be content, so only plain short ones are repeated."""
    return name if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) else "?"


# --- what a row may hold ----------------------------------------------------------------------------------------------------------------


def _breaches(row: Row, layout: Layout) -> list[tuple[str, str]]:
    """What of V5's lengths, V6, V7 and V8 a row breaks: (field, rule)."""
    if layout.format == "chat":
        return list(_chat(row.messages))
    if layout.format == "preference":
        problems = [(name, "V8.empty") for name in _FIELDS["preference"] if not getattr(row, name).strip()]
        return problems or ([("rejected", "V8.same")] if row.chosen == row.rejected else [])
    problems = []
    if not row.text.strip():
        problems.append((layout.texts[0], "V7.empty"))
    if not row.label.strip():
        problems.append((layout.label, "V7.empty"))
    elif len(row.label) > MAX_LABEL_BYTES or len(row.label.encode()) > MAX_LABEL_BYTES:
        problems.append((layout.label, "V5.length"))
    return problems


def _chat(turns: tuple[Turn, ...]) -> Iterator[tuple[str, str]]:
    if not turns:
        yield "messages", "V6.empty"
        return
    if len(turns) > MAX_TURNS:
        yield "messages", "V5.length"
    for index, turn in enumerate(turns):
        if turn.role not in ROLES:
            yield f"messages[{index}].role", "V6.role"
        elif turn.role == "system" and index:
            yield f"messages[{index}].role", "V6.system_first"
        elif turn.role == "assistant" and not turn.content.strip():
            yield f"messages[{index}].content", "V6.empty"
    if turns[-1].role != "assistant":
        yield f"messages[{len(turns) - 1}].role", "V6.last_turn"


# --- CSV --------------------------------------------------------------------------------------------------------------------------------


def _csv_rows(chunks: Iterable[bytes], layout: Layout) -> Iterator[Row | RowError]:
    records = csv_records(chunks, layout.delimiter)
    for first in records:
        if isinstance(first, RowError):
            yield first
            if first.severity == "error":
                return  # without its header no line can be read
            continue
        names = first.fields if layout.header else [str(place + 1) for place in range(len(first.fields))]
        missing = [(name, "V5.missing") for name in dict.fromkeys((*layout.texts, layout.label)) if name not in names]
        twice = [(name, "V5.repeated") for name in dict.fromkeys((*layout.texts, layout.label)) if names.count(name) > 1]
        for name, rule in missing + twice:
            yield RowError(first.line, first.offset, _shown(name), rule)
        if not missing + twice:
            rest: Iterable[CsvRecord | RowError] = records if layout.header else chain((first,), records)
            yield from _csv_body(rest, layout, names)
        return


def _csv_body(records: Iterable[CsvRecord | RowError], layout: Layout, names: list[str]) -> Iterator[Row | RowError]:
    texts = [names.index(name) for name in layout.texts]
    label = names.index(layout.label)
    for record in records:
        if isinstance(record, RowError):
            yield record
            continue
        line, offset, end, fields = record
        if len(fields) != len(names):
            yield RowError(line, offset, "", "V5.columns")
            continue
        text = "\n".join([fields[place] for place in texts])
        row = Row(line, offset, end, text=text, label=fields[label])
        problems = _breaches(row, layout)
        if not problems:
            yield row
        for field, rule in problems:
            yield RowError(line, offset, field, rule)
