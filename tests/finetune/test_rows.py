"""T1: what each rule refuses, at which line, byte and field; and rows that are the same however the bytes come."""

import json
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.finetune import rows
from services.finetune.records import MAX_LINE_BYTES, RowError
from services.finetune.rows import Layout, Row, Turn, read_rows

CLASSIFY, CHAT, PREFERENCE = Layout("classify"), Layout("chat"), Layout("preference")
CSV = Layout("classify", "csv")
GOOD = b'{"text":"Rain in Oslo","label":"weather"}\n'


def found(data: bytes, layout: Layout = CLASSIFY) -> list[Row | RowError]:
    return list(read_rows([data], layout))


def errors(data: bytes, layout: Layout = CLASSIFY) -> list[tuple[int, int, str, str, str]]:
    return [(e.line, e.byte_offset, e.field, e.rule, e.severity) for e in found(data, layout) if isinstance(e, RowError)]


def only(data: bytes, layout: Layout = CLASSIFY) -> tuple[str, str]:
    """(field, rule) of the one finding, which is at line 2, in the record that starts behind GOOD."""
    good = {"classify": GOOD, "chat": chat("user", "assistant"), "preference": b'{"prompt":"p","chosen":"c","rejected":"r"}\n'}[
        layout.format
    ]
    rows_found = found(good + data, layout)
    assert isinstance(rows_found[0], Row)
    (error,) = rows_found[1:]
    assert isinstance(error, RowError)
    assert (error.line, error.severity) == (2, "error")
    assert error.byte_offset == len(good), error
    return error.field, error.rule


def chat(*roles: str, content: str = "hello") -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]}).encode() + b"\n"


# --- V2: bytes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "rule", "at"),
    [
        (b'{"text":"\xff","label":"a"}', "V2.utf8", 9),
        (b'{"text":"\xc0\x80","label":"a"}', "V2.utf8", 9),  # an overlong NUL
        (b'{"text":"\xed\xa0\x80","label":"a"}', "V2.utf8", 9),  # an encoded surrogate
        (b'{"text":"\xf5\x80\x80\x80","label":"a"}', "V2.utf8", 9),
        ('{"text":"é'.encode() + b'\xe4\xb8","label":"a"}', "V2.utf8", 11),  # cut in a character
        (b'{"text":"a\x00","label":"a"}', "V2.nul", 10),
        (b'{"text":"a",\r"label":"a"}', "V2.carriage_return", 12),
    ],
)
def test_V2_a_bad_byte_is_named_by_its_offset(bad: bytes, rule: str, at: int) -> None:
    assert errors(GOOD + bad + b"\n" + GOOD) == [(2, len(GOOD) + at, "", rule, "error")]
    assert len(found(GOOD + bad + b"\n" + GOOD)) == 3


def test_V2_a_byte_order_mark_is_refused_at_offset_0() -> None:
    assert errors(b"\xef\xbb\xbf" + GOOD + GOOD) == [(1, 0, "", "V2.bom", "error")]
    assert errors(b"\xef\xbb\xbftext,label\na,b\n", CSV) == [(1, 0, "", "V2.bom", "error")]


def test_V2_an_escaped_NUL_is_one_too() -> None:
    assert only(b'{"text":"a\\u0000b","label":"a"}') == ("text", "V2.nul")


def test_V2_lines_may_end_in_CRLF() -> None:
    first, second = found(GOOD.replace(b"\n", b"\r\n") * 2)
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (second.line, second.byte_offset, second.label) == (2, len(GOOD) + 1, "weather")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
def test_only_line_feeds_end_lines(character: str) -> None:
    raw = character if ord(character) > 0x1F else f"\\u{ord(character):04x}"  # JSON wants control characters escaped
    data = f'{{"text":"a{raw}b","label":"x"}}\n'.encode()
    assert [row.line for row in found(data * 2) if isinstance(row, Row)] == [1, 2]
    csv = f"text,label\na{character}b,x\nlast,y\n".encode()
    assert [(row.line, row.text) for row in found(csv, CSV) if isinstance(row, Row)] == [(2, f"a{character}b"), (3, "last")]


# --- V3: sizes --------------------------------------------------------------------------------------------------------------------------


def test_V3_a_long_line_ends_the_reading() -> None:
    room = MAX_LINE_BYTES - len(b'{"text":"","label":"x"}')
    fits, over = (b'{"text":"' + b"a" * size + b'","label":"x"}\n' for size in (room, room + 1))
    assert len(fits) == MAX_LINE_BYTES + 1
    assert errors(GOOD + fits + over + GOOD) == [(3, len(GOOD + fits), "", "V3.line_bytes", "error")]
    assert len(found(GOOD + fits + over + GOOD)) == 3


def test_V3_a_line_without_end_is_not_gathered() -> None:
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield b"a" * 65_536

    assert [e.rule for e in read_rows(endless(), CLASSIFY) if isinstance(e, RowError)] == ["V3.line_bytes"]
    assert asked <= MAX_LINE_BYTES // 65_536 + 2


def test_V3_a_csv_record_without_end_is_not_gathered() -> None:
    data = b'text,label\na,b\n"never ends\n' + b"x\n" * MAX_LINE_BYTES
    assert errors(data, CSV) == [(3, 15, "", "V3.record_bytes", "error")]


# --- V4: JSON ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "field", "rule"),
    [
        (b'["a"]', "", "V4.object"),
        (b'"a"', "", "V4.object"),
        (b"1", "", "V4.object"),
        (b"null", "", "V4.object"),
        (b'{"text":"a","text":"b","label":"c"}', "", "V4.duplicate_key"),
        (b'{"text":"a","te\\u0078t":"b","label":"c"}', "", "V4.duplicate_key"),
        (b'{"text" :"a","text":"b","label" :"c"}', "", "V4.duplicate_key"),
        (b'{"text":"a\\":","label":"b","text" :"c"}', "", "V4.duplicate_key"),
        (b'{"text":"a","label":"b","more":{"x":1,"x":2}}', "", "V4.duplicate_key"),
        (b'{"text":"a","label":NaN}', "", "V4.number"),
        (b'{"text":"a","label":-Infinity}', "", "V4.number"),
        (b'{"text":"a","label":1e309}', "", "V4.number"),
        (b'{"text":"a","label":18446744073709551616}', "", "V4.integer"),
        (b'{"text":"a","label":-9223372036854775809}', "", "V4.integer"),
        (b'{"text":"a","label":' + b"9" * 5_000 + b"}", "", "V4.integer"),
        (b'{"text":"\\ud800","label":"a"}', "text", "V4.surrogate"),
        (b'{"text":"a","label":"\\udc00\\ud800"}', "label", "V4.surrogate"),
        (b"[" * 9 + b"]" * 9, "", "V4.object"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "", "V4.depth"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "", "V4.depth"),
        (b'{"a":' * 40_000, "", "V4.depth"),
    ],
)
def test_V4_one_strict_object_a_line(bad: bytes, field: str, rule: str) -> None:
    assert only(bad) == (field, rule)


@pytest.mark.parametrize(
    ("bad", "at"),
    [
        (b"text", 0),
        (b"{'text':'a'}", 1),
        (b'{"text":"a","label":"b"', 23),
        (b'{"text":"a","label":"b",}', 24),
        ('{"text":"日本","label":"b"} x'.encode(), 30),
        (b'{"text":"tab\there","label":"b"}', 12),
        (b'{"text":01,"label":"b"}', 9),
    ],
)
def test_V4_broken_JSON_is_named_by_its_offset(bad: bytes, at: int) -> None:
    (error,) = [e for e in found(GOOD + bad + b"\n") if isinstance(e, RowError)]
    assert (error.line, error.rule) == (2, "V4.json")
    assert abs(error.byte_offset - len(GOOD) - at) <= 1  # a parser may name a bracket or what follows it


@pytest.mark.parametrize("number", [b"18446744073709551615", b"-9223372036854775808", b"1e308"])
def test_V4_numbers_of_64_bits_are_well_formed(number: bytes) -> None:
    assert only(b'{"text":"a","label":' + number + b"}") == ("label", "V5.type")


def test_V4_eight_levels_are_well_formed() -> None:
    nested = b'{"text":"a","label":"b","more":' + b'{"a":' * 7 + b"1" + b"}" * 7 + b"}"
    assert only(nested) == ("more", "V5.unknown")


def test_V4_blank_lines_count_and_warn_unless_last() -> None:
    data = b"\n" + GOOD + b"  \t\r\n\n" + GOOD + b"\n"
    assert errors(data) == [
        (1, 0, "", "V4.blank", "warning"),
        (3, 1 + len(GOOD), "", "V4.blank", "warning"),
        (4, 1 + len(GOOD) + 5, "", "V4.blank", "warning"),
    ]
    assert [row.line for row in found(data) if isinstance(row, Row)] == [2, 5]


# --- V5: schema -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "problems"),
    [
        (b"{}", [("text", "V5.missing"), ("label", "V5.missing")]),
        (b'{"text":1,"label":null}', [("text", "V5.type"), ("label", "V5.type")]),
        (b'{"text":"a","label":"b","id":1}', [("id", "V5.unknown")]),
        (b'{"text":"a","label":"b","my secret text":1}', [("?", "V5.unknown")]),
        (b'{"text":"a","label":"' + "é".encode() * 129 + b'"}', [("label", "V5.length")]),
    ],
)
def test_V5_every_field_of_a_row_is_named(bad: bytes, problems: list[tuple[str, str]]) -> None:
    assert [(e.field, e.rule) for e in found(bad) if isinstance(e, RowError)] == problems


@pytest.mark.parametrize(
    ("messages", "field", "rule"),
    [
        ("hello", "messages", "V5.type"),
        (["hello"], "messages[0]", "V5.type"),
        ([{"role": "user"}], "messages[0].content", "V5.missing"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "messages[1].content", "V5.type"),
        ([{"role": "assistant", "content": "a", "weight": 1}], "messages[0].weight", "V5.unknown"),
        ([{"role": "assistant", "content": "a"}] * 1_025, "messages", "V5.length"),
    ],
)
def test_V5_fields_of_a_turn_are_named(messages: object, field: str, rule: str) -> None:
    assert only(json.dumps({"messages": messages}).encode(), CHAT) == (field, rule)


# --- V6, V7, V8 -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "field", "rule"),
    [
        (b'{"messages":[]}', "messages", "V6.empty"),
        (chat("user", "robot", "assistant"), "messages[1].role", "V6.role"),
        (chat("User", "assistant"), "messages[0].role", "V6.role"),
        (chat("user", "system", "assistant"), "messages[1].role", "V6.system_first"),
        (chat("system", "user"), "messages[1].role", "V6.last_turn"),
        (b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":" \\n"}]}', "messages[1].content", "V6.empty"),
    ],
)
def test_V6_a_chat_is_one_to_learn_from(bad: bytes, field: str, rule: str) -> None:
    assert only(bad, CHAT) == (field, rule)


def test_V6_a_whole_chat_is_read() -> None:
    (row,) = found(chat("system", "user", "assistant", "tool", "assistant"), CHAT)
    assert isinstance(row, Row)
    assert row.messages[:2] == (Turn("system", "hello"), Turn("user", "hello"))


@pytest.mark.parametrize(
    ("bad", "field"),
    [(b'{"text":"","label":"a"}', "text"), (b'{"text":" \\u3000","label":"a"}', "text"), (b'{"text":"a","label":" "}', "label")],
)
def test_V7_text_and_label_are_not_empty(bad: bytes, field: str) -> None:
    assert only(bad) == (field, "V7.empty")


@pytest.mark.parametrize(
    ("bad", "field", "rule"),
    [
        (b'{"prompt":"","chosen":"a","rejected":"b"}', "prompt", "V8.empty"),
        (b'{"prompt":"p","chosen":"a","rejected":"a"}', "rejected", "V8.same"),
        (b'{"prompt":"p","chosen":"a"}', "rejected", "V5.missing"),
    ],
)
def test_V8_a_preference_prefers(bad: bytes, field: str, rule: str) -> None:
    assert only(bad, PREFERENCE) == (field, rule)


# --- CSV and columns --------------------------------------------------------------------------------------------------------------------


def test_csv_records_span_lines_and_are_named_by_their_first() -> None:
    data = b'label,text\r\nsport,"He said ""go"",\r\n\r\nand left"\r\n"a"b,c\r\nx\r\nnews,"fine"\r\n'
    one, quoted, short, two = found(data, CSV)
    assert isinstance(one, Row)
    assert isinstance(two, Row)
    assert (one.line, one.byte_offset, one.text, one.label) == (2, 12, 'He said "go",\r\n\r\nand left', "sport")
    assert quoted == RowError(5, 49, "", "V4.csv")
    assert short == RowError(6, 57, "", "V5.columns")
    assert (two.line, two.text) == (7, "fine")
    assert data[one.byte_offset : one.end_offset] == b'sport,"He said ""go"",\r\n\r\nand left"\r\n'


def test_csv_a_bad_byte_within_quotes_is_one_finding() -> None:
    data = b'text,label\n"one\n\xff\nthree",a\nfour,b\n'
    error, row = found(data, CSV)
    assert error == RowError(3, 16, "", "V2.utf8")
    assert isinstance(row, Row)
    assert (row.line, row.text) == (5, "four")


def test_csv_an_open_quote_at_the_end_is_broken() -> None:
    assert errors(b'text,label\na,b\n"c,d\ne,f\n', CSV) == [(3, 15, "", "V4.csv", "error")]


@pytest.mark.parametrize("delimiter", sorted(rows.DELIMITERS))
def test_columns_are_found_by_name_whatever_the_delimiter(delimiter: str) -> None:
    layout = Layout("classify", "csv", ("title", "body"), "topic", delimiter)
    data = delimiter.join(("id", "topic", "body", "title")) + "\n" + delimiter.join(("7", "sport", "Long", "Short")) + "\n"
    (row,) = found(data.encode(), layout)
    assert isinstance(row, Row)
    assert (row.text, row.label) == ("Short\nLong", "sport")


def test_csv_without_a_header_names_its_columns_by_number() -> None:
    (row, _) = found(b"Rain,weather\nGoal,sport\n", Layout("classify", "csv", header=False))
    assert isinstance(row, Row)
    assert (row.line, row.text, row.label) == (1, "Rain", "weather")
    (row,) = found(b"weather;x;Rain\n", Layout("classify", "csv", ("3",), "1", ";", header=False))
    assert isinstance(row, Row)
    assert (row.text, row.label) == ("Rain", "weather")


def test_V5_a_header_lacks_or_repeats_a_column() -> None:
    assert errors(b"title,topic\na,b\n", CSV) == [(1, 0, "text", "V5.missing", "error"), (1, 0, "label", "V5.missing", "error")]
    assert errors(b"text,label,text\na,b,c\n", CSV) == [(1, 0, "text", "V5.repeated", "error")]


def test_json_fields_are_mapped_and_the_rest_is_left_unread() -> None:
    layout = Layout("classify", text_columns=("title", "body"), label_column="topic")
    rows_found = found(
        b'{"title":"T","body":"B","topic":"x","id":7}\n{"title":"T","topic":"x","body":"B"}\n{"title":"T","topic":"x"}', layout
    )
    assert [(row.text, row.label) for row in rows_found if isinstance(row, Row)] == [("T\nB", "x")] * 2
    assert rows_found[2] == RowError(3, 81, "body", "V5.missing")


# --- digests ----------------------------------------------------------------------------------------------------------------------------


def test_digests_are_of_meaning_not_spelling() -> None:
    plain, spaced, other = found(b'{"text":"\xc3\xa9","label":"a"}\n{ "label":"a", "text":"\\u00e9" }\n{"text":"\xc3\xa9","label":"b"}')
    assert isinstance(plain, Row)
    assert isinstance(spaced, Row)
    assert isinstance(other, Row)
    assert plain.digest == spaced.digest == other.digest
    assert plain.content_digest == spaced.content_digest != other.content_digest


def test_digests_keep_fields_apart() -> None:
    pairs = [Row(1, 0, 1, prompt="ab", chosen="c", rejected="d"), Row(1, 0, 1, prompt="ab", chosen="cd", rejected="")]
    assert pairs[0].content_digest != pairs[1].content_digest
    assert Row(1, 0, 1, text="a").digest != Row(1, 0, 1, prompt="a", chosen="b").digest


# --- properties -------------------------------------------------------------------------------------------------------------------------

HOSTILE = st.sampled_from([
    GOOD.strip(), b"{}", b"", b" ", b"\r", b"\xff", b"\x00", b"\xe2\x80\xa8", b'"', b'""', b"a,b", b'"a,\n,b",c', b"text,label", b"\x0c",
    b'{"text":"a","text":"b","label":"c"}', b'{"text":"\\ud800","label":"c"}', "日本,語".encode(), b'{"text":"x" ,"label" : "y"}', b"[",
])  # fmt: skip


@given(
    st.lists(HOSTILE, max_size=12),
    st.lists(st.integers(1, 40), max_size=60),
    st.sampled_from([CLASSIFY, CSV]),
    st.sampled_from([b"\n", b"\r\n"]),
)
@settings(deadline=None)
def test_the_border_of_a_chunk_changes_nothing(records: list[bytes], cuts: list[int], layout: Layout, ending: bytes) -> None:
    data = ending.join(records)
    if layout is CSV:
        data = b"text,label" + ending + data
    chunks, at = [], 0
    for size in cuts:
        chunks.append(data[at : at + size])
        at += size
    assert list(read_rows([*chunks, data[at:]], layout)) == found(data, layout)
    assert list(read_rows([data[i : i + 1] for i in range(len(data))], layout)) == found(data, layout)


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["text", "label", "messages", "prompt", "chosen", "rejected", "role", "content", 'te":', "x"])
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": st.text(max_size=9)}), max_size=4
)


@given(
    st.dictionaries(NAMES, st.text(max_size=12) | TURNS | JSONISH, max_size=4), st.booleans(), st.sampled_from([CLASSIFY, CHAT, PREFERENCE])
)
@settings(deadline=None)
def test_the_quick_reader_accepts_what_the_careful_one_does(value: dict, spaced: bool, layout: Layout) -> None:
    data = json.dumps(value, separators=(" , ", " : ") if spaced else (",", ":"), ensure_ascii=spaced).encode("utf-8", "surrogatepass")
    quick = found(data, layout)
    original = rows._quick
    try:
        rows._quick = lambda _: lambda line: None  # type: ignore[assignment]
        careful = found(data, layout)
    finally:
        rows._quick = original
    assert quick == careful


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes_are_rows_or_findings(data: bytes) -> None:
    for layout in (CLASSIFY, CHAT, PREFERENCE, CSV):
        for each in found(data, layout):
            assert isinstance(each, Row | RowError)
            assert 1 <= each.line <= data.count(b"\n") + 1
            assert 0 <= each.byte_offset <= len(data)


def test_findings_and_layouts_travel_as_json() -> None:
    layout = Layout("classify", "csv", ("a", "b"), "c", ";", False)
    assert msgspec.json.decode(msgspec.json.encode(layout), type=Layout) == layout


def test_reading_needs_the_memory_of_a_piece_whatever_the_number_of_rows() -> None:
    piece = b"".join(b'{"text":"%s","label":"x"}\n' % (b"word %d " % i * 500) for i in range(64))  # 256 KiB and more

    def pieces(count: int):
        for _ in range(count):
            yield piece[:100_000]
            yield piece[100_000:]

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_rows(pieces(count), CLASSIFY)) == 64 * count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(40) < 1.5 * peak(4)
    assert peak(40) < 6 * len(piece)
