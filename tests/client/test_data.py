"""The labelled sets that ship with the examples: balanced, bilingual, clean."""

import json
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"
CLASSES = {"technology", "sports", "finance", "health", "travel", "food"}


def rows(name: str, *columns: str) -> list[tuple[str, str]]:
    lines = (DATA / name).read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == "" and lines.pop(0).split("\t") == list(columns)
    pairs = [tuple(line.split("\t")) for line in lines]
    assert all(len(pair) == 2 and pair[1] == pair[1].strip() and len(pair[1]) >= 5 for pair in pairs)
    assert not any('"' in text or not unicodedata.is_normalized("NFC", text) for _, text in pairs)
    return pairs


def chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def test_sentences_are_many_balanced_and_in_two_languages():
    train, heldout = rows("sentences.tsv", "label", "text"), rows("heldout.tsv", "label", "text")
    assert len(train) >= 600 and len(heldout) >= 120
    for pairs in (train, heldout):
        counts = Counter((label, chinese(text)) for label, text in pairs)
        assert {label for label, _ in counts} == CLASSES
        assert len(set(counts.values())) == 1 and len(counts) == 12


def test_no_sentence_stands_twice_and_none_is_nearly_another():
    texts = [text.casefold() for name in ("sentences.tsv", "heldout.tsv") for _, text in rows(name, "label", "text")]
    assert len(set(texts)) == len(texts)
    shingles = [{text[at : at + 3] for at in range(len(text) - 2)} for text in texts]
    near = [
        (texts[one], texts[other])
        for one in range(len(texts))
        for other in range(one)
        if len(shingles[one] & shingles[other]) > 0.6 * len(shingles[one] | shingles[other])
    ]
    assert near == []


def test_rows_of_a_class_do_not_stand_together():
    labels = [label for label, _ in rows("sentences.tsv", "label", "text")]
    alike = sum(one == other for one, other in pairwise(labels))
    assert alike < len(labels) / 3


def test_reviews_are_balanced():
    pairs = rows("reviews.tsv", "sentiment", "review")
    counts = Counter((label, chinese(text)) for label, text in pairs)
    assert len(pairs) >= 150 and {label for label, _ in counts} == {"positive", "neutral", "negative"}
    assert set(counts.values()) == {25} and len({text for _, text in pairs}) == len(pairs)


def test_chats_end_with_the_clerk_and_speak_as_the_clerk():
    lines = (DATA / "chat.jsonl").read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == "" and len(lines) >= 60 and len(set(lines)) == len(lines)
    for line in lines:
        chat = json.loads(line)
        assert set(chat) == {"messages"}
        roles = [message["role"] for message in chat["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        for message in chat["messages"]:
            assert set(message) == {"role", "content"} and message["content"].strip()
            if message["role"] == "assistant":
                assert message["content"].startswith("啊嗬！" if chinese(message["content"]) else "Ahoy! ")


@pytest.mark.parametrize("name", ["sentences.tsv", "heldout.tsv", "reviews.tsv", "chat.jsonl"])
def test_files_have_no_mark_and_no_odd_character(name):
    raw = (DATA / name).read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf") and b"\r" not in raw and b"\0" not in raw
    assert not [letter for letter in raw.decode() if unicodedata.category(letter) in ("Co", "Cn", "Cf", "Cs")]
