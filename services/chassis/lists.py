"""How resources are listed: filters, orders and page tokens.

A page token is sealed (AES-GCM) over the list, its filter and order, the caller's project and the last row seen: a token of another
list, another caller, or one altered in a single bit is refused alike.
"""

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from datetime import datetime

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.chassis.errors import EtagMismatch, FieldInvalid, PageTokenInvalid

PAGE = 50  # rows, where none is asked for
PAGE_BYTES = 3 << 20  # of messages: more end a page, too
NONCE_BYTES = 12
TIMES = frozenset({"create_time", "update_time", "expire_time"})
MAX_CONDITIONS = 16

_CONDITION = re.compile(r"""\s*([a-z_]+(?:\.[a-z0-9._-]{1,63})?)\s*(!=|<=|>=|=|<|>)\s*(?:"([^"\\]*)"|([^\s"\\]+))\s*""")


@dataclass(frozen=True)
class Condition:
    """`field op value`; a time is parsed, a label's field is `labels.<key>`."""

    field: str
    op: str
    value: str | datetime


def conditions(text: str, states: frozenset[str]) -> tuple[Condition, ...]:
    """Parse an AND of `field op value` on state, times and labels.

    Raises:
        FieldInvalid: `filter`, for anything else.
    """
    found: list[Condition] = []
    at = 0
    while at < len(text):
        match = _CONDITION.match(text, at)
        if match is None or len(found) == MAX_CONDITIONS:
            raise FieldInvalid("filter", "syntax")
        field, op, quoted, bare = match.groups()
        found.append(_condition(field, op, bare if quoted is None else quoted, states))
        at = match.end()
        if at < len(text):
            if text[at : at + 4] != "AND " or not text[at - 1].isspace() or at + 4 >= len(text):
                raise FieldInvalid("filter", "syntax")
            at += 4
    return tuple(found)


def _condition(field: str, op: str, value: str, states: frozenset[str]) -> Condition:
    if field in TIMES:
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            raise FieldInvalid("filter", "time") from None
        if time.tzinfo is None:
            raise FieldInvalid("filter", "time")
        return Condition(field, op, time)
    if op not in ("=", "!="):
        raise FieldInvalid("filter", "operator")
    if field == "state":
        if value not in states:
            raise FieldInvalid("filter", "state")
    elif not field.startswith("labels."):
        raise FieldInvalid("filter", "field")
    return Condition(field, op, value)


def order(text: str, allowed: frozenset[str], unset: str) -> tuple[str, bool]:
    """(field, descending) of one field, perhaps with ` desc`.

    Raises:
        FieldInvalid: `order_by`, for another field or form.
    """
    field, _, direction = text.strip().partition(" ")
    if field == "" and direction == "":
        return unset, False
    if field not in allowed or direction.strip() not in ("", "asc", "desc"):
        raise FieldInvalid("order_by")
    return field, direction.strip() == "desc"


class _Sealed(msgspec.Struct, array_like=True):
    scope: bytes
    after: list[str]


class PageTokens:
    """Seals and opens page tokens. The key is a secret of its own, 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, *scope: str, after: list[str]) -> str:
        """A token that continues behind `after` in the list that `scope` describes whole."""
        nonce = os.urandom(NONCE_BYTES)
        body = msgspec.msgpack.encode(_Sealed(_digest(scope), after))
        return base64.urlsafe_b64encode(nonce + self._cipher.encrypt(nonce, body, None)).decode()

    def open(self, token: str, *scope: str) -> list[str] | None:
        """Where to continue; None: an empty token, the first page.

        Raises:
            PageTokenInvalid: altered, or of another list.
        """
        if not token:
            return None
        try:
            raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
            sealed = msgspec.msgpack.decode(self._cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], None), type=_Sealed)
        except (binascii.Error, ValueError, InvalidTag, msgspec.MsgspecError):
            raise PageTokenInvalid from None
        if sealed.scope != _digest(scope):
            raise PageTokenInvalid
        return sealed.after


def _digest(scope: tuple[str, ...]) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(scope)).digest()


def etag(uid: str, revision: int) -> str:
    """Changes with every change of the resource; 32 hex digits."""
    return hashlib.sha256(f"{uid}:{revision}".encode()).hexdigest()[:32]


def check_etag(asked: str, uid: str, revision: int, field: str = "etag") -> None:
    """Refuse a change of what has changed since it was read; an empty etag is no guard.

    Raises:
        EtagMismatch: it has.
    """
    if asked and asked != etag(uid, revision):
        raise EtagMismatch(field)
