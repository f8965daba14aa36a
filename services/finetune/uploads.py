"""What of an upload can be judged while its bytes arrive: V1, V2 and V3, in a state small enough to be kept with the offset (pure)."""

from collections.abc import Iterator

import msgspec

from services.finetune.records import BOM, MAX_LINE_BYTES

FLUSH_BYTES = 8 << 20  # stored and acknowledged at once
HEAD_BYTES = 512  # enough to tell every signature below

# What a file of another kind begins with; offset 257 is tar's.
SIGNATURES: tuple[tuple[int, bytes], ...] = (
    (0, b"\x1f\x8b"), (0, b"PK\x03\x04"), (0, b"PK\x05\x06"), (0, b"BZh"), (0, b"\xfd7zXZ\x00"), (0, b"\x28\xb5\x2f\xfd"),
    (0, b"\x04\x22\x4d\x18"), (0, b"7z\xbc\xaf\x27\x1c"), (0, b"Rar!\x1a\x07"), (0, b"PAR1"), (0, b"ARROW1"), (0, b"\x93NUMPY"),
    (0, b"SQLite format 3\x00"), (0, b"%PDF-"), (0, b"\xff\xfe"), (0, b"\xfe\xff"), (0, b"\x80\x04\x95"), (0, b"\xd0\xcf\x11\xe0"),
    (0, b"Obj\x01"), (0, b"ORC"), (0, b"\x89HDF"), (257, b"ustar"),
)  # fmt: skip


class Breach(msgspec.Struct, frozen=True):
    """Why an upload is refused: the rule, and the physical line and byte where it is broken."""

    rule: str
    line: int
    byte_offset: int


class Scan(msgspec.Struct):
    """How far the bytes of one upload have been judged; it can be stored between any two pieces.

    `feed` takes pieces in order and of any size: the verdict, and its place, do not depend on where they are cut.
    """

    offset: int = 0  # bytes judged
    lines: int = 0  # line feeds among them
    line_start: int = 0  # offset of the line that is open
    pending: str = ""  # hex: bytes of a character that has not ended, at most 3, part of `offset`
    carriage: bool = False  # the last byte was a carriage return
    held: str = ""  # hex: the first bytes, unjudged until every signature can be told

    def feed(self, data: bytes, max_rows: int = 0) -> Breach | None:
        """Judge the next bytes. A breach ends the upload; `max_rows` 0: any number."""
        if self.offset:
            return self._judge(data, max_rows)
        data = bytes.fromhex(self.held) + data
        if len(data) < HEAD_BYTES:
            self.held = data.hex()
            return None
        return self._judge_first(data, max_rows)

    def finish(self, max_rows: int = 0) -> Breach | None:
        """Judge that these were all bytes."""
        if not self.offset and (found := self._judge_first(bytes.fromhex(self.held), max_rows)):
            return found
        return Breach("V2.utf8", self.lines + 1, self.offset - len(self.pending) // 2) if self.pending else None

    def _judge_first(self, data: bytes, max_rows: int) -> Breach | None:
        if data.startswith(BOM):
            return Breach("V2.bom", 1, 0)
        if any(data[at : at + len(signature)] == signature for at, signature in SIGNATURES):
            return Breach("V1.format", 1, 0)
        self.held = ""
        return self._judge(data, max_rows)

    def _judge(self, data: bytes, max_rows: int) -> Breach | None:
        feeds = data.count(b"\n")
        found = [*self._encoding(data), *self._lines(data, feeds, max_rows)]
        if found:
            # What is seen first counts, byte by byte: a later piece cannot have brought it.
            return min(found, key=lambda seen: (seen[0], seen[1].byte_offset))[1]
        self.offset += len(data)
        self.carriage = data.endswith(b"\r") if data else self.carriage
        if feeds:
            self.line_start = self.offset - len(data) + data.rfind(b"\n") + 1
            self.lines += feeds
        return None

    def _encoding(self, data: bytes) -> Iterator[tuple[int, Breach]]:
        """Each with the place in `data` where it shows."""
        before = bytes.fromhex(self.pending)
        if (at := data.find(b"\0")) >= 0:
            yield at, self._at("V2.nul", data, at)
        joined = before + data if before else data
        self.pending = ""
        if joined.isascii():
            return  # ten times as fast as decoding
        try:
            joined.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                self.pending = joined[error.start :].hex()
                return
            shows = error.start if error.reason == "invalid start byte" else error.end
            yield shows - len(before), self._at("V2.utf8", data, error.start - len(before))

    def _lines(self, data: bytes, feeds: int, max_rows: int) -> Iterator[tuple[int, Breach]]:
        if self.carriage and data and data[:1] != b"\n":
            yield 0, self._at("V2.carriage_return", data, -1)
        if b"\r" in data and data.count(b"\r") - data.endswith(b"\r") != data.count(b"\r\n"):
            at = next(at for at in _places(data, b"\r") if data[at + 1 : at + 2] not in (b"\n", b""))
            yield at + 1, self._at("V2.carriage_return", data, at)
        start = self.line_start - self.offset  # of the open line, counted from this piece
        while len(data) - start > MAX_LINE_BYTES:
            feed = data.rfind(b"\n", max(0, start), max(0, start + MAX_LINE_BYTES + 1))
            if feed < 0:
                yield start + MAX_LINE_BYTES, self._at("V3.line_bytes", data, start)
                break
            start = feed + 1
        if max_rows and data and self.lines + feeds + (not data.endswith(b"\n")) > max_rows:
            last = next((at for count, at in enumerate(_places(data, b"\n"), self.lines + 1) if count == max_rows), -1)
            yield last + 1, Breach("V3.rows", max_rows + 1, self.offset + last + 1)

    def _at(self, rule: str, data: bytes, at: int) -> Breach:
        """A breach at a place counted from this piece; it may lie before it."""
        return Breach(rule, self.lines + 1 + data.count(b"\n", 0, max(0, at)), self.offset + at)


def _places(data: bytes, byte: bytes) -> Iterator[int]:
    at = data.find(byte)
    while at >= 0:
        yield at
        at = data.find(byte, at + 1)
