import peft
import pytest
import torch
from safetensors.torch import save

from services.finetune import fit, tensors
from services.finetune.trainer import lora
from services.finetune.trainer.batches import Example, pack
from services.finetune.trainer.model import load
from services.finetune.trainer.spec import Lora
from tests.inference.engine import tiny

ROWS = [Example(tuple(prompt)) for prompt in tiny.prompts((9, 14))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def tuned(directory, spec, seed=0):
    base = load(directory, torch.device("cpu"))
    lora.attach(base.model, spec, seed)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in lora.adapter(base.model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return base


def states(model, row):
    return model(torch.tensor([row.ids])).logits[0]


@pytest.mark.parametrize(
    "spec",
    [
        Lora(rank=4, alpha=8.0),
        Lora(rank=4, alpha=8.0, rslora=True),
        Lora(rank=3, alpha=5.0, dora=True),
        Lora(rank=2, alpha=4.0, targets=("q_proj", "down_proj")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # the oracle asks by an old name
def test_names_values_and_gradients_are_pefts(llama, spec):
    own = tuned(llama, spec)
    theirs = peft.get_peft_model(
        tiny.reference(llama),
        peft.LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            target_modules=list(spec.targets) or "all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    found = lora.adapter(own.model)
    report = peft.set_peft_model_state_dict(theirs, {name: tensor.detach() for name, tensor in found.items()})
    names = {name.replace("vector.weight", "vector") for name in found}  # PEFT's files drop the ending, its models have it
    assert not report.unexpected_keys and names == peft.get_peft_model_state_dict(theirs).keys()
    for base in (own.model, theirs):
        base.eval()
        base.zero_grad(set_to_none=True)
        states(base, ROWS[0]).square().mean().backward()
    assert torch.allclose(states(own.model, ROWS[0]), states(theirs, ROWS[0]), atol=2e-4)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(found)
    for name, tensor in found.items():
        other = gradients[name.replace(".weight", ".default.weight")]
        assert torch.allclose(tensor.grad, other.view_as(tensor.grad), rtol=1e-3, atol=1e-4 * float(other.abs().max())), name


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_reaches_the_adapter_alone(llama, dora):
    base = tuned(llama, Lora(rank=4, alpha=8.0, dropout=0.5, dora=dora))
    plain = tuned(llama, Lora(rank=4, alpha=8.0, dora=dora))
    batch = pack(ROWS)
    base.model.train()
    drawn = [base.model(batch.ids, position_ids=batch.positions, segments=batch.segments).logits for _ in range(2)]
    assert not torch.equal(*drawn)
    base.model.eval()
    plain.model.eval()
    assert torch.equal(states(base.model, ROWS[0]), states(plain.model, ROWS[0]))


def test_before_the_first_step_the_base_answers(llama):
    base = load(llama, torch.device("cpu"))
    before = states(base.model.eval(), ROWS[0])
    assert lora.attach(base.model, Lora(dora=True), 0) == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert torch.allclose(states(base.model, ROWS[0]), before, atol=1e-4)
    assert {name for name, parameter in base.model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in base.model.named_parameters() if "lora" in name
    }


def test_a_seed_draws_the_same_matrices_and_another_others(llama):
    def drawn(seed):
        base = load(llama, torch.device("cpu"))
        lora.attach(base.model, Lora(rank=2), seed)
        return lora.adapter(base.model)["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]

    assert torch.equal(drawn(4), drawn(4)) and not torch.equal(drawn(4), drawn(5))


def test_bfloat16_rounds_the_frozen_layers_and_nothing_learnt(llama):
    base = load(llama, torch.device("cpu"))
    lora.attach(base.model, Lora(rank=2), 0, torch.bfloat16)
    assert {tensor.dtype for tensor in lora.adapter(base.model).values()} == {torch.float32}
    assert base.model.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16
    close = states(base.model.eval(), ROWS[0])
    assert torch.nn.functional.cosine_similarity(close.flatten(), states(tiny.reference(llama), ROWS[0]).flatten(), 0) > 0.995


@pytest.mark.parametrize("spec", [Lora(rank=4), Lora(rank=4, dora=True)])
def test_what_is_stored_is_what_publishing_takes(llama, spec):
    base = tuned(llama, spec)
    data = save({name: tensor.detach() for name, tensor in lora.adapter(base.model).items()})
    found = tensors.read_header(lambda start, count: data[start : start + count], len(data))
    targets = tuple(sorted({name.split(".")[-3] for name in found if "lora_A" in name}))
    fit.check_adapter(found, fit.Lora(spec.rank, spec.alpha, spec.rslora, spec.dora, targets), None)


def test_a_target_that_is_not_there_is_named(llama):
    with pytest.raises(ValueError, match="nothing"):
        lora.attach(load(llama, torch.device("cpu")).model, Lora(targets=("nothing",)), 0)
