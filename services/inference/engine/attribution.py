"""Gradient × input: what each token of a prompt is worth to a label or a continuation, to first order (tensors).

A second view of the model, whose own attention keeps what a backward pass needs. Over the eager backend it shares the weights; beside the
fused one, which has them packed, they are read again at the first call: once more the model's size, and about 0.8 MB a token of the
prompt while a call runs (gemma-3-270m; the door bounds it). Only embeddings get a gradient, so nothing is kept for the weights.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from services.inference.engine.backend import Factors, Weights
from services.inference.engine.calls import Weigh, Weighed
from services.inference.engine.eager import EagerBackend, Given, causal_class
from services.inference.engine.runner import Source
from services.inference.engine.step import Adapter, AdapterProblem


@dataclass(slots=True)
class Gradients:
    """`make` reads the model at the first call. One caller at a time."""

    make: Callable[[], Any]
    device: torch.device
    width: int
    source: Source | None = None
    _model: Any = None  # its head alone, over given states
    _trunk: Any = None
    _linears: dict[str, torch.nn.Linear] = field(default_factory=dict)

    def weigh(self, call: Weigh) -> Weighed:
        """The answer; whatever is wrong with one call is its `error`."""
        try:
            if self._model is None:
                self._load()
            tuned = self._adapter(call.owner, call.adapter) if call.adapter else None
            if not call.continuations and (tuned is None or tuned[1].head is None):
                return Weighed(call.id, error="adapter_headless")
            with self._adapted(tuned[1] if tuned else None):
                return self._weighed(call, tuned)
        except AdapterProblem as problem:
            return Weighed(call.id, error=problem.word)
        except MemoryError:
            return Weighed(call.id, error="out_of_memory")
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                return Weighed(call.id, error="out_of_memory")
            raise

    # What `Source` asks of a backend.

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer, by its path."""
        return {path: (each.out_features, each.in_features) for path, each in self._linears.items()}

    def base(self, path: str) -> torch.Tensor:
        """A linear layer's weight, float32."""
        return self._linears[path].weight.float()

    def _load(self) -> None:
        model = self.make().eval().requires_grad_(False)
        self._trunk, prefix = model.base_model, model.base_model_prefix
        linears = [(name, each) for name, each in self._trunk.named_modules() if isinstance(each, torch.nn.Linear)]
        self._linears = {f"{prefix}.{name}": each for name, each in linears}
        setattr(model, prefix, Given())
        self._model = model

    @contextmanager
    def _adapted(self, weights: Weights | None) -> Iterator[None]:
        """With an adapter in the forward inside: gain * (W x + up (down x)) in each layer it changes."""
        with ExitStack() as stack:
            for path, factors in weights.factors.items() if weights is not None else ():
                stack.callback(self._linears[path].register_forward_hook(_hook(factors)).remove)
            yield

    def _adapter(self, owner: str, digest: str) -> tuple[Adapter, Weights]:
        """Read and checked as for the batch, each time: what was deleted meanwhile is not here. Raises AdapterProblem."""
        if self.source is None:
            raise AdapterProblem("no_adapters", "there is no store")
        return self.source.read(owner, digest, cast("Any", self))

    def _weighed(self, call: Weigh, tuned: tuple[Adapter, Weights] | None) -> Weighed:
        length, rows = len(call.prefix), call.continuations or ((),)
        longest = length + max(0, max(map(len, rows)) - 1)  # nothing follows the last token
        ids = [(*call.prefix, *row[:-1]) + (0,) * (longest - length - max(0, len(row) - 1)) for row in rows]
        with torch.no_grad():
            embedded = self._trunk.get_input_embeddings()(torch.tensor(ids, device=self.device))
        # All rows read the same prompt: its gradient is summed over them. Padding comes after what is read, so causality masks it.
        prompt = embedded[:1, :length].clone().requires_grad_()
        inputs = torch.cat([prompt.expand(len(rows), -1, -1), embedded[:, length:]], 1)
        with torch.enable_grad():
            scores = self._continued(call, inputs, length) if call.continuations else self._labelled(inputs, *cast("Any", tuned))
            if not bool(torch.isfinite(scores).all()):
                return Weighed(call.id, error="nan")
            target = int(scores.argmax()) if call.target is None else call.target
            (gradient,) = torch.autograd.grad(scores[target], prompt)
        weights = (gradient.float() * prompt.detach().float()).sum(-1)[0]
        if not bool(torch.isfinite(weights).all()):
            return Weighed(call.id, error="nan")
        return Weighed(call.id, tuple(weights.tolist()), tuple(scores.tolist()), target)

    def _continued(self, call: Weigh, inputs: torch.Tensor, length: int) -> torch.Tensor:
        """Log-probabilities of the candidates, [rows]."""
        states = self._trunk(inputs_embeds=inputs, use_cache=False).last_hidden_state
        # Only where a token is scored, and side by side: the output matrix is most of a small model.
        chosen = torch.cat([row[length - 1 : length - 1 + len(tokens)] for row, tokens in zip(states, call.continuations, strict=True)])
        logits = self._model(inputs_embeds=chosen[None], use_cache=False).logits[0].float()
        targets = torch.tensor([token for tokens in call.continuations for token in tokens], device=self.device)
        each = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        rows = torch.split(each, [len(tokens) for tokens in call.continuations])
        found = torch.stack([tokens.mean() if call.contrast else tokens.sum() for tokens in rows])
        return torch.log_softmax(found - torch.tensor(call.contrast, device=self.device), 0) if call.contrast else found

    def _labelled(self, inputs: torch.Tensor, adapter: Adapter, weights: Weights) -> torch.Tensor:
        """Log-probabilities of the head's labels, [labels]."""
        states = self._trunk(inputs_embeds=inputs, use_cache=False).last_hidden_state[0].float()
        pooled = states.mean(0) if adapter.pooling == "MEAN" else states[-1]
        assert weights.head is not None  # asked before
        logits = weights.head.weight.to(self.device) @ pooled + weights.head.bias.to(self.device)
        return torch.log_softmax(logits / adapter.temperature, 0)


def read(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with transformers' own attention. Built from data: no code of its directory runs and no pickle is read."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    model_class = causal_class(json.loads((directory / "config.json").read_text()))
    model = model_class.from_pretrained(directory, dtype=dtype, use_safetensors=True, local_files_only=True, attn_implementation="sdpa")
    return model.to(device)


def share(backend: EagerBackend) -> Any:
    """A second model over the tensors of the one that serves: it costs no memory, and none of its hooks."""
    served, trunk = backend.head, backend.trunk
    config = type(served.config).from_dict(served.config.to_dict())
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = type(served)(config)
    prefix = model.base_model_prefix
    state = served.state_dict() | {f"{prefix}.{name}": tensor for name, tensor in trunk.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    for name, buffer in trunk.named_buffers():  # those that no checkpoint holds, too: rotary frequencies
        owner, _, last = name.rpartition(".")
        model.base_model.get_submodule(owner)._buffers[last] = buffer
    return model


def gradients_of(backend: Any, directory: Path, source: Source | None) -> Gradients:
    """For the backend that serves."""
    if isinstance(backend, EagerBackend):
        return Gradients(lambda: share(backend), backend.device, backend.width, source)
    dtype = cast("torch.dtype", getattr(backend, "dtype", torch.bfloat16))
    return Gradients(lambda: read(directory, backend.device, dtype), backend.device, backend.width, source)


def _hook(factors: Factors) -> Any:
    def add(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        (x,) = args
        down, up = factors.down.to(x), factors.up.to(x)
        added = x @ down.T @ up.T
        if factors.gain is None:
            return output + added
        bias = 0.0 if module.bias is None else module.bias
        return factors.gain.to(x) * (output - bias + added) + bias

    return add
