import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.inference.text import OutputText, StopMatcher, Utf8Stream

ALPHABET = st.text("ab\n世é𓀀", max_size=40)


def cut(data, at):
    borders = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


@given(ALPHABET, st.lists(st.integers(0, 200)))
def test_text_is_whole_utf8_however_bytes_are_cut(text, at):
    stream = Utf8Stream()
    parts = [stream.feed(chunk) for chunk in cut(text.encode(), at)]
    assert "".join(parts) + stream.finish() == text
    assert all("�" not in part for part in parts)


def test_bytes_that_never_complete_end_as_replacement_character():
    stream = Utf8Stream()
    assert stream.feed("世".encode()[:2]) == ""
    assert stream.finish() == "�"


@given(ALPHABET, st.lists(st.text("ab\n世", min_size=1, max_size=4), max_size=4), st.lists(st.integers(0, 60)))
def test_stop_sequence_is_found_across_chunk_borders_and_never_leaked(text, stops, at):
    matcher = StopMatcher(stops)
    sent = ""
    for chunk in cut(text, at):
        sent += matcher.feed(chunk)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert text.startswith(sent)
        assert not any(stop in sent for stop in stops), ends
    sent += matcher.finish()
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if ends:
        assert (sent, matcher.matched) == (text[: min(ends)[1]], min(ends)[2])
    else:
        assert (sent, matcher.matched) == (text, None)


def test_possible_start_of_a_stop_sequence_is_held_back():
    matcher = StopMatcher(["<end>"])
    assert [matcher.feed(part) for part in ("a<", "en", "x", "b<e")] == ["a", "", "<enx", "b"]
    assert matcher.finish() == "<e"


def test_nothing_stops_an_output_before_its_minimum():
    output = OutputText(stops=["\n"], min_tokens=2)
    assert [output.feed(part) for part in (b"a\n", b"b", b"c\nd")] == ["a\n", "b", "c"]
    assert output.matched == "\n"
    assert output.finish() == ""


def test_task_output_begins_at_its_first_visible_character():
    output = OutputText(trim_start=True)
    assert [output.feed(part) for part in (b" ", b" \n", b"a ", b" b")] == ["", "", "a ", " b"]


def test_settled_bytes_say_which_tokens_may_be_shown():
    output = OutputText(stops=["END"])
    sizes = []
    for data in (b"a", "世".encode()[:1], "世".encode()[1:], b"E", b"ND tail"):
        output.feed(data)
        sizes.append(output.settled_bytes)
    assert sizes == [1, 1, 4, 4, 4]
