"""The safetensors layout, read with suspicion and written byte by byte (pure but for numpy).

The reader takes exactly what the format says: a header within its cap, known numbers, and data that covers the file without gap or
overlap. Everything else is refused by a rule's name, so that a file means one thing to every reader.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 1 << 20  # of a file from outside: 4,096 tensors need half of it
TENSORS = 16_384
DIMENSIONS = 8
NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")
SIZES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number; no other kind is ours

Array = npt.NDArray[np.float32]


class Refused(ValueError):
    """A file breaks `rule`. `at` is the byte in the file where it shows, if it can be told."""

    def __init__(self, rule: str, at: int | None = None) -> None:
        super().__init__(rule)
        self.rule = rule
        self.at = at


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's place: `begin` and `end` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(read: Callable[[int, int], bytes], size: int, header_bytes: int = HEADER_BYTES) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, in the order of their data.

    Args:
        read: returns `length` bytes from `start`.
        size: of the file, in bytes.
        header_bytes: a longer header is refused unread.

    Raises:
        Refused: `truncated`, `header_size`, `header_json`, `header_entry`, `tensor_name`, `tensor_dtype`, `tensor_shape`,
            `tensor_offsets`, `tensor_count`.
    """
    if size < 8:
        raise Refused("truncated", size)
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= header_bytes:
        raise Refused("header_size", 0)
    if 8 + length > size:
        raise Refused("truncated", size)
    entries = strict_json(read(8, length), "header_json")
    if not isinstance(entries, dict):
        raise Refused("header_json", 8)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused("header_entry", 8)
    if not 1 <= len(entries) <= TENSORS:
        raise Refused("tensor_count", 8)
    tensors = sorted((_tensor(name, entry, 8 + length) for name, entry in entries.items()), key=lambda tensor: (tensor.begin, tensor.end))
    at = 8 + length
    for tensor in tensors:
        if tensor.begin != at:
            raise Refused("tensor_offsets", at)
        at = tensor.end
    if at != size:
        raise Refused("truncated" if at > size else "tensor_offsets", min(at, size))
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: Any, data_at: int) -> Tensor:
    if not NAME.fullmatch(name):
        raise Refused("tensor_name", 8)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused("header_entry", 8)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise Refused("tensor_dtype", 8)
    if not _counts(shape) or len(shape) > DIMENSIONS or 0 in shape:
        raise Refused("tensor_shape", 8)
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        raise Refused("tensor_offsets", 8)
    return Tensor(name, dtype, tuple(shape), data_at + offsets[0], data_at + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 48 for item in value)


def strict_json(raw: bytes, rule: str, depth: int = 8) -> Any:
    """The value of a JSON text in which nothing is said twice, nothing is infinite and nothing is deeper than `depth`.

    Raises:
        Refused: `rule`, for anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Refused(rule)
        return dict(pairs)

    def never(_: str) -> Any:
        raise Refused(rule)

    if raw[:1] != b"{":  # a byte order mark or blank before it is somebody else's dialect
        raise Refused(rule, 0)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=never)
    except Refused:
        raise
    except (ValueError, RecursionError):
        raise Refused(rule, 0) from None
    if _depth(value) > depth:
        raise Refused(rule, 0)
    return value


def _depth(value: Any) -> int:
    """Levels of nesting; the parser's own recursion limit bounds this one."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, level)
            waiting += [(inner, level + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return deepest


def finite(dtype: str, raw: bytes | memoryview) -> bool:
    """Whether no number of these bytes is NaN or infinite."""
    if dtype == "BF16":
        return not bool(np.any((np.frombuffer(raw, dtype="<u2") & 0x7F80) == 0x7F80))
    return bool(np.isfinite(np.frombuffer(raw, dtype="<f4" if dtype == "F32" else "<f2")).all())


def floats(tensor: Tensor, raw: bytes | memoryview) -> Array:
    """A tensor's bytes as float32 of its shape; exact for every kind we take."""
    if tensor.dtype == "BF16":
        wide = np.frombuffer(raw, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(tensor.shape)
    return np.frombuffer(raw, dtype="<f4" if tensor.dtype == "F32" else "<f2").astype(np.float32).reshape(tensor.shape)


def packed(values: Array, dtype: str) -> bytes:
    """The inverse of `floats`; bfloat16 rounds to nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        return bytes(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes())
    return bytes(values.astype("<f4" if dtype == "F32" else "<f2").tobytes())


def header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and header of a file whose data follows in this order: (name, dtype, shape). Data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
