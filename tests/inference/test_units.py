"""Texts cut into units that together are the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference import units

TEXTS = st.text(alphabet=st.sampled_from("ab Z.,!?\n'-_3世界。，สัé😀\u2028"), max_size=40)


def said(text, ranges):
    return [text[first:last] for first, last in ranges]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Not bad, but the ending!!", ["Not ", "bad, ", "but ", "the ", "ending!!"]),
        ("  “Hello” world", ["  “Hello” ", "world"]),
        ("don't well-known 3.5", ["don't ", "well-known ", "3.5"]),
        ("苹果发布", ["苹", "果", "发", "布"]),
        ("我 love NLP，真的。", ["我 ", "love ", "NLP，", "真", "的。"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("한국어 문장", ["한국어 ", "문장"]),
        ("!!!", ["!!!"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert said(text, units.words(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "One. Two! J. Smith ate 3.5 pies. “Yes.” he said.\nLine",
            ["One. ", "Two! ", "J. Smith ate 3.5 pies. ", "“Yes.” ", "he said.\n", "Line"],
        ),
        ("他来了。你好！走", ["他来了。", "你好！", "走"]),
        ("\n\nend", ["\n\nend"]),
    ],
)
def test_sentences(text, expected):
    assert said(text, units.sentences(text)) == expected


def test_tokens_are_widened_to_whole_characters():
    text = "a世b"
    assert said(text, units.tokens(text, [(0, 1), (1, 4), (1, 4), (1, 4), (4, 5)])) == ["a", "世", "b"]
    assert said("a  b", units.tokens("a  b", [(0, 1), (1, 2), (2, 3), (3, 4)])) == ["a  ", "b"]


@given(TEXTS)
def test_spans_cover_text(text):
    """In order, without gap or overlap, whatever the unit."""
    letters = [(at, at + len(character.encode())) for at, character in zip(_bytes(text), text, strict=False)]
    for ranges in (units.words(text), units.sentences(text), units.tokens(text, letters)):
        assert "".join(said(text, ranges)) == text
        assert all(first < last for first, last in ranges)
        assert len(ranges) <= 1 or all(part.strip() for part in said(text, ranges))


@given(TEXTS, st.randoms(use_true_random=False))
def test_what_is_kept_is_in_the_text_in_order(text, chance):
    ranges = units.words(text)
    keep = [chance.random() < 0.5 for _ in ranges]
    left = units.kept(text, ranges, keep)
    parts = [part for part, stays in zip(said(text, ranges), keep, strict=True) if stays]
    assert left in ("".join(parts), "".join(parts).rstrip())
    assert units.kept(text, ranges, [True] * len(ranges)) == text


def test_a_blank_that_became_the_end_goes_too():
    text = "good film"
    assert units.kept(text, units.words(text), [True, False]) == "good"
    assert units.kept("good film ", units.words("good film "), [True, False]) == "good "


def _bytes(text):
    at = 0
    for character in text:
        yield at
        at += len(character.encode())
