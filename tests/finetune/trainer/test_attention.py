"""T4: what packed examples compute is what each computes alone, for every family of bases; and a planted mask is caught."""

import pytest
import torch

from services.finetune.trainer import attention
from services.finetune.trainer.batches import Example, pack, pad
from services.finetune.trainer.model import load
from tests.inference.engine import tiny

LENGTHS = (3, 47, 1, 17, 46, 8, 30)  # beyond and below the window, alike and not


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


def examples():
    return [Example(tuple(prompt), ((1, len(prompt)),)) for prompt in tiny.prompts(LENGTHS)]


def logits(base, batch):
    with torch.no_grad():
        answer = base.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, segments=batch.segments)
    return answer.logits


def worst(base, rows, packed):
    reference = tiny.reference(base)
    with torch.no_grad():
        alone = torch.cat([reference(torch.tensor([row.ids])).logits[0] for row in rows])
    return float((packed - alone).abs().max())


def test_T4_packed_is_separate(family):
    rows = examples()
    assert worst(family, rows, logits(load(family, torch.device("cpu")), pack(rows))[0]) < 2e-4


def test_T4_padded_is_separate(family):
    rows, base = examples(), load(family, torch.device("cpu"))
    padded = logits(base, pad(rows))
    assert worst(family, rows, torch.cat([padded[at, : len(row.ids)] for at, row in enumerate(rows)])) < 2e-4


def test_T4_a_planted_mask_that_mixes_examples_is_caught(family, monkeypatch):
    """The comparison above sees what an all-ones mask does to packed rows, so it is no test that cannot fail."""
    rows, base = examples(), load(family, torch.device("cpu"))
    mixed = pack(rows)
    whole = attention.Segments.of([sum(LENGTHS)])
    batch = type(mixed)(mixed.ids, mixed.positions, whole, mixed.select, mixed.targets, mixed.tokens)
    assert worst(family, rows, logits(base, batch)[0]) > 0.1


def test_T4_a_mask_handed_in_is_refused(family):
    base = load(family, torch.device("cpu"))
    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="segments"):
        attention.attend(base.model.base_model.layers[0].self_attn, query, query, query, torch.ones(1, 1, 3, 3))


def test_gradients_of_packed_rows_are_those_of_separate_ones(family):
    base, rows = load(family, torch.device("cpu")), examples()
    base.model.requires_grad_(True)

    def gradients(batches):
        base.model.zero_grad(set_to_none=True)
        for batch in batches:
            base.states(batch).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in base.model.base_model.named_parameters()}

    packed, separate = gradients([pack(rows)]), gradients([pack([row]) for row in rows])
    for name, gradient in packed.items():
        assert torch.allclose(gradient, separate[name], rtol=1e-3, atol=1e-3 * float(separate[name].abs().max())), name


def test_blocks_hold_every_token_once_and_little_padding():
    segments = attention.Segments.of([5, 100, 6, 99, 1, 5])
    tokens = torch.cat([block.tokens for block in segments.blocks])
    assert sorted(tokens.tolist()) == list(range(216))
    assert sum(block.rows * block.width for block in segments.blocks) <= 1.25 * 216
    assert tokens[segments.scatter].tolist() == list(range(216))
