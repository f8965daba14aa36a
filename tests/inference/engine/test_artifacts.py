"""What a pod believes of an adapter's files: nothing before it is checked (A16)."""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save

from services.chassis.objects import ObjectsUnavailable, open_objects_sync
from services.inference.engine.artifacts import HEADER_BYTES, Artifacts
from services.inference.engine.step import AdapterProblem
from tests.inference.engine import tuned
from tests.inference.engine.tuned import OWNER

BASE = "ba" * 32
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"


class Shapes:
    """Of a backend, what reading an adapter asks."""

    width = 6
    targets: ClassVar = {"model.layers.0.self_attn.q_proj": (8, 6), "model.layers.0.mlp.up_proj": (10, 6)}

    def base(self, path: str) -> torch.Tensor:
        return torch.eye(8, 6)


def tensors(**changes: Any) -> dict[str, torch.Tensor]:
    return {A: torch.ones(4, 6), B: torch.full((8, 4), 0.5)} | changes


class Shop:
    def __init__(self, directory: Path) -> None:
        self.url = f"file://{directory}"
        self.objects = open_objects_sync(self.url)

    def put(self, content: dict[str, torch.Tensor] | bytes, head: dict[str, torch.Tensor] | None = None, **changes: Any) -> str:
        files = {"adapter.safetensors": content if isinstance(content, bytes) else save(content)}
        if head is not None:
            files["head.safetensors"] = save(head)
        key, owner = changes.pop("key", tuned.KEY), changes.pop("at", OWNER)
        return tuned.publish(self.objects, files, tuned.manifest(files, BASE, **{"targets": ["q_proj"]} | changes), key, owner)

    def read(self, digest: str, owner: str = OWNER) -> Any:
        return Artifacts(lambda: open_objects_sync(self.url), tuned.KEYS, BASE).read(owner, digest, Shapes())  # type: ignore[arg-type]

    def problem(self, digest: str, owner: str = OWNER) -> str:
        with pytest.raises(AdapterProblem) as caught:
            self.read(digest, owner)
        return str(caught.value)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "store")


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_a_sound_adapter_is_read_with_its_scaling_in_up(shop: Shop, rslora: bool, scale: float):
    head = {"weight": torch.ones(3, 6), "bias": torch.zeros(3)}
    said = {
        "labels": list("xyz"),
        "temperature": 1.5,
        "pooling": "POOLING_MEAN",
        "max_tokens": 64,
        "template_hash": "ab",
        "method": "TUNE_METHOD_CLASSIFY",
    }
    adapter, weights = shop.read(shop.put(tensors(), head, rslora=rslora, **said))
    assert (adapter.labels, adapter.temperature, adapter.pooling, adapter.max_tokens) == (("x", "y", "z"), 1.5, "MEAN", 64)
    assert (adapter.method, adapter.template_hash, adapter.rank) == ("CLASSIFY", "ab", 4)
    (factors,) = weights.factors.values()
    assert torch.equal(factors.up, torch.full((8, 4), 0.5 * scale)) and torch.equal(factors.down, torch.ones(4, 6))
    assert weights.head is not None and torch.equal(weights.head.weight, head["weight"])


def test_a_dora_is_folded_into_a_gain_of_each_output(shop: Shop):
    _, weights = shop.read(shop.put(tensors(**{MAGNITUDE: torch.full((8,), 3.0)}), dora=True))
    (factors,) = weights.factors.values()
    merged = torch.eye(8, 6) + factors.up @ factors.down
    torch.testing.assert_close(factors.gain, 3.0 / merged.norm(dim=1))


def test_narrow_numbers_are_widened(shop: Shop):
    _, weights = shop.read(shop.put({name: tensor.bfloat16() for name, tensor in tensors().items()}))
    assert next(iter(weights.factors.values())).down.dtype == torch.float32


NAN = torch.full((8, 4), math.nan)
BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown module": ({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 6), **tensors()}, {}, "a tensor's name"),
    "strange name": ({"__reduce__": torch.ones(1), **tensors()}, {}, "a tensor's name"),
    "not a target of the manifest": (tensors(), {"targets": ["up_proj"]}, "a tensor's name"),
    "wrong shape": (tensors(**{A: torch.ones(4, 7)}), {}, "a tensor's shape"),
    "wrong rank": (tensors(), {"rank": 3}, "a tensor's shape"),
    "half a pair": ({A: torch.ones(4, 6)}, {}, "a tensor's shape"),
    "a magnitude without dora": (tensors(**{MAGNITUDE: torch.ones(8)}), {}, "a tensor's shape"),
    "a dora without magnitude": (tensors(), {"dora": True}, "a tensor's shape"),
    "nan": (tensors(**{B: NAN}), {}, "not finite"),
    "infinity": (tensors(**{B: torch.full((8, 4), math.inf)}), {}, "not finite"),
    "integers": (tensors(**{A: torch.ones((4, 6), dtype=torch.int64)}), {}, "a tensor's type"),
    "too high a rank": (tensors(), {"rank": 257}, "rank"),
    "every weight": (tensors(), {"rank": 0}, "rank"),
    "no scale": (tensors(), {"alpha": 0.0}, "rank"),
    "another base": (tensors(), {"base_digest": "00" * 32}, "base"),
    "labels without head": (tensors(), {"labels": ["x"]}, "head without labels, or labels without head"),
    "a pickle": (b"\x80\x04cposix\nsystem\n(S'true'\ntR.", {}, "header"),
    "empty": (b"", {}, "header"),
    "a header without end": ((HEADER_BYTES + 1).to_bytes(8, "little") + b"{" * (HEADER_BYTES + 1), {}, "header"),
    "a nested header": ((9000).to_bytes(8, "little") + b"[" * 9000, {}, "header"),
    "data beyond the file": (
        len(entry := json.dumps({A: {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}).encode()).to_bytes(8, "little") + entry,
        {},
        "safetensors",
    ),
    "a manifest of other types": (tensors(), {"rank": "four"}, "manifest"),
    "no parts": (tensors(), {"parts": []}, "parts"),
    "a part elsewhere": (tensors(), {"parts": [{"name": "../../x", "sha256": "00" * 32}]}, "parts"),
    "another digest": (tensors(), {"parts": [{"name": "adapter.safetensors", "sha256": "00" * 32, "total_bytes": "1"}]}, "a part's digest"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_A16_a_broken_or_malicious_file_is_refused(shop: Shop, case: str):
    content, changes, rule = BROKEN[case]
    assert shop.problem(shop.put(content, **changes)) == f"adapter_refused: {rule}"


def test_A16_a_head_of_another_width_is_refused(shop: Shop):
    head = {"weight": torch.ones(2, 7), "bias": torch.zeros(2)}
    assert shop.problem(shop.put(tensors(), head, labels=["x", "y"])) == "adapter_refused: a head's shape"


def test_A16_only_what_our_key_signed_is_believed(shop: Shop):
    assert shop.problem(shop.put(tensors(), key=Ed25519PrivateKey.generate())) == "adapter_refused: signature: bad signature"
    digest = shop.put(tensors())
    shop.objects.copy(f"adapters/{OWNER}/{digest}/manifest.json", f"adapters/{OWNER}/{'0' * 64}/manifest.json")
    assert shop.problem("0" * 64) == "adapter_refused: digest"
    shop.objects.put(f"adapters/{OWNER}/{digest}/adapter.safetensors", save(tensors(**{B: torch.zeros(8, 4)})))
    assert shop.problem(digest) == "adapter_refused: a part's digest"
    shop.objects.delete(f"adapters/{OWNER}/{digest}/adapter.safetensors")
    assert shop.problem(digest) == "adapter_refused: a part is missing"


def test_A10_anothers_adapter_is_unknown_even_where_its_files_were_copied(shop: Shop):
    stranger = "22222222-2222-4222-8222-222222222222"
    digest = shop.put(tensors())
    assert {shop.problem(digest, stranger), shop.problem("0" * 64)} == {"adapter_unknown: no manifest"}
    assert shop.put(tensors(), at=stranger) == digest
    assert shop.problem(digest, stranger) == "adapter_unknown: another owner's"
    assert shop.problem("../" * 21 + "x", OWNER).startswith("adapter_unknown: ")
    assert shop.problem(digest, "../x").startswith("adapter_unknown: ")


def test_a_store_that_is_away_is_a_problem_of_the_store(shop: Shop):
    def away() -> Any:
        raise ObjectsUnavailable

    with pytest.raises(AdapterProblem) as caught:
        Artifacts(away, tuned.KEYS, BASE).read(OWNER, "0" * 64, Shapes())  # type: ignore[arg-type]
    assert caught.value.word == "adapter_unavailable"
