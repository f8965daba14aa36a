import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from services.chassis.identity import LIFETIME_S, SKEW_S, Caller, CallerRefused, CallerSigner, CallerVerifier

OLD, NEW, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
NOW = 1_800_000_000.0
CALLER = Caller(
    project_uid="0b9f4a5e-52ab-4d3c-9f5a-0d8e31f6a1c2", project="news", key_id="k1", scopes=frozenset({"generate", "explain"}),
    request_id="6c1d0000-0000-4000-8000-000000000001", kv_scope="ab" * 16, models=("gemma", "qwen"), output_token_ceiling=512,
)  # fmt: skip
PUBLIC = {"old": OLD.public_key(), "new": NEW.public_key()}
VERIFIER = CallerVerifier(PUBLIC, "inference")


def part(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def forged(key: Ed25519PrivateKey = NEW, **changed: Any) -> bytes:
    """A token with some claims changed, signed again by `key`; None removes a claim."""
    body = json.loads(base64.urlsafe_b64decode(CallerSigner(NEW, "new").sign(CALLER, "inference", NOW).split(b".")[0] + b"=="))
    body = {k: v for k, v in (body | changed).items() if v is not None}
    text = part(json.dumps(body).encode())
    return text + b"." + part(key.sign(text))


@pytest.mark.parametrize("caller", [CALLER, replace(CALLER, scopes=frozenset(), models=(), output_token_ceiling=None)])
def test_what_is_signed_is_verified(caller: Caller) -> None:
    assert VERIFIER.verify(CallerSigner(NEW, "new").sign(caller, "inference", NOW), NOW) == caller


def test_both_keys_count_while_one_replaces_the_other() -> None:
    for key, kid in ((OLD, "old"), (NEW, "new")):
        assert VERIFIER.verify(CallerSigner(key, kid).sign(CALLER, "inference", NOW), NOW) == CALLER
    after = CallerVerifier({"new": NEW.public_key()}, "inference")
    with pytest.raises(CallerRefused, match="API key"):
        after.verify(CallerSigner(OLD, "old").sign(CALLER, "inference", NOW), NOW)


@pytest.mark.parametrize(
    "why, blob",
    [
        ("not a token", b""),
        ("not a token", b"abc"),
        ("not a token", b"." * 9_000),
        ("not base64url", b"*.*"),
        ("not JSON", part(b"\xff\xfe") + b".AAAA"),
        ("not JSON", part(b"[" * 5_000) + b".AAAA"),
        ("not an object", part(b"[]") + b".AAAA"),
        ("unknown kid", forged(kid="other")),
        ("unknown kid", forged(kid=7)),
        ("unknown kid", forged(kid=None)),
        ("bad signature", forged(STRANGER)),
        ("bad signature", forged(OLD)),
        ("another audience", forged(aud="finetune")),
        ("another audience", forged(aud=["inference"])),
        ("another audience", forged(aud=None)),
        ("iat is not a time", forged(iat=None)),
        ("exp is not a time", forged(exp="2030")),
        ("exp is not a time", forged(exp=float("inf"))),
        ("exp is not a time", forged(exp=True)),
        ("lives too long", forged(exp=NOW + 3_600)),
        ("not valid now", forged(iat=NOW + 31, exp=NOW + 60)),
        ("not valid now", forged(iat=NOW - 100, exp=NOW - 40)),
        ("scopes is not a list of text", forged(scopes="generate")),
        ("scopes is not a list of text", forged(scopes=[1])),
        ("project_uid is not text", forged(project_uid=None)),
        ("output_token_ceiling is not a count", forged(output_token_ceiling=-1)),
        ("output_token_ceiling is not a count", forged(output_token_ceiling="many")),
    ],
)
def test_a_forgery_is_refused(why: str, blob: bytes) -> None:
    with pytest.raises(CallerRefused) as refused:
        VERIFIER.verify(blob, NOW)
    assert refused.value.why == why


@given(at=st.integers(0), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(at: int, bit: int) -> None:
    blob = bytearray(CallerSigner(NEW, "new").sign(CALLER, "inference", NOW))
    blob[at % len(blob)] ^= 1 << bit
    with pytest.raises(CallerRefused):
        VERIFIER.verify(bytes(blob), NOW)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_and_nothing_else_is_raised(blob: bytes) -> None:
    with pytest.raises(CallerRefused):
        VERIFIER.verify(blob, NOW)


def test_parts_of_two_tokens_do_not_fit() -> None:
    sign = CallerSigner(NEW, "new").sign
    mine, theirs = sign(CALLER, "inference", NOW), sign(replace(CALLER, project="other"), "inference", NOW)
    with pytest.raises(CallerRefused):
        VERIFIER.verify(theirs.split(b".")[0] + b"." + mine.split(b".")[1], NOW)


@pytest.mark.parametrize(
    "late_s, good", [(-SKEW_S - 0.1, False), (-SKEW_S, True), (LIFETIME_S + SKEW_S - 0.1, True), (LIFETIME_S + SKEW_S, False)]
)
def test_F29_a_token_lives_60_s_and_clocks_may_differ_by_30(late_s: float, good: bool) -> None:
    blob = CallerSigner(NEW, "new").sign(CALLER, "inference", NOW)
    if good:
        assert VERIFIER.verify(blob, NOW + late_s) == CALLER
    else:
        with pytest.raises(CallerRefused):
            VERIFIER.verify(blob, NOW + late_s)


def test_nobody_signs_for_longer_than_a_minute() -> None:
    with pytest.raises(ValueError, match="61"):
        CallerSigner(NEW, "new").sign(CALLER, "inference", NOW, lifetime_s=61)
