"""V1-V3 as bytes arrive: the same verdict at the same place, however they are cut and wherever the state was stored between."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.finetune.records import MAX_LINE_BYTES
from services.finetune.uploads import SIGNATURES, Breach, Scan

ROW = b'{"text":"Rain in Oslo","label":"weather"}\n'


def verdict(pieces: list[bytes], max_rows: int = 0) -> Breach | None:
    scan = Scan()
    for piece in pieces:
        if found := scan.feed(piece, max_rows):
            return found
        scan = msgspec.json.decode(msgspec.json.encode(scan), type=Scan)
    return scan.finish(max_rows)


@pytest.mark.parametrize(
    "data", [ROW, ROW * 100, b"", b"\n", ROW.replace(b"\n", b"\r\n") * 50, "日本語\r\n".encode() * 300, ROW[:-1], ROW[:-1] + b"\r"]
)
def test_plain_text_passes(data: bytes) -> None:
    assert verdict([data]) is None


@pytest.mark.parametrize(("at", "signature"), SIGNATURES)
def test_V1_A13_no_archive_and_no_compression(at: int, signature: bytes) -> None:
    assert verdict([b"x" * at + signature]) == Breach("V1.format", 1, 0)
    assert verdict([b"x" * at + signature + b"y" * 1_000]) == Breach("V1.format", 1, 0)


@pytest.mark.parametrize(
    ("data", "rule", "line", "at"),
    [
        (b"\xef\xbb\xbf" + ROW, "V2.bom", 1, 0),
        (ROW + b"a\0", "V2.nul", 2, len(ROW) + 1),
        (ROW * 20 + b"a\0b\n" + ROW, "V2.nul", 21, 20 * len(ROW) + 1),
        (ROW * 20 + b"ab\xff\n", "V2.utf8", 21, 20 * len(ROW) + 2),
        (ROW * 20 + b"ab\xe4\xb8\n", "V2.utf8", 21, 20 * len(ROW) + 2),
        (ROW * 20 + b"ab\xe4\xb8", "V2.utf8", 21, 20 * len(ROW) + 2),
        (ROW * 20 + b"ab\xed\xa0\x80\n", "V2.utf8", 21, 20 * len(ROW) + 2),
        (ROW * 20 + b"ab\rcd\n", "V2.carriage_return", 21, 20 * len(ROW) + 2),
        (ROW * 20 + b"ab\r\r\n", "V2.carriage_return", 21, 20 * len(ROW) + 2),
        (ROW + b"a" * (MAX_LINE_BYTES + 1) + b"\n" + ROW, "V3.line_bytes", 2, len(ROW)),
        (ROW + b"a" * (MAX_LINE_BYTES + 1), "V3.line_bytes", 2, len(ROW)),
    ],
)
def test_A14_what_cannot_be_read_is_named_by_line_and_byte(data: bytes, rule: str, line: int, at: int) -> None:
    expected = Breach(rule, line, at)
    assert verdict([data]) == expected
    assert verdict([data[i : i + 1] for i in range(min(len(data), 5_000))] + [data[5_000:]]) == expected
    assert verdict([data[i : i + 65_521] for i in range(0, len(data), 65_521)]) == expected


def test_V3_the_longest_line_passes() -> None:
    assert verdict([ROW + b"a" * MAX_LINE_BYTES + b"\n" + b"b" * MAX_LINE_BYTES]) is None


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_V3_rows_are_bounded(ending: bytes) -> None:
    data = (ROW * 20).removesuffix(b"\n")
    assert verdict([data + ending], 20) is None
    assert verdict([data + ending], 19) == Breach("V3.rows", 20, 19 * len(ROW))
    assert verdict([ROW] * 20, 19) == Breach("V3.rows", 20, 19 * len(ROW))


PIECES = st.lists(
    st.sampled_from(
        [b"a", b"\n", b"\r", b"\r\n", b"\0", "é".encode(), "日".encode(), "😀".encode(), b"\xe6", b"\x97", b"\xf0\x9f", b"\xff", b"a" * 300]
    ),
    max_size=30,
)


@given(st.binary(max_size=20) | PIECES.map(b"".join), st.booleans(), st.lists(st.integers(1, 60), max_size=60), st.sampled_from([0, 3, 24]))
@settings(deadline=None)
def test_the_verdict_does_not_depend_on_the_cuts(tail: bytes, after_rows: bool, cuts: list[int], max_rows: int) -> None:
    data = (ROW * 20 if after_rows else b"") + tail
    pieces, at = [], 0
    for size in cuts:
        pieces.append(data[at : at + size])
        at += size
    whole = verdict([data], max_rows)
    assert verdict([*pieces, data[at:]], max_rows) == whole
    assert verdict([data[i : i + 1] for i in range(len(data))], max_rows) == whole
    if whole is None:
        data.decode()
        assert b"\0" not in data
        assert b"\r" not in data.replace(b"\r\n", b"").removesuffix(b"\r")


def test_the_state_stays_small() -> None:
    scan = Scan()
    for _ in range(64):
        assert scan.feed("日本語のテキスト\n".encode() * 20_000) is None
    assert len(msgspec.json.encode(scan)) < 200
    assert scan.lines == 64 * 20_000
