import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference import languages, spans, tasks


@given(st.integers(0, 500), st.integers(1, 60), st.data())
def test_windows_leave_nothing_out(length, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    found = list(tasks.windows(length, size, overlap))
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(last - first <= size for first, last in found)
    assert all(after[0] == before[1] - overlap for before, after in itertools.pairwise(found))
    assert all(after[1] > before[1] for before, after in itertools.pairwise(found))


@given(st.text("ab \n\t\r世", max_size=40))
def test_lines_joined_again_are_the_text(text):
    parts = tasks.cut_lines(text)
    assert text.startswith("".join(before + line for before, line in parts))
    assert not text["".join(before + line for before, line in parts).__len__() :].strip()
    assert all("\n" not in line for _, line in parts if text.strip())


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=64))
def test_softmax_sums_to_one_and_keeps_the_order(scores):
    chances = tasks.softmax(scores)
    assert sum(chances) == pytest.approx(1)
    assert max(range(len(scores)), key=chances.__getitem__) == max(range(len(scores)), key=scores.__getitem__)


@given(st.floats(-1e4, 1e4))
def test_a_label_alone_has_a_probability(score):
    assert 0 <= tasks.independent(score) <= 1
    assert tasks.independent(score) + tasks.independent(-score) == pytest.approx(1)


def test_script_decides_the_neutral_texts():
    assert tasks.script("体育新闻 2024") == "han"
    assert tasks.script("a word about 世界 and more") == "other"
    assert tasks.script("") == "other"
    assert set(tasks.NEUTRAL_TEXTS) == {"han", "other"}


# --- languages ----------------------------------------------------------------------------------------------------------------------


def test_at_least_sixty_languages_have_a_name_each_its_own():
    assert len(languages.LANGUAGES) >= 60
    assert len(set(languages.LANGUAGES.values())) == len(languages.LANGUAGES)


@pytest.mark.parametrize(
    ("tag", "canonical", "name"),
    [
        ("en", "en", "English"), ("EN-us", "en-US", "English (United States)"), ("zh-Hant", "zh-Hant", "Chinese (Traditional)"),
        ("zh-hant-tw", "zh-Hant-TW", "Chinese (Traditional, Taiwan)"), ("yue", "yue", "Cantonese"),
    ],
)  # fmt: skip
def test_language_tags_are_named(tag, canonical, name):
    assert languages.language(tag) == languages.Language(canonical, name)


@pytest.mark.parametrize("tag", ["", "xx", "english", "en-XX", "en-US-US", "e\u0301n", "en-Hant-Hant", "-en", "en--US"])
def test_unknown_language_tags_have_no_name(tag):
    assert languages.language(tag) is None


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("Where is the station?", ("en",)), 
        ("Où est la gare ?", ("fr",)), ("Wo ist der Bahnhof?", ("de",)),
        ("¿Dónde está la estación?", ("es",)),
        ("Gdzie jest dworzec?", ("pl",)), ("Де знаходиться їжа?", ("uk",)), ("今日は天気がいい", ("ja",)), ("今天天气很好", ("zh",)),
        ("오늘 날씨", ("ko",)), ("این کتاب است", ("fa",)), ("12:30", ()),
    ],
)  # fmt: skip
def test_language_of_a_text_is_told_by_letters_and_small_words(text, tags):
    assert languages.tell(text) == tags


# --- spans --------------------------------------------------------------------------------------------------------------------------


def test_words_are_where_answers_start_and_end():
    text = "In 1932, St. Mary's cost €40.5 (世界)."
    ends = spans.word_ends(text)
    starts = spans.word_starts(text)
    assert [text[start:].split(maxsplit=1)[0] for start in starts][:3] == ["In", "1932,", "St."]
    assert text.index("€") in starts
    assert text.index("世") in starts and text.index("界") in starts
    assert text.index("€40.5") + len("€40.5") in ends
    assert text.index("世") + 1 in ends
    assert text.index("Mary's") + 4 not in ends


CANDIDATES = st.builds(
    lambda passage, start, length, odds: spans.Scored(passage, start, start + length, odds),
    st.integers(0, 2),
    st.integers(0, 20),
    st.integers(1, 9),
    st.floats(-20, 20),
)


@given(st.lists(CANDIDATES, max_size=30), st.integers(1, 10))
def test_answers_do_not_overlap_and_share_one_distribution(candidates, top_k):
    answers, none = spans.best(candidates, top_k)
    assert len(answers) <= top_k
    assert 0 <= none <= 1
    assert sum(answer.probability for answer in answers) + none <= 1 + 1e-6
    assert [answer.probability for answer in answers] == sorted((answer.probability for answer in answers), reverse=True)
    assert not answers if none > 0.5 else True
    for one in answers:
        assert not any(two is not one and two.passage == one.passage and one.start < two.end and two.start < one.end for two in answers)


def test_logsumexp_survives_extremes():
    assert spans.logsumexp([-math.inf, -math.inf]) == -math.inf
    assert spans.logsumexp([1_000.0, 1_000.0]) == pytest.approx(1_000 + math.log(2))


def test_translation_shows_a_pair_where_both_languages_are_known():
    english, french, tatar = (languages.language(tag) for tag in ("en", "fr", "tt"))
    assert tasks.translate("x", english, french).plain == "English: Thank you very much.\nFrench: Merci beaucoup.\n\nEnglish: x\nFrench:"
    assert tasks.translate("x", english, tatar).plain == "English: x\nTatar:"
    assert languages.language("zh-Hant").thanks != languages.language("zh-Hans").thanks
