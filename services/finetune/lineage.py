"""What a version is and where it comes from, signed: an adapter's manifest as the predicate of an in-toto statement.

The digest of the signed payload names the adapter everywhere: in the object store, in the engine's cache, in answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf import json_format

from argosy_internal.training.v1.training_pb2 import AdapterManifest
from services.chassis import signing

MANIFEST = "manifest.json"
ADAPTER = "adapter.safetensors"
HEAD = "head.safetensors"


@dataclass(frozen=True)
class Signer:
    """The control plane's key, by which everything it vouches for is signed."""

    key: Ed25519PrivateKey
    keyid: str

    def seal(self, payload: bytes) -> bytes:
        """The envelope of an in-toto statement."""
        return signing.seal(payload, signing.IN_TOTO, self.key, self.keyid)

    def keys(self) -> dict[str, Ed25519PublicKey]:
        """What verifies it."""
        return {self.keyid: self.key.public_key()}


@dataclass(frozen=True)
class Signed:
    """A signed manifest; `digest` is the adapter's."""

    envelope: bytes
    digest: str


def sign(manifest: AdapterManifest, signer: Signer) -> Signed:
    """Sign a manifest, whose `version` is set. The same manifest gives the same digest."""
    subjects = {part.name: part.sha256 for part in manifest.parts}
    payload = signing.statement(subjects, signing.ADAPTER_MANIFEST, as_json(manifest))
    return Signed(signer.seal(payload), signing.digest_of(payload))


def unsign(envelope: bytes, keys: Mapping[str, Ed25519PublicKey]) -> tuple[AdapterManifest, str]:
    """A manifest that one of `keys` has signed, and its digest.

    Raises:
        SignatureRefused: it is not one, or its parts are not its subjects.
    """
    payload = signing.unseal(envelope, keys, signing.IN_TOTO)
    predicate, subjects = signing.predicate_of(payload, signing.ADAPTER_MANIFEST)
    manifest = from_json(predicate)
    if subjects != {part.name: part.sha256 for part in manifest.parts}:
        raise signing.SignatureRefused("subjects are not the parts")
    return manifest, signing.digest_of(payload)


def as_json(manifest: AdapterManifest) -> dict[str, Any]:
    """Proto-JSON with the proto's own names, as stored and signed."""
    said: dict[str, Any] = json_format.MessageToDict(manifest, preserving_proto_field_name=True)
    return said


def from_json(said: Mapping[str, Any]) -> AdapterManifest:
    """The inverse of `as_json`; fields newer than this program are passed over.

    Raises:
        SignatureRefused: it is not a manifest.
    """
    try:
        return json_format.ParseDict(dict(said), AdapterManifest(), ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise signing.SignatureRefused("not a manifest") from error


def place(project_uid: str, digest: str) -> str:
    """Where an adapter's files lie in the object store, without a slash behind."""
    return f"adapters/{project_uid}/{digest}"
