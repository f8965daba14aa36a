"""Gradient × input, against finite differences, in two families and beside both backends."""

import pytest
import torch

from services.inference.engine.attribution import Gradients, gradients_of, read, share
from services.inference.engine.backend import Factors, Head, Weights
from services.inference.engine.calls import Weigh
from services.inference.engine.eager import EagerBackend
from services.inference.engine.step import Adapter, AdapterProblem
from tests.inference.engine import tiny

PREFIX = (2, 40, 41, 5, 60, 7)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["gemma3", "qwen3"])
def directory(request, tmp_path_factory):
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


def call(continuations=((9, 10),), prefix=PREFIX, **fields):
    return Weigh("w", prefix, continuations, 10.0, "t", **fields)


def made(directory, source=None):
    return Gradients(lambda: read(directory, CPU, torch.float32), CPU, 24, source)


def scored(model, prompt, continuations, contrast=()):
    """The same score, from transformers' model and given embeddings [P, W]."""
    found = []
    for tokens in continuations:
        inputs = torch.cat([prompt[None], model.get_input_embeddings()(torch.tensor([tokens[:-1]], dtype=torch.int64))], 1)
        chances = torch.log_softmax(model(inputs_embeds=inputs).logits[0, len(prompt) - 1 :], -1)
        each = chances.gather(1, torch.tensor(tokens)[:, None])
        found.append(each.mean() if contrast else each.sum())
    scores = torch.stack(found)
    return torch.log_softmax(scores - torch.tensor(contrast), 0) if contrast else scores


@pytest.mark.parametrize(
    ("continuations", "contrast", "target"),
    [(((9, 10),), (), 0), (((9,),), (), 0), (((9, 10), (11,), (12, 13, 14)), (-1.0, 0.5, 0.0), 2)],
)
def test_weights_are_the_slope_along_each_embedding(directory, continuations, contrast, target):
    gradients = made(directory)
    answer = gradients.weigh(call(continuations, contrast=contrast, target=target))
    model = tiny.reference(directory)
    with torch.no_grad():
        prompt = model.get_input_embeddings()(torch.tensor(PREFIX))
        expected = scored(model, prompt, continuations, contrast)
        step = 1e-3
        slopes = []
        for place in range(len(PREFIX)):
            ends = []
            for sign in (1, -1):
                moved = prompt.clone()
                moved[place] *= 1 + sign * step
                ends.append(float(scored(model, moved, continuations, contrast)[target]))
            slopes.append((ends[0] - ends[1]) / (2 * step))
    assert answer.error is None and answer.target == target
    assert answer.scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert answer.weights == pytest.approx(slopes, rel=0.02, abs=0.01)


def test_an_unnamed_target_is_the_likeliest(directory):
    answer = made(directory).weigh(call(((9,), (10,), (11,)), contrast=(0.0, 0.0, 0.0)))
    assert answer.target == max(range(3), key=answer.scores.__getitem__)


def test_the_served_model_is_shared_not_copied(directory):
    """Over the eager backend: the same weights in the same memory, and serving is not changed."""
    backend = EagerBackend.load(directory, tiny.settings(directory), CPU, torch.float32)
    shared = share(backend)
    served = {tensor.data_ptr() for tensor in backend.trunk.state_dict().values()}
    assert {tensor.data_ptr() for tensor in shared.base_model.state_dict().values()} == served
    gradients = gradients_of(backend, directory, None)
    alone = made(directory).weigh(call())
    assert gradients.weigh(call()).weights == pytest.approx(alone.weights, abs=1e-4)
    assert gradients.weigh(call()) == gradients.weigh(call())


class Shelf:
    """A source with one adapter."""

    def __init__(self, weights, **fields):
        self.weights, self.fields = weights, fields

    def read(self, owner, digest, backend):
        if owner != "p":
            raise AdapterProblem("adapter_unknown", "another owner's")
        assert backend.targets["model.layers.0.self_attn.q_proj"] == tuple(backend.base("model.layers.0.self_attn.q_proj").shape)
        return Adapter(weights=None, memory_bytes=0, rank=2, **self.fields), self.weights


def factors(seed=0, gain=False):
    chance = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn((2, 24), generator=chance),
        torch.randn((32, 2), generator=chance),
        1 + 0.1 * torch.randn(32, generator=chance) if gain else None,
    )


@pytest.mark.parametrize("gain", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_part_of_the_passes(directory, gain):
    path, own = "model.layers.1.self_attn.q_proj", factors(gain=gain)
    gradients = made(directory, Shelf(Weights(2, {path: own})))
    tuned = gradients.weigh(call(adapter="d", owner="p"))
    bare = gradients.weigh(call())
    model = tiny.reference(directory)
    with torch.no_grad():
        linear = model.get_submodule(path)
        linear.weight += own.up @ own.down
        if own.gain is not None:
            linear.weight *= own.gain[:, None]
        prompt = model.get_input_embeddings()(torch.tensor(PREFIX))
        expected = scored(model, prompt, ((9, 10),))
    assert tuned.scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert bare.scores != pytest.approx(tuned.scores, abs=1e-3)
    assert gradients.weigh(call()) == bare, "nothing of the adapter stays"


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_a_head_is_explained(directory, pooling):
    chance = torch.Generator().manual_seed(3)
    head = Head(torch.randn((4, 24), generator=chance), torch.randn(4, generator=chance))
    gradients = made(directory, Shelf(Weights(2, {}, head), labels=("a", "b", "c", "d"), temperature=2.0, pooling=pooling))
    answer = gradients.weigh(call((), adapter="d", owner="p", target=1))
    model = tiny.reference(directory)
    with torch.no_grad():
        states = model.base_model(torch.tensor([PREFIX])).last_hidden_state[0]
        pooled = states.mean(0) if pooling == "MEAN" else states[-1]
        expected = torch.log_softmax((head.weight @ pooled + head.bias) / 2.0, 0)
    assert answer.scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert len(answer.weights) == len(PREFIX) and any(answer.weights)


def test_A10_what_is_wrong_with_one_call_is_its_error(directory):
    shelf = Shelf(Weights(2, {}, None))
    gradients = made(directory, shelf)
    assert gradients.weigh(call(adapter="d", owner="q")).error == "adapter_unknown"
    assert gradients.weigh(call((), adapter="d", owner="p")).error == "adapter_headless"
    assert made(directory).weigh(call(adapter="d", owner="p")).error == "no_adapters"
    assert gradients.weigh(call()).error is None
