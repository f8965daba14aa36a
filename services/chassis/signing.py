"""Signed statements: DSSE envelopes with Ed25519 around in-toto statements (pure).

The control plane signs what it vouches for (an adapter's manifest, a gate's verdict, an erasure's certificate); a reader that holds the
public key believes nothing else. What is signed is DSSE's pre-authentication encoding, so a payload cannot be read as another type.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

IN_TOTO = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
ADAPTER_MANIFEST = "https://argosy.dev/AdapterManifest/v1"
GATE_VERDICT = "https://argosy.dev/GateVerdict/v1"
DELETION_CERTIFICATE = "https://argosy.dev/DeletionCertificate/v1"
ENVELOPE_BYTES = 4 << 20  # a longer one is refused unread
SIGNATURES = 8  # in one envelope: rotation needs two


class SignatureRefused(Exception):
    """An envelope or its statement is not to be believed. `why` is for our log."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def seal(payload: bytes, payload_type: str, key: Ed25519PrivateKey, keyid: str) -> bytes:
    """The DSSE envelope, compact JSON, of `payload` signed with `key`; `keyid` tells readers which public key to try."""
    signature = {"keyid": keyid, "sig": base64.b64encode(key.sign(_encoded(payload, payload_type))).decode()}
    return _compact({"payload": base64.b64encode(payload).decode(), "payloadType": payload_type, "signatures": [signature]})


def unseal(envelope: bytes, keys: Mapping[str, Ed25519PublicKey], payload_type: str) -> bytes:
    """The payload of an envelope that one of `keys` has signed.

    Args:
        envelope: as `seal` or any other DSSE writer made it; at most 4 MiB.
        keys: public keys by keyid. A signature of an unknown key is passed over, as another signer's.
        payload_type: what the reader expects.

    Raises:
        SignatureRefused: not an envelope, of another type, or without a good signature.
    """
    if len(envelope) > ENVELOPE_BYTES:
        raise SignatureRefused("too long")
    outer = _object(envelope)
    signatures = outer.get("signatures")
    if outer.get("payloadType") != payload_type:
        raise SignatureRefused("another type")
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= SIGNATURES:
        raise SignatureRefused("not an envelope")
    payload = _bytes(outer.get("payload"))
    for signature in signatures:
        if not isinstance(signature, dict):
            raise SignatureRefused("not an envelope")
        key = keys.get(signature["keyid"]) if isinstance(signature.get("keyid"), str) else None
        if key is None:
            continue
        try:
            key.verify(_bytes(signature.get("sig")), _encoded(payload, payload_type))
        except InvalidSignature:
            raise SignatureRefused("bad signature") from None
        return payload
    raise SignatureRefused("unknown key")


def statement(subjects: Mapping[str, str], predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """An in-toto statement as canonical JSON: sorted keys, no spaces.

    Args:
        subjects: name → SHA-256 in 64 hex digits of what the statement is about.
        predicate_type: one of the types of this module.
        predicate: what is said; JSON values.
    """
    about = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subjects.items())]
    return _compact({"_type": STATEMENT, "subject": about, "predicateType": predicate_type, "predicate": predicate})


def predicate_of(payload: bytes, predicate_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What a statement says, and its subjects (name → SHA-256).

    Raises:
        SignatureRefused: not a statement, or of another type.
    """
    body = _object(payload)
    if body.get("_type") != STATEMENT or body.get("predicateType") != predicate_type:
        raise SignatureRefused("another statement")
    predicate, subjects = body.get("predicate"), body.get("subject")
    if not isinstance(predicate, dict) or not isinstance(subjects, list):
        raise SignatureRefused("not a statement")
    found: dict[str, str] = {}
    for subject in subjects:
        digest = subject.get("digest") if isinstance(subject, dict) else None
        sha256 = digest.get("sha256") if isinstance(digest, dict) else None
        if not isinstance(sha256, str) or not isinstance(subject.get("name"), str) or subject["name"] in found:
            raise SignatureRefused("not a statement")
        found[subject["name"]] = sha256
    return predicate, found


def digest_of(payload: bytes) -> str:
    """SHA-256 of a payload in 64 hex digits; of a signed manifest it is the adapter's digest."""
    return hashlib.sha256(payload).hexdigest()


def private_key(file: Path) -> Ed25519PrivateKey:
    """The Ed25519 key of a PEM file. Raises ValueError for another kind."""
    key = load_pem_private_key(file.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file} is not an Ed25519 private key")
    return key


def public_keys(entries: tuple[str, ...]) -> dict[str, Ed25519PublicKey]:
    """Public keys by keyid from entries `kid=path` of PEM files. Raises ValueError for another form or kind."""
    found: dict[str, Ed25519PublicKey] = {}
    for entry in entries:
        kid, equals, path = entry.partition("=")
        if not kid or not equals or kid in found:
            raise ValueError("a public key is given as kid=path, each kid once")
        key = load_pem_public_key(Path(path).expanduser().read_bytes())
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError(f"the key {kid} is not Ed25519")
        found[kid] = key
    return found


def keyid_of(key: Ed25519PublicKey) -> str:
    """A name that follows from the key: 16 hex digits of the SHA-256 of its raw bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _encoded(payload: bytes, payload_type: str) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_once)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise SignatureRefused("not JSON") from None
    if not isinstance(value, dict):
        raise SignatureRefused("not an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key said twice: two readers would see two documents."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)


def _bytes(text: Any) -> bytes:
    """DSSE allows both alphabets of base64."""
    if not isinstance(text, str):
        raise SignatureRefused("not base64")
    try:
        return base64.b64decode(text.translate({ord("-"): "+", ord("_"): "/"}), validate=True)
    except (binascii.Error, ValueError):
        raise SignatureRefused("not base64") from None
