"""The service's database: its own schema, beside the gateway's."""

import pytest
import sqlalchemy.exc
from sqlalchemy import text

from services.finetune.schema import METADATA
from services.finetune.store import open_store


async def test_the_schema_is_what_the_tables_say(finetune_url: str) -> None:
    async with open_store(finetune_url, wait=True) as store, store.transaction() as connection:
        found: dict[str, dict[str, bool]] = {}
        rows = await connection.execute(
            text("SELECT table_name, column_name, is_nullable FROM information_schema.columns WHERE table_schema = 'finetune'")
        )
        for table, column, nullable in rows:
            found.setdefault(table, {})[column] = nullable == "YES"
        found.pop("schema_version")
        assert found == {table.name: {column.name: bool(column.nullable) for column in table.columns} for table in METADATA.sorted_tables}


async def test_a_second_start_migrates_nothing(finetune_url: str) -> None:
    for _ in range(2):
        async with open_store(finetune_url, wait=True) as store, store.transaction() as connection:
            assert (await connection.execute(text("SELECT version_num FROM schema_version"))).scalar() == "f0005"


async def test_an_error_does_not_say_what_was_to_be_written(finetune_url: str) -> None:
    async with open_store(finetune_url, wait=True) as store:
        with pytest.raises(sqlalchemy.exc.DBAPIError) as caught:
            async with store.transaction() as connection:
                await connection.execute(text("SELECT length(:said) / 0"), {"said": "words of a tenant"})
        assert "words of a tenant" not in str(caught.value)
