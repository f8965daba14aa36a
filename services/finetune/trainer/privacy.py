"""Differentially private training: Poisson draws, one clipped gradient an example, noise on every step, and guards that end the job.

opacus is imported here alone, and only where a spec asks for privacy. Its hooks give each example's gradient and its accountants count;
clipping and noise are ours, since the noise must come from the operating system and be there on a step without examples, too.
"""

import functools
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch

from services.finetune.trainer.batches import Batch, Example, layout
from services.finetune.trainer.heads import Head
from services.finetune.trainer.lora import LoraLinear
from services.finetune.trainer.loss import supervised_loss
from services.finetune.trainer.model import Base
from services.finetune.trainer.spec import Privacy, Spec, learning_rate
from services.finetune.trainer.train import Step, Trainer

__all__ = ["Accounts", "GuardTripped", "Mechanism", "PoissonSampler", "PrivateTrainer", "Sampler", "canary", "gaussian"]

_CANARY = 1e-3  # relative difference of a loss between what was trained and what is stored
_DRAWS = 30  # after so many the spread of their sizes is looked at
_AGREE = 0.35  # PRV's epsilon may lie so far below RDP's, which is an upper bound as well, but looser


class GuardTripped(Exception):
    """The promise could not be kept; `rule` says which guard saw it."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class Sampler(Protocol):
    """Draws the examples of a step."""

    def draw(self) -> list[int]:
        """Indices, perhaps none."""
        ...


class PoissonSampler:
    """Each of `count` examples is in a step by chance `rate`, by itself: what the accountants assume, and nothing else is."""

    def __init__(self, count: int, rate: float, source: Callable[[int], bytes] = os.urandom) -> None:
        """`source` gives random bytes."""
        self._count, self._bound, self._source = count, int(rate * 2**64), source

    def draw(self) -> list[int]:
        """Indices of the next step."""
        drawn = np.frombuffer(self._source(8 * self._count), dtype=np.uint64)
        chosen: list[int] = np.flatnonzero(drawn < np.uint64(min(self._bound, 2**64 - 1))).tolist()
        return chosen


def gaussian(count: int, source: Callable[[int], bytes] = os.urandom) -> torch.Tensor:
    """`count` standard normal numbers from random bytes, float32.

    Half the sum of four: the grid of floating-point numbers of a single draw would give the exact value away.
    """
    pairs = -(-4 * count // 2)
    words = np.frombuffer(source(16 * pairs), dtype=np.uint64) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # neither 0 nor 1
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * math.pi * uniform[pairs:]
    drawn = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: 4 * count].reshape(4, count)
    return torch.from_numpy((drawn.sum(0) / 2.0).astype(np.float32))


@functools.lru_cache(maxsize=4_096)
def _epsilon(kind: str, noise: float, rate: float, steps: int, delta: float) -> float:
    """By opacus' accountant of this kind. Seconds for PRV, so no answer is worked out twice."""
    accountant = cast("Any", importlib.import_module("opacus.accountants")).create_accountant(mechanism=kind)
    accountant.history = [(noise, rate, steps)]
    return float(accountant.get_epsilon(delta=delta))


@functools.lru_cache(maxsize=64)
def _least_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise by PRV, to 2 % of epsilon from below. RDP finds where to look: it asks for a little more. Raises ValueError."""
    search = cast("Any", importlib.import_module("opacus.accountants.utils")).get_noise_multiplier
    most = float(
        search(target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="rdp", epsilon_tolerance=epsilon / 50)
    )
    least = 0.5 * most
    while (spent := _epsilon("prv", most, rate, steps, delta)) > epsilon:
        least, most = most, 1.1 * most
    for _ in range(12):
        if spent >= 0.98 * epsilon:
            break
        middle = (least + most) / 2
        found = _epsilon("prv", middle, rate, steps, delta)
        if found <= epsilon:
            most, spent = middle, found
        else:
            least = middle
    return most


class Accounts:
    """What steps spend, by two accountants that know nothing of each other."""

    def __init__(self, privacy: Privacy, rate: float, steps: int) -> None:
        """The noise is the least that keeps `steps` within the promise. Raises GuardTripped where none does."""
        self.privacy, self.rate, self.steps = privacy, rate, steps
        try:
            self.noise = _least_noise(privacy.epsilon, privacy.delta, rate, steps)
        except ValueError:
            raise GuardTripped("privacy.budget_too_low") from None

    def epsilon(self, steps: int) -> float:
        """Spent by `steps`, by PRV; RDP must agree. Raises GuardTripped."""
        if steps == 0:
            return 0.0
        prv, rdp = self._by("prv", steps), self._by("rdp", steps)
        if not (1 - _AGREE) * rdp <= prv <= 1.02 * rdp + 0.01:
            raise GuardTripped("privacy.accountants_disagree")
        return prv

    def bought(self, epsilon: float) -> int:
        """The fewest steps that spend `epsilon`: what was charged before is known by its price."""
        if epsilon <= 0.0:
            return 0
        low, high = 0, self.steps
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if middle and self._by("prv", middle) >= epsilon - 1e-6 else (middle + 1, high)
        return low

    def _by(self, kind: str, steps: int) -> float:
        return _epsilon(kind, self.noise, self.rate, steps, self.privacy.delta)


class Mechanism:
    """Sums clipped gradients of examples and adds the noise; parameters get the mean over the expected batch as their gradient."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], clip_norm: float, noise: float, expected: float, normal: Callable[[int], torch.Tensor]
    ) -> None:
        self._parameters = [cast("Any", parameter) for parameter in parameters]
        self._clip_norm, self._noise, self._expected, self._normal = clip_norm, noise, expected, normal
        self._sums = [torch.zeros_like(parameter) for parameter in parameters]

    def accumulate(self, examples: int) -> None:
        """Take over the gradients that the hooks left. Raises GuardTripped where they are not one an example."""
        samples = [getattr(parameter, "grad_sample", None) for parameter in self._parameters]
        if any(not isinstance(sample, torch.Tensor) or len(sample) != examples for sample in samples):
            raise GuardTripped("privacy.gradient_not_per_example")
        norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in cast("Any", samples)], 1).norm(dim=1)
        factors = (self._clip_norm / (norms + 1e-6)).clamp(max=1.0)
        for total, sample, parameter in zip(self._sums, samples, self._parameters, strict=True):
            total.add_(torch.einsum("n,n...->...", factors, sample))
            parameter.grad_sample = None
            parameter.grad = None

    def finish(self) -> float:
        """Noise, and the gradient of the step; its norm."""
        squares = 0.0
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            drawn = self._normal(total.numel()).view_as(total).to(total.device)
            parameter.grad = (total + self._noise * self._clip_norm * drawn) / self._expected
            squares += float(parameter.grad.square().sum())
            total.zero_()
        return math.sqrt(squares)


class PrivateTrainer(Trainer):
    """A Trainer whose steps spend a budget. `charge` is told the epsilon of a block of steps before the first of them runs."""

    def __init__(
        self,
        spec: Spec,
        base: Base,
        examples: Sequence[Example],
        validation: Sequence[Example] = (),
        *,
        charge: Callable[[float], None],
        charged: float = 0.0,
        sampler: Sampler | None = None,
    ) -> None:
        """`charged`: epsilon that earlier attempts were charged; it stays spent. Raises GuardTripped."""
        super().__init__(spec, base, examples, validation)
        privacy = spec.privacy
        if privacy is None or privacy.unit != "example" or spec.lora is None or spec.lora.dora:
            raise GuardTripped("privacy.unsupported")
        self.rate = min(1.0, spec.hyperparameters.batch_size / len(examples))
        self.accounts = Accounts(privacy, self.rate, self.target)
        self._bought = self.accounts.bought(charged)  # steps paid for, by all attempts
        self._spent = self._bought  # of these, used up or lost with an attempt
        if self._bought >= self.accounts.steps:
            raise GuardTripped("privacy.spent")
        self._charge = charge
        self._sampler = sampler or PoissonSampler(len(examples), self.rate)
        self._sizes: list[int] = []
        trained = self.parameters()
        if any(parameter.device != base.device for parameter in trained.values()):
            raise GuardTripped("privacy.parameters_elsewhere")
        normal = gaussian if privacy.secure_random else torch.randn
        expected = self.rate * len(examples)
        self._mechanism = Mechanism(list(trained.values()), privacy.clip_norm, self.accounts.noise, expected, normal)
        self._hooks = _hooked(base, self.head)
        # Else the first layer's backward hook would find no input that has a gradient.
        base.model.get_input_embeddings().register_forward_hook(lambda _, __, states: states.requires_grad_(states.is_leaf or None))
        self._start = {name: value.detach().clone() for name, value in trained.items() if name.endswith("lora_B.weight")}

    @property
    def epsilon(self) -> float:
        """What all steps paid for have spent, repeated ones included."""
        return self.accounts.epsilon(self._bought)

    def resumed(self) -> None:
        """After a restore: steps that earlier attempts paid for are not given back, so fewer may be left than the target asks."""
        self.target = min(self.target, self.done + self.accounts.steps - self._bought)

    def step(self) -> Step:
        """One noisy step over a Poisson draw, perhaps an empty one. Raises GuardTripped."""
        began = time.perf_counter()
        own = self.spec.hyperparameters
        if self._spent == self._bought:
            block = min(self.spec.checkpoint_interval_steps, self.target - self.done)
            self._charge(self.accounts.epsilon(self._bought + block))
            self._bought += block
        self._spent += 1
        if self._spent > self.accounts.steps:
            raise GuardTripped("privacy.spent")
        chosen = self._drawn()
        self.base.model.train()
        total, tokens = 0.0, 0
        for batch in layout(chosen, self.spec.step_tokens, False, self.base.device):
            loss = self._mean_losses(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self._mechanism.accumulate(batch.ids.shape[0])
            total += float(loss.detach())
            tokens += batch.tokens
        norm = self._mechanism.finish()
        mean = total / max(1, len(chosen))
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise FloatingPointError(f"step {self.done + 1} has loss {mean} and gradient norm {norm}")
        factor = learning_rate(own, self.done, self.target)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self._moved()
        supervised = sum(example.supervised for example in chosen)
        return Step(self.done, mean, own.learning_rate * factor, norm, tokens, supervised, time.perf_counter() - began)

    def _drawn(self) -> list[Example]:
        """The next draw. Raises GuardTripped for sizes that no Poisson sampler gives: too even, as a shuffled epoch's are, or too wild."""
        indices = self._sampler.draw()
        if len(set(indices)) != len(indices):
            raise GuardTripped("privacy.sampler")
        self._sizes.append(len(indices))
        if len(self._sizes) >= _DRAWS:
            expected = self.rate * len(self.examples)
            variance = expected * (1 - self.rate)
            ratio = sum((size - expected) ** 2 for size in self._sizes) / len(self._sizes) / max(variance, 1e-9)
            if variance > 0.5 and not 0.2 < ratio < 4.0:
                raise GuardTripped("privacy.sampler")
        return [self.examples[at] for at in indices]

    def _mean_losses(self, batch: Batch) -> torch.Tensor:
        """Sum over examples of their own mean loss: a long chat weighs no more than a short one before it is clipped."""
        states = self.base.states(batch)
        if self.head is not None:
            return torch.nn.functional.cross_entropy(self.head(states), batch.targets, reduction="sum")
        rows = batch.select // batch.ids.shape[1]
        counts = torch.bincount(rows, minlength=batch.ids.shape[0])
        return supervised_loss(states, self.output, batch.targets, self.base.softcap, 1.0 / counts[rows])

    def _moved(self) -> None:
        """After the first step every lora_B has left its start: noise alone moves it. Raises GuardTripped."""
        if not self._start:
            return
        now = self.parameters()
        if any(torch.equal(now[name].detach(), before) or not now[name].isfinite().all() for name, before in self._start.items()):
            raise GuardTripped("privacy.weights_did_not_move")
        self._start = {}


def canary(trained: Trainer, stored: Trainer, files: Mapping[str, torch.Tensor], examples: Sequence[Example]) -> None:
    """Whether what is stored loses as much as what was trained: `stored` is a fresh trainer of the same spec. Raises GuardTripped."""
    stored.put(files)
    before, after = trained.evaluate(examples).loss, stored.evaluate(examples).loss
    if not math.isfinite(after) or abs(before - after) > _CANARY * max(1.0, abs(before)):
        raise GuardTripped("privacy.stored_weights_differ")


def _hooked(base: Base, head: Head | None) -> list[Any]:
    """opacus' hooks on every layer that learns, with gradients of an example by our own formulas."""
    grad_sample = cast("Any", importlib.import_module("opacus.grad_sample"))
    grad_sample.register_grad_sampler(LoraLinear)(_lora_gradients)
    grad_sample.register_grad_sampler(Head)(_head_gradients)
    # Not strict: rotary tables are buffers, and no example's gradient reaches another through them.
    modules = [base.model] + ([head] if head is not None else [])
    return [grad_sample.GradSampleModule(module, loss_reduction="sum", strict=False) for module in modules]


def _lora_gradients(layer: LoraLinear, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """x [n, T, in] and the output's gradient [n, T, out] → of A [n, r, in], of B [n, out, r]."""
    x = activations[0].float()
    back = layer.scaling * backprops.float()
    return {
        layer.lora_A: torch.einsum("ntr,nti->nri", back @ layer.lora_B, x),
        layer.lora_B: torch.einsum("nto,ntr->nor", back, x @ layer.lora_A.T),
    }


def _head_gradients(layer: Head, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """States [n, width] and the logits' gradient [n, labels] → of W [n, labels, width], of b [n, labels]."""
    return {layer.weight: torch.einsum("nl,nw->nlw", backprops, activations[0] / layer.scale), layer.bias: backprops}
