"""Lists in SQL: conditions, an order by one field, and where a page goes on."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Table, func, literal, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.lists import Condition

Record = Mapping[Any, Any]  # column → value

_OPERATORS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


async def one(connection: AsyncConnection, statement: Any) -> Record | None:
    """The first row, if any."""
    return (await connection.execute(statement)).mappings().first()


def where(table: Table, conditions: Iterable[Condition]) -> list[Any]:
    """The conditions of a list's filter, as clauses; a label that is not there is the empty string."""
    found = []
    for condition in conditions:
        if condition.field.startswith("labels."):
            column: Any = func.coalesce(table.c.labels[condition.field.removeprefix("labels.")].astext, "")
        else:
            column = table.c[condition.field]
        found.append(_OPERATORS[condition.op](column, condition.value))
    return found


async def page(
    connection: AsyncConnection, statement: Any, table: Table, order: tuple[str, bool], after: Sequence[str] | None, limit: int
) -> list[Record]:
    """Rows of `statement` in `order` (field, descending), then by uid, behind what `after_of` told."""
    field, descending = order
    column = table.c[field]
    if after is not None:
        last: Any = datetime.fromisoformat(after[0]) if field.endswith("_time") else after[0]
        here, there = tuple_(column, table.c.uid), tuple_(literal(last, column.type), literal(after[1], table.c.uid.type))
        statement = statement.where(here < there if descending else here > there)
    columns = (column.desc(), table.c.uid.desc()) if descending else (column, table.c.uid)
    return list((await connection.execute(statement.order_by(*columns).limit(limit))).mappings())


def after_of(row: Record, field: str) -> list[str]:
    """Where the next page starts, if `row` ends this one. Only text and times order lists."""
    value = row[field]
    return [value.isoformat() if isinstance(value, datetime) else value, row["uid"]]
