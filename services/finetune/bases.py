"""The bases that models may build on: their directories, digests and linear layers, found once and on first use."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.chassis.errors import NotStarted, ResourceNotFound
from services.finetune import fit, tensors
from services.pretrained import weights

DEFAULT_CONTEXT = 2048  # tokens, where a config does not say
LAYER = ".layers."  # what lies below is repeated; embeddings and the output matrix are outside


@dataclass(frozen=True)
class Base:
    """A base as it lies here."""

    directory: Path
    digest: str  # SHA-256 as replicas report it
    modules: fit.Modules
    width: int  # values of a hidden state
    weights: int  # numbers in it
    context: int  # tokens of prompt and output


class Bases:
    """By resource name, `models/{m}`."""

    def __init__(self, entries: Sequence[str], cache_dir: str | None = None) -> None:
        """`entries`: `name=directory, .gguf file or hub id`. Raises ValueError for another form."""
        self._sources: dict[str, str] = {}
        for entry in entries:
            name, equals, source = entry.partition("=")
            if not name or not equals or not source:
                raise ValueError("a base is given as name=directory, file or hub id")
            self._sources[f"models/{name}"] = source
        self._cache_dir = weights.cache_directory(cache_dir)
        self._found: dict[str, asyncio.Task[Base]] = {}

    @property
    def names(self) -> frozenset[str]:
        """What there is."""
        return frozenset(self._sources)

    def known(self, name: str) -> Base | None:
        """A base that was read already; None: nobody has asked for it yet."""
        task = self._found.get(name)
        read = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return task.result() if task is not None and read else None

    async def get(self, name: str, field: str = "base_model") -> Base:
        """A base; the first call may take seconds, for which nothing else waits.

        Raises:
            ResourceNotFound: there is none of this name.
            NotStarted: its files cannot be had now.
        """
        if name not in self._sources:
            raise ResourceNotFound(field)
        task = self._found.get(name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._found[name] = asyncio.create_task(asyncio.to_thread(self._read, name), name=f"base {name}")
        try:
            return await asyncio.shield(task)  # a caller who leaves takes nobody else's work along
        except (weights.ModelRefused, weights.ModelUnavailable, OSError, tensors.Refused) as error:
            raise NotStarted(5.0) from error

    def _read(self, name: str) -> Base:
        directory = weights.prepare(self._sources[name], self._cache_dir)
        modules = linear_layers(directory)
        width = next((shape[1] for path, shape in modules.items() if path.endswith("q_proj")), 0)
        config = json.loads((directory / "config.json").read_text())
        context = (config.get("text_config") or config).get("max_position_embeddings", DEFAULT_CONTEXT)
        return Base(directory, weights.digest(directory, self._cache_dir), modules, width, _numbers(directory), context)


def _numbers(directory: Path) -> int:
    """Weights of a base: bytes of its files by the size of a number, which all of a base's tensors share."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            head = opened.read(8 + min(int.from_bytes(opened.read(8), "little"), weights.HEADER_BYTES))
        total += file.stat().st_size // (4 if b'"F32"' in head else 2)
    return total


def linear_layers(directory: Path) -> dict[str, tuple[int, int]]:
    """Path → (out, in) of each matrix in a layer, as the files' headers say. Raises tensors.Refused, OSError."""
    found: dict[str, tuple[int, int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:

            def read(start: int, length: int) -> bytes:
                opened.seek(start)
                return opened.read(length)

            for tensor in tensors.read_header(read, file.stat().st_size, weights.HEADER_BYTES).values():
                if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and LAYER in tensor.name:
                    found[tensor.name.removesuffix(".weight")] = (tensor.shape[0], tensor.shape[1])
    return found
