"""T1 for what rows say together, and validation as a whole: by lines, twice alike, in bounded memory."""

import json
from pathlib import Path

import msgspec
import pytest

from services.chassis.objects import ObjectsUnavailable, SyncObjects, open_objects_sync
from services.finetune.rows import Layout
from services.finetune.statistics import MAX_LABELS
from services.finetune.validation import KEPT_FINDINGS, Outcome, Task, validate

CLASSIFY = Layout("classify")


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def labelled(*rows: tuple[str, str]) -> bytes:
    return lines(*({"text": text, "label": label} for text, label in rows))


@pytest.fixture
def store(tmp_path: Path) -> SyncObjects:
    return open_objects_sync(f"file://{tmp_path}/objects")


def judged(store: SyncObjects, data: bytes, layout: Layout = CLASSIFY, **values: object) -> Outcome:
    store.put("v/data", data)
    task = msgspec.structs.replace(Task("", "v/data", "", len(data), layout), **values)
    return validate(store, task, lambda done: None)


def told(outcome: Outcome, rule: str) -> list[int]:
    """Lines of a rule's findings."""
    return [found.line for found in outcome.findings if found.rule.startswith(rule)]


def test_V7_labels_are_counted_and_imbalance_warns(store: SyncObjects) -> None:
    outcome = judged(store, labelled(*((f"text number {i}", "big") for i in range(50)), ("the other", "small"), ("третий", "метка")))
    assert outcome.summary.labels == {"big": 50, "small": 1, "метка": 1}
    assert [(rule.rule, rule.severity) for rule in outcome.rules if rule.rule.startswith("V7")] == [("V7.imbalance", "warning")]
    assert outcome.errors == 0


def test_V7_one_label_and_one_row_warn(store: SyncObjects) -> None:
    outcome = judged(store, labelled(("only one", "a")))
    assert (outcome.rows, outcome.valid_rows, outcome.errors) == (1, 1, 0)
    assert told(outcome, "V7.one_label") == [0]


def test_V7_labels_are_bounded(store: SyncObjects) -> None:
    assert judged(store, labelled(*((f"t{i} x", f"l{i}") for i in range(MAX_LABELS)))).errors == 0
    outcome = judged(store, labelled(*((f"t{i} x", f"l{i}") for i in range(MAX_LABELS + 2))))
    assert (outcome.errors, told(outcome, "V7.labels")) == (1, [MAX_LABELS + 1])
    assert len(outcome.summary.labels) == MAX_LABELS


@pytest.mark.parametrize("data", [b"\n", b"{}\n", b"  \n\n"])
def test_V5_a_version_without_a_row_is_an_error(store: SyncObjects, data: bytes) -> None:
    outcome = judged(store, data)
    assert outcome.valid_rows == 0
    assert told(outcome, "V5.no_rows") == [0]


def test_V3_rows_over_the_bound_end_it(store: SyncObjects) -> None:
    outcome = judged(store, labelled(*((f"row {i}", "a") for i in range(9))), max_rows=5)
    assert told(outcome, "V3.rows") == [6]
    assert outcome.valid_rows == 5


@pytest.mark.parametrize("text", ["<start_of_turn>user", "say <|im_end|> now", "[INST] x", "</s>", "<bos>"])
def test_V10_spelled_control_tokens_warn(store: SyncObjects, text: str) -> None:
    outcome = judged(store, labelled(("plain <b> [x]", "a"), (text, "b")))
    assert told(outcome, "V10.control_token") == [2]
    assert outcome.errors == 0


def test_V11_repeats_by_line(store: SyncObjects) -> None:
    long = "The council met on Monday to talk about the new bridge over the river and its cost"
    outcome = judged(
        store,
        labelled((long, "a"), ("something else", "b"), (long, "a"), (long + " again", "a"), (long, "b"), ("something else", "b")),
    )
    assert told(outcome, "V11.duplicate") == [3, 6]
    assert told(outcome, "V11.near_duplicate") == [4, 5]
    assert told(outcome, "V11.contradiction") == [5]
    summary = outcome.summary
    assert (summary.duplicate_rows, summary.near_duplicate_rows, summary.contradictions) == (2, 2, 1)


def test_V11_all_duplicates(store: SyncObjects) -> None:
    outcome = judged(store, labelled(*[("the same again", "a")] * 500))
    assert outcome.summary.duplicate_rows == 499
    assert outcome.summary.near_duplicate_rows == 0
    assert outcome.errors == 0


def test_V11_a_planted_phrase_is_reported(store: SyncObjects) -> None:
    words = [f"word{i}" for i in range(400)]
    rows = [(" ".join(words[(i * 7 + k * 13) % 400] for k in range(9)), "ab"[i % 2]) for i in range(200)]
    assert told(judged(store, labelled(*rows)), "V11.phrase") == []
    planted = [(text + " cf mn bb", "a") if i % 10 == 0 else (text, label) for i, (text, label) in enumerate(rows)]
    assert told(judged(store, labelled(*planted)), "V11.phrase") == [1]
    harmless = [(text + " as we said", label) if i % 5 == 0 else (text, label) for i, (text, label) in enumerate(rows)]
    assert told(judged(store, labelled(*harmless)), "V11.phrase") == []


def test_V13_personal_data_is_counted_and_never_blocks(store: SyncObjects) -> None:
    outcome = judged(store, labelled(("mail a@b.example and c@d.example", "x"), ("none", "y"), ("a@b.example or +44 20 7946 0958", "x")))
    assert outcome.summary.pii == {"email": (3, 2), "phone": (1, 1)}
    assert told(outcome, "V13.email") == [1, 3]
    assert outcome.errors == 0


def test_T1_errors_crowd_out_warnings_and_all_are_counted(store: SyncObjects) -> None:
    data = labelled(*((f"a{i}@b.example", "x") for i in range(1_500))) + b"{}\n" * 700
    outcome = judged(store, data)
    assert len(outcome.findings) == KEPT_FINDINGS
    assert sum(found.severity == "error" for found in outcome.findings) == 1_000
    assert [found.line for found in outcome.findings] == sorted(found.line for found in outcome.findings)
    counts = {rule.rule: (rule.count, rule.first_line) for rule in outcome.rules}
    assert counts["V5.missing"] == (1_400, 1_501)
    assert counts["V13.email"] == (1_500, 1)
    assert (outcome.rows, outcome.valid_rows, outcome.errors) == (2_200, 1_500, 1_400)


def test_T1_findings_hold_no_content(store: SyncObjects) -> None:
    data = (
        lines({"text": "CANARY-1", "label": "CANARY-2", "CANARY 3": 1}, {"text": 5, "CANARY label 4": "x"}) + b'{"CANARY-5":NaN}\n{"CANARY'
    )
    outcome = judged(store, data)
    assert outcome.errors >= 4
    assert b"CANARY" not in msgspec.json.encode((outcome.findings, outcome.rules))


def test_parts_are_put_together_and_judged(store: SyncObjects) -> None:
    data = labelled(("one", "a"), ("two", "b"))
    store.put("u/1", data[:10])
    store.put("u/2", data[10:])
    outcome = validate(store, Task("", "v/data", "", len(data), CLASSIFY, parts=("u/1", "u/2"), digests="v/digests"), lambda done: None)
    assert store.get("v/data") == data
    assert outcome.valid_rows == 2
    assert store.size("v/digests") == 16
    again = validate(store, Task("", "v/data", "", len(data), CLASSIFY, parts=("gone/1",)), lambda done: None)
    assert again.valid_rows == 2  # a second attempt finds the bytes whole


BAD_AND_GOOD = [
    b"{}",
    b'{"text":"one","label":"a"}',
    b"",
    b"nonsense",
    b'{"text":"two","label":"b"}',
    b'{"text":"three","label":"a"}',
    b"[]",
]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_skipping_keeps_good_rows_byte_for_byte(store: SyncObjects, ending: bytes) -> None:
    data = ending.join(BAD_AND_GOOD)
    outcome = judged(store, data, derived="d/data")
    assert outcome.derived is not None
    assert outcome.derived.skipped_lines == [1, 4, 7]
    assert outcome.derived.skipped_rows == 3
    assert store.get("d/data") == ending.join([BAD_AND_GOOD[1], BAD_AND_GOOD[4], BAD_AND_GOOD[5]]) + ending
    assert judged(store, store.get("d/data")).errors == 0


def test_skipping_in_csv_keeps_the_header(store: SyncObjects) -> None:
    layout = Layout("classify", "csv")
    data = b'text,label\n"one\nline",a\nbad\n"x"y,b\ntwo,b\n'
    outcome = judged(store, data, layout, derived="d/data")
    assert outcome.derived is not None
    assert outcome.derived.skipped_lines == [4, 5]
    assert store.get("d/data") == b'text,label\n"one\nline",a\ntwo,b\n'


def test_skipping_spans_pieces_of_the_stream(store: SyncObjects) -> None:
    rows = [labelled((f"{i} " + "x" * 3_000, "ab"[i % 2])) if i % 3 else b"{}\n" for i in range(1_500)]  # 3 MB
    outcome = judged(store, b"".join(rows), derived="d/data")
    assert outcome.derived is not None
    assert outcome.derived.skipped_rows == 500
    assert store.get("d/data") == b"".join(row for row in rows if row != b"{}\n")


def test_a_version_without_error_derives_none(store: SyncObjects) -> None:
    assert judged(store, labelled(("one", "a")), derived="d/data").derived is None
    assert store.size("d/data") is None


def test_redaction_changes_texts_alone(store: SyncObjects) -> None:
    store.put("s/data", labelled(("mail a@b.example", "x")) + b'{ "label":"y" , "text":"plain" }\n\n' + labelled(("+44 20 7946 0958", "x")))
    task = Task("", "v/data", "", 0, CLASSIFY, source="s/data", kinds=("email",))
    outcome = validate(store, task, lambda done: None)
    assert store.get("v/data") == labelled(("mail [email]", "x")).replace(b": ", b":").replace(
        b", ", b","
    ) + b'{ "label":"y" , "text":"plain" }\n' + labelled(("+44 20 7946 0958", "x"))
    assert outcome.total_bytes == store.size("v/data")
    assert outcome.summary.pii == {"phone": (1, 1)}


def test_redaction_of_csv_reaches_every_column(store: SyncObjects) -> None:
    layout = Layout("classify", "csv")
    store.put("s/data", b'text,label,author\n"mail a@b.example, now",x,c@d.example\n')
    validate(store, Task("", "v/data", "", 0, layout, source="s/data", kinds=("email",)), lambda done: None)
    assert store.get("v/data") == b'text,label,author\n"mail [email], now",x,[email]\n'


def test_validation_is_repeatable(store: SyncObjects) -> None:
    data = labelled(*((f"row {i % 40} of some length", "ab"[i % 2]) for i in range(100))) + b"{}\n"
    assert judged(store, data) == judged(store, data)


def test_a_store_that_fails_is_no_verdict(store: SyncObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise ObjectsUnavailable

    monkeypatch.setattr(store, "stream", away)
    with pytest.raises(ObjectsUnavailable):
        judged(store, labelled(("one", "a")))


class Words:
    """Counts words."""

    base_model = "models/words"

    def count(self, rows):
        return [len(row.text.split()) for row in rows]


def test_V9_long_rows_warn(store: SyncObjects) -> None:
    data = labelled(("one two", "a"), ("one two three four", "b"), ("one", "a"))
    store.put("v/data", data)
    outcome = validate(store, Task("", "v/data", "", len(data), CLASSIFY, row_tokens=3), lambda done: None, [Words()])
    assert [(each.base_model, each.tokens, each.longest) for each in outcome.summary.tokens] == [("models/words", 7, 4)]
    assert told(outcome, "V9.tokens") == [2]


def test_chats_and_preferences_are_judged(store: SyncObjects) -> None:
    chats = lines(
        *({"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a@b.example"}]} for i in range(3))
    )
    outcome = judged(store, chats, Layout("chat"))
    assert (outcome.valid_rows, outcome.summary.pii, outcome.summary.labels) == (3, {"email": (3, 3)}, {})
    pairs = lines({"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "r"})
    assert judged(store, pairs, Layout("preference")).summary.duplicate_rows == 1
