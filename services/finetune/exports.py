"""A version as a plain tar archive that we write: an adapter in PEFT's form, or the base's weights with it merged in.

The same version gives the same bytes, so a reader whose connection broke goes on at an offset. Nothing is held whole: tensors are read,
merged and sent piece by piece.
"""

import asyncio
import functools
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from argosy.v1.finetune_pb2 import TuneMethod
from argosy_internal.training.v1.training_pb2 import AdapterManifest
from services.chassis.objects import Objects
from services.finetune import fit, tensors
from services.finetune.lineage import ADAPTER, HEAD, MANIFEST
from services.finetune.publishing import lora_of
from services.finetune.tensors import Array, Tensor
from services.pretrained import weights

BLOCK = 512
PIECE_BYTES = 1 << 20
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
CARD = "README.md"
BASE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")

Pieces = Callable[[int], AsyncIterator[bytes]]  # the bytes from an offset on


@dataclass(frozen=True)
class Entry:
    """One file of an archive."""

    name: str
    size: int
    pieces: Pieces


def archive_bytes(entries: Sequence[Entry]) -> int:
    """Size of the whole archive."""
    return sum(BLOCK + entry.size + -entry.size % BLOCK for entry in entries) + 2 * BLOCK


async def archive(entries: Sequence[Entry], time: int, offset: int = 0) -> AsyncIterator[bytes]:
    """The archive from `offset` on. `time`: seconds of the epoch that every file carries."""
    at = 0
    for entry in entries:
        info = tarfile.TarInfo(entry.name)
        info.size, info.mtime, info.mode = entry.size, time, 0o644
        head = info.tobuf(tarfile.USTAR_FORMAT)
        for data in (head, entry, b"\0" * (-entry.size % BLOCK)):
            size = data.size if isinstance(data, Entry) else len(data)
            if at + size > offset:
                skip = max(0, offset - at)
                if isinstance(data, Entry):
                    async for piece in data.pieces(skip):
                        yield piece
                elif data:
                    yield data[skip:]
            at += size
    yield (b"\0" * 2 * BLOCK)[max(0, offset - at) :]


def stored(data: bytes) -> Pieces:
    """Bytes that are at hand."""

    async def pieces(start: int) -> AsyncIterator[bytes]:
        yield data[start:]

    return pieces


# --- the adapter ------------------------------------------------------------------------------------------------------------------------


async def adapter_entries(objects: Objects, place: str, manifest: AdapterManifest, envelope: bytes) -> list[Entry]:
    """The adapter as PEFT loads it, the head, the signed manifest and a card."""
    found = await _header(objects, f"{place}/{ADAPTER}")
    begin = min(tensor.begin for tensor in found.values())
    # PEFT's own spelling of a magnitude, which it completes when loading.
    names = {name: name.removesuffix(".weight") if "lora_magnitude_vector" in name else name for name in found}
    head = tensors.header([(names[name], tensor.dtype, tensor.shape) for name, tensor in found.items()], {"format": "pt"})
    data = sum(tensor.end - tensor.begin for tensor in found.values())

    async def pieces(start: int) -> AsyncIterator[bytes]:
        if start < len(head):
            yield head[start:]
        async for piece in objects.stream(f"{place}/{ADAPTER}", begin + max(0, start - len(head))):
            yield piece

    config = json.dumps(peft_config(manifest), indent=2, sort_keys=True).encode() + b"\n"
    entries = [Entry(PEFT_CONFIG, len(config), stored(config)), Entry(PEFT_WEIGHTS, len(head) + data, pieces)]
    return [*entries, *await _beside(objects, place, manifest, envelope)]


def peft_config(manifest: AdapterManifest) -> dict[str, object]:
    """`adapter_config.json` of a version."""
    return {
        "base_model_name_or_path": manifest.base_model.removeprefix("models/"),
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": int(manifest.alpha) if manifest.alpha.is_integer() else manifest.alpha,
        "lora_dropout": manifest.dropout,
        "peft_type": "LORA",
        "r": manifest.rank,
        "target_modules": sorted(manifest.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": manifest.dora,
        "use_rslora": manifest.rslora,
    }


async def _beside(objects: Objects, place: str, manifest: AdapterManifest, envelope: bytes) -> list[Entry]:
    entries = []
    if manifest.labels:
        size = next(part.total_bytes for part in manifest.parts if part.name == HEAD)
        entries.append(Entry(HEAD, size, functools.partial(objects.stream, f"{place}/{HEAD}")))
    card = model_card(manifest).encode()
    return [*entries, Entry(MANIFEST, len(envelope), stored(envelope)), Entry(CARD, len(card), stored(card))]


async def _header(objects: Objects, path: str) -> dict[str, Tensor]:
    size = await objects.size(path) or 0
    length = int.from_bytes(await objects.get_range(path, 0, 8), "little")
    head = await objects.get_range(path, 0, 8 + min(length, tensors.HEADER_BYTES))
    return tensors.read_header(lambda start, count: head[start : start + count], size)


def model_card(manifest: AdapterManifest) -> str:
    """What a person wants to know of a version, in Markdown."""
    method = TuneMethod.Name(manifest.method).removeprefix("TUNE_METHOD_").lower()
    lines = [f"# {manifest.version}", "", f"Tuned for {method} on {manifest.base_model} (SHA-256 {manifest.base_digest})."]
    if manifest.rank:
        form = "rsLoRA" if manifest.rslora else "LoRA"
        lines.append(f"{form}{' with DoRA' if manifest.dora else ''}, rank {manifest.rank}, alpha {manifest.alpha:g}.")
    if manifest.labels:
        lines += [
            "",
            f"Labels, in the order of the head's rows: {', '.join(manifest.labels)}. Scores are divided by {manifest.temperature:g}.",
        ]
    lines += _table("Data", ((each.dataset_version, f"{each.use}, SHA-256 {each.sha256}") for each in manifest.datasets))
    lines += _table("Measured", ((name, f"{value:.6g}") for name, value in sorted(manifest.metrics.items())))
    lines += _table("Chosen", sorted(manifest.hyperparameters.items()))
    lines += ["", "## Privacy", ""]
    if manifest.HasField("privacy"):
        said = manifest.privacy
        lines.append(f"Differentially private training: epsilon {said.epsilon:g}, delta {said.delta:g}, counted by {said.accountant}.")
        lines.append("This protects the examples of the training set, not prompts.")
    else:
        lines.append("Training was not private.")
    return "\n".join(lines) + "\n"


def _table(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    listed = [f"| {name} | {value} |" for name, value in rows]
    return ["", f"## {title}", "", "| | |", "|---|---|", *listed] if listed else []


# --- merged weights ---------------------------------------------------------------------------------------------------------------------


async def merged_entries(objects: Objects, place: str, manifest: AdapterManifest, envelope: bytes, directory: Path) -> list[Entry]:
    """The base's files with the adapter in its weights, the head, the signed manifest and a card."""
    entries = []
    for name in BASE_FILES:
        if (directory / name).is_file():
            data = await asyncio.to_thread((directory / name).read_bytes)
            entries.append(Entry(name, len(data), stored(data)))
    factors = await _factors(objects, place, manifest)
    for file in sorted(directory.glob("*.safetensors")):
        entries.append(Entry(file.name, file.stat().st_size, functools.partial(_merged, file, factors)))
    return [*entries, *await _beside(objects, place, manifest, envelope)]


Merge = Callable[[Array], Array]  # a base's matrix [out, in] → the tuned one


async def _factors(objects: Objects, place: str, manifest: AdapterManifest) -> dict[str, Merge]:
    """By the base's tensor name."""
    path, lora = f"{place}/{ADAPTER}", lora_of(manifest)
    layers = fit.check_adapter(await _header(objects, path), lora)
    found: dict[str, Merge] = {}
    for module, kinds in layers.items():
        values = {
            kind: tensors.floats(tensor, await objects.get_range(path, tensor.begin, tensor.end - tensor.begin))
            for kind, tensor in kinds.items()
        }
        found[f"{module}.weight"] = functools.partial(merge, factors=values, scale=lora.scale)
    return found


def merge(weight: Array, factors: Mapping[str, Array], scale: float) -> Array:
    """W + scale B A; with a magnitude, each row then has that length (DoRA)."""
    tuned = weight + np.float32(scale) * (factors["lora_B.weight"] @ factors["lora_A.weight"])
    if (magnitude := factors.get("lora_magnitude_vector.weight")) is not None:
        tuned *= (magnitude.reshape(-1) / np.linalg.norm(tuned, axis=1))[:, None]
    return tuned


async def _merged(file: Path, factors: Mapping[str, Merge], start: int) -> AsyncIterator[bytes]:
    """A base's file from an offset on, tensors of the adapter merged."""
    with file.open("rb") as opened:

        def read(at: int, length: int) -> bytes:
            opened.seek(at)
            return opened.read(length)

        size = file.stat().st_size
        found = tensors.read_header(read, size, weights.HEADER_BYTES)
        begin = min(tensor.begin for tensor in found.values())
        if start < begin:
            yield await asyncio.to_thread(read, start, begin - start)
        for name, tensor in found.items():
            if tensor.end <= start:
                continue
            skip = max(0, start - tensor.begin)
            if (change := factors.get(name)) is not None:
                raw = await asyncio.to_thread(_changed, tensor, functools.partial(read, tensor.begin, tensor.end - tensor.begin), change)
                for at in range(skip, len(raw), PIECE_BYTES):
                    yield raw[at : at + PIECE_BYTES]
                continue
            for at in range(tensor.begin + skip, tensor.end, PIECE_BYTES):
                yield await asyncio.to_thread(read, at, min(PIECE_BYTES, tensor.end - at))


def _changed(tensor: Tensor, read: Callable[[], bytes], change: Merge) -> bytes:
    return tensors.packed(change(tensors.floats(tensor, read())), tensor.dtype)
