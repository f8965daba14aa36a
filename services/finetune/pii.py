"""Personal data in texts, by pattern and, where a kind has one, by checksum (pure; V13). It warns and never blocks.

Kinds: email, phone, iban, card, resident_id (China), ssn (USA), ip. What overlaps belongs to the kind named first in `KINDS`.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Found(NamedTuple):
    """One find: characters `start` to `end` of the text, half-open."""

    kind: str
    start: int
    end: int


_DIGITS = re.compile(r"[0-9][ ().:/0-9A-Fa-f-]{5}|::")  # a text with neither these nor an @ holds none of the kinds

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w-])", re.ASCII
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CARD = re.compile(r"(?<![0-9.-])[3-6][0-9]{3}(?:[ -]?[0-9]){8,15}(?![0-9]|[.-][0-9])")
_RESIDENT = re.compile(
    r"(?<![0-9A-Za-z])[1-9][0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx](?![0-9A-Za-z])"
)
_SSN = re.compile(r"(?<![0-9-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![0-9-])")
_IP4 = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9]|\.[0-9])")
_IP6 = re.compile(r"(?<![0-9A-Fa-f:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![0-9A-Fa-f:])")
# International with +, North American, or Chinese mobile: a bare run of digits is an order number more often than a telephone.
_PHONE = re.compile(
    r"(?<![0-9A-Za-z+])(?:\+[1-9][0-9]{0,2}(?:[ .()/-]{0,2}[0-9]){6,12}"
    r"|(?:1[ .-])?\(?[2-9][0-9]{2}\)?[ .-][2-9][0-9]{2}[ .-][0-9]{4}"
    r"|1[3-9][0-9]{9})(?![0-9])"
)


def _luhn(text: str) -> bool:
    digits = [int(each) for each in text if each.isdigit()]
    doubled = [digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4) for place, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(each, 36)) for each in plain[4:] + plain[:4])) % 97 == 1


def _resident(text: str) -> bool:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return "10X98765432"[sum(int(digit) * weight for digit, weight in zip(text, weights, strict=False)) % 11] == text[17].upper()


def _ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


def _always(_: str) -> bool:
    return True


_RULES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", _EMAIL, _always),
    ("iban", _IBAN, _iban),
    ("resident_id", _RESIDENT, _resident),
    ("card", _CARD, _luhn),
    ("ssn", _SSN, _always),
    ("ip", _IP4, _ip),
    ("ip", _IP6, _ip),
    ("phone", _PHONE, _always),
)
KINDS = tuple(dict.fromkeys(kind for kind, _, _ in _RULES))


def find(text: str) -> list[Found]:
    """Every find, in order and without overlap."""
    if "@" not in text and not _DIGITS.search(text):
        return []
    taken: list[Found] = []
    for kind, pattern, holds in _RULES:
        for match in pattern.finditer(text):
            start, end = match.span()
            if holds(match.group()) and not any(start < other.end and other.start < end for other in taken):
                taken.append(Found(kind, start, end))
    return sorted(taken, key=lambda found: found.start)


def redact(text: str, kinds: Iterable[str] = KINDS) -> str:
    """The text with each find of these kinds replaced by its kind in brackets, such as `[email]`."""
    wanted = frozenset(kinds)
    return "".join(_pieces(text, [found for found in find(text) if found.kind in wanted]))


def _pieces(text: str, found: Iterable[Found]) -> Iterator[str]:
    at = 0
    for kind, start, end in found:
        yield text[at:start]
        yield f"[{kind}]"
        at = end
    yield text[at:]
