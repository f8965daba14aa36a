import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from services.finetune.tensors import Refused, Tensor, finite, floats, header, packed, read_header, strict_json


def tensors(raw: bytes, **bounds: int) -> dict[str, Tensor]:
    return read_header(lambda start, length: raw[start : start + length], len(raw), **bounds)


def file(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read_and_what_we_write_the_library_reads() -> None:
    values = {"b": torch.randn(3, 2), "a": torch.randn(4).to(torch.bfloat16), "c": torch.randn(2, 1, 2).half()}
    raw = save(values, metadata={"format": "pt"})
    found = tensors(raw)
    assert found.keys() == values.keys()
    for name, tensor in found.items():
        assert torch.equal(torch.from_numpy(floats(tensor, raw[tensor.begin : tensor.end]).copy()), values[name].float())
    ours = header(((t.name, t.dtype, t.shape) for t in found.values()), {"format": "pt"})
    assert len(ours) % 8 == 0
    again = load(ours + b"".join(raw[t.begin : t.end] for t in found.values()))
    assert all(torch.equal(again[name], values[name]) for name in values)


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    values = torch.cat([torch.randn(4_096), torch.tensor([1.00390625, 1.01171875, 0.0, -0.0, 3e38])])
    assert packed(values.numpy(), "BF16") == values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert packed(values.numpy()[:9], "F16") == values[:9].half().numpy().tobytes()


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        (file({"a": entry(0, 8)}, b"x" * 8, length=1 << 40), "header_size"),
        (file(b"{}" + b" " * (1 << 20)), "header_size"),
        (file(b"{", length=100), "truncated"),
        (file(b"not json"), "header_json"),
        (file(b"[]"), "header_json"),
        (file(b'{"a":NaN}'), "header_json"),
        (file(b"\xef\xbb\xbf{}"), "header_json"),
        (file(b"{\xff}"), "header_json"),
        (file(b'{"a":' + b"[" * 50_000), "header_json"),
        (file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"x" * 8),
         "header_json"),
        (file({}), "tensor_count"),
        (file({"__metadata__": {"a": 1}, "a": entry(0, 8)}, b"x" * 8), "header_entry"),
        (file({"a": 1}), "header_entry"),
        (file({"a": entry(0, 8) | {"extra": 1}}, b"x" * 8), "header_entry"),
        (file({"../a": entry(0, 8)}, b"x" * 8), "tensor_name"),
        (file({"a": entry(0, 8, "I64", [1])}, b"x" * 8), "tensor_dtype"),
        (file({"a": entry(0, 8, ["F32"])}, b"x" * 8), "tensor_dtype"),
        (file({"a": entry(0, 8, shape=[-2])}, b"x" * 8), "tensor_shape"),
        (file({"a": entry(0, 8, shape=[True, 2])}, b"x" * 8), "tensor_shape"),
        (file({"a": entry(0, 0, shape=[0])}), "tensor_shape"),
        (file({"a": entry(0, 8, shape=[1] * 9)}, b"x" * 8), "tensor_shape"),
        (file({"a": entry(0, 8, shape=[3])}, b"x" * 8), "tensor_offsets"),
        (file({"a": entry(4, 12)}, b"x" * 12), "tensor_offsets"),
        (file({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "tensor_offsets"),
        (file({"a": entry(0, 8)}, b"x" * 9), "tensor_offsets"),
        (file({"a": entry(0, 8)}, b"x" * 7), "truncated"),
    ],
)  # fmt: skip
def test_A16_a_file_that_is_not_exactly_the_format_is_refused(raw: bytes, rule: str) -> None:
    with pytest.raises(Refused) as caught:
        tensors(raw)
    assert caught.value.rule == rule


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_A16_nan_and_infinity_are_seen_in_every_kind(dtype: str) -> None:
    good = np.array([0.0, -1.5, 60000.0], dtype=np.float32)
    assert finite(dtype, packed(good, dtype))
    for bad in (np.nan, np.inf, -np.inf):
        values = np.array([0.0, bad], dtype=np.float32)
        raw = {"F32": values.tobytes(), "F16": values.astype("<f2").tobytes()}.get(dtype) or (values.view("<u4") >> 16).astype(
            "<u2"
        ).tobytes()
        assert not finite(dtype, raw)


def test_json_deeper_than_asked_is_refused() -> None:
    assert strict_json(b'{"a":{"b":[1]}}', "rule", depth=3) == {"a": {"b": [1]}}
    with pytest.raises(Refused):
        strict_json(b'{"a":{"b":[1]}}', "rule", depth=2)
