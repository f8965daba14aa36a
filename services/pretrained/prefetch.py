"""Fetch a model's files into a folder that all replicas share: `python -m services.pretrained.prefetch SOURCE FOLDER --digest sha256:…`.

The folder appears whole and verified, or not at all. What was fetched before an interruption is kept beside it and not fetched again.
With --wait nothing is fetched: the command ends when somebody else has.
"""

import argparse
import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Protocol, cast
from urllib.parse import unquote, urlsplit

from services.pretrained import weights
from services.pretrained.weights import ModelRefused, ModelUnavailable

WANTED = (*weights.FILES, "tokenizer_config.json", "chat_template.jinja")
SPARE_BYTES = 64 << 20  # left free beside what is fetched
WAIT_SECONDS = 1.0  # a shared file system tells nobody of a new name
PIECE_BYTES = 8 << 20
UNAVAILABLE, REFUSED = 75, 65  # exit codes: try again later, or never with this


class Source(Protocol):
    """Where a model's files are."""

    def sizes(self) -> dict[str, int]:
        """Bytes by file name, of the files that are wanted. Raises ModelUnavailable."""
        ...

    def fetch(self, names: list[str], folder: Path) -> None:
        """Write these files into `folder`. Raises ModelUnavailable."""
        ...


class Folder:
    """Files of this machine, such as another volume."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def sizes(self) -> dict[str, int]:
        """See Source."""
        if not self._path.is_dir():
            raise ModelUnavailable(f"{self._path} is no directory.")
        return {path.name: path.stat().st_size for path in self._path.iterdir() if path.is_file() and wanted(path.name)}

    def fetch(self, names: list[str], folder: Path) -> None:
        """See Source."""
        for name in names:
            shutil.copyfile(self._path / name, folder / name)


class Bucket:
    """A prefix of an object store: s3://, gs:// or az://."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._obstore = cast("Any", importlib.import_module("obstore"))
        self._errors = cast("Any", importlib.import_module("obstore.exceptions"))
        self._store = cast("Any", importlib.import_module("obstore.store")).from_url(url)

    def sizes(self) -> dict[str, int]:
        """See Source."""
        try:
            found = [meta for page in self._obstore.list(self._store) for meta in page]
        except self._errors.BaseError as error:
            raise ModelUnavailable(f"{self._url} cannot be listed ({type(error).__name__}).") from error
        return {str(meta["path"]): int(meta["size"]) for meta in found if wanted(str(meta["path"]))}

    def fetch(self, names: list[str], folder: Path) -> None:
        """See Source."""
        for name in names:
            try:
                with (folder / name).open("wb") as file:
                    for piece in self._obstore.get(self._store, name).stream(min_chunk_size=PIECE_BYTES):
                        file.write(memoryview(piece))
            except self._errors.BaseError as error:
                raise ModelUnavailable(f"{self._url} did not give {name} ({type(error).__name__}).") from error


class Hub:
    """A model on the hub, by name and revision; HF_TOKEN and HF_ENDPOINT are the hub's own variables."""

    def __init__(self, model: str, revision: str | None) -> None:
        self._model, self._revision = model, revision
        self._hub = cast("Any", importlib.import_module("huggingface_hub"))
        self._errors = cast("Any", importlib.import_module("huggingface_hub.errors"))

    def sizes(self) -> dict[str, int]:
        """See Source."""
        with self._asking():
            found = self._hub.HfApi().model_info(self._model, revision=self._revision, files_metadata=True).siblings
        return {each.rfilename: int(each.size or 0) for each in found if wanted(each.rfilename)}

    def fetch(self, names: list[str], folder: Path) -> None:
        """See Source."""
        with self._asking():
            for name in names:
                self._hub.hf_hub_download(self._model, name, revision=self._revision, local_dir=folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (self._errors.HTTPError, OSError, ValueError) as error:
            raise ModelUnavailable(f"The hub did not give {self._model} ({type(error).__name__}).") from error


def wanted(name: str) -> bool:
    """Whether a file is one of a model's: at the top, and data."""
    return PurePosixPath(name).name == name and any(fnmatch(name, pattern) for pattern in WANTED)


def open_source(source: str, revision: str | None = None) -> Source:
    """The source of hf://ORG/NAME, file:///FOLDER or an object store's URL. Raises ModelUnavailable."""
    parts = urlsplit(source)
    if parts.scheme == "hf":
        return Hub(f"{parts.netloc}{parts.path}", revision)
    if parts.scheme == "file":
        return Folder(Path(unquote(parts.path)))
    if parts.scheme in ("s3", "gs", "az"):
        return Bucket(source)
    raise ModelUnavailable(f"{source!r} is not hf://, file://, s3://, gs:// or az://.")


def prefetch(source: Source, target: Path, digest: str, say: weights.Progress) -> None:
    """Make `target`, unless it is there, of files whose digest is `digest` (`sha256:` and hex, as weights.digest computes it).

    Raises ModelUnavailable where they cannot be had now, ModelRefused where they are not those or must not be loaded.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return
        partial.mkdir(exist_ok=True)
        sizes = source.sizes()
        if not sizes:
            raise ModelRefused("None of a model's files is there: *.safetensors, config.json and tokenizer.json are looked for.")
        missing = [name for name, size in sorted(sizes.items()) if _size(partial / name) != size]
        needed, free = sum(sizes[name] for name in missing) + SPARE_BYTES, shutil.disk_usage(partial).free
        if needed > free:
            raise ModelUnavailable(f"{needed >> 20} MiB are needed on the volume of {target}, and {free >> 20} MiB are free.")
        done, total = sum(sizes.values()) - sum(sizes[name] for name in missing), sum(sizes.values())
        for name in missing:
            source.fetch([name], partial)
            done += sizes[name]
            say(done, total, "download")
        try:
            _verify(partial, digest)
        except ModelRefused:
            shutil.rmtree(partial)  # a retry must not find the same again
            raise
        for path in partial.iterdir():
            _on_disk(path)
        partial.rename(target)
        _on_disk(target.parent)


def _verify(folder: Path, digest: str) -> None:
    """Raise ModelRefused unless the folder holds the model of this digest and nothing but data."""
    with tempfile.TemporaryDirectory() as scratch:  # no record of sizes and times is believed
        weights.prepare(str(folder), Path(scratch))
        found = weights.digest(folder, Path(scratch))
    if f"sha256:{found}" != digest:
        raise ModelRefused(f"The files' digest is sha256:{found}, and {digest} was asked for.")


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return -1


def _on_disk(path: Path) -> None:
    """So that no name outlives a crash that its bytes do not."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _end(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """0, or an exit code and a sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("source", help="hf://ORG/NAME, s3://…, gs://…, az://… or file:///…")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--digest", required=True, help="sha256:… of the model, as a mismatch prints it")
    parser.add_argument("--revision", help="on the hub")
    parser.add_argument("--wait", action="store_true", help="for somebody else to fetch it")
    read = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _end)  # the first process of a container ignores a signal that it does not handle
    if read.wait:
        print(f"waiting for {read.folder}", flush=True)
        while not read.folder.is_dir():
            time.sleep(WAIT_SECONDS)
        return 0
    try:
        source = open_source(read.source, read.revision)
        prefetch(source, read.folder, read.digest, lambda done, total, what: print(f"{what}: {done} of {total} bytes", flush=True))
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE
    except ModelRefused as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
