"""Vectors of training rows: those that EmbedTexts would answer, of a sample that a run can afford."""

import json

import numpy as np
import pytest
import torch

from services.finetune import nearest
from services.finetune.rows import Layout, read_rows
from services.finetune.trainer.batches import Example, pack
from services.finetune.trainer.grants import numbered
from services.finetune.trainer.model import load
from services.finetune.trainer.neighbours import chosen, index, means
from services.pretrained.tokenizer import Tokenizer
from tests.finetune.trainer import world


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return load(tiny_base, torch.device("cpu"))


def rows_of(count=12):
    return list(read_rows([world.classify_rows(count)], Layout("classify")))


def test_a_vector_is_the_mean_of_all_states_whatever_lies_beside_it(loaded):
    examples = [Example(tuple(range(3, 3 + length)), label=0) for length in (5, 1, 9, 4)]
    together = means(loaded, examples, step_tokens=10)
    with torch.no_grad():
        for found, example in zip(together, examples, strict=True):
            alone = pack([example])
            states = loaded.model.base_model(input_ids=alone.ids, position_ids=alone.positions, use_cache=False, segments=alone.segments)
            assert np.allclose(found, states.last_hidden_state[0].mean(0).numpy(), atol=1e-4)


def test_an_index_finds_each_row_by_its_own_text(loaded, tiny_base):
    rows, tokenizer = rows_of(), Tokenizer.from_directory(tiny_base)
    held = rows[3:5]
    learnt = numbered([row for row in rows if row not in held], held, apart=False)
    assert [number for number, _ in learnt] == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11], "numbers are those of the file"
    data = index(loaded, tokenizer, learnt, 96, 64, 10_000)
    found = nearest.Index.read(data, nearest.promise(data))
    for number, row in learnt:
        asked = Example((*tokenizer.prefix, *tokenizer.encode(row.text)), label=0)
        assert found.nearest(means(loaded, [asked], 64)[0], 1)[0][0] == number, json.dumps(row.text)


def test_a_short_run_indexes_a_sample_that_does_not_depend_on_the_order_of_its_rows(tiny_base):
    tokenizer = Tokenizer.from_directory(tiny_base)
    learnt = list(enumerate(rows_of(40)))
    whole = chosen(learnt, tokenizer, 96, 10**6)
    assert [number for number, _ in whole] == list(range(40))
    some = chosen(learnt, tokenizer, 96, sum(len(example.ids) for _, example in whole) // 3)
    assert 8 <= len(some) <= 18 and [number for number, _ in some] == sorted(number for number, _ in some)
    assert chosen(learnt[::-1], tokenizer, 96, sum(len(example.ids) for _, example in whole) // 3) == some
    assert len(chosen(learnt, tokenizer, 96, 1)) == 1
    assert all(len(example.ids) <= 2 for _, example in chosen(learnt, tokenizer, 2, 10**6))
