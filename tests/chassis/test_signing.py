import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from services.chassis import signing
from services.chassis.signing import SignatureRefused, predicate_of, seal, statement, unseal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
KEYS = {"k1": KEY.public_key()}


def envelope(**changed: Any) -> bytes:
    return json.dumps(json.loads(seal(b"payload", "text/plain", KEY, "k1")) | changed).encode()


def test_what_is_sealed_is_unsealed() -> None:
    assert unseal(seal(b"\x00\xff", "a/b", KEY, "k1"), KEYS, "a/b") == b"\x00\xff"


def test_the_signature_covers_the_encoding_of_the_specification() -> None:
    """The example of DSSE's own protocol text, so that any other DSSE reader agrees with us."""
    signature = base64.b64decode(json.loads(seal(b"hello world", "http://example.com/HelloWorld", KEY, "k1"))["signatures"][0]["sig"])
    KEY.public_key().verify(signature, b"DSSEv1 29 http://example.com/HelloWorld 11 hello world")


def test_an_altered_payload_type_or_signature_is_refused() -> None:
    for changed, why in (
        ({"payload": base64.b64encode(b"other").decode()}, "bad signature"),
        ({"payloadType": "text/html"}, "another type"),
        ({"signatures": []}, "not an envelope"),
        ({"signatures": [{"keyid": "k1", "sig": base64.b64encode(b"s" * 64).decode()}]}, "bad signature"),
        ({"signatures": [{"keyid": "k1", "sig": "!"}]}, "not base64"),
        ({"signatures": ["k1"]}, "not an envelope"),
        ({"payload": 1}, "not base64"),
    ):
        with pytest.raises(SignatureRefused) as caught:
            unseal(envelope(**changed), KEYS, "text/plain")
        assert caught.value.why == why, changed


def test_a_key_we_do_not_hold_proves_nothing_and_a_rotated_one_still_does() -> None:
    with pytest.raises(SignatureRefused, match="unknown key"):
        unseal(seal(b"p", "t", OTHER, "k2"), KEYS, "t")
    with pytest.raises(SignatureRefused, match="bad signature"):
        unseal(seal(b"p", "t", OTHER, "k1"), KEYS, "t")
    assert unseal(seal(b"p", "t", OTHER, "k2"), KEYS | {"k2": OTHER.public_key()}, "t") == b"p"
    both = json.loads(seal(b"p", "t", KEY, "k1"))
    both["signatures"] = json.loads(seal(b"p", "t", OTHER, "k2"))["signatures"] + both["signatures"]
    assert unseal(json.dumps(both).encode(), KEYS, "t") == b"p"


def test_what_is_not_an_envelope_is_refused() -> None:
    twice = envelope().replace(b'{"payload"', b'{"payload":"","payload"', 1)
    for raw in (b"", b"[]", b"\xff", b"[" * 100_000, b" " * (signing.ENVELOPE_BYTES + 1), twice):
        with pytest.raises(SignatureRefused):
            unseal(raw, KEYS, "text/plain")


def test_a_statement_is_canonical_and_names_its_subjects() -> None:
    payload = statement({"b": "2" * 64, "a": "1" * 64}, signing.GATE_VERDICT, {"y": 1, "x": "é"})
    assert payload == statement({"a": "1" * 64, "b": "2" * 64}, signing.GATE_VERDICT, {"x": "é", "y": 1})
    assert json.loads(payload)["_type"] == "https://in-toto.io/Statement/v1"
    assert predicate_of(payload, signing.GATE_VERDICT) == ({"x": "é", "y": 1}, {"a": "1" * 64, "b": "2" * 64})
    assert len(signing.digest_of(payload)) == 64


def test_a_statement_of_another_type_or_form_is_refused() -> None:
    payload = statement({"a": "1" * 64}, signing.GATE_VERDICT, {})
    with pytest.raises(SignatureRefused, match="another statement"):
        predicate_of(payload, signing.ADAPTER_MANIFEST)
    for old, new in ((b'"subject":[', b'"subject":[1,'), (b'"predicate":{}', b'"predicate":[]'), (b'"sha256"', b'"md5"')):
        with pytest.raises(SignatureRefused, match="not a statement"):
            predicate_of(payload.replace(old, new), signing.GATE_VERDICT)


def test_a_value_json_cannot_hold_is_not_signed() -> None:
    with pytest.raises(ValueError):
        statement({}, signing.GATE_VERDICT, {"loss": float("nan")})


def test_keys_come_from_pem_files_and_other_kinds_are_refused(tmp_path: Path) -> None:
    ours, public, curve = tmp_path / "k.pem", tmp_path / "p.pem", tmp_path / "c.pem"
    ours.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    other = generate_private_key(SECP256R1())
    curve.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    keys = signing.public_keys((f"k1={public}",))
    assert unseal(seal(b"p", "t", signing.private_key(ours), "k1"), keys, "t") == b"p"
    assert signing.keyid_of(keys["k1"]) == signing.keyid_of(KEY.public_key()) != signing.keyid_of(OTHER.public_key())
    with pytest.raises(ValueError):
        signing.private_key(curve)
    curve.write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for wrong in ((f"k1={curve}",), (str(public),), (f"={public}",), (f"a={public}", f"a={public}")):
        with pytest.raises(ValueError):
            signing.public_keys(wrong)
