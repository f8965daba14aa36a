"""What a key is, and that a check of one tells nothing but yes or no."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.gateway import keys
from services.gateway.keys import Grant, KeyRecord, beyond, mint, parse, proves

PEPPER = b"p" * 32
SOON = datetime(2030, 1, 1, tzinfo=UTC)


def a_record(minted: keys.Minted, **changes: object) -> KeyRecord:
    plain = KeyRecord(minted.uid, str(uuid4()), "acme", True, (minted.mac,), Grant(frozenset({"generate"})), "00")
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_mint_and_parse() -> None:
    uid = str(uuid4())
    minted = mint(uid, "live", PEPPER)
    presented = parse(minted.token)
    assert presented is not None
    assert presented.uid == uid
    assert minted.token.startswith("argosy_live_")
    assert len(presented.secret) * 5.95 > 160  # bits
    assert len(minted.token.rpartition("_")[2]) == 6
    assert minted.token not in repr(a_record(minted))


# Once: what is drawn must not depend on a secret that differs from try to try.
TOKEN = mint("12345678-1234-4234-8234-123456789abc", "live", PEPPER).token


@given(st.integers(0, len(TOKEN) - 1), st.sampled_from(keys.BASE62))
@settings(max_examples=200, deadline=None)
def test_one_typo_is_caught_without_a_query(at: int, char: str) -> None:
    assume(char != TOKEN[at])
    assert parse(TOKEN[:at] + char + TOKEN[at + 1 :]) is None


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_L5_anything_else_is_no_key(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    "token", ["", "argosy_live_' OR 1=1 --_x_y", "argosy_" + "a" * 10_000, "argosy_live_" + "z" * 22 + "_" + "a" * 32 + "_000000"]
)
def test_L5_hostile_tokens_are_no_keys(token: str) -> None:
    assert parse(token) is None


def test_proves() -> None:
    minted = mint(str(uuid4()), "live", PEPPER)
    presented = parse(minted.token)
    assert presented is not None
    record = a_record(minted)
    assert proves(presented, record, PEPPER)
    assert not proves(presented, None, PEPPER)
    assert not proves(presented, replace(record, live=False), PEPPER)
    assert not proves(presented, record, b"q" * 32)
    other = mint(minted.uid, "live", PEPPER)
    assert not proves(presented, replace(record, macs=(other.mac,)), PEPPER)
    assert proves(presented, replace(record, macs=(other.mac, minted.mac)), PEPPER)  # a rotation's overlap


def test_A8_unknown_key_does_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    minted = mint(str(uuid4()), "live", PEPPER)
    presented = parse(minted.token)
    assert presented is not None
    counts: list[int] = []
    for record in (a_record(minted), None, a_record(minted, live=False), a_record(minted, macs=(b"w" * 32,))):
        calls = 0

        def counted(one: bytes, other: bytes) -> bool:
            nonlocal calls
            calls += len(one) + len(other)
            return one == other

        monkeypatch.setattr("hmac.compare_digest", counted)
        proves(presented, record, PEPPER)
        counts.append(calls)
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (Grant(frozenset({"generate"}), ("models/a",), SOON, output_token_ceiling=10), None),
        (Grant(frozenset({"generate", "platform"}), ("models/a",), SOON, output_token_ceiling=10), "scopes"),
        (Grant(frozenset({"generate"}), ("models/b",), SOON, output_token_ceiling=10), "models"),
        (Grant(frozenset({"generate"}), (), SOON, output_token_ceiling=10), "models"),
        (Grant(frozenset({"generate"}), ("models/a",), None, output_token_ceiling=10), "expire_time"),
        (Grant(frozenset({"generate"}), ("models/a",), SOON + timedelta(seconds=1), output_token_ceiling=10), "expire_time"),
        (Grant(frozenset({"generate"}), ("models/a",), SOON), "limits"),
        (Grant(frozenset({"generate"}), ("models/a",), SOON, output_token_ceiling=11), "limits"),
    ],
)
def test_minted_key_stays_within_its_minter(asked: Grant, field: str | None) -> None:
    assert beyond(asked, Grant(frozenset({"generate", "keys.write"}), ("models/a",), SOON, output_token_ceiling=10)) == field
