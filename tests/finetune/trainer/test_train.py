import random
from dataclasses import replace

import pytest
import torch

from services.finetune.trainer.batches import Example
from services.finetune.trainer.model import load
from services.finetune.trainer.spec import HEAD_RATE, Hyperparameters, Lora, Method, Spec
from services.finetune.trainer.train import Trainer
from tests.finetune.trainer import world

CPU = torch.device("cpu")


def chats(count=12):
    source = random.Random(6)
    rows = [tuple(source.randrange(7, world.VOCABULARY) for _ in range(source.randint(3, 30))) for _ in range(count)]
    return [Example(ids, ((source.randrange(1, len(ids)), len(ids)),)) for ids in rows]


def trainer(directory, rows, **others):
    own = {"lora": Lora(rank=4, alpha=8.0), "hyperparameters": Hyperparameters(learning_rate=1e-3, batch_size=8)}
    return Trainer(Spec(Method.CHAT, **own | others), load(directory, CPU), rows, rows[:5])


@pytest.mark.parametrize(
    "others", [{"step_tokens": 32}, {"packing": False}, {"packing": False, "step_tokens": 16}, {"gradient_checkpointing": True}]
)
def test_how_a_step_is_cut_changes_neither_loss_nor_direction(tiny_base, others):
    rows = chats()
    whole, cut = trainer(tiny_base, rows, step_tokens=4_096), trainer(tiny_base, rows, **others)
    if "gradient_checkpointing" in others:
        cut.base = load(tiny_base, CPU, gradient_checkpointing=True)
        cut = Trainer(cut.spec, cut.base, rows, rows[:5])
    for _ in range(3):
        one, other = whole.step(), cut.step()
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
        assert (one.tokens, one.supervised) == (other.tokens, other.supervised)
    for name, tensor in whole.parameters().items():
        assert torch.allclose(tensor, cut.parameters()[name], atol=2e-4), name


def test_the_loss_is_the_mean_over_supervised_tokens_of_the_step(tiny_base):
    rows = chats(8)
    model = load(tiny_base, CPU).model.eval()
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = torch.log_softmax(model(torch.tensor([row.ids])).logits[0], -1)
            ((begin, end),) = row.spans
            losses += [-float(logits[at - 1, row.ids[at]]) for at in range(begin, end)]
    assert trainer(tiny_base, rows).step().loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_every_weight_can_be_learnt(tiny_base):
    own = trainer(tiny_base, chats(), lora=None)
    before = own.snapshot()
    first = own.evaluate().loss
    for _ in range(6):
        own.step()
    assert own.evaluate().loss < first
    moved = [name for name, value in own.snapshot().items() if not torch.equal(before[name], value)]
    assert len(moved) == len(before)


def test_evaluation_ignores_dropout_and_moves_nothing(tiny_base):
    own = trainer(tiny_base, chats(), lora=Lora(rank=4, dropout=0.5))
    own.step()
    state, before = torch.get_rng_state(), own.snapshot()
    assert own.evaluate().loss == own.evaluate().loss
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in own.snapshot().items())


def test_without_its_adapter_the_base_answers(tiny_base):
    own = trainer(tiny_base, chats())
    before = own.evaluate().loss
    own.step()
    with own.untuned():
        assert own.evaluate().loss == before
    assert own.evaluate().loss != before


def test_a_heads_rate_follows_the_size_of_the_bases_states(tiny_base):
    texts = [Example(row.ids, label=at % 2) for at, row in enumerate(chats())]
    spec = Spec(Method.CLASSIFY, Lora(rank=2), Hyperparameters(learning_rate=1e-3), labels=("a", "b"))
    own = Trainer(spec, load(tiny_base, CPU), texts)
    larger = load(tiny_base, CPU)
    with torch.no_grad():
        larger.model.model.norm.weight.add_(1.0).mul_(10.0).sub_(1.0)  # Gemma's norm scales by 1 + weight
    rates = [group["full"] for group in own.optimizer.param_groups]
    scaled = [group["full"] for group in Trainer(spec, larger, texts).optimizer.param_groups]
    assert rates[0] == scaled[0] == 1e-3 and 0 < rates[1] < 10 * HEAD_RATE
    assert scaled[1] == pytest.approx(rates[1] / 10, rel=1e-3)
    asked = replace(spec, hyperparameters=Hyperparameters(head_learning_rate=0.5))
    assert Trainer(asked, load(tiny_base, CPU), texts).optimizer.param_groups[1]["full"] == 0.5
