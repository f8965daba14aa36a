"""Images as files: layers that are equal byte for byte wherever and whenever they are packed, and archives that containerd and docker load.

Names are sorted, owners are root but where told otherwise, modes are 0755 or 0644, and every time is SOURCE_DATE_EPOCH or 1980.
"""

import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

__all__ = ["EPOCH", "Layer", "Owner", "pack", "write"]

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "315532800"))  # 1980: zip files begin there
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"


@dataclass(frozen=True)
class Owner:
    """Who owns a path that is not root's, and its mode."""

    uid: int
    mode: int


@dataclass(frozen=True)
class Layer:
    """A packed layer on disk."""

    path: Path
    digest: str  # sha256, hex, of the tar as it is: nothing is compressed
    size: int  # bytes
    comment: str  # of the image's history
    components: tuple[dict[str, str], ...] = field(default=(), compare=False)  # of the bill of materials


class _Hashed:
    """A file that knows the digest of what went through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


def pack(root: Path, target: Path, comment: str, owners: Mapping[str, Owner] | None = None) -> Layer:
    """`root` as a layer in `target`, which appears whole. `owners`: by path without a leading slash."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            out = _Hashed(file)
            with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:  # type: ignore[call-overload]
                for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).parts):
                    _add(tar, path, path.relative_to(root).as_posix(), owners or {})
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return Layer(target, out.hash.hexdigest(), out.size, comment)


def _add(tar: tarfile.TarFile, path: Path, name: str, owners: Mapping[str, Owner]) -> None:
    found = path.lstat()
    member = tarfile.TarInfo(name)
    member.mtime = EPOCH
    if stat.S_ISLNK(found.st_mode):
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
    elif stat.S_ISDIR(found.st_mode):
        member.type, member.mode = tarfile.DIRTYPE, 0o755
    elif stat.S_ISREG(found.st_mode):
        member.size, member.mode = found.st_size, 0o755 if found.st_mode & stat.S_IXUSR else 0o644
    else:
        raise ValueError(f"{name} is neither a file, a directory nor a link")
    if owner := owners.get(name):
        member.uid = member.gid = owner.uid
        member.mode = owner.mode
    if member.isreg():
        with path.open("rb") as file:
            tar.addfile(member, file)
    else:
        tar.addfile(member)


def write(target: Path, reference: str, layers: Sequence[Layer], settings: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """An OCI archive that `docker load` reads too: `settings` as of an image's `config`. Returns the manifest's sha256, hex."""
    created = datetime.fromtimestamp(EPOCH, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": created,
            "config": {**settings, "Labels": dict(labels)},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.digest}" for layer in layers]},
            "history": [{"created": created, "comment": layer.comment} for layer in layers],
        }
    )
    config_digest = hashlib.sha256(config).hexdigest()
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor(_CONFIG, config_digest, len(config)),
            "layers": [_descriptor(_LAYER, layer.digest, layer.size) for layer in layers],
        }
    )
    digest = hashlib.sha256(manifest).hexdigest()
    named = {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference.rpartition(":")[2]}
    index = _json({"schemaVersion": 2, "manifests": [{**_descriptor(_MANIFEST, digest, len(manifest)), "annotations": named}]})
    docker = [{"Config": _blob(config_digest), "RepoTags": [reference], "Layers": [_blob(layer.digest) for layer in layers]}]
    small = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": index,
        "manifest.json": _json(docker),
        _blob(config_digest): config,
        _blob(digest): manifest,
    }
    if _holds(target, index):
        return digest
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in small.items():
                tar.addfile(_member(name, len(content)), io.BytesIO(content))
            for layer in {layer.digest: layer for layer in layers}.values():
                with layer.path.open("rb") as file:
                    tar.addfile(_member(_blob(layer.digest), layer.size), file)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def _holds(target: Path, index: bytes) -> bool:
    """Whether the archive is there already: it appeared whole, and its index names all of it."""
    try:
        with tarfile.open(target) as tar:
            found = tar.extractfile("index.json")
            return found is not None and found.read() == index
    except (FileNotFoundError, KeyError, tarfile.ReadError):
        return False


def _blob(digest: str) -> str:
    return f"blobs/sha256/{digest}"


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, EPOCH, 0o644
    return member


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
