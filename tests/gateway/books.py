"""Rows and values that the tests of the gateway's books share."""

from dataclasses import replace
from typing import Any
from uuid import uuid4

from sqlalchemy import text

from services.gateway.keys import mint
from services.gateway.ledger import Outcome, Reservation, Settlement
from services.gateway.store import Store

PEPPER = b"p" * 32
CHAT = "/argosy.v1.GenerationService/Chat"


async def add_project(store: Store, name: str = "", **policy: int | None) -> str:
    """A project with this quota policy; returns its uid."""
    uid = str(uuid4())
    async with store.transaction() as connection:
        await connection.execute(
            text("INSERT INTO projects (uid, name, kv_secret) VALUES (:uid, :name, :secret)"),
            {"uid": uid, "name": name or f"p-{uid[:8]}", "secret": b"k" * 32},
        )
        columns = ", ".join(["project_uid", *policy])
        values = ", ".join([":uid", *(f":{column}" for column in policy)])
        await connection.execute(text(f"INSERT INTO quota_policies ({columns}) VALUES ({values})"), {"uid": uid, **policy})
    return uid


async def add_key(store: Store, project_uid: str, scopes: tuple[str, ...] = ("generate",), **columns: Any) -> tuple[str, str]:
    """A key of the project; returns (uid, token)."""
    minted = mint(str(uuid4()), "test", PEPPER)
    names = ["project_uid", "uid", "mac", "scopes", *columns]
    async with store.transaction() as connection:
        await connection.execute(
            text(f"INSERT INTO api_keys ({', '.join(names)}) VALUES ({', '.join(':' + name for name in names)})"),
            {"project_uid": project_uid, "uid": minted.uid, "mac": minted.mac, "scopes": list(scopes), **columns},
        )
    return minted.uid, minted.token


def a_reservation(project_uid: str, key_uid: str, **changes: Any) -> Reservation:
    """One that asks for 10 + 20 tokens."""
    plain = Reservation(
        generation_id=str(uuid4()), request_id=str(uuid4()), project_uid=project_uid, key_id=key_uid, method=CHAT, model="tiny",
        version="1", input_tokens=10, output_tokens=20, body_digest=b"d" * 32,
    )  # fmt: skip
    return replace(plain, **changes)


def a_settlement(reservation: Reservation, outcome: Outcome = Outcome.DONE, **changes: Any) -> Settlement:
    """10 tokens in, 4 of them cached, 5 out."""
    return replace(Settlement(reservation.generation_id, outcome, 10, 4, 5, 0, "r-1"), **changes)


async def rows(store: Store, statement: str, **values: Any) -> list[Any]:
    """The rows of a query."""
    async with store.transaction() as connection:
        return list((await connection.execute(text(statement), values)).mappings())
