"""Texts that are nearly alike, and those that are not."""

import random

import numpy as np

from services.finetune import near_duplicates

WORDS = [f"w{index}" for index in range(2_000)]


def texts(count: int, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(40)) for _ in range(count)]


def repeats(found: list[str], skip: list[int] | None = None) -> list[int]:
    mask = np.zeros(len(found), dtype=bool)
    mask[skip or []] = True
    return near_duplicates.repeats(near_duplicates.minima(found), mask).tolist()


def test_V11_a_changed_word_is_nearly_the_same() -> None:
    plain = texts(300)
    changed = [" ".join(["other" if place == 20 else word for place, word in enumerate(text.split())]) for text in plain[:100]]
    found = repeats(plain + changed)
    assert set(found) <= set(range(300, 400))
    assert len(found) >= 90


def test_V11_case_and_punctuation_do_not_tell_texts_apart() -> None:
    assert repeats(["Rain in Oslo today!", "rain in oslo, today", "Sun in Oslo today"]) == [1]
    assert repeats(["天气很好今天我们去公园", "天气很好，今天我们去公园。", "明天下雨不要出门"]) == [1]


def test_V11_different_texts_are_different() -> None:
    assert repeats(texts(2_000)) == []
    assert repeats(["", "a", "b", "goal", "rain"]) == []


def test_exact_repeats_are_left_out() -> None:
    assert repeats(["one two three", "one two three"], skip=[1]) == []


def test_minima_are_the_same_in_any_company() -> None:
    found = texts(50)
    alone = np.concatenate([near_duplicates.minima([text]) for text in found])
    assert (alone == near_duplicates.minima(found)).all()


def test_V12_overlap_of_two_sets() -> None:
    ours = texts(500)
    theirs = texts(100, seed=2) + [text + " more" for text in ours[:50]]
    found = near_duplicates.overlap(near_duplicates.minima(ours), near_duplicates.minima(theirs)).tolist()
    assert set(found) <= set(range(100, 150))
    assert len(found) >= 45
    none = np.zeros((0, near_duplicates.MINIMA), dtype=np.uint16)
    assert near_duplicates.overlap(none, near_duplicates.minima(theirs)).tolist() == []
    assert near_duplicates.overlap(near_duplicates.minima(ours), none).tolist() == []
