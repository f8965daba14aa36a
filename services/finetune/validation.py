"""One version's bytes, put together and judged, in a process of its own: `python -m services.finetune.validation`.

It is told a `Task` on standard input, and writes a `Progress` a second and last an `Outcome` to standard output, a line of JSON each. It
has no database: whoever started it may kill it at any point and start it again.
"""

import heapq
import resource
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from services.chassis.objects import ObjectsUnavailable, SyncObjects, open_objects_sync
from services.finetune.derivation import Derived, derive, redact
from services.finetune.rows import Layout, Row, RowError, read_rows
from services.finetune.statistics import Counting, Statistics, Summary

KEPT_FINDINGS = 1_000
KEPT_RULES = 256  # kinds of findings; there are fewer
AGAIN = 75  # exit code: the store does not answer; nothing is wrong with the rows
PROGRESS_SECONDS = 1.0
SKIPPED_LINES = 1_000


class Task(msgspec.Struct, frozen=True):
    """What to validate; all paths are objects."""

    store_url: str
    data: str  # the version's bytes
    sha256: str
    total_bytes: int
    layout: Layout
    parts: tuple[str, ...] = ()  # of the upload, to be put together as `data` first; none: `data` is there
    source: str = ""  # another version's bytes, which `data` is made of by redaction
    kinds: tuple[str, ...] = ()  # what is redacted
    digests: str = ""  # where the rows' digests go; empty: nowhere
    derived: str = ""  # where the rows without error go, if some have one; empty: nowhere
    max_rows: int = 0  # 0: any number
    row_tokens: int = 0  # V9 warns of longer rows; 0: never
    bases: tuple[tuple[str, str], ...] = ()  # base model and the directory of its tokenizer
    memory_bytes: int = 0  # bound on the process's data; 0: none


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """So many bytes are judged."""

    validated_bytes: int


class Rule(msgspec.Struct):
    """Findings of one rule."""

    rule: str
    severity: str
    count: int
    first_line: int


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    """The verdict."""

    sha256: str
    total_bytes: int
    rows: int  # read, bad ones included
    valid_rows: int
    errors: int
    warnings: int
    rules: list[Rule]
    findings: list[RowError]  # in the order of their lines; errors before warnings where not all are kept
    summary: Summary
    derived: Derived | None = None


class Findings:
    """Counts every finding and keeps a thousand: errors first, then the earliest."""

    def __init__(self) -> None:
        self.rules: dict[str, Rule] = {}
        self._kept: dict[str, list[tuple[int, int, int, RowError]]] = {"error": [], "warning": []}  # heaps, the latest line on top
        self._count = 0

    def add(self, found: RowError) -> None:
        """Take one."""
        self._count += 1
        rule = self.rules.get(found.rule)
        if rule is None:
            rule = self.rules[found.rule] = Rule(found.rule, found.severity, 0, found.line)
        rule.count += 1
        rule.first_line = min(rule.first_line, found.line)
        kept = self._kept[found.severity]
        entry = (-found.line, -found.byte_offset, -self._count, found)
        if len(kept) < KEPT_FINDINGS:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)

    def total(self, severity: str) -> int:
        """How many of a severity."""
        return sum(rule.count for rule in self.rules.values() if rule.severity == severity)

    def kept(self) -> list[RowError]:
        """The thousand, by line."""
        chosen = [entry for severity in ("error", "warning") for entry in sorted(self._kept[severity], reverse=True)][:KEPT_FINDINGS]
        return [found for *_, found in sorted(chosen, reverse=True)]


def validate(store: SyncObjects, task: Task, tell: Callable[[int], None], counting: Sequence[Counting] = ()) -> Outcome:
    """Judge one version.

    Args:
        store: holds what the task names.
        task: what to do.
        tell: called with the bytes judged so far, about once a second; may raise to end the work.
        counting: tokenizers of bases.

    Raises:
        ObjectMissing, ObjectsUnavailable: the store lacks what the task names, or does not answer.
    """
    pace = _Pace(tell)
    sha256, total = task.sha256, task.total_bytes
    if task.parts:
        _assemble(store, task, pace)
    elif task.source:
        sha256, total = redact(store, task.source, task.data, task.layout, task.kinds, pace.idle)
    findings = Findings()
    statistics = Statistics(task.layout, findings.add, counting, task.row_tokens)
    spans = array("Q")  # [start, end) of rows without error, neighbours joined
    bad, last_bad = array("Q"), 0
    bad_rows = 0
    for found in read_rows(store.stream(task.data), task.layout):
        pace(found.byte_offset)
        if isinstance(found, RowError):
            findings.add(found)
            if found.severity == "error" and found.line != last_bad:
                last_bad = found.line
                bad_rows += 1
                if len(bad) < SKIPPED_LINES:
                    bad.append(found.line)
            continue
        if task.max_rows and statistics.rows >= task.max_rows:
            findings.add(RowError(found.line, found.byte_offset, "", "V3.rows"))
            break
        statistics.add(found)
        if task.derived:
            _extend(spans, found)
    valid = statistics.rows
    if not valid:
        findings.add(RowError(0, 0, "", "V5.no_rows"))
    summary = statistics.finish()
    if task.digests and valid:
        with store.writing(task.digests) as writer:
            writer.write(statistics.inputs.tobytes())
        with store.writing(f"{task.digests}-near") as writer:
            writer.write(statistics.minima().tobytes())
    derived = None
    if task.derived and bad_rows and valid and not any(rule.startswith(("V3.", "V7.labels")) for rule in findings.rules):
        derived = derive(store, task.data, task.derived, task.layout, spans, list(bad), bad_rows)
    tell(total)
    return Outcome(
        sha256, total, valid + bad_rows, valid, findings.total("error"), findings.total("warning"),
        sorted(findings.rules.values(), key=lambda rule: rule.rule)[:KEPT_RULES], findings.kept(), summary, derived,
    )  # fmt: skip


class _Pace:
    """Tells progress about once a second."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._calls, self._next = tell, 0, time.monotonic() + PROGRESS_SECONDS

    def __call__(self, done: int) -> None:
        self._calls += 1
        if self._calls % 256 == 0 and (now := time.monotonic()) >= self._next:
            self._next = now + PROGRESS_SECONDS
            self._tell(done)

    def idle(self) -> None:
        """Still at work, though nothing more is judged."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + PROGRESS_SECONDS
            self._tell(0)


def _extend(spans: "array[int]", row: Row) -> None:
    if spans and spans[-1] == row.byte_offset:
        spans[-1] = row.end_offset
    else:
        spans.extend((row.byte_offset, row.end_offset))


def _assemble(store: SyncObjects, task: Task, pace: _Pace) -> None:
    if store.size(task.data) == task.total_bytes:
        return  # an earlier attempt did: objects appear whole
    with store.writing(task.data) as writer:
        for part in task.parts:
            for piece in store.stream(part):
                writer.write(piece)
                pace.idle()


def main() -> None:
    """Validate what standard input asks for."""
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    if task.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes, task.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold rows
    out = sys.stdout.buffer

    def tell(done: int) -> None:
        out.write(msgspec.json.encode(Progress(done)) + b"\n")
        out.flush()

    counting: Sequence[Counting] = ()
    if task.bases:
        from services.finetune.token_counts import counters

        counting = counters([(name, Path(directory)) for name, directory in task.bases])
    try:
        outcome = validate(open_objects_sync(task.store_url), task, tell, counting)
    except ObjectsUnavailable:
        sys.exit(AGAIN)
    out.write(msgspec.json.encode(outcome) + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
