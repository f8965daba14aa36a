"""Adapters that may come from outside: good ones as stock PEFT and others write them, and bad ones with the rule that each breaks."""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.finetune.imports import Order
from tests.finetune.adapters import MODULES, RANK, WIDTH, file, head, lora

LABELS = ("tech", "sport", "politics")
CHAT = Order("CHAT", (), dict(MODULES), WIDTH)
CLASSIFY = Order("CLASSIFY", LABELS, dict(MODULES), WIDTH)
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

# As peft 0.21 writes it.
STOCK: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "google/gemma-3-270m", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 4, "lora_bias": False, "lora_dropout": 0.05,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": RANK, "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False,
}  # fmt: skip
BARE = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Case:
    name: str
    config: bytes
    weights: bytes
    head: bytes | None = None
    order: Order = CHAT
    rule: str = ""

    def put(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(self.config)
        (folder / "weights.safetensors").write_bytes(self.weights)
        if self.head is not None:
            (folder / "head.safetensors").write_bytes(self.head)


def config(drop: str = "", **changed: Any) -> bytes:
    said = STOCK | changed
    said.pop(drop, None)
    return json.dumps(said).encode()


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    values = lora()
    change(values)
    return file(values)


def renamed(old: str, new: str) -> bytes:
    return file({name.replace(old, new): value for name, value in lora().items()})


def dora(suffix: str = "", shape: tuple[int, ...] = (WIDTH,)) -> bytes:
    more = {f"base_model.model.{module}.lora_magnitude_vector{suffix}": np.ones(shape, dtype=np.float32) for module in MODULES}
    return file(lora() | more)


def raw(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def doubled(weights: bytes) -> bytes:
    """The first tensor is said twice, the second time elsewhere."""
    size = struct.unpack("<Q", weights[:8])[0]
    text, data = weights[8 : 8 + size].rstrip(), weights[8 + size :]
    end = len(data)
    extra = f',"{FIRST}":{{"dtype":"F32","shape":[{RANK},{WIDTH}],"data_offsets":[{end},{end + 4 * RANK * WIDTH}]}}}}'.encode()
    text = text[:-1] + extra
    return struct.pack("<Q", len(text)) + text + data + b"\0" * (4 * RANK * WIDTH)


def pickled(canary: Path) -> bytes:
    """Unpickling it would touch the canary."""
    return b"cposix\nsystem\n(S'touch " + bytes(canary) + b"'\ntR."


def without(*gone: str) -> bytes:
    return file({name: value for name, value in lora().items() if not any(part in name for part in gone)})


def zipped(canary: Path) -> bytes:
    """As torch.save lays it out."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("../../escape", "x")
    return out.getvalue()


def good() -> Iterator[Case]:
    weights, bare = file(lora()), json.dumps(BARE).encode()
    yield Case("stock", config(), weights)
    yield Case("stock, spread over lines", json.dumps(STOCK, indent=2).encode() + b"\n", weights)
    yield Case("only what is needed", bare, weights)
    for dtype in ("F16", "BF16"):
        yield Case(f"numbers of {dtype}", config(), file(lora(), dtype))
    yield Case("rsLoRA", config(use_rslora=True), weights)
    yield Case("DoRA as PEFT names it", config(use_dora=True), dora())
    yield Case("DoRA by its own name", config(use_dora=True), dora(".weight"))
    yield Case("DoRA with a row", config(use_dora=True), dora(shape=(1, WIDTH)))
    yield Case("no dropout said", config("lora_dropout"), weights)
    yield Case("alpha with a point", config(lora_alpha=0.5), weights)
    yield Case("gaussian at first", config(init_lora_weights="gaussian"), weights)
    yield Case("a feature extractor", config(task_type="FEATURE_EXTRACTION"), weights, file(head(LABELS)), CLASSIFY)
    yield Case("a classifier", config(task_type="SEQ_CLS"), weights, file(head(LABELS)), CLASSIFY)
    yield Case("a classifier on a writer", config(), weights, file(head(LABELS)), CLASSIFY)
    yield Case("no task", config(task_type=None), weights)
    yield Case("a newer key that is null", config(some_config_of_2027=None), weights)
    yield Case("from a directory of theirs", config(base_model_name_or_path="/srv/x/../../etc/passwd"), weights)
    one = {name: value for name, value in lora().items() if "q_proj" in name}
    yield Case("one target", config(target_modules=["q_proj"]), file(one))
    yield Case("a target by a longer name", config(target_modules=["self_attn.q_proj"]), file(one))
    first = {name: value for name, value in one.items() if "layers.0" in name}
    yield Case("a target by its path", config(target_modules=["model.layers.0.self_attn.q_proj"]), file(first))
    yield Case("rank 1", config(r=1), file(lora(rank=1)))
    yield Case("rank 256", config(r=256), file(lora(rank=256)))
    yield Case("numbers near the end", config(), changed(lambda values: values[FIRST].fill(3e38)))
    padded = bytearray(weights)
    size = struct.unpack("<Q", weights[:8])[0]
    yield Case(
        "a header with blanks", config(), struct.pack("<Q", size + 64) + weights[8 : 8 + size] + b" " * 64 + bytes(padded[8 + size :])
    )


def bad(canary: Path) -> Iterator[Case]:
    weights, tops = file(lora()), file(head(LABELS))
    nan, inf = np.float32("nan"), np.float32("inf")

    def conf(rule: str, name: str, config_bytes: bytes) -> Case:
        return Case(name, config_bytes, weights, rule=f"config.{rule}")

    yield conf("auto_mapping", "code by auto_mapping", config(auto_mapping={"base_model_class": "X", "parent_library": "evil"}))
    yield conf("auto_mapping", "code by auto_map", config(auto_map={"AutoModel": "evil.Model"}))
    yield conf("unknown_key", "an unknown key", config(trust_remote_code=True))
    yield conf("unknown_key", "a runtime of its own", config(runtime_config={"ephemeral_gpu_offload": True}))
    yield conf("unknown_key", "a key that is none, with null", config(**{"__class__": None}))
    yield conf("unknown_key", "layers of megatron", config(megatron_config={"a": 1}))
    yield conf("unknown_key", "layers repeated", config(layer_replication=[[0, 4]]))
    yield conf("unknown_key", "EVA", config(eva_config={"rho": 2.0}))
    yield conf("unknown_key", "parameters as targets", config(target_parameters=["a"]))
    yield conf("modules_to_save", "whole modules", config(modules_to_save=["score"]))
    yield conf("layers_to_transform", "some layers", config(layers_to_transform=[0]))
    yield conf("trainable_token_indices", "tokens", config(trainable_token_indices=[1, 2]))
    yield conf("rank_pattern", "ranks by pattern", config(rank_pattern={".*": 4096}))
    yield conf("alpha_pattern", "alphas by pattern", config(alpha_pattern={"(a+)+$": 8}))
    yield conf("exclude_modules", "a pattern of exclusions", config(exclude_modules="(a+)+$"))
    yield conf("init_lora_weights", "a base changed by PiSSA", config(init_lora_weights="pissa"))
    yield conf("loftq_config", "LoftQ", config(loftq_config={"loftq_bits": 4}))
    yield conf("fan_in_fan_out", "transposed", config(fan_in_fan_out=True))
    yield conf("use_qalora", "QALoRA", config(use_qalora=True))
    yield conf("lora_bias", "a bias in B", config(lora_bias=True))
    yield conf("ensure_weight_tying", "tied weights", config(ensure_weight_tying=True))
    yield conf("base_model_name_or_path", "a base that is no name", config(base_model_name_or_path={"url": "http://x"}))
    yield conf("base_model_name_or_path", "a base of a megabyte", config(base_model_name_or_path="x" * 1_000))
    yield conf("bias", "biases", config(bias="all"))
    yield conf("peft_type", "another method", config(peft_type="IA3"))
    yield conf("peft_type", "no method", config("peft_type"))
    yield conf("peft_type", "a method that is a list", config(peft_type=["LORA"]))
    yield conf("task_type", "another task", config(task_type="SEQ_2_SEQ_LM"))
    yield conf("task_type", "a classifier where a chat is asked", config(task_type="SEQ_CLS"))
    yield conf("task_type", "a task that is a list", config(task_type=["CAUSAL_LM"]))
    for value in (0, -1, 257, 1 << 40, 2.0, "2", True, None):
        yield conf("r", f"rank {value!r}", config(r=value))
    for value in (0, -4, 1_025, 1e308, "4", None):
        yield conf("lora_alpha", f"alpha {value!r}", config(lora_alpha=value))
    yield conf("lora_dropout", "dropout 1", config(lora_dropout=1.0))
    yield conf("use_rslora", "rsLoRA by a number", config(use_rslora=1))
    yield conf("use_dora", "DoRA by a text", config(use_dora="yes"))
    for name, value in {
        "a regular expression": "(a+)+$", "all of them": "all-linear", "none": [], "a pattern in the list": [".*"],
        "the same twice": ["q_proj", "q_proj"],
        "numbers": [1], "a path out": ["../q_proj"], "too many": [f"m{at}" for at in range(65)], "a long one": ["q" * 65], "nothing": None,
    }.items():  # fmt: skip
        yield conf("target_modules", f"targets: {name}", config(target_modules=value))
    yield conf("json", "no JSON", b"peft_type: LORA")
    yield conf("json", "a list", b"[]")
    yield conf("json", "a key twice", config()[:-1] + b', "r": 256}')
    yield conf("json", "NaN", config(lora_alpha=float("nan")))
    yield conf("json", "infinity", config(lora_alpha=float("inf")))
    yield conf("json", "deep nesting", b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}")
    yield conf("json", "a byte order mark", b"\xef\xbb\xbf" + config())
    yield conf("json", "UTF-16", config().decode().encode("utf-16"))
    yield conf("json", "a lone surrogate's bytes", config().replace(b"LORA", b"\xed\xa0\x80"))
    yield conf("json", "a pickle", pickled(canary))
    yield conf("size", "empty", b"")
    yield conf("size", "64 KiB of blanks", config() + b" " * 65_536)

    def body(rule: str, name: str, data: bytes, config_bytes: bytes | None = None) -> Case:
        return Case(name, config_bytes or config(), data, rule=f"weights.{rule}")

    yield body("truncated", "no bytes", b"")
    yield body("header_size", "a pickle for weights", pickled(canary) + b"\0" * 64)
    yield body("header_size", "a torch archive", zipped(canary))
    yield body("header_size", "a header of 2^60 bytes", raw(b"{}", length=1 << 60))
    yield body("header_size", "a header of 2 MiB", raw(b"{}" + b" " * (2 << 20)))
    yield body("truncated", "a header past the end", raw(b"{}", length=500_000))
    yield body("header_json", "a header that is no JSON", raw(b"(lp0\nS'x'\np1\na."))
    yield body("header_json", "a name twice", doubled(weights))
    yield body("header_json", "a header of NaN", raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"))
    yield body(
        "header_entry",
        "metadata that is no text",
        raw({"__metadata__": {"a": {}}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    )
    yield body(
        "header_entry",
        "an entry with more to say",
        raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "code": "x"}}, b"1234"),
    )
    yield body("tensor_count", "no tensor", raw({}))
    yield body("truncated", "cut short", weights[:-1])
    yield body("tensor_offsets", "more than it says", weights + b"\0")
    yield body("tensor_offsets", "a hole", raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"))
    yield body(
        "tensor_offsets", "an overlap", raw({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "xy"}, b"1234")
    )
    yield body("tensor_offsets", "a shape over its bytes", raw({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, b"1234"))
    yield body("tensor_shape", "a negative shape", raw({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"))
    yield body("tensor_shape", "nothing in it", raw({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))
    for dtype in ("I64", "F64", "F8_E4M3", "BOOL"):
        yield body("tensor_dtype", f"numbers of {dtype}", raw({"x": {"dtype": dtype, "shape": [1], "data_offsets": [0, 8]}}, b"12345678"))
    yield body("tensor_name", "a name with a path", raw({"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"))
    yield body(
        "tensor_name", "the base's own weight", changed(lambda v: v.update({"model.embed_tokens.weight": np.ones((2, 2), np.float32)}))
    )
    yield body("tensor_name", "a saved head", changed(lambda v: v.update({"base_model.model.score.weight": np.ones((2, 2), np.float32)})))
    yield body("tensor_name", "an embedding adapter", renamed("lora_A", "lora_embedding_A"))
    yield body("tensor_name", "a magnitude without DoRA", dora())
    ones = np.ones(WIDTH, np.float32)
    twice = {f"base_model.model.{module}.lora_magnitude_vector{end}": ones for module in MODULES for end in ("", ".weight")}
    yield body("tensor_duplicate", "a magnitude by both names", file(lora() | twice), config(use_dora=True))
    yield body("tensor_missing", "no magnitude with DoRA", weights, config(use_dora=True))
    yield body("tensor_shape", "a magnitude of another width", dora(shape=(WIDTH + 1,)), config(use_dora=True))
    yield body("tensor_target", "a layer that is no target", weights, config(target_modules=["q_proj"]))
    yield body("tensor_module", "a layer that the base lacks", renamed("layers.1", "layers.12"))
    yield body("tensor_module", "the output matrix", changed(
        lambda v: v.update({f"base_model.model.lm_head.lora_{m}.weight": np.ones((2, 2), np.float32) for m in "AB"})
    ), config(target_modules=["q_proj", "v_proj", "lm_head"]))  # fmt: skip
    yield body("tensor_missing", "half a pair", without(FIRST))
    yield body("tensor_missing", "a layer left out", without("layers.1"))
    yield body("tensor_missing", "a target without a layer", weights, config(target_modules=["q_proj", "v_proj", "z_proj"]))
    yield body("tensor_rank", "another rank than said", weights, config(r=4))
    yield body(
        "tensor_shape", "another width than the base's", changed(lambda v: v.update({FIRST: np.ones((RANK, WIDTH + 1), np.float32)}))
    )
    yield body("tensor_shape", "a vector for a matrix", changed(lambda v: v.update({FIRST: np.ones(RANK, np.float32)})))
    yield body("tensor_shape", "three dimensions", changed(lambda v: v.update({FIRST: np.ones((RANK, WIDTH, 1), np.float32)})))
    for name, value in (("NaN", nan), ("infinity", inf), ("minus infinity", -inf)):
        yield body("not_finite", f"{name} among the numbers", changed(lambda v, value=value: v[FIRST].__setitem__((0, 1), value)))  # type: ignore[misc]
    half = bytearray(file(lora(), "F16"))
    half[-2:] = struct.pack("<H", 0x7C00)
    yield body("not_finite", "infinity in half precision", bytes(half))
    brain = bytearray(file(lora(), "BF16"))
    brain[-2:] = struct.pack("<H", 0x7FC0)
    yield body("not_finite", "NaN in bfloat16", bytes(brain))

    def top(rule: str, name: str, data: bytes | None) -> Case:
        return Case(name, config(), weights, data, CLASSIFY, f"head.{rule}")

    yield top("missing", "labels without a head", None)
    yield Case("a head without labels", config(), weights, tops, CHAT, "head.unasked")
    yield top("name", "a head with more in it", file(head(LABELS) | {"code": np.ones(1, np.float32)}))
    yield top("name", "a head without a bias", file({"weight": head(LABELS)["weight"]}))
    yield top("shape", "a head of other labels", file(head(LABELS[:2])))
    yield top("shape", "a head of another width", file({"weight": np.ones((3, WIDTH + 1), np.float32), "bias": np.ones(3, np.float32)}))
    yield top("dtype", "a head in half precision", file(head(LABELS), "F16"))
    yield top("not_finite", "NaN in a head", file({"weight": np.full((3, WIDTH), nan), "bias": np.ones(3, np.float32)}))
    yield top("header_size", "a pickle for a head", pickled(canary) + b"\0" * 64)
