"""Who calls: a `Caller` in a ContextVar, and its signed form between services (pure).

The gateway makes a `Caller` from a verified API key and signs it; a pod verifies it at the start of a call and trusts nothing else. The
token is two base64url parts and a dot between, both compact: JSON, Ed25519 signature over the first part as sent. It lives at most 60 s.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.chassis.errors import ApiKeyInvalid

CALLER_KEY = "x-argosy-caller-bin"
LIFETIME_S = 60.0  # the longest a token may live
SKEW_S = 30.0  # clocks may differ by this
TOKEN_BYTES = 8_192  # longer is refused unread


@dataclass(frozen=True, slots=True)
class Caller:
    """A verified caller. Everything here comes from the credential, nothing from the request but its id."""

    project_uid: str  # storage paths and cache keys use this
    project: str  # name segment: projects/{project}
    key_id: str
    scopes: frozenset[str]
    request_id: str
    kv_scope: str  # hex, secret of the project: root of its prefix cache
    models: tuple[str, ...] = ()  # the key's model list; empty: all
    output_token_ceiling: int | None = None  # tokens of one request; None: the model's own
    # What calls that start jobs may take; None: unlimited, or not such a call.
    concurrent_jobs: int | None = None
    job_nanos_left: int | None = None  # of today's budget, 1e-9 of the currency's unit
    job_seconds_left: int | None = None  # of the device, today


_CLAIMS = tuple(field.name for field in fields(Caller))  # asdict would copy each value deeply, on every call

CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


class CallerRefused(ApiKeyInvalid):
    """The token is not to be believed. `why` is for our log; the wire says what it says of any bad credential."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why


class CallerSigner:
    """Signs callers with one private key, named `kid`."""

    def __init__(self, private_key: Ed25519PrivateKey, kid: str) -> None:
        self._key = private_key
        self._kid = kid

    def sign(self, caller: Caller, audience: str, now: float, lifetime_s: float = LIFETIME_S) -> bytes:
        """Return the value of `x-argosy-caller-bin`. `now` is in seconds of the epoch; `lifetime_s` is at most 60."""
        if not 0 < lifetime_s <= LIFETIME_S:
            raise ValueError(f"a caller token lives 0..{LIFETIME_S:.0f} s, not {lifetime_s}")
        claims = {name: getattr(caller, name) for name in _CLAIMS} | {
            "scopes": sorted(caller.scopes), "kid": self._kid, "aud": audience, "iat": round(now, 3), "exp": round(now + lifetime_s, 3),
        }  # fmt: skip
        body = _encode(json.dumps(claims, separators=(",", ":"), sort_keys=True).encode())
        return body + b"." + _encode(self._key.sign(body))


class CallerVerifier:
    """Verifies tokens meant for `audience`, against several public keys by kid, so that a key can be rotated under load."""

    def __init__(self, public_keys: Mapping[str, Ed25519PublicKey], audience: str) -> None:
        self._keys = dict(public_keys)
        self._audience = audience

    def verify(self, blob: bytes, now: float) -> Caller:
        """Return the caller, or raise `CallerRefused`. `now` is in seconds of the epoch."""
        body, dot, signature = blob.partition(b".")
        if not dot or len(blob) > TOKEN_BYTES:
            raise CallerRefused("not a token")
        claims = _claims(body)
        key = self._keys.get(claims["kid"]) if isinstance(claims.get("kid"), str) else None
        if key is None:
            raise CallerRefused("unknown kid")
        try:
            key.verify(_decode(signature), body)
        except InvalidSignature:
            raise CallerRefused("bad signature") from None
        if claims.get("aud") != self._audience:
            raise CallerRefused("another audience")
        issued, expires = _seconds(claims, "iat"), _seconds(claims, "exp")
        if expires - issued > LIFETIME_S + 0.001:  # both were rounded to a millisecond
            raise CallerRefused("lives too long")
        if not issued - SKEW_S <= now < expires + SKEW_S:
            raise CallerRefused("not valid now")
        return _caller(claims)


def _encode(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    """Strict base64url: one text a value, so a token has no second spelling."""
    try:
        raw = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise CallerRefused("not base64url") from None
    if _encode(raw) != text:
        raise CallerRefused("not base64url")
    return raw


def _claims(body: bytes) -> dict[str, Any]:
    try:
        claims = json.loads(_decode(body))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise CallerRefused("not JSON") from None
    if not isinstance(claims, dict):
        raise CallerRefused("not an object")
    return claims


def _seconds(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CallerRefused(f"{name} is not a time")
    return float(value)


def _caller(claims: Mapping[str, Any]) -> Caller:
    """Field by field: what our own key signed is still checked for shape, since versions of us differ during an upgrade."""

    def text(name: str) -> str:
        value = claims.get(name)
        if not isinstance(value, str):
            raise CallerRefused(f"{name} is not text")
        return value

    def texts(name: str) -> list[str]:
        value = claims.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CallerRefused(f"{name} is not a list of text")
        return value

    def count(name: str) -> int | None:
        value = claims.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise CallerRefused(f"{name} is not a count")
        return value

    return Caller(
        project_uid=text("project_uid"),
        project=text("project"),
        key_id=text("key_id"),
        scopes=frozenset(texts("scopes")),
        request_id=text("request_id"),
        kv_scope=text("kv_scope"),
        models=tuple(texts("models")),
        output_token_ceiling=count("output_token_ceiling"),
        concurrent_jobs=count("concurrent_jobs"),
        job_nanos_left=count("job_nanos_left"),
        job_seconds_left=count("job_seconds_left"),
    )
