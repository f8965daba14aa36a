"""The admin services over real gRPC, behind the real door, on a real PostgreSQL."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy import text

from argosy.admin.v1 import (
    api_key_pb2,
    api_key_pb2_grpc,
    project_pb2,
    project_pb2_grpc,
    quota_pb2,
    quota_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from argosy.v1 import usage_pb2 as amounts
from services.chassis.interceptors import Policy
from services.chassis.lists import PageTokens
from services.chassis.server import Listener, serve
from services.gateway.access import ACCESS
from services.gateway.authentication import authenticating, deadline_cap_s, permit
from services.gateway.ledger import Outcome, Tariff
from services.gateway.server import administration
from services.gateway.servicers.register import handlers
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings, SqlLedger, open_ledger
from services.gateway.store import Store, StoreSettings, bootstrap, open_store
from tests.gateway.books import CHAT, PEPPER, a_reservation, a_settlement, add_key, add_project, rows

SCOPES = ("generate", "keys.read", "keys.write", "quota.read", "usage.read")


@dataclass
class Fleet:
    """A gateway that serves the admin services alone."""

    store: Store
    ledger: SqlLedger
    address: str
    platform: str  # a key
    stack: AsyncExitStack

    async def tenant(self, name: str = "", **policy: int) -> tuple[str, str, str]:
        """A project; returns (name, uid, token)."""
        name = name or f"t-{uuid4().hex[:8]}"
        uid = await add_project(self.store, name, **policy)
        _, token = await add_key(self.store, uid, SCOPES)
        return name, uid, token

    async def stubs(self, token: str) -> "Stubs":
        channel = await self.stack.enter_async_context(grpc.aio.insecure_channel(self.address))
        return Stubs(channel, (("authorization", f"Bearer {token}"),))


class Stubs:
    """Every admin method as `await stubs(method, request)`."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        self._stubs = [
            stub(channel)  # type: ignore[no-untyped-call]
            for stub in (
                project_pb2_grpc.ProjectServiceStub, api_key_pb2_grpc.ApiKeyServiceStub, quota_pb2_grpc.QuotaServiceStub,
                usage_pb2_grpc.UsageServiceStub,
            )
        ]  # fmt: skip
        self._metadata = metadata

    async def __call__(self, method: str, request: Any, more: Any = ()) -> Any:
        stub = next(stub for stub in self._stubs if hasattr(stub, method))
        call = getattr(stub, method)(request, metadata=(*self._metadata, *more), timeout=20)
        if method == "ExportUsage":
            return [record async for record in call]
        return await call


@pytest.fixture
async def fleet(postgres_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    tariff = Tariff()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(StoreSettings(database_url=postgres_url), PEPPER, wait=True))
        ledger = await stack.enter_async_context(open_ledger(store, LedgerSettings(journal_dir=tmp_path)))
        door = await stack.enter_async_context(authenticating(store))
        services = administration(GatewaySettings(key_environment="test"), store, PageTokens(b"t" * 32), tariff)
        table = tuple(handlers(descriptor, servicer) for descriptor, servicer in services)
        serving = await stack.enter_async_context(
            serve(
                Listener(),
                lambda server: server.add_generic_rpc_handlers(table),
                [],
                policy=Policy(authenticate=door, permit=permit, deadline_cap_s=deadline_cap_s, strip="x-"),
            )
        )
        clients = await stack.enter_async_context(AsyncExitStack())
        yield Fleet(store, ledger, serving.address, await bootstrap(store), clients)


def answer(error: grpc.aio.AioRpcError) -> tuple[Any, ...]:
    """All that a refusal says, but for the ids that differ from call to call."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))  # type: ignore[arg-type]
    details = []
    for packed in status.details:
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info):
            details.append((info.reason, info.domain, tuple(sorted(info.metadata.items()))))
        else:
            details.append(packed.SerializeToString())
    return error.code(), error.details(), tuple(details)


async def refused(call: Any) -> tuple[Any, ...]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return answer(error.value)


async def reason(call: Any) -> str:
    return str((await refused(call))[2][0][0])


def a_key(**fields: Any) -> api_key_pb2.ApiKey:
    return api_key_pb2.ApiKey(**{"scopes": ["generate"], **fields})


# --- projects -----------------------------------------------------------------------------------------------------------------------


async def test_project_life(fleet: Fleet) -> None:
    admin = await fleet.stubs(fleet.platform)
    asked = project_pb2.Project(display_name="Acme")
    made = await admin("CreateProject", project_pb2.CreateProjectRequest(project_id="acme", project=asked))
    assert (made.name, made.display_name, made.state) == ("projects/acme", "Acme", project_pb2.Project.STATE_ACTIVE)
    assert await admin("GetProject", project_pb2.GetProjectRequest(name="projects/acme")) == made
    again = admin("CreateProject", project_pb2.CreateProjectRequest(project_id="acme"))
    assert await reason(again) == "RESOURCE_EXISTS"

    _, token = await add_key(fleet.store, made.uid, SCOPES)
    own = await fleet.stubs(token)
    assert await own("GetProject", project_pb2.GetProjectRequest(name="projects/acme")) == made
    for _ in range(2):
        suspended = await admin("SuspendProject", project_pb2.SuspendProjectRequest(name="projects/acme"))
    assert suspended.state == project_pb2.Project.STATE_SUSPENDED
    while (await _code(own("GetProject", project_pb2.GetProjectRequest(name="projects/acme")))) is None:
        await asyncio.sleep(0.01)
    assert await reason(own("GetProject", project_pb2.GetProjectRequest(name="projects/acme"))) == "API_KEY_INVALID"
    restored = await admin("RestoreProject", project_pb2.RestoreProjectRequest(name="projects/acme", etag=suspended.etag))
    assert restored.state == project_pb2.Project.STATE_ACTIVE

    deletion = await admin("DeleteProject", project_pb2.DeleteProjectRequest(name="projects/acme", cascade=True))
    assert deletion.target == "projects/acme"
    assert await reason(admin("GetProject", project_pb2.GetProjectRequest(name="projects/acme"))) == "RESOURCE_NOT_FOUND"
    reborn = await admin("CreateProject", project_pb2.CreateProjectRequest(project_id="acme"))
    assert reborn.uid != made.uid


async def _code(call: Any) -> grpc.StatusCode | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


async def test_platform_does_not_lock_itself_out(fleet: Fleet) -> None:
    admin = await fleet.stubs(fleet.platform)
    assert await reason(admin("SuspendProject", project_pb2.SuspendProjectRequest(name="projects/platform"))) == "WRONG_STATE"
    assert await reason(admin("DeleteProject", project_pb2.DeleteProjectRequest(name="projects/platform"))) == "WRONG_STATE"


async def test_masks_and_etags(fleet: Fleet) -> None:
    admin = await fleet.stubs(fleet.platform)
    made = await admin(
        "CreateProject",
        project_pb2.CreateProjectRequest(project_id="acme", project=project_pb2.Project(display_name="Acme", labels={"a": "1"})),
    )

    def update(paths: list[str], **fields: Any) -> Any:
        request = project_pb2.UpdateProjectRequest(project=project_pb2.Project(name="projects/acme", **fields))
        request.update_mask.CopyFrom(FieldMask(paths=paths))
        return admin("UpdateProject", request)

    populated = await update([], display_name="New")
    assert (populated.display_name, dict(populated.labels)) == ("New", {"a": "1"})
    assert populated.etag != made.etag
    assert await reason(update([], display_name="Stale", etag=made.etag)) == "ETAG_MISMATCH"
    masked = await update(["labels"], display_name="ignored", etag=populated.etag)
    assert (masked.display_name, dict(masked.labels)) == ("New", {})
    replaced = await update(["*"], labels={"b": "2"})
    assert (replaced.display_name, dict(replaced.labels)) == ("", {"b": "2"})
    for path in ("uid", "name", "nonsense", "display_name.x"):
        assert await reason(update([path])) == "FIELD_INVALID"


async def test_page_token(fleet: Fleet) -> None:
    admin = await fleet.stubs(fleet.platform)
    for n in range(7):
        await add_project(fleet.store, f"p{n}")
    seen: list[str] = []
    token = ""
    for _ in itertools.count():
        page = await admin("ListProjects", project_pb2.ListProjectsRequest(page_size=3, page_token=token, order_by="name desc"))
        seen += [found.name for found in page.projects]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["projects/platform", *(f"projects/p{n}" for n in reversed(range(7)))]

    def listing(token: str, **fields: Any) -> Any:
        return admin("ListProjects", project_pb2.ListProjectsRequest(page_size=3, page_token=token, **fields))

    token = (await listing("", order_by="name")).next_page_token
    flipped = token[:20] + ("A" if token[20] != "A" else "B") + token[21:]
    for call in (
        listing(flipped, order_by="name"), listing(token, order_by="create_time"), listing(token, filter="state = ACTIVE", order_by="name"),
        listing("nonsense"), listing("é"),
    ):  # fmt: skip
        assert await reason(call) == "PAGE_TOKEN_INVALID"


async def test_A10_page_token_of_another_project(fleet: Fleet) -> None:
    (one, _, one_token), (other, _, other_token) = await fleet.tenant(), await fleet.tenant()
    mine, theirs = await fleet.stubs(one_token), await fleet.stubs(other_token)
    for _ in range(2):
        await mine("CreateApiKey", api_key_pb2.CreateApiKeyRequest(parent=f"projects/{one}", api_key=a_key()))
    page = await mine("ListApiKeys", api_key_pb2.ListApiKeysRequest(parent=f"projects/{one}", page_size=1))
    foreign = theirs(
        "ListApiKeys", api_key_pb2.ListApiKeysRequest(parent=f"projects/{other}", page_size=1, page_token=page.next_page_token)
    )
    assert await reason(foreign) == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize(
    ("filter_", "names"),
    [
        ("state = SUSPENDED", {"projects/b"}),
        ('labels.team = "x y" AND state != SUSPENDED', {"projects/a"}),
        ("create_time > 2100-01-01T00:00:00Z", set()),
        ("create_time > 2000-01-01T00:00:00Z AND labels.team = z", {"projects/b"}),
    ],
)
async def test_filters(fleet: Fleet, filter_: str, names: set[str]) -> None:
    admin = await fleet.stubs(fleet.platform)
    for name, team in (("a", "x y"), ("b", "z")):
        asked = project_pb2.Project(labels={"team": team})
        await admin("CreateProject", project_pb2.CreateProjectRequest(project_id=name, project=asked))
    await admin("SuspendProject", project_pb2.SuspendProjectRequest(name="projects/b"))
    page = await admin("ListProjects", project_pb2.ListProjectsRequest(filter=filter_))
    assert {found.name for found in page.projects} == names


@pytest.mark.parametrize(
    "filter_",
    ["state", "state > ACTIVE", "uid = 1", "state = NOPE", "create_time = yesterday", "state = ACTIVE OR state = ACTIVE",
     "state = ACTIVE AND ", "labels = 1", "state = ACTIVE state = ACTIVE", "' OR 1=1 --", "create_time > 2000-01-01T00:00:00"],
)  # fmt: skip
async def test_bad_filters_are_refused(fleet: Fleet, filter_: str) -> None:
    admin = await fleet.stubs(fleet.platform)
    assert await reason(admin("ListProjects", project_pb2.ListProjectsRequest(filter=filter_))) == "FIELD_INVALID"


# --- replays ------------------------------------------------------------------------------------------------------------------------


async def test_A23_request_id_replays(fleet: Fleet) -> None:
    admin = await fleet.stubs(fleet.platform)
    request = project_pb2.CreateProjectRequest(project_id="acme", request_id=str(uuid4()))
    first = await admin("CreateProject", request)
    assert await admin("CreateProject", request) == first
    other = project_pb2.CreateProjectRequest(project_id="acme2", request_id=request.request_id)
    assert await reason(admin("CreateProject", other)) == "IDEMPOTENCY_KEY_REUSED"
    suspend = project_pb2.SuspendProjectRequest(name="projects/acme", request_id=request.request_id)
    await admin("SuspendProject", suspend)  # another method: an id of its own
    async with fleet.store.transaction() as connection:
        await connection.execute(text("UPDATE request_replays SET create_time = create_time - interval '25 hours'"))
    assert await reason(admin("CreateProject", request)) == "RESOURCE_EXISTS"  # forgotten: it runs again


async def test_A23_hundred_at_once_make_one(fleet: Fleet) -> None:
    name, uid, token = await fleet.tenant()
    mine = await fleet.stubs(token)
    request = api_key_pb2.CreateApiKeyRequest(parent=f"projects/{name}", api_key=a_key(), request_id=str(uuid4()))
    outcomes = await asyncio.gather(*(mine("CreateApiKey", request) for _ in range(100)), return_exceptions=True)
    made = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len({outcome.api_key.uid for outcome in made}) == 1
    assert sum(bool(outcome.secret) for outcome in made) == 1  # the others are replays
    for outcome in outcomes:
        if isinstance(outcome, grpc.aio.AioRpcError):
            assert answer(outcome)[2][0][0] in ("REQUEST_IN_FLIGHT", "STORE_UNAVAILABLE")
            assert "grpc-retry-pushback-ms" in dict(outcome.trailing_metadata() or ())
    (count,) = await rows(fleet.store, "SELECT count(*) AS n FROM api_keys WHERE project_uid = :uid", uid=uid)
    assert count["n"] == 2


async def test_A23_same_id_of_another_project_is_another(fleet: Fleet) -> None:
    request_id = str(uuid4())
    for _ in range(2):
        name, _, token = await fleet.tenant()
        mine = await fleet.stubs(token)
        issued = await mine(
            "CreateApiKey", api_key_pb2.CreateApiKeyRequest(parent=f"projects/{name}", api_key=a_key(), request_id=request_id)
        )
        assert issued.secret


# --- keys ---------------------------------------------------------------------------------------------------------------------------


async def test_key_life(fleet: Fleet) -> None:
    name, _, token = await fleet.tenant()
    mine = await fleet.stubs(token)
    issued = await mine("CreateApiKey", api_key_pb2.CreateApiKeyRequest(parent=f"projects/{name}", api_key=a_key(display_name="ci")))
    key = issued.api_key
    assert key.key_id in issued.secret
    assert (await mine("GetApiKey", api_key_pb2.GetApiKeyRequest(name=key.name))) == key
    stored = await rows(fleet.store, "SELECT * FROM api_keys WHERE uid = :uid", uid=key.uid)
    secret = issued.secret.split("_")[3]
    assert secret not in repr(stored)

    made = await fleet.stubs(issued.secret)
    assert (await made("GetCaller", api_key_pb2.GetCallerRequest())).api_key == key.name

    rotated = await mine("RotateApiKey", api_key_pb2.RotateApiKeyRequest(name=key.name, overlap=timedelta(hours=1)))
    assert rotated.secret != issued.secret
    for secret in (issued.secret, rotated.secret):
        caller = await (await fleet.stubs(secret))("GetCaller", api_key_pb2.GetCallerRequest())
        assert caller.scopes == ["generate"]
    last = await mine("RotateApiKey", api_key_pb2.RotateApiKeyRequest(name=key.name))
    await _until_refused(fleet, rotated.secret)
    await _until_refused(fleet, issued.secret)

    disabled = await mine("DisableApiKey", api_key_pb2.DisableApiKeyRequest(name=key.name))
    assert disabled.state == api_key_pb2.ApiKey.STATE_DISABLED
    await _until_refused(fleet, last.secret)
    await mine("EnableApiKey", api_key_pb2.EnableApiKeyRequest(name=key.name))
    await (await fleet.stubs(last.secret))("GetCaller", api_key_pb2.GetCallerRequest())

    deleted = await mine("DeleteApiKey", api_key_pb2.DeleteApiKeyRequest(name=key.name))
    assert deleted.state == api_key_pb2.ApiKey.STATE_DELETED
    assert await reason(mine("EnableApiKey", api_key_pb2.EnableApiKeyRequest(name=key.name))) == "WRONG_STATE"
    assert await reason(mine("RotateApiKey", api_key_pb2.RotateApiKeyRequest(name=key.name))) == "WRONG_STATE"
    back = await mine("UndeleteApiKey", api_key_pb2.UndeleteApiKeyRequest(name=key.name))
    assert back.state == api_key_pb2.ApiKey.STATE_DISABLED
    page = await mine("ListApiKeys", api_key_pb2.ListApiKeysRequest(parent=f"projects/{name}", filter="state = DISABLED"))
    assert [found.name for found in page.api_keys] == [key.name]


async def _until_refused(fleet: Fleet, secret: str) -> None:
    stubs = await fleet.stubs(secret)
    async with asyncio.timeout(2):
        while await _code(stubs("GetCaller", api_key_pb2.GetCallerRequest())) is not grpc.StatusCode.UNAUTHENTICATED:
            await asyncio.sleep(0.01)


async def test_A23_replayed_create_has_no_secret(fleet: Fleet) -> None:
    name, _, token = await fleet.tenant()
    mine = await fleet.stubs(token)
    request = api_key_pb2.CreateApiKeyRequest(parent=f"projects/{name}", api_key=a_key(), request_id=str(uuid4()))
    first, again = await mine("CreateApiKey", request), await mine("CreateApiKey", request)
    assert again.api_key == first.api_key
    assert again.secret == ""
    kept = await rows(fleet.store, "SELECT reply FROM request_replays")
    assert first.secret.encode() not in kept[0]["reply"]


async def test_minted_key_never_exceeds_its_minter(fleet: Fleet) -> None:
    name, uid, _ = await fleet.tenant()
    limited = {"models": ["models/a"], "output_token_ceiling": 100, "expire_time": datetime.now(UTC) + timedelta(days=1)}
    _, token = await add_key(fleet.store, uid, SCOPES, **limited)
    mine = await fleet.stubs(token)
    soon = datetime.now(UTC) + timedelta(hours=1)
    fits = {"models": ["models/a"], "limits": api_key_pb2.KeyLimits(output_token_ceiling=100), "expire_time": soon}

    def create(**fields: Any) -> Any:
        return mine("CreateApiKey", api_key_pb2.CreateApiKeyRequest(parent=f"projects/{name}", api_key=a_key(**{**fits, **fields})))

    for beyond in (
        {"scopes": ["platform"]}, {"models": []}, {"models": ["models/b"]}, {"limits": None}, {"expire_time": None},
        {"limits": api_key_pb2.KeyLimits(output_token_ceiling=101)}, {"expire_time": datetime.now(UTC) + timedelta(days=2)},
        {"scopes": ["made.up"]},
    ):  # fmt: skip
        assert await reason(create(**beyond)) == "FIELD_INVALID"
    made = (await create()).api_key
    update = api_key_pb2.UpdateApiKeyRequest(api_key=a_key(name=made.name, scopes=["platform"]), update_mask=FieldMask(paths=["scopes"]))
    assert await reason(mine("UpdateApiKey", update)) == "FIELD_INVALID"
    update = api_key_pb2.UpdateApiKeyRequest(api_key=a_key(name=made.name), update_mask=FieldMask(paths=["limits"]))
    assert await reason(mine("UpdateApiKey", update)) == "FIELD_INVALID"


async def test_stronger_key_is_neither_revealed_nor_revived(fleet: Fleet) -> None:
    name, uid, token = await fleet.tenant()
    mine = await fleet.stubs(token)
    strong, _ = await add_key(fleet.store, uid, ("platform",))
    full = f"projects/{name}/apiKeys/{strong}"
    assert await reason(mine("RotateApiKey", api_key_pb2.RotateApiKeyRequest(name=full))) == "SCOPE_MISSING"
    await mine("DeleteApiKey", api_key_pb2.DeleteApiKeyRequest(name=full))  # less power to anybody is always allowed
    assert await reason(mine("UndeleteApiKey", api_key_pb2.UndeleteApiKeyRequest(name=full))) == "SCOPE_MISSING"


async def test_caller_sees_its_limits_in_effect(fleet: Fleet) -> None:
    name, uid, _ = await fleet.tenant(tokens_per_minute=1_000, concurrent_streams=4, nanos_per_day=500)
    _, token = await add_key(fleet.store, uid, ("generate",), tokens_per_minute=10, concurrent_requests=9)
    caller = await (await fleet.stubs(token))("GetCaller", api_key_pb2.GetCallerRequest())
    assert caller.project == f"projects/{name}"
    expected = api_key_pb2.KeyLimits(tokens_per_minute=10, concurrent_requests=4, cost_per_day=amounts.Cost(currency_code="USD", nanos=500))
    assert caller.limits == expected


async def test_scope_is_needed(fleet: Fleet) -> None:
    name, uid, _ = await fleet.tenant()
    _, token = await add_key(fleet.store, uid, ("generate",))
    weak = await fleet.stubs(token)
    assert await reason(weak("ListApiKeys", api_key_pb2.ListApiKeysRequest(parent=f"projects/{name}"))) == "SCOPE_MISSING"
    assert await reason(weak("ListProjects", project_pb2.ListProjectsRequest())) == "SCOPE_MISSING"


# --- quotas and usage ---------------------------------------------------------------------------------------------------------------


async def test_quota_policy(fleet: Fleet) -> None:
    admin = await fleet.stubs(fleet.platform)
    name, _, token = await fleet.tenant(requests_per_minute=5)
    policy_name = f"projects/{name}/quotaPolicy"
    before = await admin("GetQuotaPolicy", quota_pb2.GetQuotaPolicyRequest(name=policy_name))
    assert before.requests_per_minute == 5
    assert not before.HasField("tokens_per_day")
    change = quota_pb2.UpdateQuotaPolicyRequest(
        quota_policy=quota_pb2.QuotaPolicy(
            name=policy_name, etag=before.etag, tokens_per_day=0, cost_per_day=amounts.Cost(currency_code="USD", nanos=7)
        ),
        update_mask=FieldMask(paths=["tokens_per_day", "cost_per_day", "requests_per_minute"]),
        validate_only=True,
    )
    tried = await admin("UpdateQuotaPolicy", change)
    assert (tried.tokens_per_day, tried.HasField("tokens_per_day"), tried.HasField("requests_per_minute")) == (0, True, False)
    assert await admin("GetQuotaPolicy", quota_pb2.GetQuotaPolicyRequest(name=policy_name)) == before
    change.validate_only = False
    after = await admin("UpdateQuotaPolicy", change)
    assert (after.tokens_per_day, after.cost_per_day.nanos, after.HasField("requests_per_minute")) == (0, 7, False)
    assert await reason(admin("UpdateQuotaPolicy", change)) == "ETAG_MISMATCH"
    change.quota_policy.etag = ""
    change.quota_policy.cost_per_day.currency_code = "EUR"
    assert await reason(admin("UpdateQuotaPolicy", change)) == "FIELD_INVALID"
    mine = await fleet.stubs(token)
    assert (await mine("GetQuotaPolicy", quota_pb2.GetQuotaPolicyRequest(name=policy_name))) == after
    assert await reason(mine("UpdateQuotaPolicy", change)) == "SCOPE_MISSING"


async def test_quota_usage(fleet: Fleet) -> None:
    name, uid, token = await fleet.tenant(tokens_per_day=1_000)
    mine = await fleet.stubs(token)
    key, _ = await add_key(fleet.store, uid)
    await fleet.ledger.reserve(a_reservation(uid, key))
    used = await mine("GetQuotaUsage", quota_pb2.GetQuotaUsageRequest(name=f"projects/{name}/quotaPolicy"))
    gauges = {gauge.kind: gauge for gauge in used.gauges}
    assert gauges[quota_pb2.QUOTA_KIND_TOKENS_PER_DAY].used == 30
    assert gauges[quota_pb2.QUOTA_KIND_TOKENS_PER_DAY].limit == 1_000
    assert gauges[quota_pb2.QUOTA_KIND_CONCURRENT_STREAMS].used == 1
    assert not gauges[quota_pb2.QUOTA_KIND_CONCURRENT_STREAMS].HasField("limit")


async def test_usage_is_the_ledgers(fleet: Fleet) -> None:
    name, uid, token = await fleet.tenant()
    mine = await fleet.stubs(token)
    key, _ = await add_key(fleet.store, uid)
    failed = a_reservation(uid, key)
    reservations = [a_reservation(uid, key, model=model) for model in ("a", "a", "b")]
    for r in (failed, *reservations):
        await fleet.ledger.reserve(r)
        await fleet.ledger.settle(a_settlement(r, Outcome.FAILED if r is failed else Outcome.DONE))
    again = replace(failed, generation_id=str(uuid4()))
    await fleet.ledger.reserve(again)
    await fleet.ledger.settle(a_settlement(again))
    await fleet.ledger.reserve(a_reservation(uid, key))  # open: not yet used

    parent = f"projects/{name}"
    total = await mine("QueryUsage", usage_pb2.QueryUsageRequest(parent=parent))
    assert len(total.sums) == 1
    assert (total.sums[0].requests, total.sums[0].usage.input_tokens, total.sums[0].usage.output_tokens) == (5, 50, 25)
    assert total.sums[0].usage.cost.nanos == 4 * (6 * 100 + 4 * 25 + 5 * 400)  # the failed one is not billed

    request = usage_pb2.QueryUsageRequest(
        parent=parent, group_by=[usage_pb2.USAGE_GROUP_MODEL, usage_pb2.USAGE_GROUP_API_KEY], interval=usage_pb2.USAGE_INTERVAL_DAY,
        page_size=1,
    )  # fmt: skip
    seen = {}
    while True:
        page = await mine("QueryUsage", request)
        seen |= {found.model: found for found in page.sums}
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert {model: found.requests for model, found in seen.items()} == {"a": 2, "b": 1, "tiny": 2}
    assert seen["a"].api_key == f"{parent}/apiKeys/{key}"

    exported = await mine("ExportUsage", usage_pb2.ExportUsageRequest(parent=parent))
    assert len(exported) == 5
    assert [record.cursor for record in exported] == sorted({record.cursor for record in exported})
    assert exported[0].outcome == usage_pb2.USAGE_OUTCOME_FAILED
    assert exported[0].method == CHAT.removeprefix("/")
    rest = await mine("ExportUsage", usage_pb2.ExportUsageRequest(parent=parent, after_cursor=exported[2].cursor))
    assert rest == exported[3:]

    attempts = await mine("GetRequestUsage", usage_pb2.GetRequestUsageRequest(parent=parent, request_id=failed.request_id))
    assert [record.outcome for record in attempts.records] == [usage_pb2.USAGE_OUTCOME_FAILED, usage_pb2.USAGE_OUTCOME_COMPLETED]
    unknown = mine("GetRequestUsage", usage_pb2.GetRequestUsageRequest(parent=parent, request_id=str(uuid4())))
    assert await reason(unknown) == "RESOURCE_NOT_FOUND"


async def test_usage_range_is_bounded(fleet: Fleet) -> None:
    name, _, token = await fleet.tenant()
    mine = await fleet.stubs(token)
    now = datetime.now(UTC)
    request = usage_pb2.QueryUsageRequest(parent=f"projects/{name}", interval=usage_pb2.USAGE_INTERVAL_HOUR)
    request.start_time.FromDatetime(now - timedelta(days=32))
    assert await _code(mine("QueryUsage", request)) is grpc.StatusCode.INVALID_ARGUMENT


# --- whose is it --------------------------------------------------------------------------------------------------------------------

UID = "00000000-0000-4000-8000-000000000000"


def requests(project_name: str, key_uid: str) -> dict[str, Any]:
    """One request of every admin method that names a resource, for a project and a key of it."""
    parent, key, policy = f"projects/{project_name}", f"projects/{project_name}/apiKeys/{key_uid}", f"projects/{project_name}/quotaPolicy"
    verbs = ("Get", "Rotate", "Disable", "Enable", "Delete", "Undelete")
    named = {verb: getattr(api_key_pb2, f"{verb}ApiKeyRequest")(name=key) for verb in verbs}
    return {
        "GetProject": project_pb2.GetProjectRequest(name=parent),
        "UpdateProject": project_pb2.UpdateProjectRequest(project=project_pb2.Project(name=parent, display_name="x")),
        "DeleteProject": project_pb2.DeleteProjectRequest(name=parent),
        "SuspendProject": project_pb2.SuspendProjectRequest(name=parent),
        "RestoreProject": project_pb2.RestoreProjectRequest(name=parent),
        "CreateApiKey": api_key_pb2.CreateApiKeyRequest(parent=parent, api_key=a_key()),
        "ListApiKeys": api_key_pb2.ListApiKeysRequest(parent=parent),
        "UpdateApiKey": api_key_pb2.UpdateApiKeyRequest(api_key=api_key_pb2.ApiKey(name=key, display_name="x")),
        **{f"{name}ApiKey": request for name, request in named.items()},
        "GetQuotaPolicy": quota_pb2.GetQuotaPolicyRequest(name=policy),
        "UpdateQuotaPolicy": quota_pb2.UpdateQuotaPolicyRequest(quota_policy=quota_pb2.QuotaPolicy(name=policy, tokens_per_day=1)),
        "GetQuotaUsage": quota_pb2.GetQuotaUsageRequest(name=policy),
        "QueryUsage": usage_pb2.QueryUsageRequest(parent=parent),
        "ExportUsage": usage_pb2.ExportUsageRequest(parent=parent),
        "GetRequestUsage": usage_pb2.GetRequestUsageRequest(parent=parent, request_id="00000000-0000-4000-8000-000000000000"),
    }


NAMELESS = {"CreateProject", "ListProjects", "GetCaller"}  # they name no resource of anybody


def test_C2_every_admin_method_is_in_the_matrix() -> None:
    methods = {path.rpartition("/")[2] for path in ACCESS if path.startswith("/argosy.admin.v1.")}
    assert methods == set(requests("p", UID)) | NAMELESS


async def test_A10_foreign_is_random_byte_for_byte(fleet: Fleet) -> None:
    mine_name, _, token = await fleet.tenant()
    other_name, other_uid, _ = await fleet.tenant()
    gone_name, _, _ = await fleet.tenant()
    other_key, _ = await add_key(fleet.store, other_uid)
    admin = await fleet.stubs(fleet.platform)
    await admin("DeleteProject", project_pb2.DeleteProjectRequest(name=f"projects/{gone_name}"))
    before = await rows(fleet.store, "SELECT count(*) AS n FROM audit_events")
    mine = await fleet.stubs(token)
    random = (f"r-{uuid4().hex[:8]}", str(uuid4()))
    resources = [(other_name, other_key), random, (gone_name, UID), (mine_name, other_key), (mine_name, UID)]
    for method in requests("p", UID):
        answers = []
        for project_name, key_uid in resources:
            if project_name == mine_name and (method == "CreateApiKey" or not method.endswith("ApiKey")):
                continue  # a project of one's own is no foreign one
            answers.append(await refused(mine(method, requests(project_name, key_uid)[method])))
        assert len(set(answers)) == 1, method
        code = answers[0][0]
        assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED), method
    assert await rows(fleet.store, "SELECT count(*) AS n FROM audit_events") == before


async def test_changes_are_audited(fleet: Fleet) -> None:
    name, uid, token = await fleet.tenant()
    mine = await fleet.stubs(token)
    issued = await mine("CreateApiKey", api_key_pb2.CreateApiKeyRequest(parent=f"projects/{name}", api_key=a_key()))
    (event,) = await rows(fleet.store, "SELECT * FROM audit_events")
    assert (event["method"], event["resource"], str(event["project_uid"])) == ("CreateApiKey", issued.api_key.name, uid)


async def test_A11_headers_name_nobody(fleet: Fleet) -> None:
    name, _, token = await fleet.tenant()
    other, _, _ = await fleet.tenant()
    mine = await fleet.stubs(token)
    for header in (("x-tenant", other), ("x-tenant-bin", other.encode()), ("x_tenant", other), ("x-argosy-caller-bin", b"forged")):
        assert (await mine("GetCaller", api_key_pb2.GetCallerRequest(), more=(header,))).project == f"projects/{name}"
