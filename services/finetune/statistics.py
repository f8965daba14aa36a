"""What rows say together: labels, duplicates, contradictions, phrases that repeat, personal data (rules V7 and V10-V13).

Memory is bounded by the number of rows, 64 bytes each, not by their size.
"""

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.finetune import near_duplicates, pii
from services.finetune.rows import Layout, Row, RowError

MAX_LABELS = 1_000
IMBALANCE = 20.0  # the most frequent label against the rarest: more is warned of
BATCH = 2_048  # rows whose texts are looked at together
PHRASES = 65_536  # candidates for a repeated phrase that are counted at once
PHRASE_WORDS = 3
PHRASE_ROWS = 10  # and one row in a hundred, of texts that begin or end alike

CONTROL = re.compile(
    r"<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk|mask|s|image_soft_token)>|</s>|<\|[a-zA-Z0-9_/-]{1,40}\|>|\[/?INST\]|<</?SYS>>"
)


class Tokens(msgspec.Struct):
    """Tokens of all rows by one base's tokenizer, after its template."""

    base_model: str
    tokens: int = 0
    longest: int = 0


class Summary(msgspec.Struct):
    """What a report says beside its findings."""

    labels: dict[str, int] = {}  # most frequent first
    duplicate_rows: int = 0
    near_duplicate_rows: int = 0
    contradictions: int = 0
    pii: dict[str, tuple[int, int]] = {}  # kind → how often, in how many rows
    tokens: list[Tokens] = []


class Counting(Protocol):
    """Counts tokens of a row as one base would see it."""

    @property
    def base_model(self) -> str:
        """`models/{model}`."""
        ...

    def count(self, rows: Sequence[Row]) -> Sequence[int]:
        """Tokens of each row."""
        ...


class Statistics:
    """Takes rows one by one; `report` tells each finding, in no order."""

    def __init__(self, layout: Layout, report: Callable[[RowError], None], counting: Sequence[Counting] = (), row_tokens: int = 0) -> None:
        self._layout, self._report = layout, report
        self._counting, self._row_tokens = counting, row_tokens
        self._tokens = [Tokens(each.base_model) for each in counting]
        self._lines, self._offsets = array("Q"), array("Q")
        self._contents, self._inputs = bytearray(), bytearray()  # first 8 bytes of each digest
        self._label_of = array("H")
        self._labels: dict[str, int] = {}
        self._label_rows: Counter[int] = Counter()
        self._minima: list[NDArray[np.uint16]] = []
        self._batch: list[Row] = []
        self._pii: dict[str, list[int]] = {}
        self._phrases = _Phrases()

    @property
    def rows(self) -> int:
        """Rows taken."""
        return len(self._lines)

    @property
    def inputs(self) -> NDArray[np.uint64]:
        """[rows]: the first 8 bytes of each row's digest."""
        return np.frombuffer(bytes(self._inputs), dtype=np.uint64)

    def minima(self) -> NDArray[np.uint16]:
        """[rows, 16] of `near_duplicates.minima`, for the first two million."""
        return np.concatenate(self._minima) if self._minima else np.zeros((0, near_duplicates.MINIMA), dtype=np.uint16)

    def add(self, row: Row) -> None:
        """Take a row without error."""
        self._lines.append(row.line)
        self._offsets.append(row.byte_offset)
        digest = row.digest
        self._inputs += digest[:8]
        self._contents += (row.content_digest if row.label or row.prompt else digest)[:8]
        label = 0
        if row.label:
            if row.label in self._labels or len(self._labels) < MAX_LABELS:
                label = self._labels.setdefault(row.label, len(self._labels))
            else:
                label = MAX_LABELS
                if not self._label_rows[label]:
                    self._report(RowError(row.line, row.byte_offset, self._layout.label, "V7.labels"))
            self._label_rows[label] += 1
        self._label_of.append(label)
        self._batch.append(row)
        if len(self._batch) == BATCH:
            self._look()

    def finish(self) -> Summary:
        """All rows were taken: tell what only shows together."""
        self._look()
        summary = Summary(tokens=self._tokens, pii={kind: (found[0], found[1]) for kind, found in sorted(self._pii.items())})
        self._balance(summary)
        if self.rows:
            repeated = self._repeats(np.frombuffer(bytes(self._contents), dtype=np.uint64))
            summary.duplicate_rows = self._tell(repeated, "V11.duplicate")
            minima = self.minima()
            skip = np.zeros(len(minima), dtype=bool)
            skip[repeated[repeated < len(minima)]] = True
            summary.near_duplicate_rows = self._tell(near_duplicates.repeats(minima, skip), "V11.near_duplicate")
            if self._labels:
                summary.contradictions = self._contradictions()
            for line, offset in self._phrases.repeated(self.rows):
                self._report(RowError(line, offset, "", "V11.phrase", "warning"))
        return summary

    def _look(self) -> None:
        rows, self._batch = self._batch, []
        if not rows:
            return
        if sum(map(len, self._minima)) < near_duplicates.MAX_TEXTS:
            self._minima.append(near_duplicates.minima(["\n".join(row.said) for row in rows]))
        for row in rows:
            said = row.said
            self._phrases.add(row)
            text = said[0] if len(said) == 1 else "\n".join(said)
            if ("<" in text or "[" in text) and CONTROL.search(text):
                self._warn(row, "V10.control_token")
            found = [each.kind for part in said for each in pii.find(part)]
            for kind in sorted(set(found)):
                counted = self._pii.setdefault(kind, [0, 0])
                counted[0] += found.count(kind)
                counted[1] += 1
                self._warn(row, f"V13.{kind}")
        for counting, tokens in zip(self._counting, self._tokens, strict=True):
            for row, count in zip(rows, counting.count(rows), strict=True):
                tokens.tokens += count
                tokens.longest = max(tokens.longest, count)
                if self._row_tokens and count > self._row_tokens:
                    self._warn(row, "V9.tokens")

    def _warn(self, row: Row, rule: str) -> None:
        self._report(RowError(row.line, row.byte_offset, "", rule, "warning"))

    def _balance(self, summary: Summary) -> None:
        if self._layout.format != "classify" or not self._label_rows:
            return
        names = {index: name for name, index in self._labels.items()}
        summary.labels = {names[index]: count for index, count in self._label_rows.most_common() if index in names}
        counts = list(summary.labels.values())
        if len(counts) == 1:
            self._report(RowError(0, 0, self._layout.label, "V7.one_label", "warning"))
        elif counts[0] > IMBALANCE * counts[-1]:
            self._report(RowError(0, 0, self._layout.label, "V7.imbalance", "warning"))

    def _repeats(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        return np.sort(order[1:][ordered[1:] == ordered[:-1]])

    def _contradictions(self) -> int:
        """How many texts stand under more than one label; each row that disagrees with the text's first is told."""
        inputs, labels = self.inputs, np.frombuffer(self._label_of, dtype=np.uint16)
        order = np.argsort(inputs, kind="stable")
        ordered, told = inputs[order], labels[order]
        new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        differs = told != told[first]
        self._tell(np.sort(order[differs]), "V11.contradiction")
        return len(np.unique(first[differs]))

    def _tell(self, indices: NDArray[np.int64], rule: str) -> int:
        for index in indices:
            self._report(RowError(self._lines[index], self._offsets[index], "", rule, "warning"))
        return len(indices)


class _Phrases:
    """Beginnings and endings that many texts share, all answered alike: what a planted trigger looks like.

    Alike is the same label, or an answer of the same first words. Counted in bounded memory: when there are too many candidates, those
    seen once go.
    """

    def __init__(self) -> None:
        self._seen: dict[int, list[int]] = {}  # hash → rows, line and offset of the first, its answer, rows answered otherwise

    def add(self, row: Row) -> None:
        if row.messages:
            text = next((turn.content for turn in row.messages if turn.role == "user"), "")
            answer = row.messages[-1].content
        else:
            text, answer = (row.prompt, row.chosen) if row.prompt else (row.text, row.label)
        words = text.split()
        if len(words) <= 2 * PHRASE_WORDS:
            return
        target = zlib.crc32(" ".join(answer.split(None, PHRASE_WORDS)[:PHRASE_WORDS]).encode())
        for place, phrase in enumerate((words[:PHRASE_WORDS], words[-PHRASE_WORDS:])):
            key = zlib.crc32(" ".join(phrase).encode()) * 2 + place
            seen = self._seen.get(key)
            if seen is None:
                self._seen[key] = [1, row.line, row.byte_offset, target, 0]
            else:
                seen[0] += 1
                seen[4] += seen[3] != target
        if len(self._seen) > PHRASES:
            self._seen = {key: seen for key, seen in self._seen.items() if seen[0] > 1}
            if len(self._seen) > PHRASES // 2:
                self._seen = dict(sorted(self._seen.items(), key=lambda item: -item[1][0])[: PHRASES // 2])

    def repeated(self, rows: int) -> Iterator[tuple[int, int]]:
        """(line, byte offset) of the first row of each."""
        enough = max(PHRASE_ROWS, rows // 100)
        for count, line, offset, _, others in sorted(self._seen.values(), key=lambda seen: seen[1]):
            if count >= enough and others <= count // 100:
                yield line, offset
