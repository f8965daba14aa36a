from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.finetune.splits import split

ROWS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from("ab")), max_size=80)


@given(ROWS, st.floats(0, 0.5), st.integers(0, 2**62))
def test_both_sides_hold_every_row_once_and_share_no_text(rows, share, seed):
    digests = [str(text).encode() for text, _ in rows]
    learnt, measured = split(digests, [label for _, label in rows], share, seed)
    assert sorted([*learnt, *measured]) == list(range(len(rows)))
    assert not {digests[at] for at in learnt} & {digests[at] for at in measured}
    assert not rows or learnt or share == 0.5


def test_each_label_gives_its_share():
    labels = ["a"] * 900 + ["b"] * 90 + ["c"] * 10 + ["d"]
    _, measured = split([str(at).encode() for at in range(len(labels))], labels, 0.1, 7)
    assert Counter(labels[at] for at in measured) == {"a": 90, "b": 9, "c": 1}


def test_a_row_keeps_its_side_wherever_it_stands():
    digests = [str(at).encode() for at in range(50)]
    _, measured = split(digests, ["a"] * 50, 0.2, 3)
    _, turned = split(digests[::-1], ["a"] * 50, 0.2, 3)
    assert {digests[at] for at in measured} == {digests[::-1][at] for at in turned}
    assert split(digests, ["a"] * 50, 0.2, 4)[1] != measured
