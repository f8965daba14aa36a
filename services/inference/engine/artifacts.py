"""An adapter's files from the object store, believed only after every check (A16): no file of it is code, and none is unpickled.

    adapters/<owner>/<digest>/manifest.json          a DSSE envelope that the control plane signed; its payload's SHA-256 is the digest
    adapters/<owner>/<digest>/adapter.safetensors    LoRA factors by PEFT's names
    adapters/<owner>/<digest>/head.safetensors       where it has labels: weight and bias

What an operator should look at is logged as a rule; of the files' content nothing is.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors.torch import load

from services.chassis import signing
from services.chassis.objects import ObjectMissing, ObjectsUnavailable, SyncObjects
from services.inference.engine.backend import Backend, Factors, Head, Weights
from services.inference.engine.step import Adapter, AdapterProblem

MOST_RANK = 256
MOST_LABELS = 1_000
HEADER_BYTES = 1 << 20
TYPES = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of a number
WEIGHTS, HEAD = "adapter.safetensors", "head.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|(magnitude_vector)(?:\.weight)?)")
_OWNER, _DIGEST = re.compile(r"[A-Za-z0-9-]{1,64}"), re.compile(r"[0-9a-f]{64}")


class Part(msgspec.Struct, frozen=True):
    """A file of the adapter."""

    name: str
    sha256: str
    total_bytes: int = 0


class Manifest(msgspec.Struct, frozen=True):
    """Of `AdapterManifest` in proto-JSON, what serving needs; absent is the proto's default."""

    project_uid: str
    base_digest: str
    method: str = ""
    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    parts: tuple[Part, ...] = ()
    labels: tuple[str, ...] = ()
    temperature: float = 0.0
    pooling: str = ""
    max_tokens: int = 0
    template_hash: str = ""


class Artifacts:
    """Implements `runner.Source`. `base_digest` is what is loaded: an adapter of another base is refused."""

    def __init__(self, open_store: Callable[[], SyncObjects], keys: Mapping[str, Ed25519PublicKey], base_digest: str) -> None:
        self._open_store = open_store
        self._objects: SyncObjects | None = None
        self._keys = keys
        self._base_digest = base_digest

    def read(self, owner: str, digest: str, backend: Backend) -> tuple[Adapter, Weights]:
        """See `runner.Source`."""
        if not _OWNER.fullmatch(owner) or not _DIGEST.fullmatch(digest):
            raise AdapterProblem("adapter_unknown", "no such name")
        prefix = f"adapters/{owner}/{digest}/"
        manifest = self._manifest(prefix, owner, digest)
        parts = {part.name: part for part in manifest.parts}
        if len(parts) != len(manifest.parts) or parts.keys() - {WEIGHTS, HEAD} or WEIGHTS not in parts:
            raise _refused("parts")
        if (HEAD in parts) != bool(manifest.labels):
            raise _refused("head without labels, or labels without head")
        most = sum(outputs + inputs + 1 for outputs, inputs in backend.targets.values()) * manifest.rank * 4 + HEADER_BYTES
        factors = self._factors(self._tensors(prefix, parts[WEIGHTS], most), manifest, backend)
        head = None
        if manifest.labels:
            most = (backend.width + 1) * len(manifest.labels) * 4 + HEADER_BYTES
            head = self._head(self._tensors(prefix, parts[HEAD], most), manifest, backend.width)
        adapter = Adapter(
            weights=None,
            memory_bytes=sum(part.total_bytes for part in manifest.parts),
            rank=manifest.rank,
            labels=manifest.labels,
            temperature=manifest.temperature or 1.0,
            pooling="MEAN" if manifest.pooling == "POOLING_MEAN" else "LAST",
            max_tokens=manifest.max_tokens,
            method=manifest.method.removeprefix("TUNE_METHOD_"),
            template_hash=manifest.template_hash,
        )
        return adapter, Weights(manifest.rank, factors, head)

    def _manifest(self, prefix: str, owner: str, digest: str) -> Manifest:
        try:
            payload = signing.unseal(self._bytes(f"{prefix}manifest.json", signing.ENVELOPE_BYTES), self._keys, signing.IN_TOTO)
            if signing.digest_of(payload) != digest:
                raise _refused("digest")
            predicate, _ = signing.predicate_of(payload, signing.ADAPTER_MANIFEST)
            manifest = msgspec.convert(predicate, Manifest, strict=False)  # proto-JSON writes 64-bit integers as text
        except ObjectMissing:
            raise AdapterProblem("adapter_unknown", "no manifest") from None
        except signing.SignatureRefused as refused:
            raise _refused(f"signature: {refused.why}") from None
        except msgspec.ValidationError:
            raise _refused("manifest") from None
        if manifest.project_uid != owner:
            raise AdapterProblem("adapter_unknown", "another owner's")
        if manifest.base_digest != self._base_digest:
            raise _refused("base")
        if not 1 <= manifest.rank <= MOST_RANK or not 0 < manifest.alpha < math.inf:
            raise _refused("rank")
        if len(manifest.labels) > MOST_LABELS or not 0 <= manifest.temperature < math.inf:
            raise _refused("labels")
        return manifest

    def _bytes(self, path: str, most: int) -> bytes:
        """Raises ObjectMissing."""
        try:
            if self._objects is None:
                self._objects = self._open_store()
            size = self._objects.size(path)
            if size is None:
                raise ObjectMissing
            if size > most:
                raise _refused("size")
            return self._objects.get(path)
        except ObjectsUnavailable as away:
            raise AdapterProblem("adapter_unavailable", type(away).__name__) from away

    def _tensors(self, prefix: str, part: Part, most: int) -> dict[str, torch.Tensor]:
        """A part's tensors as float32, each finite, of at most `most` bytes together."""
        try:
            data = self._bytes(prefix + part.name, most)
        except ObjectMissing:
            raise _refused("a part is missing") from None
        if len(data) != part.total_bytes or hashlib.sha256(data).hexdigest() != part.sha256:
            raise _refused("a part's digest")
        _check_header(data)
        try:
            tensors = load(data)
        except Exception:  # whatever it finds wrong
            raise _refused("safetensors") from None
        wide = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in wide.values()):
            raise _refused("not finite")
        return wide

    @staticmethod
    def _factors(tensors: Mapping[str, torch.Tensor], manifest: Manifest, backend: Backend) -> dict[str, Factors]:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            path = match[1] if match else ""
            if match is None or path not in backend.targets or path.rpartition(".")[2] not in manifest.targets:
                raise _refused("a tensor's name")
            found.setdefault(path, {})[match[2] or "gain"] = tensor
        scale = manifest.alpha / (math.sqrt(manifest.rank) if manifest.rslora else manifest.rank)
        factors = {}
        for path, each in found.items():
            outputs, inputs = backend.targets[path]
            shapes = {"A": (manifest.rank, inputs), "B": (outputs, manifest.rank)} | ({"gain": (outputs,)} if manifest.dora else {})
            if {name: tuple(tensor.shape) for name, tensor in each.items()} != shapes:
                raise _refused("a tensor's shape")
            up = each["B"] * scale
            gain = None
            if manifest.dora:
                gain = each["gain"] / torch.addmm(backend.base(path), up, each["A"]).norm(dim=1)
                if not bool(torch.isfinite(gain).all()):
                    raise _refused("not finite")
            factors[path] = Factors(each["A"], up, gain)
        return factors

    @staticmethod
    def _head(tensors: Mapping[str, torch.Tensor], manifest: Manifest, width: int) -> Head:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"weight": (len(manifest.labels), width), "bias": (len(manifest.labels),)}:
            raise _refused("a head's shape")
        return Head(tensors["weight"], tensors["bias"])


def _check_header(data: bytes) -> None:
    """What a parser should not have to survive: a header too long, or numbers of a kind that is not ours."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(HEADER_BYTES, len(data) - 8):
        raise _refused("header")
    try:
        entries: Any = msgspec.json.decode(data[8 : 8 + length])
    except (msgspec.DecodeError, RecursionError):
        raise _refused("header") from None
    named: Iterable[Any] = [value for key, value in entries.items() if key != "__metadata__"] if isinstance(entries, dict) else [None]
    if not all(isinstance(entry, dict) and entry.get("dtype") in TYPES for entry in named):
        raise _refused("a tensor's type")


def _refused(rule: str) -> AdapterProblem:
    return AdapterProblem("adapter_refused", rule)
