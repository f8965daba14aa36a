"""Any causal language model of transformers over a paged KV pool (tensors).

The model's own code runs; only its attention is ours, registered with transformers under `ATTENTION`. All tokens of a step are one row
[1, T] without padding. The step's plan travels to the attention in the forward's keyword arguments, never in a module global.

Decoding sequences of similar length attend together, each slot gathered from its own sequence only, so that a neighbour's NaN cannot
reach it, and prefill chunks attend one by one. On CUDA, where torch's `varlen_attn` reads block tables of 16 tokens (`build` compares it
with the gathered form at load: some builds want another kernel package, some pages of 256), it replaces both, and decode steps replay a
captured graph per batch bucket.

THE CUDA PATHS HAVE NOT RUN ON A GPU YET. First run tests/inference/engine/test_golden.py with ARGOSY_TEST_DEVICE=cuda (float32, gathered),
then the same model in bfloat16 and look for "varlen_attn" in the log.
"""

import bisect
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

from services.inference.engine.backend import Batch, Weights
from services.inference.engine.kernels import Unsupported
from services.inference.engine.lora import Lora
from services.inference.engine.step import BLOCK_SIZE, DeviceLost
from services.pretrained.weights import ModelRefused

if TYPE_CHECKING:
    from services.inference.engine.settings import EngineSettings

ATTENTION = "argosy_paged"
QUERIES = 512  # of one chunk attended at once: bounds the mask to heads × 512 × context
GRAPH_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GPU_SHARE = 0.9  # of the memory free after warm-up that becomes KV pool; the rest is for activations and logits
CPU_TOKENS = 65_536  # of KV when the settings leave it open; pages are committed as they are written

Pool = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, each [slots, heads, dim]


class _Group:
    """Decoding sequences that attend together: their rows, the slots of what they see, and the mask of what is padding."""

    __slots__ = ("bias", "rows", "slots")

    def __init__(self, rows: torch.Tensor, slots: torch.Tensor, bias: torch.Tensor) -> None:
        self.rows = rows  # int64 [G]
        self.slots = slots  # int64 [G * L]
        self.bias = bias  # [G, 1, 1, L], 0 or -inf


class _Chunk:
    """Up to QUERIES consecutive tokens of one sequence. `bias` None: plain causal over this step's own keys."""

    __slots__ = ("bias", "end", "first", "slots")

    def __init__(self, first: int, end: int, slots: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.first = first  # rows [first, end) of the step
        self.end = end
        self.slots = slots  # int64 [L], oldest first
        self.bias = bias  # [end - first, L], 0 or -inf


class Plan:
    """What every layer of a step needs to attend; built once a step and window."""

    def __init__(self, batch: Batch, pools: dict[int, Pool], slots: int, dtype: torch.dtype) -> None:
        self.batch = batch
        self.pools = pools
        self.size = slots
        self.dtype = dtype
        self.windows: dict[int | None, tuple[list[_Group], list[_Chunk]]] = {}
        self.longest: tuple[int, int] | None = None  # most queries and most keys of a sequence; None: attend by gathering
        self.rows: list[int] = []
        self.lengths: list[int] = []

    def pool(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Pool:
        """The layer's pool; made on the layer's first step, when the shapes of its heads are known."""
        pool = self.pools.get(layer)
        if pool is None:
            pool = key.new_zeros((self.size, key.shape[1], key.shape[3])), value.new_zeros((self.size, value.shape[1], value.shape[3]))
            self.pools[layer] = pool
        return pool

    def window(self, window: int | None) -> tuple[list[_Group], list[_Chunk]]:
        """The step's groups and chunks when a token sees itself and at most window - 1 before it."""
        if window not in self.windows:
            if not self.rows:
                self.rows, self.lengths = self.batch.rows.tolist(), self.batch.lengths.tolist()
            self.windows[window] = self._groups(window), list(self._chunks(window))
        return self.windows[window]

    def _groups(self, window: int | None) -> list[_Group]:
        seen: dict[int, list[int]] = {}
        for b, length in enumerate(self.lengths):
            if self.rows[b + 1] - self.rows[b] == 1:
                # Sequences share a group within a factor of two of length: padding costs at most as much again.
                seen.setdefault((min(length, window) if window else length).bit_length(), []).append(b)
        groups = []
        device = self.batch.slots.device
        for members in seen.values():
            index = torch.tensor(members, device=device)
            lengths = self.batch.lengths[index].to(torch.int64)
            first = (lengths - window).clamp_min_(0) if window else torch.zeros_like(lengths)
            longest = max(min(self.lengths[b], window) if window else self.lengths[b] for b in members)
            position = first[:, None] + torch.arange(longest, device=device)
            absent = position >= lengths[:, None]
            # Padding reads the sequence's own last token: another's slot may hold NaN, and NaN × 0 is NaN.
            position = torch.minimum(position, lengths[:, None] - 1)
            blocks = self.batch.tables[index].to(torch.int64).gather(1, position // BLOCK_SIZE)
            bias = torch.zeros(absent.shape, dtype=self.dtype, device=device).masked_fill_(absent, -math.inf)
            rows = self.batch.rows[index].to(torch.int64)
            groups.append(_Group(rows, (blocks * BLOCK_SIZE + position % BLOCK_SIZE).reshape(-1), bias[:, None, None, :]))
        return groups

    def _chunks(self, window: int | None) -> Iterator[_Chunk]:
        device = self.batch.slots.device
        for b, length in enumerate(self.lengths):
            first, end = self.rows[b], self.rows[b + 1]
            if end - first == 1:
                continue
            if end - first == length <= QUERIES and (window is None or length <= window):
                yield _Chunk(first, end, None, None)
                continue
            for begin in range(first, end, QUERIES):
                stop = min(begin + QUERIES, end)
                newest = length - (end - stop)  # keys 0..newest-1 exist for the chunk's last query
                oldest = max(0, newest - (stop - begin) + 1 - window) if window else 0
                keys = torch.arange(oldest, newest, device=device)
                queries = torch.arange(newest - (stop - begin), newest, device=device)[:, None]
                hidden = keys > queries
                if window:
                    hidden |= keys <= queries - window
                bias = torch.zeros(hidden.shape, dtype=self.dtype, device=device).masked_fill_(hidden, -math.inf)
                slots = self.batch.tables[b].to(torch.int64)[keys // BLOCK_SIZE] * BLOCK_SIZE + keys % BLOCK_SIZE
                yield _Chunk(begin, stop, slots, bias)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Plan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D]. Writes the step's KV first."""
    strange = [name for name in ("s_aux", "position_bias", "cache") if others.get(name) is not None]
    if strange or attention_mask is not None or not getattr(module, "is_causal", True):
        raise Unsupported(f"its attention is not plain causal attention ({', '.join(strange) or 'a mask of its own'})")
    keys, values = paged.pool(cast("int", module.layer_idx), key, value)
    keys.index_copy_(0, paged.batch.slots, key[0].transpose(0, 1))
    values.index_copy_(0, paged.batch.slots, value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if paged.longest is not None and softcap is None:
        return _attend_varlen(query, keys, values, paged, paged.longest, scale, sliding_window), None
    groups, chunks = paged.window(sliding_window)
    heads, kv_heads = query.shape[1], key.shape[1]
    out = query.new_empty((query.shape[2], heads, value.shape[-1]))
    for group in groups:
        count = group.rows.shape[0]
        q = query[0].index_select(1, group.rows).transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, -1)
        k = keys.index_select(0, group.slots).view(count, -1, *keys.shape[1:]).transpose(1, 2)
        v = values.index_select(0, group.slots).view(count, -1, *values.shape[1:]).transpose(1, 2)
        out[group.rows] = _weigh(q, k, v, group.bias, scale, softcap).reshape(count, heads, -1)
    for chunk in chunks:
        rows = slice(chunk.first, chunk.end)
        q = query[:, :, rows].reshape(1, kv_heads, heads // kv_heads, chunk.end - chunk.first, -1)
        if chunk.slots is None:
            k, v = key[:, :, rows], value[:, :, rows]
        else:
            k = keys.index_select(0, chunk.slots).transpose(0, 1)[None]
            v = values.index_select(0, chunk.slots).transpose(0, 1)[None]
        # A head of each group at a time: the query heads as more rows would need the mask repeated, and cannot be plain causal.
        shared = [_weigh(q[:, :, g], k, v, chunk.bias, scale, softcap, causal=chunk.bias is None) for g in range(q.shape[2])]
        out[rows] = torch.stack(shared, 2)[0].flatten(0, 1).transpose(0, 1)
    return out[None], None


def _weigh(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool = False,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, is_causal=causal)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    elif bias is not None:
        scores = scores + bias
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def _attend_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    paged: Plan,
    longest: tuple[int, int],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch = paged.batch
    pages = keys.view(-1, BLOCK_SIZE, *keys.shape[1:]), values.view(-1, BLOCK_SIZE, *values.shape[1:])
    out = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        *pages,
        batch.rows,
        None,
        *longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != keys.shape[1],
        seqused_k=batch.lengths,
        block_table=batch.tables,
        num_splits=1,  # more splits would make a row's sum depend on its neighbours' lengths
    )
    return cast("torch.Tensor", out)[None]


class Given(torch.nn.Module):
    """Stands where the trunk was, so that the model's own forward computes its head, with its scaling and capping, from given states."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        """What the trunk would answer, had it come to these states."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=cast("Any", inputs_embeds))


class _Graph:
    """A decode step of up to `size` sequences, captured; its inputs are copied in, padding rows write to the scratch block."""

    def __init__(self, backend: "EagerBackend", size: int) -> None:
        zeros, device = torch.zeros, backend.device
        wide = -(-backend.context // BLOCK_SIZE)
        self.scratch = backend.blocks * BLOCK_SIZE
        self.batch = Batch(
            tokens=zeros(size, dtype=torch.int64, device=device),
            positions=zeros(size, dtype=torch.int64, device=device),
            rows=torch.arange(size + 1, dtype=torch.int32, device=device),
            lengths=torch.ones(size, dtype=torch.int32, device=device),
            tables=torch.full((size, wide), backend.blocks, dtype=torch.int32, device=device),
            slots=torch.full((size,), self.scratch, dtype=torch.int64, device=device),
            select=torch.arange(size, device=device),
        )
        self.graph = torch.cuda.CUDAGraph()
        stream = cast("Any", torch.cuda).Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            backend._trunk_states(self.batch, (1, backend.context))
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.states = backend._trunk_states(self.batch, (1, backend.context))

    def replay(self, batch: Batch) -> torch.Tensor:
        count = batch.tokens.shape[0]
        own = self.batch
        own.tokens[:count].copy_(batch.tokens)
        own.positions[:count].copy_(batch.positions)
        own.lengths.fill_(1)
        own.lengths[:count].copy_(batch.lengths)
        own.slots.fill_(self.scratch)
        own.slots[:count].copy_(batch.slots)
        own.tables.fill_(self.scratch // BLOCK_SIZE)
        own.tables[:count, : batch.tables.shape[1]].copy_(batch.tables)
        self.graph.replay()
        return self.states.index_select(0, batch.select)


class EagerBackend:
    """Implements `backend.Backend` with the model's own modules."""

    name = "eager"

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype, kv_tokens: int | None, slots: int = 0) -> None:
        """Take a loaded causal model. `kv_tokens` None: from free memory on CUDA, CPU_TOKENS on a CPU."""
        config = model.config
        self.device = device
        self.dtype = dtype
        self.vocabulary = int(config.vocab_size)
        self.width = int(config.hidden_size)
        self.trunk = model.base_model
        self.head = model
        self.slots = slots
        prefix = model.base_model_prefix
        linears = [(f"{prefix}.{name}", each) for name, each in self.trunk.named_modules() if isinstance(each, torch.nn.Linear)]
        self.lora = Lora(dict(linears), slots)
        self.targets: Mapping[str, tuple[int, int]] = self.lora.targets
        setattr(model, model.base_model_prefix, Given())
        self.pools: dict[int, Pool] = {}
        self.blocks = 1
        self.graphs: dict[int, _Graph] = {}
        self.context = _context(config)
        self.softcapped = getattr(config, "attn_logit_softcapping", None) is not None
        self.varlen = False  # attend with varlen_attn; `build` turns it on where it agrees with the gathered form
        with _device_errors(device):
            self._probe(int(config.num_hidden_layers))
        self._allocate(kv_tokens)
        self.context = min(self.context, self.blocks * BLOCK_SIZE)

    @classmethod
    def load(cls, directory: Path, settings: "EngineSettings", device: torch.device, dtype: torch.dtype) -> "EagerBackend":
        """Load safetensors. Raises Unsupported for a model whose state is more than causal keys and values."""
        return cls(_load(directory, device, dtype), device, dtype, settings.kv_tokens or None, settings.adapter_slots)

    def forward(self, batch: Batch) -> torch.Tensor:
        """See `backend.Backend`."""
        with torch.inference_mode(), _device_errors(self.device):
            count = batch.tokens.shape[0]
            # A captured step knows no adapter: which tokens are whose is decided on the host.
            if self.graphs and batch.adapters is None and count == batch.lengths.shape[0]:
                sizes = sorted(self.graphs)
                at = bisect.bisect_left(sizes, count)
                if at < len(sizes):
                    return self.graphs[sizes[at]].replay(batch)
            longest = None
            if self.varlen:
                longest = int((batch.rows[1:] - batch.rows[:-1]).max()), int(batch.lengths.max())
            with self.lora.adapting(batch.adapters):
                return self._trunk_states(batch, longest).index_select(0, batch.select)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `backend.Backend`."""
        with torch.inference_mode(), _device_errors(self.device):
            answer = self.head(inputs_embeds=hidden[None], use_cache=False)
            return cast("torch.Tensor", answer.logits[0].float())

    def candidates(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """None: this backend has no faster way than the whole output matrix."""
        return None

    def base(self, path: str) -> torch.Tensor:
        """See `backend.Backend`."""
        return self.lora.base(path)

    def prepare(self, weights: Weights) -> object:
        """See `backend.Backend`."""
        return self.lora.prepare(weights, pin=self.device.type == "cuda")

    def install(self, slot: int, prepared: object | None) -> None:
        """See `backend.Backend`."""
        with torch.inference_mode(), _device_errors(self.device):
            self.lora.install(slot, prepared)

    def capture(self, largest: int) -> None:
        """Capture decode steps for the batch buckets up to `largest`. Needs varlen_attn: gathering reads lengths on the host."""
        if self.varlen and not self.softcapped:
            for size in GRAPH_BATCHES:
                if size <= largest:
                    self.graphs[size] = _Graph(self, size)

    def _trunk_states(self, batch: Batch, longest: tuple[int, int] | None) -> torch.Tensor:
        plan = Plan(batch, self.pools, (self.blocks + 1) * BLOCK_SIZE, self.dtype)
        plan.longest = longest
        answer = self.trunk(input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, paged=plan)
        return cast("torch.Tensor", answer.last_hidden_state[0])

    def _probe(self, layers: int) -> None:
        """Two tokens through all layers: the pools' shapes become known, and what attends otherwise is refused."""
        batch = Batch(
            tokens=torch.zeros(2, dtype=torch.int64, device=self.device),
            positions=torch.arange(2, device=self.device),
            rows=torch.tensor([0, 2], dtype=torch.int32, device=self.device),
            lengths=torch.tensor([2], dtype=torch.int32, device=self.device),
            tables=torch.zeros((1, 1), dtype=torch.int32, device=self.device),
            slots=torch.arange(2, device=self.device),
            select=torch.arange(2, device=self.device),
        )
        with torch.inference_mode():
            self._trunk_states(batch, None)
        if len(self.pools) != layers:
            raise Unsupported(f"only {len(self.pools)} of its {layers} layers keep keys and values")

    def _allocate(self, kv_tokens: int | None) -> None:
        """The real pools, and one block more: the scratch that padding rows of a captured step write to."""
        token_bytes = sum((k[0].numel() + v[0].numel()) * k.element_size() for k, v in self.pools.values())
        if kv_tokens is None:
            kv_tokens = CPU_TOKENS
            if self.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(self.device)
                kv_tokens = int(free * GPU_SHARE) // token_bytes
        self.blocks = max(1, kv_tokens // BLOCK_SIZE)
        slots = (self.blocks + 1) * BLOCK_SIZE
        # Not under inference_mode: its tensors refuse index_copy_ outside of it. zeros commits no page before it is written.
        self.pools = {
            layer: (torch.zeros((slots, *k.shape[1:]), dtype=k.dtype, device=k.device), v.new_zeros((slots, *v.shape[1:])))
            for layer, (k, v) in self.pools.items()
        }


@contextmanager
def _device_errors(device: torch.device) -> Iterator[None]:
    """Turn the device's "out of memory" into MemoryError, for which a step may be asked to shrink, and a dead device into DeviceLost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(f"a step did not fit on {device.type}") from error
        if isinstance(error, torch.AcceleratorError):  # after one, every later call on the device fails too
            raise DeviceLost(f"{device.type} no longer answers") from error
        raise


def _context(config: Any) -> int:
    """Longest sequence whose positions are computed alike in any batch."""
    context = int(getattr(config, "max_position_embeddings", 0) or 0)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            # Beyond the original length these rescale all positions by the longest sequence present, so neighbours would matter.
            original = kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            context = min(context, int(original or context))
    if context < 1:
        raise Unsupported("its config.json does not say how many positions it has")
    return context


def _load(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """One model class, built from data: no code of the model's directory runs and no pickle is read."""
    settings = json.loads((directory / "config.json").read_text())
    model_class = causal_class(settings)
    transformers = cast("Any", importlib.import_module("transformers"))
    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.utils.logging.disable_progress_bar()
    config = model_class.config_class.from_pretrained(directory, local_files_only=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"it has {', '.join(sorted(kinds)) or 'an encoder'}, and only causal attention is served")
    config._attn_implementation = ATTENTION
    # What it reports of a load goes unread; what is wrong with one is asked for and refused, since it would be made up at random.
    transformers.utils.logging.set_verbosity_error()
    model, report = model_class.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if wrong := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise ModelRefused(f"{directory.name} lacks {len(wrong)} tensors or has them in another shape, {wrong[0]} first.")
    return model.eval().to(device)


def causal_class(settings: dict[str, Any]) -> Any:
    """The class named by the model type in transformers' own causal mapping, imported alone."""
    names = cast("Any", importlib.import_module("transformers.models.auto.modeling_auto")).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = settings.get("model_type")
    if kind not in names:
        raise Unsupported(f"model type {kind!r} is not a causal language model of this transformers")
    name = names[kind]
    return getattr(cast("Any", importlib.import_module("transformers")), name if isinstance(name, str) else name[0])
