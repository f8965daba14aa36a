"""V13: what counts as personal data, and what only looks like it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.finetune import pii


def kinds(text: str) -> list[tuple[str, str]]:
    return [(found.kind, text[found.start : found.end]) for found in pii.find(text)]


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("write to ann.lee+x@mail.example.co.uk.", "email", "ann.lee+x@mail.example.co.uk"),
        ("(ann@example.com)", "email", "ann@example.com"),
        ("邮箱ann@example.com。", "email", "ann@example.com"),
        ("call +44 20 7946 0958 now", "phone", "+44 20 7946 0958"),
        ("call (415) 555-2671", "phone", "(415) 555-2671"),
        ("电话13812345678,", "phone", "13812345678"),
        ("IBAN GB82 WEST 1234 5698 7654 32", "iban", "GB82 WEST 1234 5698 7654 32"),
        ("DE89370400440532013000", "iban", "DE89370400440532013000"),
        ("card 4111 1111 1111 1111", "card", "4111 1111 1111 1111"),
        ("5500-0000-0000-0004", "card", "5500-0000-0000-0004"),
        ("378282246310005", "card", "378282246310005"),
        ("身份证11010519491231002X。", "resident_id", "11010519491231002X"),
        ("ssn 078-05-1120", "ssn", "078-05-1120"),
        ("from 203.0.113.7:443", "ip", "203.0.113.7"),
        ("from 2001:db8::8a2e:370:7334 on", "ip", "2001:db8::8a2e:370:7334"),
    ],
)
def test_V13_each_kind_is_found(text: str, kind: str, found: str) -> None:
    assert kinds(text) == [(kind, found)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no data here",
        "a@b",
        "user@localhost",
        "4111 1111 1111 1112",  # Luhn fails
        "0000 0000 0000 0000",
        "GB82 WEST 1234 5698 7654 33",  # mod 97 fails
        "110105194912310021",  # the check digit is X
        "11010519491331002X",  # month 13
        "order 123456789",
        "version 1.2.3.4.5",
        "999.1.1.1",
        "127.0.0.1",
        "12:30:45",
        "000-12-3456",
        "on 2026-11-25 at 10:15",
        "revenue of 1,234,567,890",
        "9" * 4_000,
    ],
)
def test_V13_what_only_looks_like_it_is_not(text: str) -> None:
    assert kinds(text) == []


def test_V13_finds_do_not_overlap_and_are_in_order() -> None:
    text = "ip 10.2.3.4, mail a@b.example, card 4111111111111111, again 10.2.3.4"
    assert [kind for kind, _ in kinds(text)] == ["ip", "email", "card", "ip"]


def test_redact_leaves_the_rest() -> None:
    text = "Mail a@b.example or +44 20 7946 0958 – merci"
    assert pii.redact(text) == "Mail [email] or [phone] – merci"
    assert pii.redact(text, ["phone"]) == "Mail a@b.example or [phone] – merci"
    assert pii.redact("nothing", ["phone"]) == "nothing"


@given(st.text(alphabet="0123456789 -+.@:abcXGB()", max_size=120))
def test_finds_are_apart_and_redaction_takes_just_them(text: str) -> None:
    found = pii.find(text)
    assert all(first.end <= second.start for first, second in itertools.pairwise(found))
    for each in reversed(found):
        assert 0 <= each.start < each.end <= len(text)
    rest = text
    for each in reversed(found):
        rest = rest[: each.start] + f"[{each.kind}]" + rest[each.end :]
    assert pii.redact(text) == rest
    assert pii.redact(text, []) == text
