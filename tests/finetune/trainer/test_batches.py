import torch
from hypothesis import given
from hypothesis import strategies as st

from services.finetune.trainer.batches import Example, fit, layout, order, pack, pad, taken
from services.finetune.trainer.spec import Hyperparameters, Method, Spec, learning_rate, steps

CHAT = [Example((5, 6, 7, 8, 9), ((1, 2), (3, 5))), Example((4, 3, 2), ((2, 3),))]


@given(st.lists(st.integers(1, 90), max_size=60), st.integers(1, 80))
def test_bins_hold_every_example_once_within_their_room(lengths, room):
    bins = fit(lengths, room)
    assert sorted(at for members in bins for at in members) == list(range(len(lengths)))
    assert all(sum(lengths[at] for at in members) <= room or len(members) == 1 for members in bins)


def test_best_fit_wastes_little():
    assert len(fit([60, 40, 50, 50, 30, 70], 100)) == 3


@given(st.integers(0, 2**62), st.integers(1, 50), st.integers(1, 9))
def test_an_epoch_takes_every_example_once_and_another_epoch_in_another_order(seed, count, size):
    each = -(-count // size)
    epoch = [at for step in range(each) for at in taken(seed, step, count, size)]
    assert sorted(epoch) == list(range(count)) and epoch == order(seed, 0, count).tolist()
    again = [at for step in range(each, 2 * each) for at in taken(seed, step, count, size)]
    assert again == order(seed, 1, count).tolist()


def test_supervised_states_are_those_before_the_supervised_tokens():
    batch = pack(CHAT)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2]] and batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.select.tolist() == [0, 2, 3, 6] and batch.targets.tolist() == [6, 8, 9, 2]
    padded = pad(CHAT)
    assert padded.ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]]
    assert padded.select.tolist() == [0, 2, 3, 6] and padded.targets.tolist() == [6, 8, 9, 2]


def test_a_label_is_read_at_the_last_token():
    texts = [Example((5, 6, 7), label=1), Example((4,), label=0)]
    assert pack(texts).select.tolist() == [2, 3] and pack(texts).targets.tolist() == [1, 0]
    assert pad(texts).select.tolist() == [2, 3]
    assert [text.supervised for text in texts] == [1, 1] and [chat.supervised for chat in CHAT] == [3, 1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(8, 64), st.booleans())
def test_a_step_computes_every_example_once(lengths, room, packing):
    texts = [Example(tuple(range(length)), label=at) for at, length in enumerate(lengths)]
    batches = list(layout(texts, room, packing, torch.device("cpu")))
    assert sorted(label for batch in batches for label in batch.targets.tolist()) == list(range(len(lengths)))
    assert sum(batch.tokens for batch in batches) == sum(lengths)
    assert all(batch.ids.numel() <= room or len(batch.targets) == 1 for batch in batches)


def test_steps_and_rates():
    own = Hyperparameters(epochs=1.5, batch_size=4, warmup_ratio=0.2)
    spec = Spec(Method.CHAT, hyperparameters=own)
    assert steps(spec, 10) == 5
    rates = [learning_rate(own, step, 10) for step in range(10)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0] and rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 0.05
    assert learning_rate(own, 0, 1) == 1.0
