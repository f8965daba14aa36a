"""A key's life: made, used, revoked. New calls are refused within 2 s, and a stream that runs is cut within 5 s."""

import asyncio

import pytest

import argosy
from argosy import AsyncClient, Client
from argosy.errors import ArgosyError, NotFound, PermissionDenied, Unauthenticated
from tests.fleet.running import SETTLED, Fleet, Tenant

SHORT = argosy.config(max_output_tokens=4)
LONG = argosy.config(temperature=1, seed=2, max_output_tokens=4_000, min_output_tokens=4_000)


async def test_A9_a_revoked_key_opens_nothing_and_its_streams_are_cut(tenant: Tenant) -> None:
    fleet = tenant.fleet
    async with tenant.client() as client, AsyncClient(fleet.address, fleet.api_key) as platform:
        await client.generate("hello", config=SHORT)
        began = [asyncio.Event(), asyncio.Event()]
        streams = [asyncio.ensure_future(_read(client, event)) for event in began]
        await asyncio.gather(*(event.wait() for event in began))
        await platform.delete_key(tenant.key_name)
        async with asyncio.timeout(10):  # promised in 5 s and 2 s; a busy machine may take longer
            async with asyncio.timeout(5):
                while (reason := await _reason(client)) != "API_KEY_INVALID":
                    assert reason in ("", "KEY_REVOKED"), "until then it works, or is cut on its way"
            assert await asyncio.gather(*streams) == ["KEY_REVOKED"] * 2
    rows = await tenant.records_until(lambda rows: sum(row.usage.output_tokens > 4 for row in rows) == 2)
    cut = [row for row in rows if row.usage.output_tokens > 4]
    assert all(row.outcome != SETTLED.USAGE_OUTCOME_COMPLETED and row.usage.output_tokens < 4_000 for row in cut), "billed to the cut"
    truth = await fleet.truth([row.generation_id for row in cut])
    assert truth == {row.generation_id: (row.usage.input_tokens, row.usage.output_tokens) for row in cut}


async def _read(client: AsyncClient, began: asyncio.Event) -> str:
    """Read a long answer to its end; the reason why it ended."""
    try:
        async with client.stream_generate("One, two,", config=LONG) as stream:
            async for event in stream.events():
                if event.HasField("text"):
                    began.set()
    except PermissionDenied as error:
        return error.reason
    return "it ran to its end"


async def _reason(client: AsyncClient) -> str:
    """Why a call is refused; empty if it is not."""
    try:
        await client.generate("hello", config=SHORT)
    except ArgosyError as error:
        return error.reason
    return ""


async def test_A10_a_foreign_project_looks_like_none(tiny: Fleet) -> None:
    mine, theirs = tiny.tenant(), tiny.tenant()
    async with mine.client() as client:
        foreign, random = [await _denied(client, project) for project in (theirs.project, "projects/t-000000000000")]
    assert foreign == random
    assert foreign[0] is NotFound


async def test_a_key_without_the_scope_is_told_which_it_lacks(tiny: Fleet) -> None:
    tenant = tiny.tenant()
    with Client(tiny.address, tiny.api_key) as platform:
        issued = platform.create_key(tenant.project, ["usage.read"])
    async with AsyncClient(tiny.address, issued.secret, model=tiny.model) as client:
        with pytest.raises(PermissionDenied) as denied:
            await client.generate("hello")
        assert (denied.value.reason, denied.value.metadata["scope"]) == ("SCOPE_MISSING", "generate")
        assert not [found async for found in client.usage(tenant.project)]
    async with AsyncClient(tiny.address, issued.secret[:-1] + "x", model=tiny.model) as client:
        with pytest.raises(Unauthenticated):
            await client.generate("hello")


async def _denied(client: AsyncClient, project: str) -> tuple:
    try:
        _ = [key async for key in client.keys(project)]
    except ArgosyError as error:
        return type(error), error.reason, str(error), error.field
    raise AssertionError(f"{project} was shown")
