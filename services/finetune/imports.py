"""An adapter from outside, checked in a process of its own: `python -m services.finetune.imports`, in a private directory.

Nothing of it is run or kept as it came: the config is rebuilt from an allow-list of keys, tensors are written anew as float32 under names
of ours. The process has limits on memory, time, files and size, no environment, and no network where the kernel lets it say so.
"""

import contextlib
import ctypes
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from services.finetune import fit, tensors
from services.finetune.fit import Lora
from services.finetune.tensors import Refused, Tensor

CONFIG_BYTES = 65_536
WEIGHTS_BYTES = 512 << 20
HEAD_BYTES = 64 << 20
MAX_ALPHA = 1_024.0
MAX_DROPOUT = 0.9
MAX_TARGETS = 64
PIECE_BYTES = 4 << 20  # of a tensor at once; a multiple of every number's size

MEMORY_BYTES = 2 << 30  # address space: numpy alone maps a quarter of it
CPU_SECONDS = 60
FILES = 64

_TARGET = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TEXT_BYTES = 512

# What stock PEFT writes without effect on an adapter's output, with the values that have none.
_INERT: Mapping[str, Callable[[Any], bool]] = {
    "base_model_name_or_path": lambda value: isinstance(value, str) and len(value) <= _TEXT_BYTES,  # never opened
    "revision": lambda value: isinstance(value, str) and len(value) <= _TEXT_BYTES,
    "peft_version": lambda value: isinstance(value, str) and len(value) <= 64,
    "inference_mode": lambda value: isinstance(value, bool),
    "megatron_core": lambda value: value == "megatron.core",
    "init_lora_weights": lambda value: isinstance(value, bool) or value == "gaussian",  # others change the base, too
    "qalora_group_size": lambda value: isinstance(value, int),  # read only beside use_qalora
    "fan_in_fan_out": lambda value: value is False,
    "use_qalora": lambda value: value is False,
    "lora_bias": lambda value: value is False,
    "ensure_weight_tying": lambda value: value is False,
    "modules_to_save": lambda value: value == [],
    "layers_to_transform": lambda value: value == [],
    "exclude_modules": lambda value: value == [],
    "trainable_token_indices": lambda value: value == [],
    "rank_pattern": lambda value: value == {},
    "alpha_pattern": lambda value: value == {},
    "loftq_config": lambda value: value == {},
}
_TASKS = {"CHAT": {"CAUSAL_LM", None}, "CLASSIFY": {"CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None}}
_READ = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora"}


class Order(msgspec.Struct, frozen=True):
    """What the child is to hold the files against."""

    method: str  # CHAT or CLASSIFY
    labels: tuple[str, ...]
    modules: dict[str, tuple[int, int]]  # the base's linear layers: (out, in)
    width: int


class Checked(msgspec.Struct, frozen=True):
    """What it found: an adapter that fits, or the rule that a file breaks."""

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()
    rule: str = ""
    at: int | None = None  # byte of the file


# --- config ---------------------------------------------------------------------------------------------------------------------------


def read_config(raw: bytes, method: str) -> tuple[Lora, float]:
    """An adapter's form and dropout from PEFT's `adapter_config.json`.

    Raises:
        Refused: `config.size`, `config.json`, `config.unknown_key`, or `config.{key}` for a value that is not allowed.
    """
    if not 2 <= len(raw) <= CONFIG_BYTES:
        raise Refused("config.size")
    said: dict[str, Any] = tensors.strict_json(raw.strip(b" \t\r\n"), "config.json", depth=4)
    for key, value in said.items():
        if key in _READ or (value is None and _KEY.fullmatch(key)):
            continue
        inert = _INERT.get(key)
        if inert is None:
            raise Refused("config.auto_mapping" if key in ("auto_mapping", "auto_map") else "config.unknown_key")
        if not inert(value):
            raise Refused(f"config.{key}")
    if said.get("peft_type") != "LORA":
        raise Refused("config.peft_type")
    task = said.get("task_type")
    if not (task is None or isinstance(task, str)) or task not in _TASKS[method]:
        raise Refused("config.task_type")
    if said.get("bias") not in (None, "none"):
        raise Refused("config.bias")
    rank = _number(said, "r", 1, fit.MAX_RANK, whole=True)
    alpha = _number(said, "lora_alpha", 0, MAX_ALPHA)
    dropout = _number(said, "lora_dropout", 0, MAX_DROPOUT, unset=0.0)
    if alpha == 0:
        raise Refused("config.lora_alpha")
    return Lora(int(rank), alpha, _flag(said, "use_rslora"), _flag(said, "use_dora"), _targets(said)), dropout


def _number(said: Mapping[str, Any], key: str, least: float, most: float, *, whole: bool = False, unset: float | None = None) -> float:
    value = said.get(key)
    if value is None and unset is not None:
        return unset
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not least <= value <= most:
        raise Refused(f"config.{key}")
    return float(value)


def _flag(said: Mapping[str, Any], key: str) -> bool:
    value = said.get(key)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"config.{key}")
    return bool(value)


def _targets(said: Mapping[str, Any]) -> tuple[str, ...]:
    """A list of names. A single text would be a regular expression, and those are not taken."""
    value = said.get("target_modules")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TARGETS or not all(isinstance(name, str) for name in value):
        raise Refused("config.target_modules")
    if len(set(value)) != len(value) or not all(len(name) <= 64 and _TARGET.fullmatch(name) for name in value):
        raise Refused("config.target_modules")
    return tuple(sorted(value))


# --- the files, in the child ----------------------------------------------------------------------------------------------------------


def check_files(folder: Path, order: Order) -> Checked:
    """Check `config.json`, `weights.safetensors` and perhaps `head.safetensors`, and write `adapter.safetensors` and `head.out` anew.

    Raises:
        Refused: a rule that begins with the file's name.
    """
    lora, dropout = read_config((folder / "config.json").read_bytes(), order.method)
    with _named("weights"), (folder / "weights.safetensors").open("rb") as source:
        found = _header(source, WEIGHTS_BYTES)
        modules = fit.check_adapter(found, lora, order.modules)
        placed = {
            f"base_model.model.{path}.{kind}": tensor for path, kinds in sorted(modules.items()) for kind, tensor in sorted(kinds.items())
        }
        _rewrite(source, placed, folder / "adapter.safetensors")
    head = folder / "head.safetensors"
    if head.exists() != bool(order.labels):
        raise Refused("head.missing" if order.labels else "head.unasked")
    if order.labels:
        with _named("head"), head.open("rb") as source:
            found = _header(source, HEAD_BYTES)
            fit.check_head(found, order.labels, order.width)
            _rewrite(source, dict(sorted(found.items())), folder / "head.out")
    return Checked(lora.rank, lora.alpha, dropout, lora.rslora, lora.dora, lora.targets)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the file's name before the rule that it breaks."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{name}.{error.rule.removeprefix(f'{name}_')}", error.at) from None


def _header(source: BinaryIO, most: int) -> dict[str, Tensor]:
    size = source.seek(0, os.SEEK_END)
    if size > most:
        raise Refused("size", most)

    def read(start: int, length: int) -> bytes:
        source.seek(start)
        return source.read(length)

    return tensors.read_header(read, size)


def _rewrite(source: BinaryIO, placed: Mapping[str, Tensor], target: Path) -> None:
    """The tensors as float32 under these names, in this order, if every number is one."""
    shapes = {name: (tensor.shape[-1],) if name.endswith("_vector.weight") else tensor.shape for name, tensor in placed.items()}
    with target.open("xb") as out:
        out.write(tensors.header([(name, "F32", shapes[name]) for name in placed]))
        for tensor in placed.values():
            source.seek(tensor.begin)
            for at in range(tensor.begin, tensor.end, PIECE_BYTES):
                raw = source.read(min(PIECE_BYTES, tensor.end - at))
                piece = Tensor(tensor.name, tensor.dtype, (len(raw) // tensors.SIZES[tensor.dtype],), at, at + len(raw))
                values = tensors.floats(piece, raw)
                if not bool(np.isfinite(values).all()):
                    raise Refused("not_finite", at)
                out.write(values.tobytes())


def confine() -> None:
    """Give up what reading three files does not need."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_FSIZE, 2 * WEIGHTS_BYTES + (1 << 20)),
        (resource.RLIMIT_NOFILE, FILES), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        _, hard = resource.getrlimit(limit)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        # CLONE_NEWUSER and CLONE_NEWNET: without a network, where a container allows it; the limits hold either way.
        libc.unshare(0x10000000 | 0x40000000)


def main() -> int:
    """Check the files of the directory we stand in; the answer goes out as one line."""
    confine()
    order = msgspec.json.decode(Path("order.json").read_bytes(), type=Order)
    try:
        checked = check_files(Path(), order)
    except Refused as refused:
        checked = Checked(rule=refused.rule, at=refused.at)
    sys.stdout.buffer.write(msgspec.json.encode(checked) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
