"""The training loop: forward and backward of packed rows, AdamW, evaluation, early stopping. It knows no store and no wire."""

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from services.finetune.trainer import lora as adapters
from services.finetune.trainer.batches import Batch, Example, layout, pack, taken
from services.finetune.trainer.heads import Head
from services.finetune.trainer.loss import supervised_loss
from services.finetune.trainer.model import Base
from services.finetune.trainer.products import narrow_is_fast
from services.finetune.trainer.spec import HEAD_RATE, Method, Spec, learning_rate, steps

__all__ = ["Evaluation", "Step", "Trainer"]


_SIZED = 32  # texts, and tokens of each, by which the size of states is measured


@dataclass(frozen=True, slots=True)
class Step:
    """What an optimizer step did. `loss` in nats per supervised token, or per text."""

    number: int  # 1-based: steps done
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    supervised: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over the validation examples. `logits` [n, labels] for a classifier, in the examples' order."""

    loss: float
    logits: torch.Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)  # others, by name


@dataclass(slots=True)
class Best:
    """The best evaluation so far, and how many since were no better."""

    loss: float = math.inf
    step: int = 0
    worse: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Trainer:
    """A model under training; `step` moves it, `evaluate` looks at it. Deterministic for one device, thread count and spec."""

    def __init__(self, spec: Spec, base: Base, examples: Sequence[Example], validation: Sequence[Example] = ()) -> None:
        """Attach the adapter, or unfreeze the base where the spec names none. Raises ValueError for a target that is not there."""
        self.spec, self.base = spec, base
        self.examples, self.validation = examples, validation
        own = spec.hyperparameters
        torch.manual_seed(spec.seed)
        narrow = spec.precision == "bfloat16" or (spec.precision == "auto" and narrow_is_fast(base.device))
        precision = torch.bfloat16 if narrow else torch.float32
        self.precision = "bfloat16" if narrow else "float32"
        if spec.lora is not None:
            self.targets = adapters.attach(base.model, spec.lora, spec.seed, precision)
        else:
            base.model.requires_grad_(True)
            self.targets = ()
        # Where the output matrix is learnt, too, its gradient is float32's.
        self.output = base.output.detach().to(precision) if spec.lora is not None and spec.method is not Method.CLASSIFY else base.output
        self.head = Head(len(spec.labels), base.width, base.device) if spec.method is Method.CLASSIFY else None
        trained = self.parameters()
        head = {} if self.head is None else {f"head.{name}": tensor for name, tensor in self.head.tensors().items()}
        rest = [tensor for name, tensor in trained.items() if name not in head]
        groups: list[dict[str, Any]] = [{"params": rest, "full": own.learning_rate}]
        if self.head is not None:
            size = self._size()
            rate = HEAD_RATE / size if own.head_learning_rate is None else own.head_learning_rate
            groups.append({"params": [trained[name] for name in head], "full": rate})
            self.head.scale = size * math.sqrt(base.width)
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=own.learning_rate,
            betas=(own.beta1, own.beta2),
            eps=own.epsilon,
            weight_decay=own.weight_decay,
            fused=True,
        )
        self.done = 0  # optimizer steps
        self.target = steps(spec, len(examples))
        self.per_epoch = -(-len(examples) // own.batch_size)
        self.best = Best()

    def _size(self) -> float:
        """Root mean square of the base's states over random ids: no row has a say, so private runs may ask, too."""
        drawn = np.random.Generator(np.random.PCG64(0)).integers(0, self.base.vocabulary, (_SIZED, _SIZED)).tolist()
        self.base.model.eval()
        with torch.no_grad():
            states = self.base.states(pack([Example(tuple(ids), label=0) for ids in drawn], self.base.device).to(self.base.device))
        return max(1e-6, float(states.square().mean().sqrt()))

    def parameters(self) -> dict[str, torch.Tensor]:
        """What is trained: the adapter by PEFT's names (or the base by its own), and the head's as `head.…`; sorted."""
        body = adapters.adapter(self.base.model) if self.spec.lora is not None else dict(self.base.model.named_parameters())
        head = {} if self.head is None else {f"head.{name}": tensor for name, tensor in self.head.tensors().items()}
        return dict(sorted(body.items())) | head

    def step(self) -> Step:
        """One optimizer step over the next batch. Raises FloatingPointError, unmoved, where loss or gradient are no numbers."""
        began = time.perf_counter()
        own = self.spec.hyperparameters
        chosen = [self.examples[at] for at in taken(self.spec.seed, self.done, len(self.examples), own.batch_size)]
        supervised = sum(example.supervised for example in chosen)
        self.base.model.train()
        total, tokens = 0.0, 0
        for batch in self.batches(chosen):
            loss = self._loss(batch) / supervised
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            tokens += batch.tokens
        factor = learning_rate(own, self.done, self.target)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * factor
        if self.head is not None and self.head.weight.grad is not None:
            self.head.weight.grad.div_(self.head.scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters().values(), own.clip_norm or math.inf, foreach=True)
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            raise FloatingPointError(f"step {self.done + 1} has loss {total} and gradient norm {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return Step(self.done, total, own.learning_rate * factor, float(norm), tokens, supervised, time.perf_counter() - began)

    def batches(self, chosen: Sequence[Example]) -> Iterable[Batch]:
        """The forward passes of a step."""
        return layout(chosen, self.spec.step_tokens, self.spec.packing, self.base.device)

    def due(self) -> bool:
        """Whether the step just done is followed by an evaluation: at the spec's interval or twice an epoch, and at the end."""
        every = self.spec.evaluation_interval_steps or max(1, self.per_epoch // 2)
        return bool(self.validation) and (self.done % every == 0 or self.done == self.target)

    def evaluate(self, examples: Sequence[Example] | None = None) -> Evaluation:
        """Loss, and a classifier's logits, without dropout and without a gradient."""
        examples = self.validation if examples is None else examples
        self.base.model.eval()
        total = 0.0
        logits = torch.empty((len(examples), len(self.spec.labels))) if self.head is not None else None
        # Neighbours of like length waste no attention; a window holds many forward passes and few ids.
        ranked = sorted(range(len(examples)), key=lambda at: len(examples[at].ids))
        with torch.no_grad():
            for window in _windows(ranked, [len(examples[at].ids) for at in ranked], self.spec.step_tokens):
                (batch,) = layout([examples[at] for at in window], 2**31, True, self.base.device)
                states = self.base.states(batch)
                if self.head is None or logits is None:
                    total += float(supervised_loss(states, self.base.output, batch.targets, self.base.softcap))
                else:
                    found = self.head(states)
                    total += float(torch.nn.functional.cross_entropy(found, batch.targets, reduction="sum"))
                    logits[window] = found.float().cpu()
        return Evaluation(total / max(1, sum(example.supervised for example in examples)), logits)

    def judge(self, evaluation: Evaluation) -> bool:
        """Remember the best; whether patience has run out, by which the target becomes the step just done."""
        rule = self.spec.early_stopping
        if evaluation.loss < self.best.loss - (rule.min_delta if rule else 0.0):
            self.best.loss, self.best.step, self.best.worse = evaluation.loss, self.done, 0
            if self.spec.lora is not None:  # the base's every weight twice would not fit
                self.best.tensors = self.snapshot()
        else:
            self.best.worse += 1
        if rule is not None and self.best.worse >= rule.patience and self.done < self.target:
            self.target = self.done
            return True
        return False

    @contextlib.contextmanager
    def untuned(self) -> Iterator[None]:
        """Inside, the model is the base alone."""
        layers = [module for module in self.base.model.modules() if isinstance(module, adapters.LoraLinear)]
        for layer in layers:
            layer.tuned = False
        try:
            yield
        finally:
            for layer in layers:
                layer.tuned = True

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of what is trained, on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.parameters().items()}

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a snapshot back. Raises ValueError where names or shapes differ."""
        own = self.parameters()
        if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
            raise ValueError("the tensors are not those of this job")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as `{name}.exp_avg`, `{name}.exp_avg_sq` and `{name}.step`, copied to the CPU."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters().items():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{kind}"] = value.detach().to("cpu", copy=True)
        return found

    def put_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put `moments` back."""
        self.optimizer.state.clear()
        for name, parameter in self.parameters().items():
            kinds = {kind: tensors[f"{name}.{kind}"] for kind in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{kind}" in tensors}
            if kinds:
                self.optimizer.state[parameter] = {kind: copy.deepcopy(value).to(parameter.device) for kind, value in kinds.items()}

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Sum over the batch's supervised tokens or texts, in nats."""
        states = self.base.states(batch)
        if self.head is not None:
            return torch.nn.functional.cross_entropy(self.head(states), batch.targets, reduction="sum")
        return supervised_loss(states, self.output, batch.targets, self.base.softcap)


def _windows(ranked: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Consecutive runs of at most `room` tokens, in order; a longer example is a run of its own."""
    windows: list[list[int]] = []
    left = 0
    for at, length in zip(ranked, lengths, strict=True):
        if not windows or length > left:
            windows.append([])
            left = room
        windows[-1].append(at)
        left -= length
    return windows
