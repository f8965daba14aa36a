"""A whole step in one C call: decoder-only models of the Llama line on a CPU with AVX-512 (tensors).

config.json becomes a flat description (`Plan`), the weights are packed once into the kernels' layout, and `kernels/` does the rest. What
the kernels cannot compute exactly raises `Unsupported` at load, and the eager backend takes over.
"""

import ctypes
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from services.inference.engine import kernels
from services.inference.engine.backend import Batch, Factors, Weights
from services.inference.engine.kernels import Unsupported, layout
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import BLOCK_SIZE
from services.pretrained import weights

GROUP = 64  # outputs side by side in a packed matrix
KV_TOKENS = 65_536  # of the pool when the settings leave it open; pages are committed as they are written
MOST_CANDIDATES = 1024  # beyond that the whole output matrix costs no more
LARGEST_HEAD = 512  # model.h: MAX_HEAD
VNNI = "avx512_vnni"  # products of bytes
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """One model as the kernels see it: sizes, and per layer its window (0: none) and its RoPE table."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    layers: int
    vocabulary: int
    context: int
    activation: int  # 0: SiLU, 1: GELU by tanh
    epsilon: float
    score_scale: float
    score_cap: float  # 0: none
    logit_cap: float  # 0: none
    embedding_scale: float
    one_plus: bool  # norms multiply by 1 + weight
    sandwich: bool  # norms after attention and feed-forward too
    head_norms: bool
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    rope_parameters: tuple[dict[str, Any], ...]
    tied: bool


FAMILIES = {  # model_type → what config.json does not say
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_norms": True},
    "gemma2": {"one_plus": True, "sandwich": True, "scaled_embedding": True},
    "gemma3_text": {"one_plus": True, "sandwich": True, "scaled_embedding": True, "head_norms": True},
}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}


def plan(config: dict[str, Any]) -> Plan:
    """What to compute, from config.json. Raises Unsupported for anything the kernels would compute differently."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise Unsupported(f"The fused kernels do not know the model type {kind!r}.")
    layers, hidden, heads = int(config["num_hidden_layers"]), int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise Unsupported(f"The fused kernels do not know the activation {activation!r}.")
    if hidden % 16 or head_dim % 16 or head_dim > LARGEST_HEAD or heads % kv_heads:
        raise Unsupported(f"The fused kernels need sizes in multiples of 16, and this model has hidden {hidden} and heads of {head_dim}.")
    if heads // kv_heads > GROUP or config.get("mlp_bias") or config.get("use_bidirectional_attention"):
        raise Unsupported("The fused kernels do not compute biased feed-forwards, bidirectional attention or more than 64 heads a group.")
    kinds = _layer_kinds(config, layers)
    window = int(config.get("sliding_window") or 0)
    ropes = _rope_parameters(config)
    names = sorted(ropes)
    return Plan(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=int(config["intermediate_size"]),
        layers=layers,
        vocabulary=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        activation=ACTIVATIONS[activation],
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        score_scale=float(config.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        score_cap=float(config.get("attn_logit_softcapping") or 0),
        logit_cap=float(config.get("final_logit_softcapping") or 0),
        embedding_scale=math.sqrt(hidden) if family.get("scaled_embedding") else 1.0,
        one_plus=bool(family.get("one_plus")),
        sandwich=bool(family.get("sandwich")),
        head_norms=bool(family.get("head_norms")),
        windows=tuple(window if each == "sliding_attention" else 0 for each in kinds),
        ropes=tuple(names.index(each) if each in ropes else 0 for each in kinds),
        rope_parameters=tuple(ropes[name] for name in names),
        tied=bool(config.get("tie_word_embeddings", str(kind).startswith("gemma"))),
    )


def _layer_kinds(config: dict[str, Any], layers: int) -> list[str]:
    if kinds := config.get("layer_types"):
        if set(kinds) - {"full_attention", "sliding_attention"} or len(kinds) != layers:
            raise Unsupported(f"The fused kernels do not know the layer types {sorted(set(kinds))}.")
        return list(kinds)
    kind, window = config["model_type"], config.get("sliding_window")
    if kind == "gemma3_text":
        pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    if kind == "gemma2":
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if kind == "mistral" and window:
        return ["sliding_attention"] * layers
    if kind.startswith("qwen") and window and config.get("use_sliding_window"):
        first = int(config.get("max_window_layers", layers))
        return ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return ["full_attention"] * layers


def _rope_parameters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameters by layer kind; one entry where all layers share them."""
    given = config.get("rope_parameters")
    if given and all(isinstance(value, dict) for value in given.values()):
        found = {str(name): dict(value) for name, value in given.items()}
    else:
        shared = dict(given or config.get("rope_scaling") or {})
        shared.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
        found = {"full_attention": shared}
        if config["model_type"] == "gemma3_text":
            found["sliding_attention"] = {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
    for each in found.values():
        each.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
        kind = each.get("rope_type", each.get("type", "default"))
        if kind not in ("default", "linear", "llama3") or float(each.get("partial_rotary_factor", 1.0)) != 1.0:
            raise Unsupported(f"The fused kernels do not know the rotary embedding {kind!r}.")
        each["rope_type"] = kind
    if len(found) > 2:
        raise Unsupported("The fused kernels hold two rotary tables.")
    return found


def frequencies(parameters: dict[str, Any], head_dim: int) -> torch.Tensor:
    """Inverse frequencies, float32 [head_dim / 2]."""
    inverse = 1.0 / (float(parameters["rope_theta"]) ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if parameters["rope_type"] == "linear":
        return inverse / float(parameters["factor"])
    if parameters["rope_type"] == "llama3":
        factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
        original = parameters["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inverse
        scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
        smooth = (original / wavelength - low) / (high - low)
        between = (1 - smooth) * scaled / factor + smooth * scaled
        middle = ~(wavelength < original / high) & ~(wavelength > original / low)
        return torch.where(middle, between, scaled)
    return inverse


CHUNK = 256 << 20  # bytes of one mapping


class Arena:
    """Zeroed memory on huge pages where the system has them: weights that stream by then need few address look-ups.

    A page is committed when it is first written, so an unused KV pool costs nothing. `size` is what one mapping hands out, in bytes.
    """

    def __init__(self, size: int = CHUNK) -> None:
        self.size = size
        self.chunk: mmap.mmap | None = None
        self.used = 0

    def zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count], aligned to 64 bytes, as the kernels' loads want it."""
        size = max(64, -(-count * dtype.itemsize // 64) * 64)
        if self.chunk is None or self.used + size > len(self.chunk):
            # Private: huge pages of shared memory are a separate setting, off by default.
            self.chunk = mmap.mmap(-1, max(self.size, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.chunk.madvise(mmap.MADV_HUGEPAGE)
            self.used = 0
        self.used += size
        return torch.frombuffer(self.chunk, dtype=dtype, count=count, offset=self.used - size)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter in the kernels' layout."""

    rank: int  # padded to 16
    layers: "ctypes.Array[layout.LowRank]"  # for each layer, those of layout.ADAPTED
    kept: list[torch.Tensor]  # what `layers` points to


class FusedBackend:
    """See `backend.Backend`. One caller at a time, but for `base` and `prepare`."""

    name = "fused"

    def __init__(
        self,
        plan: Plan,
        library: ctypes.CDLL,
        read: Read,
        dtype: torch.dtype,
        threads: int,
        kv_tokens: int,
        int8: bool = False,
        slots: int = 0,
        directory: Path | None = None,
    ) -> None:
        self.plan = plan
        self.int8 = int8  # of the layers; the output matrix stays exact
        self.library = library
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.vocabulary = plan.vocabulary
        self.context = plan.context
        self.width = plan.hidden
        self.blocks = max(1, kv_tokens // BLOCK_SIZE)
        self.threads = threads
        self.slots = slots
        self.targets: Mapping[str, tuple[int, int]] = dict(_targets(plan))
        self.directory = directory  # of the weights
        self.adapters = (layout.Adapter * (slots + 1))()
        self.installed: dict[int, Prepared] = {}
        self.engine = library.argosy_open(threads)
        if not self.engine:
            raise MemoryError("no room for the engine's threads")
        self.pair = 4 // dtype.itemsize  # elements of a 4-byte word
        self.arena = Arena()
        self.kept: list[torch.Tensor] = []  # what C points to
        self.examined = torch.zeros(0, dtype=torch.int64)  # rows computed exactly by the last `candidates`, per hidden state
        self.cosines: list[torch.Tensor] = []
        self.sines: list[torch.Tensor] = []
        self._extend_ropes(min(plan.context, 2048))
        self.layers = (layout.Layer * plan.layers)(*(self._layer(read, i) for i in range(plan.layers)))
        self.model = self._model(read)
        self.screen = self._screen() if plan.hidden % 64 == 0 and VNNI in kernels.cpu_flags() else None

    @classmethod
    def load(cls, directory: Path, settings: EngineSettings) -> "FusedBackend":
        """Compile or fetch the kernels and pack the weights of a directory. Raises Unsupported with a sentence."""
        if settings.int8 and VNNI not in kernels.cpu_flags():
            raise Unsupported(f"Layers in int8 need {VNNI}, which this CPU does not report.")
        description = plan(json.loads((directory / "config.json").read_text()))
        library = kernels.load(weights.cache_directory(settings.cache_dir))
        dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        threads = settings.threads or len(os.sched_getaffinity(0))
        # torch's own threads would spin on the cores that the kernels' threads need; what is left to torch is small.
        torch.set_num_threads(1)
        with ExitStack() as stack:
            read = _reader(directory, stack)
            kv_tokens = settings.kv_tokens or KV_TOKENS
            return cls(description, library, read, dtype, threads, kv_tokens, settings.int8, settings.adapter_slots, directory)

    def __del__(self) -> None:
        if getattr(self, "engine", None):
            self.library.argosy_close(self.engine)
            self.engine = None

    def forward(self, batch: Batch) -> torch.Tensor:
        """See `backend.Backend`. float32 [S, width]."""
        longest = int(batch.positions.max()) + 1
        if longest > self.cosines[0].shape[0]:
            self._extend_ropes(longest)
        out = torch.empty((batch.select.shape[0], self.width), dtype=torch.float32)
        step = layout.Step(
            count=batch.tokens.shape[0],
            sequences=batch.lengths.shape[0],
            table_width=batch.tables.shape[1],
            selected=batch.select.shape[0],
            out=out.data_ptr(),
            **{name: getattr(batch, name).data_ptr() for name in ("tokens", "slots", "select", "positions", "rows", "lengths", "tables")},
        )
        if batch.adapters is not None and self.installed:
            step.adapters, step.adapter, step.adapter_slots = batch.adapters.data_ptr(), self.adapters, self.slots
            step.adapter_rank = max(each.rank for each in self.installed.values())
        for i, (cosine, sine) in enumerate(zip(self.cosines, self.sines, strict=True)):
            step.cosines[i], step.sines[i] = cosine.data_ptr(), sine.data_ptr()
        if self.library.argosy_step(self.engine, self.model, step):
            raise MemoryError(f"no room for a step of {step.count} tokens")
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `backend.Backend`."""
        narrow = hidden.to(self.dtype).contiguous()
        out = torch.empty((hidden.shape[0], self.vocabulary), dtype=torch.float32)
        self.library.argosy_logits(self.engine, self.model, narrow.data_ptr(), hidden.shape[0], self.plan.logit_cap, out.data_ptr())
        return out

    def candidates(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `backend.Backend`: int8 screening with a proven bound, then the real weights."""
        if self.screen is None or count > min(MOST_CANDIDATES, self.vocabulary):
            return None
        rows = hidden.shape[0]
        narrow = hidden.to(self.dtype).contiguous()
        best, ids = torch.empty((rows, count), dtype=torch.float32), torch.empty((rows, count), dtype=torch.int64)
        self.examined = torch.zeros(rows, dtype=torch.int64)
        pointers = (best.data_ptr(), ids.data_ptr(), self.examined.data_ptr())
        screen, cap = self.screen, self.plan.logit_cap
        if self.library.argosy_candidates(self.engine, self.model, screen, narrow.data_ptr(), rows, count, cap, *pointers):
            raise MemoryError(f"no room to screen {rows} rows")
        return best, ids

    def base(self, path: str) -> torch.Tensor:
        """See `backend.Backend`: from the files, since the kernels' layout is no matrix."""
        assert self.directory is not None  # `load` gave it
        with ExitStack() as stack:
            return _reader(self.directory, stack)(f"{path}.weight").to(torch.float32, copy=True)

    def prepare(self, weights: Weights) -> Prepared:
        """See `backend.Backend`. Ranks are padded to 16, and the parts of a packed matrix lie as the kernels read them."""
        p, rank = self.plan, -(-weights.rank // 16) * 16
        heads, kept, arena = p.heads * p.head_dim, list[torch.Tensor](), Arena(self._adapter_bytes(rank))
        layers = (layout.LowRank * (p.layers * len(layout.ADAPTED)))()

        def keep(tensor: torch.Tensor) -> int:
            room = arena.zeros(tensor.numel(), tensor.dtype)
            room.copy_(tensor.reshape(-1))
            kept.append(room)
            return room.data_ptr()

        for i in range(p.layers):
            at = f"model.layers.{i}."
            inner = -(-p.inner // 32) * 32
            shapes = {
                "qkv": ([f"{at}self_attn.{name}_proj" for name in "qkv"], p.hidden),
                "o": ([f"{at}self_attn.o_proj"], heads),
                "gate_up": ([f"{at}mlp.gate_proj", f"{at}mlp.up_proj"], p.hidden),
                "down": ([f"{at}mlp.down_proj"], inner),
            }
            for place, (name, (paths, inputs)) in enumerate(shapes.items()):
                found = [weights.factors.get(path) for path in paths]
                if any(found):
                    sizes = [self.targets[path][0] for path in paths]
                    down = torch.cat([_padded(each.down if each else None, rank, inputs) for each in found])
                    ups = [_padded(each.up if each else None, size, rank) for each, size in zip(found, sizes, strict=True)]
                    up = _interleaved(ups) if name == "gate_up" else torch.cat(ups)
                    low = layers[i * len(layout.ADAPTED) + place]
                    low.down = keep(self._panels(down, 16))
                    low.up = keep(self._panels(up, GROUP))
                    if any(each is not None and each.gain is not None for each in found):
                        gains = [_gain(each, size) for each, size in zip(found, sizes, strict=True)]
                        gain = _interleaved(gains) if name == "gate_up" else torch.cat(gains)
                        low.gain = keep(_padded(gain, -(-gain.shape[0] // GROUP) * GROUP, 1))
        return Prepared(rank, layers, kept)

    def install(self, slot: int, prepared: object | None) -> None:
        """See `backend.Backend`. Nothing is copied: a slot is a pointer."""
        if prepared is None:
            self.installed.pop(slot, None)
            self.adapters[slot] = layout.Adapter()
            return
        assert isinstance(prepared, Prepared)  # what `prepare` made
        self.adapters[slot] = layout.Adapter(prepared.rank, ctypes.cast(prepared.layers, ctypes.POINTER(layout.LowRank)))
        self.installed[slot] = prepared

    def _adapter_bytes(self, rank: int) -> int:
        """Upper bound of what an adapter of this rank takes."""
        values = sum((inputs + outputs + 2 * GROUP) * rank + 2 * (outputs + GROUP) for outputs, inputs in self.targets.values())
        return values * self.dtype.itemsize + 64 * 3 * len(self.targets)

    def _panels(self, rows: torch.Tensor, lanes: int) -> torch.Tensor:
        """[rows, inputs] as int32 words [rows / lanes, words, lanes], rows padded with zeros."""
        narrow = _padded(rows, -(-rows.shape[0] // lanes) * lanes, rows.shape[1]).to(self.dtype).contiguous()
        return narrow.view(torch.int32).view(-1, lanes, narrow.shape[1] // self.pair).transpose(1, 2).contiguous()

    def _keep(self, tensor: torch.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _vector(self, tensor: torch.Tensor, size: int) -> int:
        """float32, zero-padded to `size`."""
        padded = self.arena.zeros(size, torch.float32)
        padded[: tensor.shape[0]] = tensor.float()
        return self._keep(padded)

    def _norm(self, read: Read, name: str) -> int:
        weight = read(name).float()
        return self._keep((weight + 1.0 if self.plan.one_plus else weight).contiguous())

    def _pack(self, parts: list[tuple[torch.Tensor, int, int, int]], groups: int, inputs: int) -> layout.Matrix:
        """Rows [outputs, inputs'] of each part go `step` to a group, from group `first` and lane `lane`. Inputs are padded with zeros."""
        if self.int8:
            matrix = self._int8_matrix(groups, inputs)
            for rows, step, first, lane in parts:
                source = torch.nn.functional.pad(rows.to(self.dtype), (0, inputs - rows.shape[1])).contiguous()
                self._quantise(matrix, (None, None), source.data_ptr(), (rows.shape[0], inputs, step, first, lane))
            return matrix
        words = inputs // self.pair
        packed = self.arena.zeros(groups * words * GROUP, torch.int32)
        for rows, step, first, lane in parts:
            source = rows.to(self.dtype).contiguous()
            if source.shape[1] % self.pair:
                source = torch.nn.functional.pad(source, (0, 1))
            own = source.shape[1] // self.pair
            self.library.argosy_pack(self.engine, packed.data_ptr(), source.data_ptr(), source.shape[0], own, words, step, first, lane)
        return layout.Matrix(packed=self._keep(packed))

    def _int8_matrix(self, groups: int, inputs: int) -> layout.Matrix:
        return layout.Matrix(
            packed=self._keep(self.arena.zeros(groups * GROUP * inputs, torch.int8)),
            offset=self._keep(self.arena.zeros(groups * GROUP, torch.int32)),
            scale=self._keep(self.arena.zeros(groups * GROUP, torch.float32)),
        )

    def _quantise(self, matrix: layout.Matrix, lengths: tuple[int | None, int | None], source: int, shape: tuple[int, ...]) -> None:
        """`lengths`: where a screen's `rest` and `norm` go; `shape`: rows, inputs, and as `_pack` places them step, first, lane."""
        self.library.argosy_quantise(self.engine, matrix, *lengths, source, int(self.dtype == torch.float32), *shape)

    def _layer(self, read: Read, i: int) -> layout.Layer:
        p, at = self.plan, f"model.layers.{i}."
        heads, width = p.heads * p.head_dim, (p.heads + 2 * p.kv_heads) * p.head_dim
        padded, inner = -(-width // GROUP) * GROUP, -(-p.inner // 32) * 32
        names = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        down = read(f"{at}mlp.down_proj.weight")
        gate, up = (read(f"{at}mlp.{name}_proj.weight") for name in ("gate", "up"))
        pool = [self.arena.zeros(self.blocks * p.kv_heads * BLOCK_SIZE * p.head_dim, self.dtype) for _ in range(2)]
        norm = f"{at}{'pre_feedforward' if p.sandwich else 'post_attention'}_layernorm.weight"
        return layout.Layer(
            qkv=self._pack([(torch.cat([read(f"{name}.weight") for name in names]), GROUP, 0, 0)], padded // GROUP, p.hidden),
            o=self._pack([(read(f"{at}self_attn.o_proj.weight"), GROUP, 0, 0)], -(-p.hidden // GROUP), heads),
            gate_up=self._pack([(gate, 32, 0, 0), (up, 32, 0, 32)], inner // 32, p.hidden),
            down=self._pack([(down, GROUP, 0, 0)], -(-p.hidden // GROUP), inner),
            qkv_bias=self._bias(read, names, padded),
            o_bias=self._bias(read, [f"{at}self_attn.o_proj"], -(-p.hidden // GROUP) * GROUP),
            input_norm=self._norm(read, f"{at}input_layernorm.weight"),
            attention_norm=self._norm(read, f"{at}post_attention_layernorm.weight") if p.sandwich else None,
            feed_norm=self._norm(read, norm),
            after_norm=self._norm(read, f"{at}post_feedforward_layernorm.weight") if p.sandwich else None,
            q_norm=self._norm(read, f"{at}self_attn.q_norm.weight") if p.head_norms else None,
            k_norm=self._norm(read, f"{at}self_attn.k_norm.weight") if p.head_norms else None,
            keys=self._keep(pool[0]),
            values=self._keep(pool[1]),
            window=p.windows[i],
            rope=p.ropes[i],
        )

    def _bias(self, read: Read, names: list[str], size: int) -> int | None:
        try:
            return self._vector(torch.cat([read(f"{name}.bias") for name in names]), size)
        except KeyError:
            return None

    def _model(self, read: Read) -> layout.Model:
        p = self.plan
        embedding = self._copied(read("model.embed_tokens.weight"))
        head = embedding if p.tied else self._copied(read("lm_head.weight"))
        return layout.Model(
            hidden=p.hidden,
            heads=p.heads,
            kv_heads=p.kv_heads,
            head_dim=p.head_dim,
            inner=-(-p.inner // 32) * 32,
            layers=p.layers,
            vocabulary=p.vocabulary,
            activation=p.activation,
            wide=int(self.dtype == torch.float32),
            int8=int(self.int8),
            epsilon=p.epsilon,
            score_scale=p.score_scale,
            score_cap=p.score_cap,
            embedding_scale=p.embedding_scale,
            embedding=embedding,
            head=head,
            final_norm=self._norm(read, "model.norm.weight"),
            layer=self.layers,
        )

    def _copied(self, tensor: torch.Tensor) -> int:
        room = self.arena.zeros(tensor.numel(), self.dtype)
        room.view(tensor.shape).copy_(tensor)
        return self._keep(room)

    def _screen(self) -> layout.Screen:
        p = self.plan
        groups = -(-p.vocabulary // GROUP)
        matrix = self._int8_matrix(groups, p.hidden)
        rest, norm = (self._keep(self.arena.zeros(groups * GROUP, torch.float32)) for _ in range(2))
        self._quantise(matrix, (rest, norm), self.model.head, (p.vocabulary, p.hidden, GROUP, 0, 0))
        return layout.Screen(matrix=matrix, rest=rest, norm=norm)

    def _extend_ropes(self, positions: int) -> None:
        """Tables for at least `positions`, doubled so that a growing sequence seldom pays for it."""
        size = 1
        while size < positions:
            size *= 2
        at = torch.arange(size, dtype=torch.float32)[:, None]
        angles = [at * frequencies(each, self.plan.head_dim) for each in self.plan.rope_parameters]
        self.cosines, self.sines = [each.cos() for each in angles], [each.sin() for each in angles]


def _targets(plan: Plan) -> Iterator[tuple[str, tuple[int, int]]]:
    heads, kv_heads = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim
    for i in range(plan.layers):
        yield f"model.layers.{i}.self_attn.q_proj", (heads, plan.hidden)
        yield f"model.layers.{i}.self_attn.k_proj", (kv_heads, plan.hidden)
        yield f"model.layers.{i}.self_attn.v_proj", (kv_heads, plan.hidden)
        yield f"model.layers.{i}.self_attn.o_proj", (plan.hidden, heads)
        yield f"model.layers.{i}.mlp.gate_proj", (plan.inner, plan.hidden)
        yield f"model.layers.{i}.mlp.up_proj", (plan.inner, plan.hidden)
        yield f"model.layers.{i}.mlp.down_proj", (plan.hidden, plan.inner)


def _padded(tensor: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor:
    """Float32 [rows, columns], zeros around what is given; a vector is one column."""
    out = torch.zeros((rows, columns))
    if tensor is not None:
        given = tensor.float().reshape(tensor.shape[0], -1)
        out[: given.shape[0], : given.shape[1]] = given
    return out


def _gain(factors: Factors | None, outputs: int) -> torch.Tensor:
    return torch.ones((outputs, 1)) if factors is None or factors.gain is None else factors.gain.float()[:, None]


def _interleaved(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gates and ups as the packed matrix has them: 32 of one, 32 of the other, and so on; each padded to 32."""
    padded = [_padded(part, -(-part.shape[0] // 32) * 32, part.shape[1]).view(-1, 32, part.shape[1]) for part in parts]
    return torch.cat(padded, 1).reshape(-1, parts[0].shape[1])


def _reader(directory: Path, stack: ExitStack) -> Read:
    """Tensors by name over all files of a directory; raises KeyError for a name that none has."""
    where: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        where.update({name: file for name in _names(file)})
    if not where:
        raise Unsupported(f"There are no safetensors in {directory.name}.")

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = where[name].get_tensor(name)
        return tensor

    return read


def _names(file: Any) -> Iterator[str]:
    yield from file.keys()
