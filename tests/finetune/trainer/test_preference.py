import json
import random
import threading

import pytest
import torch

from services.finetune.trainer.attempt import DONE, INPUT, TERMINATED, Attempt
from services.finetune.trainer.batches import Example
from services.finetune.trainer.control import Failure
from services.finetune.trainer.model import load
from services.finetune.trainer.preference import PreferenceTrainer
from services.finetune.trainer.spec import Hyperparameters, Lora, Method, Spec
from tests.finetune.trainer import world


def pairs(count=6):
    source = random.Random(2)

    def answer(prompt, length):
        ids = (*prompt, *(source.randrange(7, world.VOCABULARY) for _ in range(length)))
        return Example(ids, ((len(prompt), len(ids)),))

    found = []
    for _ in range(count):
        prompt = tuple(source.randrange(7, world.VOCABULARY) for _ in range(source.randint(2, 6)))
        better, worse = answer(prompt, source.randint(1, 9)), answer(prompt, source.randint(1, 9))
        found.append(Example(better.ids, better.spans, against=worse))
    return found


def trainer(directory, rows, **others):
    spec = Spec(
        Method.PREFERENCE, Lora(rank=4, alpha=8.0), Hyperparameters(**{"batch_size": 6, "preference_beta": 0.5} | others), step_tokens=40
    )
    own = PreferenceTrainer(spec, load(directory, torch.device("cpu")), rows, rows)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in own.parameters().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return own


def log_likelihood(model, example):
    logits = torch.log_softmax(model(torch.tensor([example.ids])).logits[0], -1)
    ((begin, end),) = example.spans
    return logits[torch.arange(begin - 1, end - 1), torch.tensor(example.ids[begin:end])].sum()


def test_loss_and_gradients_are_those_of_the_papers_formula(tiny_base):
    rows = pairs()
    own = trainer(tiny_base, rows)
    model = own.base.model.eval()
    losses = []
    for row in rows:
        with own.untuned(), torch.no_grad():
            reference = log_likelihood(model, row) - log_likelihood(model, row.against)
        margin = log_likelihood(model, row) - log_likelihood(model, row.against) - reference
        losses.append(-torch.nn.functional.logsigmoid(0.5 * margin))
    torch.stack(losses).sum().backward()
    wanted = {name: tensor.grad.clone() for name, tensor in own.parameters().items()}
    own.base.model.zero_grad(set_to_none=True)
    found = [own._loss(batch) for batch in own.batches(rows)]
    assert len(found) > 1  # several packed rows
    total = float(sum(losses).detach())
    assert float(sum(found).detach()) == pytest.approx(total, rel=1e-4)
    sum(found).backward()
    for name, tensor in own.parameters().items():
        assert torch.allclose(tensor.grad, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max())), name
    assert own.evaluate().loss == pytest.approx(total / len(rows), rel=1e-4)


def rows(count=30):
    chosen = [{"prompt": f"the world {at}", "chosen": "yes the tech", "rejected": "no the sport"} for at in range(count)]
    return "".join(json.dumps(row) + "\n" for row in chosen).encode()


def plane(**others):
    own = Hyperparameters(learning_rate=5e-3, epochs=3, batch_size=8)
    return world.plane(Method.PREFERENCE, data=rows(), hyperparameters=own, **others)


def run(plane, directory, stop=None, boundary=lambda step: None):
    return Attempt(plane, plane.objects, directory, stop or threading.Event(), interval_s=0.05, boundary=boundary).run()


def test_the_better_answer_gains_and_a_run_resumes_to_the_same_bytes(tiny_base):
    straight, broken, stop = plane(), plane(), threading.Event()
    assert run(straight, tiny_base) == DONE
    (outcome,) = straight.ends
    assert outcome.metrics["validation_preferred"] == 1.0 and outcome.metrics["validation_loss"] < 0.6  # untuned: ln 2
    assert [part.name for part in outcome.parts] == ["adapter.safetensors"]
    assert run(broken, tiny_base, stop, lambda step: stop.set() if step == 4 else None) == TERMINATED
    assert run(broken, tiny_base) == DONE
    assert broken.ends[0].parts == outcome.parts


def test_without_an_adapter_there_is_no_base_to_compare_with(tiny_base):
    lacking = plane(lora=None)
    assert run(lacking, tiny_base) == INPUT and lacking.ends == [Failure("DATA_INVALID", "spec.adapter")]
