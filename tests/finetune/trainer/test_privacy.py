"""T9, C14: private training keeps its promise, and each guard sees the bug it was made for."""

import random
import sys
import threading

import pytest
import torch
from scipy import stats

from services.finetune.trainer import privacy
from services.finetune.trainer.attempt import DONE, INPUT, Attempt
from services.finetune.trainer.batches import Example, pad
from services.finetune.trainer.control import Failure
from services.finetune.trainer.model import load
from services.finetune.trainer.privacy import Accounts, GuardTripped, Mechanism, PoissonSampler, PrivateTrainer
from services.finetune.trainer.spec import Hyperparameters, Lora, Method, Privacy, Spec
from services.finetune.trainer.train import Trainer
from tests.finetune.trainer import world

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:opacus")
PROMISE = Privacy(epsilon=8.0, delta=1e-3, secure_random=False)
LORA = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))


def spec(method=Method.CLASSIFY, **others):
    own = Hyperparameters(learning_rate=1e-2, epochs=2, batch_size=8)
    labels = ("a", "b", "c") if method is Method.CLASSIFY else ()
    return Spec(method, **{"lora": LORA, "hyperparameters": own, "privacy": PROMISE, "labels": labels, "packing": False} | others)


def examples(method=Method.CLASSIFY, count=40):
    source = random.Random(4)
    rows = [tuple(source.randrange(7, world.VOCABULARY) for _ in range(source.randint(3, 12))) for _ in range(count)]
    if method is Method.CLASSIFY:
        return [Example(ids, label=at % 3) for at, ids in enumerate(rows)]
    return [Example(ids, ((2, len(ids)),)) for ids in rows]


def trainer(directory, method=Method.CLASSIFY, **others):
    charges = others.pop("charges", [])
    changed = {key: others.pop(key) for key in list(others) if key in Spec.__dataclass_fields__}
    base = load(directory, torch.device("cpu"))
    return PrivateTrainer(spec(method, **changed), base, examples(method), charge=charges.append, **others)


@pytest.mark.parametrize("method", [Method.CLASSIFY, Method.CHAT])
def test_C14_gradients_of_examples_are_those_of_each_alone(tiny_base, method):
    own = trainer(tiny_base, method)
    rows = examples(method)[:5]
    own._mechanism._noise = 0.0
    own._mechanism._clip_norm = 1e9
    if own.head is not None:
        own.head.scale = 1.0  # else the head's gradients are taken as if states had norm 1
    with torch.no_grad():
        for tensor in own.parameters().values():
            tensor.add_(0.02 * torch.randn_like(tensor))
    own.base.model.train()
    own._mean_losses(pad(rows)).backward()
    together = {name: parameter.grad_sample.clone() for name, parameter in own.parameters().items()}
    for at, row in enumerate(rows):
        for parameter in own.parameters().values():
            parameter.grad, parameter.grad_sample = None, None
        own._mean_losses(pad([row])).backward()
        for name, parameter in own.parameters().items():
            alone, among = parameter.grad, together[name][at]
            assert torch.allclose(alone, among, rtol=1e-4, atol=1e-5 * float(alone.abs().max() + 1e-9)), name
            assert torch.allclose(alone, parameter.grad_sample[0], rtol=1e-4, atol=1e-6)
            parameter.grad_sample = None
        own.base.model.zero_grad(set_to_none=True)


def test_clipping_and_noise_are_opacus_own():
    from opacus.optimizers import DPOptimizer

    parameters = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(4))]
    torch.manual_seed(1)
    samples = [torch.randn(6, 3, 2), 5 * torch.randn(6, 4)]
    mechanism = Mechanism(parameters, 1.0, 0.0, 8.0, torch.randn)
    for parameter, sample in zip(parameters, samples, strict=True):
        parameter.grad_sample = sample.clone()
    mechanism.accumulate(6)
    mechanism.finish()
    found = [parameter.grad.clone() for parameter in parameters]
    theirs = DPOptimizer(torch.optim.SGD(parameters, 1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=8)
    for parameter, sample in zip(parameters, samples, strict=True):
        parameter.grad_sample = sample.clone()
    theirs.pre_step()
    assert all(torch.allclose(grad, parameter.grad, atol=1e-6) for grad, parameter in zip(found, parameters, strict=True))


def test_the_systems_noise_is_normal():
    drawn = privacy.gaussian(200_001)
    assert drawn.dtype is torch.float32 and len(drawn) == 200_001
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(privacy.gaussian(8), privacy.gaussian(8))


def test_C14_the_sampler_is_poisson_by_chi_square():
    source = random.Random(3)
    sampler = PoissonSampler(200, 0.05, source.randbytes)
    sizes = [len(sampler.draw()) for _ in range(4_000)]
    edges = [*range(4, 18)]
    counts = [sum(size <= 3 for size in sizes), *(sizes.count(size) for size in edges), sum(size > 17 for size in sizes)]
    law = stats.binom(200, 0.05)
    expected = [law.cdf(3), *(law.pmf(size) for size in edges), 1 - law.cdf(17)]
    assert stats.chisquare(counts, [share * len(sizes) for share in expected]).pvalue > 1e-4


def test_C14_two_accountants_agree_and_the_budget_is_met_from_below():
    accounts = Accounts(PROMISE, 0.1, 50)
    assert 7.8 < accounts.epsilon(50) <= 8.0
    assert [accounts.bought(accounts.epsilon(steps)) for steps in (0, 1, 7, 50)] == [0, 1, 7, 50]
    spent = [accounts.epsilon(steps) for steps in (0, 1, 10, 50)]
    assert spent == sorted(spent)


def test_an_empty_draw_is_a_step_of_noise(tiny_base):
    class Empty:
        def draw(self):
            return []

    own = trainer(tiny_base, sampler=Empty())
    before = own.snapshot()
    step = own.step()
    assert (step.number, step.tokens, step.loss) == (1, 0, 0.0)
    assert all(not torch.equal(before[name], value) for name, value in own.snapshot().items())


def test_the_ledger_is_charged_before_the_steps_and_never_less(tiny_base):
    charges = []
    own = trainer(tiny_base, charges=charges, checkpoint_interval_steps=4)
    assert own.target == 10
    own.step()
    assert len(charges) == 1 and charges[0] == own.accounts.epsilon(4)
    while own.done < own.target:
        own.step()
    assert charges == [own.accounts.epsilon(steps) for steps in (4, 8, 10)] and own.epsilon == charges[-1] <= 8.0


def test_C14_a_resume_never_resets_epsilon(tiny_base):
    charges = []
    first = trainer(tiny_base, charges=charges, checkpoint_interval_steps=4)
    for _ in range(5):
        first.step()
    # Killed: the last checkpoint is of step 4, eight steps are paid for.
    second = trainer(tiny_base, charges=charges, charged=charges[-1], checkpoint_interval_steps=4)
    second.done = 4
    second.resumed()
    assert second.target == 6
    while second.done < second.target:
        second.step()
    assert charges == sorted(charges) and second.epsilon == charges[-1] == second.accounts.epsilon(10)


def test_a_budget_that_earlier_attempts_spent_is_gone(tiny_base):
    with pytest.raises(GuardTripped, match=r"privacy\.spent"):
        trainer(tiny_base, charged=8.0)


# Each guard with its planted bug.


def test_T9_weights_that_do_not_move_are_seen(tiny_base, monkeypatch):
    own = trainer(tiny_base)
    monkeypatch.setattr(own.optimizer, "step", lambda: None)
    with pytest.raises(GuardTripped, match="did_not_move"):
        own.step()


def test_T9_a_shuffled_sampler_is_not_poisson(tiny_base):
    class Shuffled:
        def draw(self):
            return random.Random(0).sample(range(40), 8)

    own = trainer(tiny_base, sampler=Shuffled(), hyperparameters=Hyperparameters(epochs=8, batch_size=8))
    with pytest.raises(GuardTripped, match="sampler"):
        while own.done < own.target:
            own._drawn()
            own.done += 1


def test_T9_a_poisson_sampler_is_let_through(tiny_base):
    own = trainer(tiny_base, sampler=PoissonSampler(40, 0.2, random.Random(5).randbytes))
    for _ in range(300):
        own._drawn()


def test_T9_a_gradient_of_the_whole_batch_is_seen(tiny_base, monkeypatch):
    own = trainer(tiny_base)
    real = own._mean_losses

    def averaged(batch):
        loss = real(batch)
        for parameter in own.parameters().values():
            parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad_sample", each.grad[None]))
        return loss

    monkeypatch.setattr(own, "_mean_losses", averaged)
    monkeypatch.setattr(own._sampler, "draw", lambda: [1, 2, 3])
    with pytest.raises(GuardTripped, match="per_example"):
        own.step()


def test_T9_stored_weights_that_differ_are_seen(tiny_base):
    own = trainer(tiny_base)
    own.step()
    fresh = Trainer(spec(privacy=None), load(tiny_base, torch.device("cpu")), examples())
    files = own.snapshot()
    privacy.canary(own, fresh, files, examples()[:8])
    files["head.weight"] = files["head.weight"] + 1.0 + torch.arange(3)[:, None]
    with pytest.raises(GuardTripped, match="stored"):
        privacy.canary(own, fresh, files, examples()[:8])


def test_T9_accountants_that_disagree_are_seen(monkeypatch):
    accounts = Accounts(PROMISE, 0.1, 50)
    real = Accounts._by
    monkeypatch.setattr(Accounts, "_by", lambda self, kind, steps: real(self, kind, steps) * (0.4 if kind == "prv" else 1.0))
    with pytest.raises(GuardTripped, match="disagree"):
        accounts.epsilon(50)


def test_a_private_run_ends_with_its_statement(tiny_base):
    plane = world.plane(privacy=PROMISE, lora=LORA, packing=False)
    assert Attempt(plane, plane.objects, tiny_base, threading.Event(), interval_s=0.05).run() == DONE
    (outcome,) = plane.ends
    assert 0 < outcome.epsilon <= 8.0 and outcome.accountant == "prv"
    charged = [report.epsilon_charged for report in plane.reports if report.epsilon_charged is not None]
    assert charged == sorted(charged) and charged[-1] == outcome.epsilon
    assert outcome.rows == {"train": 40, "validation": 0}  # nothing was measured on rows it protects


@pytest.mark.parametrize("change", [{"privacy": Privacy(8.0, 1e-3, unit="user")}, {"lora": Lora(rank=2, dora=True)}])
def test_what_cannot_be_promised_is_refused(tiny_base, change):
    plane = world.plane(**{"privacy": PROMISE, "lora": LORA, "packing": False} | change)
    assert Attempt(plane, plane.objects, tiny_base, threading.Event(), interval_s=0.05).run() == INPUT
    assert plane.ends == [Failure("PRIVACY_GUARD", "privacy.unsupported")]


def test_without_a_promise_opacus_is_not_imported():
    import subprocess

    code = "import services.finetune.trainer.attempt, sys; sys.exit('opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
