"""DatasetService over real gRPC, on a real PostgreSQL and a real folder."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import uuid4

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy import text

from argosy.v1 import dataset_pb2 as pb
from argosy.v1 import deletion_pb2, error_pb2
from services.chassis import signing
from services.chassis.errors import ResourceNotFound, WrongState
from services.finetune import dataset_store
from services.finetune.datasets import Erased
from services.finetune.overlap import overlap
from services.finetune.settings import DatasetSettings
from tests.finetune.served import KEY, SCOPES, Served, Tenant, datasets_served

ROWS = b"".join(b'{"text":"Story %d about %s","label":"%s"}\n' % (i, topic, topic) for i in range(10) for topic in (b"sport", b"weather"))
BAD = ROWS + b'{"text":"mail a@b.example","label":"sport"}\n{"text":1}\n'


@pytest.fixture
async def served(finetune_url: str, tmp_path) -> AsyncIterator[Served]:
    async with datasets_served(finetune_url, tmp_path / "objects") as found:
        yield found


def refusal(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[str, str, dict[str, str]]:
    """(code, reason, metadata) of a failed call."""
    status = status_pb2.Status()
    for key, value in error.value.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return error.value.code().name, info.reason, dict(info.metadata)
    return error.value.code().name, "", {}


async def emptied(served: Served, prefix: str) -> None:
    """Wait until nothing is stored below `prefix`."""
    served.eraser.wake()
    async with asyncio.timeout(20):
        while [path async for path, _ in served.objects.list(prefix)]:
            await asyncio.sleep(0.02)


# --- versions ---------------------------------------------------------------------------------------------------------------------------


async def test_upload_to_ready(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    version = await tenant.version(dataset.name, ROWS)
    assert version.state == version.STATE_READY
    assert version.name == f"{dataset.name}/versions/1"
    assert (version.sha256, version.total_bytes, version.validated_bytes) == (hashlib.sha256(ROWS).hexdigest(), len(ROWS), len(ROWS))
    assert (version.report.rows, version.report.valid_rows, version.report.errors) == (20, 20, 0)
    assert {count.label: count.rows for count in version.report.labels} == {"sport": 10, "weather": 10}
    shown = await tenant("GetDataset", pb.GetDatasetRequest(name=dataset.name))
    assert shown.latest_version == version.name
    await emptied(served, f"uploads/{tenant.uid}")
    async with served.store.transaction() as connection:
        found = await dataset_store.version_for_training(connection, tenant.uid, version.name)
        with pytest.raises(ResourceNotFound):
            await dataset_store.version_for_training(connection, str(uuid4()), version.name)
    assert (found.rows, found.labels, found.sha256) == (20, {"sport": 10, "weather": 10}, version.sha256)
    assert await served.objects.get(found.path) == ROWS


async def test_T1_a_bad_row_rejects_the_version_and_is_named(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    version = await tenant.version(dataset.name, BAD)
    assert version.state == version.STATE_REJECTED
    assert version.error.reason == error_pb2.ERROR_REASON_UNSUPPORTED_FORMAT
    at = len(BAD) - len(b'{"text":1}\n')
    assert dict(version.error.metadata) == {"rule": "V5.type", "line": "22", "byte_offset": str(at), "field": "text"}
    assert await tenant.findings(version.name, severity=pb.ROW_SEVERITY_ERROR) == [
        (22, at, "text", "V5.type"),
        (22, at, "label", "V5.missing"),
    ]
    assert (21, len(ROWS), "", "V13.email") in await tenant.findings(version.name)
    async with served.store.transaction() as connection:
        with pytest.raises(WrongState):
            await dataset_store.version_for_training(connection, tenant.uid, version.name)
    assert (await tenant("GetDataset", pb.GetDatasetRequest(name=dataset.name))).latest_version == ""


async def test_skip_derives_a_clean_version(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    version = await tenant.version(dataset.name, BAD, skip=True)
    assert version.state == version.STATE_REJECTED
    clean = await tenant.validated(version.derived_version)
    assert clean.state == clean.STATE_READY
    assert (clean.source_version, list(clean.skipped_lines), clean.skipped_rows) == (version.name, [22], 1)
    assert clean.report.valid_rows == 21
    assert clean.sha256 == hashlib.sha256(BAD.removesuffix(b'{"text":1}\n')).hexdigest()


async def test_same_bytes_are_one_version_of_a_dataset_and_of_no_other(served: Served) -> None:
    tenant, other = served.tenant(), served.tenant()
    dataset = await tenant.dataset()
    first = await tenant.version(dataset.name, ROWS)
    assert (await tenant.upload(dataset.name, ROWS)).name == first.name
    elsewhere = await other.version((await other.dataset()).name, ROWS)
    assert elsewhere.uid != first.uid
    await emptied(served, f"uploads/{tenant.uid}")
    assert (await tenant.version(dataset.name, BAD)).name.endswith("/versions/2")


async def test_columns_of_csv_are_mapped(served: Served) -> None:
    tenant = served.tenant()
    layout = pb.RowLayout(encoding=pb.DATASET_ENCODING_CSV, text_columns=["title", "body"], label_column="topic", delimiter="\t")
    dataset = await tenant.dataset("tsv", layout=layout)
    assert dataset.layout.header
    version = await tenant.version(dataset.name, b"id\ttopic\ttitle\tbody\n1\tsport\tGoal\tLate\n2\tweather\tRain\tAgain\n")
    assert {count.label: count.rows for count in version.report.labels} == {"sport": 1, "weather": 1}
    assert version.layout.text_columns == ["title", "body"]


@pytest.mark.parametrize(
    ("form", "layout", "field"),
    [
        ("CHAT", pb.RowLayout(encoding=pb.DATASET_ENCODING_CSV), "dataset.layout.encoding"),
        ("CHAT", pb.RowLayout(text_columns=["a"]), "dataset.layout.text_columns"),
        ("PREFERENCE", pb.RowLayout(label_column="a"), "dataset.layout.label_column"),
        ("CLASSIFY", pb.RowLayout(delimiter=";"), "dataset.layout.delimiter"),
        ("CLASSIFY", pb.RowLayout(header=False), "dataset.layout.header"),
        ("CLASSIFY", pb.RowLayout(text_columns=["label"]), "dataset.layout.label_column"),
        ("CLASSIFY", pb.RowLayout(encoding=pb.DATASET_ENCODING_CSV, header=False, text_columns=["x"]), "dataset.layout.text_columns"),
        ("UNSPECIFIED", pb.RowLayout(), "dataset.format"),
    ],
)
async def test_V1_layouts_that_no_row_could_follow_are_refused(served: Served, form: str, layout: pb.RowLayout, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.tenant().dataset("x", form, layout=layout)
    code, reason, metadata = refusal(error)
    assert (code, reason, metadata["field"]) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)


async def test_redact_makes_a_version_without_personal_data(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    data = ROWS + b'{"text":"mail a@b.example, call +44 20 7946 0958","label":"sport"}\n'
    version = await tenant.version(dataset.name, data)
    assert {count.kind: (count.count, count.rows) for count in version.report.pii} == {"email": (1, 1), "phone": (1, 1)}
    made = await tenant("RedactDatasetVersion", pb.RedactDatasetVersionRequest(name=version.name))
    clean = await tenant.validated(made.name)
    assert (clean.state, clean.source_version, len(clean.report.pii)) == (clean.STATE_READY, version.name, 0)
    stored = await read(tenant, clean.name)
    assert stored == ROWS + b'{"text":"mail [email], call [phone]","label":"sport"}\n'
    assert (clean.sha256, clean.total_bytes) == (hashlib.sha256(stored).hexdigest(), len(stored))
    same = await tenant("RedactDatasetVersion", pb.RedactDatasetVersionRequest(name=clean.name))
    assert same.name == clean.name
    full = served.servicer.settings
    served.servicer.settings = replace(full, stored_bytes_per_project=len(data) + len(stored))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant("RedactDatasetVersion", pb.RedactDatasetVersionRequest(name=version.name, kinds=["email"]))
    assert refusal(error)[:2] == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    served.servicer.settings = full
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant("RedactDatasetVersion", pb.RedactDatasetVersionRequest(name=version.name, kinds=["shoe_size"]))
    assert refusal(error)[2]["field"] == "kinds[0]"


async def read(tenant: Tenant, name: str, offset: int = 0) -> bytes:
    found, at = b"", offset
    async for piece in tenant.stub.ReadDatasetVersion(
        pb.ReadDatasetVersionRequest(name=name, offset=offset), metadata=tenant.metadata(), timeout=20
    ):
        assert piece.offset == at
        found += piece.data
        at += len(piece.data)
    return found


async def test_content_is_read_with_its_own_scope_from_any_offset(served: Served) -> None:
    tenant = served.tenant()
    version = await tenant.version((await tenant.dataset()).name, ROWS)
    assert await read(tenant, version.name) == ROWS
    assert await read(tenant, version.name, 100) == ROWS[100:]
    assert await read(tenant, version.name, len(ROWS)) == b""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await read(tenant, version.name, len(ROWS) + 1)
    assert refusal(error)[1] == "FIELD_OUT_OF_RANGE"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await read(replace(tenant, scopes=SCOPES - {"datasets.content"}), version.name)
    assert refusal(error) == ("PERMISSION_DENIED", "SCOPE_MISSING", {"scope": "datasets.content"})


async def test_V12_shared_rows_are_counted(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    other_label = ROWS.splitlines(keepends=True)[0].replace(b'"label":"sport"', b'"label":"weather"')
    near = b'{"text":"' + b" ".join(b"word%d" % i for i in range(60)) + b'%s","label":"sport"}\n'
    first = await tenant.version(dataset.name, ROWS + near % b"")
    second = await tenant.version(dataset.name, b'{"text":"Something new here","label":"sport"}\n' + other_label + near % b" more")
    async with served.store.transaction() as connection:
        train, held_out = [await dataset_store.version_for_training(connection, tenant.uid, each.name) for each in (first, second)]
    found = await overlap(served.objects, train, held_out)
    assert (found.exact_rows, found.near_rows) == (1, 1)
    assert (await overlap(served.objects, train, train)).exact_rows == 21


# --- datasets as resources --------------------------------------------------------------------------------------------------------------


async def test_masks_and_etags(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset(display_name="News", labels={"team": "a"}, retention=Duration(seconds=86_400))
    change = pb.Dataset(name=dataset.name, display_name="Renamed", etag=dataset.etag)
    changed = await tenant("UpdateDataset", pb.UpdateDatasetRequest(dataset=change))
    assert (changed.display_name, dict(changed.labels), changed.retention.seconds) == ("Renamed", {"team": "a"}, 86_400)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant("UpdateDataset", pb.UpdateDatasetRequest(dataset=change))
    assert refusal(error)[:2] == ("ABORTED", "ETAG_MISMATCH")
    everything = pb.UpdateDatasetRequest(dataset=pb.Dataset(name=dataset.name), update_mask=FieldMask(paths=["*"]))
    cleared = await tenant("UpdateDataset", everything)
    assert (cleared.display_name, dict(cleared.labels), cleared.HasField("retention")) == ("", {}, False)
    for asked, field in (
        (pb.UpdateDatasetRequest(dataset=pb.Dataset(name=dataset.name), update_mask=FieldMask(paths=["uid"])), "update_mask"),
        (pb.UpdateDatasetRequest(dataset=pb.Dataset(name=dataset.name, format=pb.DATASET_FORMAT_CHAT)), "dataset.format"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await tenant("UpdateDataset", asked)
        assert refusal(error)[2]["field"] == field


async def test_a_new_layout_holds_for_new_versions(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    first = await tenant.version(dataset.name, ROWS)
    layout = pb.RowLayout(text_columns=["text"], label_column="label")
    await tenant("UpdateDataset", pb.UpdateDatasetRequest(dataset=pb.Dataset(name=dataset.name, layout=layout)))
    second = await tenant.version(dataset.name, ROWS)
    assert second.name != first.name
    assert list(second.layout.text_columns) == ["text"]
    assert list((await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=first.name))).layout.text_columns) == []


async def test_page_token_pages_through_and_belongs_to_its_list(served: Served) -> None:
    tenant, other = served.tenant(), served.tenant()
    for index in range(5):
        await tenant.dataset(f"d{index}", labels={"half": str(index % 2)})
    seen, token = [], ""
    while True:
        page = await tenant("ListDatasets", pb.ListDatasetsRequest(parent=f"projects/{tenant.project}", page_size=2, page_token=token))
        seen += [dataset.name.rsplit("/", 1)[1] for dataset in page.datasets]
        if not page.next_page_token:
            break
        token = page.next_page_token
    assert seen == [f"d{index}" for index in range(5)]
    asked = pb.ListDatasetsRequest(parent=f"projects/{tenant.project}", filter='labels.half = "1"', order_by="name desc")
    assert [dataset.name[-2:] for dataset in (await tenant("ListDatasets", asked)).datasets] == ["d3", "d1"]
    for who, parent in ((other, other.project), (tenant, tenant.project)):
        wrong = pb.ListDatasetsRequest(parent=f"projects/{parent}", page_token=token if who is other else token[:-4] + "AAAA")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await who("ListDatasets", wrong)
        assert refusal(error)[:2] == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID")


async def test_versions_and_findings_are_listed_by_pages(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    bad = await tenant.version(dataset.name, b"{}\n" * 30)
    good = await tenant.version(dataset.name, ROWS)
    listed = await tenant("ListDatasetVersions", pb.ListDatasetVersionsRequest(parent=dataset.name, filter="state = READY"))
    assert [version.name for version in listed.dataset_versions] == [good.name]
    first = await tenant("ListRowErrors", pb.ListRowErrorsRequest(parent=bad.name, page_size=25, severity=pb.ROW_SEVERITY_ERROR))
    rest = await tenant(
        "ListRowErrors",
        pb.ListRowErrorsRequest(parent=bad.name, page_size=1_000, severity=pb.ROW_SEVERITY_ERROR, page_token=first.next_page_token),
    )
    assert (len(first.row_errors), len(rest.row_errors), rest.next_page_token) == (25, 36, "")


async def test_A23_request_id_replays_refuses_another_body_and_runs_once(served: Served) -> None:
    tenant = served.tenant()
    asked = pb.CreateDatasetRequest(parent=f"projects/{tenant.project}", dataset_id="once", request_id=str(uuid4()))
    asked.dataset.format = pb.DATASET_FORMAT_CHAT
    replies = await asyncio.gather(*(tenant("CreateDataset", asked) for _ in range(20)), return_exceptions=True)
    made = {reply.uid for reply in replies if isinstance(reply, pb.Dataset)}
    assert len(made) == 1
    assert {error.code().name for error in replies if isinstance(error, grpc.aio.AioRpcError)} <= {"ABORTED"}
    assert (await tenant("CreateDataset", asked)).uid in made
    asked.dataset.display_name = "another body"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant("CreateDataset", asked)
    assert refusal(error)[:2] == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
    other = served.tenant()
    asked.parent = f"projects/{other.project}"
    assert (await other("CreateDataset", asked)).uid not in made


async def test_A10_foreign_is_random(served: Served) -> None:
    owner, other = served.tenant(), served.tenant()
    dataset = await owner.dataset()
    version = await owner.version(dataset.name, ROWS)
    upload = await owner("CreateUpload", pb.CreateUploadRequest(parent=dataset.name))
    deletion = await owner("DeleteUpload", pb.DeleteUploadRequest(name=upload.name))
    nowhere = f"projects/{other.project}/datasets/nope"
    header = {"header": pb.UploadHeader(upload=upload.name, writer_epoch=1)}

    async def asked(names: dict[str, str]) -> list[object]:
        found = []
        for method, request in (
            ("GetDataset", pb.GetDatasetRequest(name=names["dataset"])),
            ("UpdateDataset", pb.UpdateDatasetRequest(dataset=pb.Dataset(name=names["dataset"], display_name="x"))),
            ("DeleteDataset", pb.DeleteDatasetRequest(name=names["dataset"])),
            ("CreateUpload", pb.CreateUploadRequest(parent=names["dataset"])),
            ("GetUpload", pb.GetUploadRequest(name=names["upload"])),
            ("ResumeUpload", pb.ResumeUploadRequest(name=names["upload"])),
            ("DeleteUpload", pb.DeleteUploadRequest(name=names["upload"])),
            ("FinalizeUpload", pb.FinalizeUploadRequest(name=names["upload"], total_bytes=1, sha256="0" * 64)),
            ("GetDatasetVersion", pb.GetDatasetVersionRequest(name=names["version"])),
            ("ListDatasetVersions", pb.ListDatasetVersionsRequest(parent=names["dataset"])),
            ("DeleteDatasetVersion", pb.DeleteDatasetVersionRequest(name=names["version"])),
            ("RedactDatasetVersion", pb.RedactDatasetVersionRequest(name=names["version"])),
            ("ListRowErrors", pb.ListRowErrorsRequest(parent=names["version"])),
            ("GetDeletion", pb.GetDeletionRequest(name=names["deletion"])),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await other(method, request)
            found.append((method, refusal(error), error.value.details()))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await read(other, names["version"])
        found.append(("ReadDatasetVersion", refusal(error), error.value.details()))

        async def writes() -> AsyncIterator[pb.WriteUploadRequest]:
            header["header"].upload = names["upload"]
            yield pb.WriteUploadRequest(**header)

        with pytest.raises(grpc.aio.AioRpcError) as error:
            await other.stub.WriteUpload(writes(), metadata=other.metadata(), timeout=20)
        return [*found, ("WriteUpload", refusal(error), error.value.details())]

    foreign = await asked({"dataset": dataset.name, "version": version.name, "upload": upload.name, "deletion": deletion.name})
    random = await asked(
        {
            "dataset": nowhere,
            "version": f"{nowhere}/versions/1",
            "upload": f"{nowhere}/uploads/{uuid4()}",
            "deletion": f"projects/{other.project}/deletions/{uuid4()}",
        }
    )
    assert foreign == random
    assert {answer[1][1] for answer in foreign} == {"RESOURCE_NOT_FOUND"}


@pytest.mark.parametrize("name", ["../x", "a/../b", "A", "a%2eb", "a\\b", "", "x" * 64, "é", "a b", "con.txt"])
async def test_A15_names_are_plain(served: Served, name: str) -> None:
    tenant = served.tenant()
    for method, request in (
        ("CreateDataset", pb.CreateDatasetRequest(parent=f"projects/{tenant.project}", dataset_id=name, dataset=pb.Dataset(format=1))),
        ("GetDataset", pb.GetDatasetRequest(name=f"projects/{tenant.project}/datasets/{name}")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await tenant(method, request)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- erasure ----------------------------------------------------------------------------------------------------------------------------


class Models:
    """A dependant for tests: one model on one version."""

    def __init__(self) -> None:
        self.on: set[str] = set()

    async def of_versions(self, connection, project_uid, version_uids) -> bool:
        return bool(self.on & set(version_uids))

    async def erase(self, connection, project_uid, project, version_uids) -> Erased:
        gone = self.on & set(version_uids)
        self.on -= gone
        return (
            Erased((f"projects/{project}/models/m",), (f"adapters/{project_uid}/abc",), {f"projects/{project}/models/m": "a" * 64})
            if gone
            else Erased()
        )


async def test_deletion_takes_everything_and_is_certified(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    version = await tenant.version(dataset.name, ROWS)
    half = await tenant("CreateUpload", pb.CreateUploadRequest(parent=dataset.name))
    await tenant.write(half, ROWS[:100])
    deletion = await tenant("DeleteDataset", pb.DeleteDatasetRequest(name=dataset.name))
    assert deletion.target == dataset.name
    for method, request in (
        ("GetDataset", pb.GetDatasetRequest(name=dataset.name)),
        ("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name)),
        ("GetUpload", pb.GetUploadRequest(name=half.name)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await tenant(method, request)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
    done = await tenant.deleted(deletion)
    assert set(done.erased) == {dataset.name, version.name}
    payload = signing.unseal(done.certificate.encode(), {"test": KEY.public_key()}, signing.IN_TOTO)
    predicate, subjects = signing.predicate_of(payload, signing.DELETION_CERTIFICATE)
    assert predicate["target"] == dataset.name
    assert subjects == {version.name: version.sha256}
    await emptied(served, f"datasets/{tenant.uid}")
    await emptied(served, f"uploads/{tenant.uid}")


async def test_deleted_names_come_back_empty_and_versions_count_on(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    version = await tenant.version(dataset.name, ROWS)
    await tenant.deleted(await tenant("DeleteDataset", pb.DeleteDatasetRequest(name=dataset.name)))
    again = await tenant.dataset()
    assert again.uid != dataset.uid
    with pytest.raises(grpc.aio.AioRpcError):
        await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))
    second = await tenant.version(again.name, ROWS)
    assert second.name == f"{dataset.name}/versions/2"
    assert second.uid != version.uid


async def test_dependants_refuse_or_go_along(finetune_url: str, tmp_path) -> None:
    models = Models()
    async with datasets_served(finetune_url, tmp_path / "objects", dependants=(models,)) as served:
        tenant = served.tenant()
        dataset = await tenant.dataset()
        version = await tenant.version(dataset.name, ROWS)
        models.on.add(version.uid)
        await served.objects.put(f"adapters/{tenant.uid}/abc/adapter", b"weights")
        for method, request in (
            ("DeleteDataset", pb.DeleteDatasetRequest(name=dataset.name)),
            ("DeleteDatasetVersion", pb.DeleteDatasetVersionRequest(name=version.name)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await tenant(method, request)
            assert refusal(error)[:2] == ("FAILED_PRECONDITION", "HAS_DEPENDANTS")
        done = await tenant.deleted(await tenant("DeleteDatasetVersion", pb.DeleteDatasetVersionRequest(name=version.name, cascade=True)))
        assert list(done.erased) == [version.name, f"projects/{tenant.project}/models/m"]
        assert await served.objects.size(f"adapters/{tenant.uid}/abc/adapter") is None
        assert await read_nothing(served, tenant)


async def read_nothing(served: Served, tenant: Tenant) -> bool:
    return [path async for path, _ in served.objects.list(f"datasets/{tenant.uid}")] == []


async def test_retention_erases_versions_in_time(served: Served) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset(retention=Duration(seconds=86_400))
    version = await tenant.version(dataset.name, ROWS)
    assert version.expire_time.seconds - version.create_time.seconds == 86_400
    async with served.store.transaction() as connection:
        await connection.execute(text("UPDATE dataset_versions SET expire_time = clock_timestamp() WHERE uid = :uid"), {"uid": version.uid})
    await emptied(served, f"datasets/{tenant.uid}")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_erasure_survives_a_store_that_is_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = served.tenant()
    dataset = await tenant.dataset()
    await tenant.version(dataset.name, ROWS)
    calls = 0
    real = served.objects.sync.delete_prefix

    def flaky(prefix: str) -> int:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise OSError("disk")
        return real(prefix)

    monkeypatch.setattr(served.objects.sync, "delete_prefix", flaky)
    deletion: deletion_pb2.Deletion = await tenant("DeleteDataset", pb.DeleteDatasetRequest(name=dataset.name))
    served.eraser.settings = DatasetSettings(erase_seconds=0.05)
    done = await tenant.deleted(deletion)
    assert done.certificate
    assert calls >= 3
    assert await read_nothing(served, tenant)
