"""LoRA, rsLoRA and DoRA beside frozen linear layers, under the names that PEFT gives their tensors."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from services.finetune.trainer.products import linear
from services.finetune.trainer.spec import Lora

__all__ = ["PREFIX", "LoraLinear", "adapter", "attach", "restore"]

PREFIX = "base_model.model."  # PEFT's, before a module's path


class _Product(torch.autograd.Function):
    """x W' + s (d A') B' with W frozen, sums taken in place; W may be bfloat16 while all else is float32.

    x, d [tokens, in] (d is x after dropout; None: no dropout), W [out, in], A [r, in], B [out, r] → [tokens, out].
    """

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, d: torch.Tensor | None, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out = linear(x.to(weight.dtype), weight).to(x.dtype)
        context.scaling, context.same = scaling, d is None
        d = x if d is None else d
        low = d @ a.T
        out.addmm_(low, b.T, alpha=scaling)
        context.save_for_backward(d, low, weight, a, b)
        return out

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        d, low, weight, a, b = context.saved_tensors
        back = grad @ b
        back *= context.scaling
        grad_a, grad_b = back.T @ d, (grad.T @ low).mul_(context.scaling)
        grad_x = grad_d = None
        if context.needs_input_grad[0]:
            grad_x = linear(grad.to(weight.dtype), weight.T).to(grad.dtype)
            if context.same:
                grad_x.addmm_(back, a)
        if context.needs_input_grad[1] and not context.same:
            grad_d = back @ a
        return grad_x, grad_d, None, grad_a, grad_b, None


class LoraLinear(torch.nn.Module):
    """A frozen linear layer [out, in] with A [r, in] and B [out, r]; with DoRA a magnitude [out] as well."""

    def __init__(self, linear: torch.nn.Linear, lora: Lora, generator: torch.Generator) -> None:
        """B is zero: the first step starts from the base. `generator` draws A, the same on every device."""
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scaling, self.dropout = lora.scaling, lora.dropout
        self.tuned = True  # False: the base alone answers
        drawn = torch.empty(lora.rank, linear.in_features)
        torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        device = linear.weight.device
        self.lora_A = torch.nn.Parameter(drawn.to(device))
        self.lora_B = torch.nn.Parameter(torch.zeros(linear.out_features, lora.rank, device=device))
        self.lora_magnitude_vector: torch.nn.Parameter | None = None
        if lora.dora:
            self.lora_magnitude_vector = torch.nn.Parameter(self.weight.detach().float().norm(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        flat = x.reshape(-1, self.in_features)
        dropped = torch.nn.functional.dropout(flat, self.dropout) if self.dropout and self.training else None
        if not self.tuned:
            out = torch.nn.functional.linear(flat.to(self.weight.dtype), self.weight).to(x.dtype)
        elif self.lora_magnitude_vector is None:
            out = _Product.apply(flat, dropped, self.weight, self.lora_A, self.lora_B, self.scaling)  # type: ignore[no-untyped-call]
        else:
            # PEFT: with dropout the base's part is rescaled on the dropped input too, and the plain base added back.
            tuned = _Product.apply(flat if dropped is None else dropped, None, self.weight, self.lora_A, self.lora_B, self.scaling)  # type: ignore[no-untyped-call]
            with torch.no_grad():  # the norm is a constant for the gradient, as in the paper
                norm = (self.weight.float() + self.scaling * (self.lora_B @ self.lora_A)).norm(dim=1)
            factor = (self.lora_magnitude_vector / norm)[None]
            out = factor * tuned
            if dropped is not None:
                narrow = self.weight.dtype
                out = out + torch.nn.functional.linear((flat - dropped).to(narrow), self.weight).to(x.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)


def attach(model: torch.nn.Module, lora: Lora, seed: int, precision: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Freeze `model` and put LoRA beside its targets; the last parts of their names, sorted.

    The output matrix is never a target. Raises ValueError for a target that names no linear layer.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    head = getattr(model, "lm_head", None)
    found: set[str] = set()
    for path, module in list(model.named_modules()):
        leaf = path.rpartition(".")[2]
        if not isinstance(module, torch.nn.Linear) or module is head or (lora.targets and leaf not in lora.targets):
            continue
        module.weight.data = module.weight.data.to(precision)
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, leaf, LoraLinear(module, lora, generator))
        found.add(leaf)
    if missing := sorted(set(lora.targets) - found):
        raise ValueError(f"no linear layer is named {missing[0]}")
    return tuple(sorted(found))


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's parameters by PEFT's names, sorted; these are the parameters themselves, no copies."""
    return dict(sorted(_named(model)))


def restore(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put an adapter's values back. Raises ValueError where names or shapes differ."""
    own = adapter(model)
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise ValueError("the adapter's tensors are not those of this job")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield f"{PREFIX}{path}.lora_A.weight", module.lora_A
            yield f"{PREFIX}{path}.lora_B.weight", module.lora_B
            if module.lora_magnitude_vector is not None:
                yield f"{PREFIX}{path}.lora_magnitude_vector.weight", module.lora_magnitude_vector
