"""What an API key is and how it is checked.

A key reads `argosy_<env>_<keyid>_<secret>_<crc>`. The key id is the key's uid in base62; the secret holds 160 random bits or more;
the crc lets scanners and this gateway drop a typo without a query. Stored are the uid and HMAC-SHA-256(pepper, secret): the secret
is random, so a slow hash would protect nothing and let anyone burn our CPU.
"""

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEY_ID_CHARS = 22  # 62^22 > 2^128
SECRET_CHARS = 32  # 190 bits
CRC_CHARS = 6  # 62^6 > 2^32
MAX_TOKEN_CHARS = 128
PEPPER_BYTES = 32

_SHAPE = re.compile(rf"(argosy_[a-z]{{1,16}}_([0-9A-Za-z]{{{KEY_ID_CHARS}}})_([0-9A-Za-z]{{27,64}}))_([0-9A-Za-z]{{{CRC_CHARS}}})")
_VALUE = {char: value for value, char in enumerate(BASE62)}


@dataclass(frozen=True)
class Presented:
    """A well-formed key as a caller sent it; nothing is proved yet."""

    uid: str
    secret: bytes


@dataclass(frozen=True)
class Grant:
    """What a key may do and use; None and an empty list of models: whatever its project may."""

    scopes: frozenset[str] = frozenset()
    models: tuple[str, ...] = ()
    expire_time: datetime | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    output_token_ceiling: int | None = None
    nanos_per_day: int | None = None


@dataclass(frozen=True)
class KeyRecord:
    """A key as the store holds it, with what its project lends it."""

    uid: str
    project_uid: str
    project: str
    live: bool  # key ACTIVE and unexpired, project ACTIVE, by the database's clock
    macs: tuple[bytes, ...]  # the secret's, and during a rotation's overlap the one before
    grant: Grant  # the key's own; `output_token_ceiling` is the smaller of the key's and the project's
    kv_scope: str


@dataclass(frozen=True)
class Minted:
    """A new key: `token` is shown once, `mac` is stored."""

    uid: str
    token: str
    mac: bytes


def _base62(number: int, width: int) -> str:
    chars = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        chars.append(BASE62[digit])
    return "".join(reversed(chars))


def _crc(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), CRC_CHARS)


def key_id(uid: str) -> str:
    """The part of a key's text that names it and may be shown."""
    return _base62(UUID(uid).int, KEY_ID_CHARS)


def mint(uid: str, environment: str, pepper: bytes) -> Minted:
    """Make a key for the UUID `uid`; minting again for the same uid makes a new secret (rotation)."""
    secret = "".join(secrets.choice(BASE62) for _ in range(SECRET_CHARS))
    body = f"argosy_{environment}_{key_id(uid)}_{secret}"
    return Minted(uid, f"{body}_{_crc(body)}", mac_of(secret.encode(), pepper))


def parse(token: str) -> Presented | None:
    """The parts of a well-formed key whose crc fits, else None. Costs no query."""
    if len(token) > MAX_TOKEN_CHARS or not (match := _SHAPE.fullmatch(token)):
        return None
    body, number_text, secret, crc = match.groups()
    number = 0
    for char in number_text:
        number = number * 62 + _VALUE[char]
    if crc != _crc(body) or number >> 128:
        return None
    return Presented(str(UUID(int=number)), secret.encode())


def mac_of(secret: bytes, pepper: bytes) -> bytes:
    """32 bytes: what the store keeps instead of the secret."""
    return hmac.digest(pepper, secret, "sha256")


def fingerprint(token: str) -> bytes:
    """32 bytes that name a whole token in a cache; a prefix must never find another key's entry."""
    return hashlib.sha256(token.encode()).digest()


_NOBODY = (bytes(32), bytes(32))  # compared when the uid is unknown; no secret has this mac


def proves(presented: Presented, record: KeyRecord | None, pepper: bytes) -> bool:
    """Whether the secret belongs to the record and the record is live. The same work is done for every answer."""
    mac = mac_of(presented.secret, pepper)
    known = record.macs if record is not None and record.macs else _NOBODY
    first = hmac.compare_digest(mac, known[0])
    second = hmac.compare_digest(mac, known[-1])
    return (first | second) & (record is not None and record.live)


def beyond(asked: Grant, minter: Grant) -> str | None:
    """The field in which a key asked for would exceed the key that makes it, or None if it stays within (CVE-2026-47101)."""
    if not asked.scopes <= minter.scopes:
        return "scopes"
    if minter.models and not (asked.models and set(asked.models) <= set(minter.models)):
        return "models"
    if minter.expire_time is not None and (asked.expire_time is None or asked.expire_time > minter.expire_time):
        return "expire_time"
    for limit in ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "output_token_ceiling", "nanos_per_day"):
        most, wanted = getattr(minter, limit), getattr(asked, limit)
        if most is not None and (wanted is None or wanted > most):
            return "limits"
    return None
