"""Uploads over real gRPC: broken, resumed, fenced off, out of order, too large, onto a full disk. Nothing acknowledged is lost."""

import asyncio
import errno
import hashlib
import os
import random
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest
from sqlalchemy import text

from argosy.v1 import dataset_pb2 as pb
from argosy.v1 import dataset_pb2_grpc, error_pb2
from services.finetune import upload_writer
from services.finetune.servicers import dataset as dataset_servicer
from services.finetune.settings import DatasetSettings
from services.finetune.store import open_store
from tests.finetune.served import Served, Tenant, datasets_served
from tests.finetune.test_dataset import ROWS, emptied, read, refusal

FLUSH = 64 << 10  # so that small uploads have several parts
BIG = b"".join(b'{"text":"Row %07d with a text of its own","label":"%s"}\n' % (i, b"ab"[i % 2 : i % 2 + 1]) for i in range(12_000))


@pytest.fixture
async def served(finetune_url: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(upload_writer, "FLUSH_BYTES", FLUSH)
    async with datasets_served(finetune_url, tmp_path / "objects") as found:
        yield found


async def opened(tenant: Tenant, **values) -> pb.Upload:
    dataset = await tenant.dataset()
    return await tenant("CreateUpload", pb.CreateUploadRequest(parent=dataset.name, **values))


async def persisted(tenant: Tenant, upload: pb.Upload) -> int:
    return (await tenant("GetUpload", pb.GetUploadRequest(name=upload.name))).persisted_bytes


class Stream:
    """A WriteUpload whose chunks a test sends one by one."""

    def __init__(self, tenant: Tenant, upload: pb.Upload, epoch: int = 0) -> None:
        self.call = tenant.stub.WriteUpload(metadata=tenant.metadata(), timeout=30)
        self._header = pb.UploadHeader(upload=upload.name, writer_epoch=epoch or upload.writer_epoch)

    async def __aenter__(self) -> "Stream":
        await self.call.write(pb.WriteUploadRequest(header=self._header))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()

    async def send(self, offset: int, data: bytes, crc: int | None = None) -> None:
        value = google_crc32c.value(data) if crc is None else crc
        await self.call.write(pb.WriteUploadRequest(chunk=pb.UploadChunk(offset=offset, data=data, crc32c=value)))

    async def done(self) -> int:
        await self.call.done_writing()
        return (await self.call).persisted_bytes


async def refused(stream: Stream) -> tuple[str, str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stream.call
    return refusal(error)


async def test_upload_resume_after_a_break_at_any_byte(served: Served) -> None:
    draw = random.Random(7)
    tenant = served.tenant()
    upload = await opened(tenant)
    epoch, at, breaks = upload.writer_epoch, 0, 0
    while at < len(BIG):
        async with Stream(tenant, upload, epoch) as stream:
            sent = at
            for _ in range(draw.randrange(1, 12)):
                if piece := BIG[sent : sent + draw.randrange(1, 60_000)]:
                    await stream.send(sent, piece)
                    sent += len(piece)
            if sent == len(BIG):
                at = await stream.done()
                break
            if draw.random() < 0.7:  # else it breaks with everything still on its way
                async with asyncio.timeout(10):
                    while await persisted(tenant, upload) < sent - 2 * FLUSH:
                        await asyncio.sleep(0.01)
        breaks += 1
        resumed = await tenant("ResumeUpload", pb.ResumeUploadRequest(name=upload.name))
        assert resumed.writer_epoch == epoch + 1
        assert at <= resumed.persisted_bytes <= sent
        epoch, at = resumed.writer_epoch, resumed.persisted_bytes
    assert breaks > 3
    version = await tenant.validated((await tenant.finalize(upload, BIG)).name)
    assert (version.state, version.report.valid_rows) == (version.STATE_READY, 12_000)
    assert await read(tenant, version.name) == BIG


async def test_an_old_epoch_is_fenced_off(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    async with Stream(tenant, upload) as old:
        await old.send(0, BIG[: 2 * FLUSH])
        async with asyncio.timeout(10):
            while not await persisted(tenant, upload):
                await asyncio.sleep(0.01)
        resumed = await tenant("ResumeUpload", pb.ResumeUploadRequest(name=upload.name))
        await old.send(2 * FLUSH, BIG[2 * FLUSH : 4 * FLUSH])
        await old.call.done_writing()
        assert await refused(old) == ("ABORTED", "UPLOAD_FENCED", {"field": "writer_epoch"})
    async with Stream(tenant, upload, upload.writer_epoch) as late:
        assert (await refused(late))[1] == "UPLOAD_FENCED"
    assert await tenant.write(upload, BIG[resumed.persisted_bytes :], resumed.persisted_bytes, resumed.writer_epoch) == len(BIG)
    version = await tenant.validated((await tenant.finalize(upload, BIG)).name)
    assert version.state == version.STATE_READY


async def test_two_streams_of_one_epoch_cannot_both_write(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    other = BIG[:FLUSH].replace(b"text of its own", b"text of another")
    replies = await asyncio.gather(tenant.write(upload, BIG[:FLUSH]), tenant.write(upload, other), return_exceptions=True)
    assert sorted(type(reply).__name__ for reply in replies) == ["AioRpcError", "int"] or replies.count(FLUSH) == 1
    winner = BIG[:FLUSH] if replies[0] == FLUSH else other
    async with served.store.transaction() as connection:
        paths = (
            (await connection.execute(text("SELECT path FROM upload_parts WHERE upload_uid = :uid"), {"uid": upload.uid})).scalars().all()
        )
    assert await served.objects.get(paths[0]) == winner


async def test_stored_bytes_are_skipped_and_gaps_refused(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    await tenant.write(upload, ROWS[:500])
    async with Stream(tenant, upload) as again:
        await again.send(0, ROWS[:300])
        await again.send(200, ROWS[200:700])
        assert await again.done() == 700
    async with Stream(tenant, upload) as gap:
        await gap.send(700, ROWS[700:710])
        await gap.send(711, ROWS[711:720])
        assert await refused(gap) == ("OUT_OF_RANGE", "UPLOAD_OFFSET", {"persisted_bytes": "710"})
    assert await tenant.write(upload, ROWS[710:], 710) == len(ROWS)
    version = await tenant.validated((await tenant.finalize(upload, ROWS)).name)
    assert version.sha256 == hashlib.sha256(ROWS).hexdigest()


async def test_a_chunk_that_was_changed_is_dropped(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    async with Stream(tenant, upload) as stream:
        await stream.send(0, ROWS[:100])
        await stream.send(100, ROWS[100:200], crc=google_crc32c.value(b"other"))
        assert await refused(stream) == ("DATA_LOSS", "CHECKSUM_MISMATCH", {"offset": "100"})
    assert await persisted(tenant, upload) == 100
    assert await tenant.write(upload, ROWS[100:], 100) == len(ROWS)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([], "header"),
        ([{"chunk": pb.UploadChunk(data=b"x")}], "header"),
        ([{"header": None}, {"header": None}], "header"),
        ([{"header": None}, {"chunk": pb.UploadChunk()}], "chunk.data"),
        ([{"header": None}, {"chunk": pb.UploadChunk(data=b"x", offset=-1)}], "chunk.offset"),
        ([{"header": None}, {"chunk": pb.UploadChunk(data=b"x" * 524_289)}], "chunk.data"),
        ([{}], "part"),
    ],
)
async def test_a_stream_is_a_header_and_then_chunks(served: Served, parts: list[dict], field: str) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    header = pb.UploadHeader(upload=upload.name, writer_epoch=1)

    async def requests() -> AsyncIterator[pb.WriteUploadRequest]:
        for part in parts:
            yield pb.WriteUploadRequest(**{name: header if value is None else value for name, value in part.items()})

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.stub.WriteUpload(requests(), metadata=tenant.metadata(), timeout=20)
    code, _, metadata = refusal(error)
    assert (code, metadata["field"]) == ("INVALID_ARGUMENT", field)


@pytest.mark.parametrize(
    ("data", "rule", "line", "at"),
    [
        (b"PK\x03\x04" + b"\x14" * 600, "V1.format", 1, 0),
        (b"\x1f\x8b\x08" + b"\x00" * 600, "V1.format", 1, 0),
        (b"\xef\xbb\xbf" + ROWS, "V2.bom", 1, 0),
        (ROWS + b'{"text":"\xff"}\n', "V2.utf8", 21, len(ROWS) + 9),
        (BIG + b'{"text":"a\0"}\n', "V2.nul", 12_001, len(BIG) + 10),
        (ROWS + b"x" * 300_000, "V3.line_bytes", 21, len(ROWS)),
    ],
)
async def test_A13_A14_bytes_that_are_no_rows_end_the_upload(served: Served, data: bytes, rule: str, line: int, at: int) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.write(upload, data)
    expected = {"rule": rule, "line": str(line), "byte_offset": str(at)}
    assert refusal(error) == ("INVALID_ARGUMENT", "UNSUPPORTED_FORMAT", expected)
    shown = await tenant("GetUpload", pb.GetUploadRequest(name=upload.name))
    assert shown.state == shown.STATE_REJECTED
    assert shown.error.reason == error_pb2.ERROR_REASON_UNSUPPORTED_FORMAT
    assert dict(shown.error.metadata) == expected
    for method, request in (
        ("ResumeUpload", pb.ResumeUploadRequest(name=upload.name)),
        ("FinalizeUpload", pb.FinalizeUploadRequest(name=upload.name, total_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await tenant(method, request)
        assert refusal(error)[1] == "WRONG_STATE"
    await emptied(served, f"uploads/{tenant.uid}")


async def test_a_cut_character_at_the_end_is_seen_when_finalised(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    data = ROWS * 2 + "é".encode()[:1]
    await tenant.write(upload, data)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.finalize(upload, data)
    assert refusal(error)[2] == {"rule": "V2.utf8", "line": "41", "byte_offset": str(2 * len(ROWS))}


async def test_finalize_wants_the_bytes_that_were_meant(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    await tenant.write(upload, ROWS)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.finalize(upload, ROWS + b"more")
    assert refusal(error) == ("OUT_OF_RANGE", "UPLOAD_OFFSET", {"persisted_bytes": str(len(ROWS))})
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.finalize(upload, b"x" * len(ROWS))
    assert refusal(error)[:2] == ("DATA_LOSS", "CHECKSUM_MISMATCH")
    first = await tenant.finalize(upload, ROWS)
    assert (await tenant.finalize(upload, ROWS)).name == first.name  # the reply was lost
    shown = await tenant("GetUpload", pb.GetUploadRequest(name=upload.name))
    assert (shown.state, shown.dataset_version) == (shown.STATE_FINALIZED, first.name)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.write(upload, b"more", len(ROWS))
    assert refusal(error)[1] == "WRONG_STATE"


async def test_what_another_process_stored_is_hashed_again(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    await tenant.write(upload, BIG[: 3 * FLUSH])
    served.servicer._hashers = upload_writer.Hashers()  # as after a restart
    await tenant.write(upload, BIG[3 * FLUSH :], 3 * FLUSH)
    version = await tenant.validated((await tenant.finalize(upload, BIG)).name)
    assert (version.state, version.sha256) == (version.STATE_READY, hashlib.sha256(BIG).hexdigest())


async def test_a_long_hash_outlives_its_callers_deadline_and_is_made_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    await tenant.write(upload, ROWS)
    served.servicer._hashers = upload_writer.Hashers()  # as after a restart
    hashed, go = 0, asyncio.Event()

    async def slowly(objects: Any, parts: list[str]) -> Any:
        nonlocal hashed
        hashed += 1
        await go.wait()
        return await upload_writer.hash_parts(objects, parts)

    monkeypatch.setattr(dataset_servicer, "hash_parts", slowly)
    asked = pb.FinalizeUploadRequest(name=upload.name, total_bytes=len(ROWS), sha256=hashlib.sha256(ROWS).hexdigest())
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await tenant.stub.FinalizeUpload(asked, metadata=tenant.metadata(), timeout=0.8)
        assert refusal(error)[:2] == ("ABORTED", "REQUEST_IN_FLIGHT")
    go.set()
    version = await tenant.finalize(upload, ROWS)
    assert (version.sha256, hashed) == (asked.sha256, 1)


async def test_an_upload_given_up_is_erased(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    await tenant.write(upload, ROWS)
    done = await tenant.deleted(await tenant("DeleteUpload", pb.DeleteUploadRequest(name=upload.name)))
    assert list(done.erased) == [upload.name]
    assert [path async for path, _ in served.objects.list(f"uploads/{tenant.uid}")] == []
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.write(upload, ROWS)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_upload_expires(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    assert upload.expire_time.seconds - upload.create_time.seconds == 86_400
    await tenant.write(upload, ROWS)
    async with served.store.transaction() as connection:
        await connection.execute(text("UPDATE uploads SET expire_time = clock_timestamp() WHERE uid = :uid"), {"uid": upload.uid})
    shown = await tenant("GetUpload", pb.GetUploadRequest(name=upload.name))
    assert shown.state == shown.STATE_EXPIRED
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.write(upload, b"x", len(ROWS))
    assert refusal(error)[1] == "WRONG_STATE"
    await emptied(served, f"uploads/{tenant.uid}")


async def test_V3_quotas_hold(finetune_url: str, tmp_path) -> None:
    settings = DatasetSettings(upload_bytes=3_000, stored_bytes_per_project=5_000, rows_per_version=30, open_uploads_per_project=2)
    async with datasets_served(finetune_url, tmp_path / "objects", settings) as served:
        tenant = served.tenant()
        dataset = await tenant.dataset()
        for total, subject in ((3_001, "upload_bytes"), (2_000, ""), (3_000, ""), (1, "stored_bytes")):
            asked = tenant("CreateUpload", pb.CreateUploadRequest(parent=dataset.name, total_bytes=total))
            if not subject:
                await asked
                continue
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await asked
            assert refusal(error) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", {"subject": subject})
        other = served.tenant()
        parent = (await other.dataset()).name
        upload = await other("CreateUpload", pb.CreateUploadRequest(parent=parent))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await other.write(upload, b"x" * 3_001)
        assert refusal(error)[1] == "QUOTA_EXCEEDED"
        second = await other("CreateUpload", pb.CreateUploadRequest(parent=parent, total_bytes=100))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await other("CreateUpload", pb.CreateUploadRequest(parent=parent))
        assert refusal(error)[2] == {"subject": "open_uploads"}
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await other.write(second, b"x" * 101)
        assert refusal(error)[2] == {"subject": "upload_bytes"}
        with pytest.raises(grpc.aio.AioRpcError) as error:
            rows = b"{}\n" * 31
            await other.write(upload, rows + b" " * 600)
        assert refusal(error)[2] == {"rule": "V3.rows", "line": "31", "byte_offset": "90"}
        third = served.tenant()
        csv = await third.dataset("csv", layout=pb.RowLayout(encoding=pb.DATASET_ENCODING_CSV))
        spanning = await third.version(csv.name, b"text,label\n" + b'"a\nb\nc",x\n' * 30)
        assert (spanning.state, spanning.report.rows) == (spanning.STATE_READY, 30)
        over = await third.version(csv.name, b"text,label\n" + b'"a\nb\nc",x\n' * 31)
        assert over.error.metadata["rule"] == "V3.rows"


async def test_a_full_disk_loses_no_acknowledged_byte(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    room, write = 300_000, os.write

    def filling(descriptor: int, data: bytes) -> int:
        nonlocal room
        if os.readlink(f"/proc/self/fd/{descriptor}").find("/uploads/") < 0:
            return write(descriptor, data)
        if room <= 0:
            raise OSError(errno.ENOSPC, "no space")
        done = write(descriptor, data[:room])
        room -= done
        return done

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tenant.write(upload, BIG)
    assert refusal(error)[:2] == ("UNAVAILABLE", "STORE_UNAVAILABLE")
    acknowledged = await persisted(tenant, upload)
    assert 0 < acknowledged <= 300_000
    room = 1 << 30
    resumed = await tenant("ResumeUpload", pb.ResumeUploadRequest(name=upload.name))
    assert resumed.persisted_bytes == acknowledged
    assert await tenant.write(upload, BIG[acknowledged:], acknowledged, resumed.writer_epoch) == len(BIG)
    version = await tenant.validated((await tenant.finalize(upload, BIG)).name)
    assert version.state == version.STATE_READY
    assert await read(tenant, version.name) == BIG


async def test_a_hang_up_leaves_no_task_and_no_half_part(served: Served) -> None:
    tenant = served.tenant()
    upload = await opened(tenant)
    for _ in range(5):
        async with Stream(tenant, upload) as stream:
            await stream.send(0, BIG[:FLUSH])
            await stream.send(FLUSH, BIG[FLUSH : 2 * FLUSH])
    async with asyncio.timeout(10):
        while any(task.get_name() == "upload part" for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)
    async with served.store.transaction() as connection:
        rows = await connection.execute(
            text("SELECT start, size, path FROM upload_parts WHERE upload_uid = :uid ORDER BY start"), {"uid": upload.uid}
        )
        parts = rows.all()
    at = 0
    for start, size, path in parts:
        assert start == at
        assert await served.objects.get(path) == BIG[start : start + size]
        at += size
    assert at == await persisted(tenant, upload)


async def served_process(database_url: str, folder: Path) -> tuple[asyncio.subprocess.Process, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.finetune.served", database_url, str(folder),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    return child, (await child.stdout.readline()).decode().strip()


async def test_F1_a_killed_service_loses_no_acknowledged_byte_and_goes_on(finetune_url: str, tmp_path: Path) -> None:
    big = b"".join(b'{"text":"%06d%s","label":"a"}\n' % (i, b"x" * 4_000) for i in range(7_000))  # 28 MB: several parts of 8 MiB
    draw = random.Random(3)
    project, uid = "killed", str(uuid.uuid4())
    upload: pb.Upload | None = None
    acknowledged, kills, version = 0, 0, None
    while version is None:
        child, address = await served_process(finetune_url, tmp_path / "objects")
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            tenant = Tenant(dataset_pb2_grpc.DatasetServiceStub(channel), project, uid)
            if upload is None:
                upload = await opened(tenant)
                epoch = upload.writer_epoch
            else:
                resumed = await tenant("ResumeUpload", pb.ResumeUploadRequest(name=upload.name))
                assert resumed.persisted_bytes >= acknowledged
                acknowledged, epoch = resumed.persisted_bytes, resumed.writer_epoch
            writing = asyncio.create_task(tenant.write(upload, big[acknowledged:], acknowledged, epoch, size=512 << 10))
            if kills < 2:
                target = acknowledged + draw.randrange(1, 9 << 20)
                async with asyncio.timeout(60):
                    while not writing.done() and (seen := await persisted(tenant, upload)) < target:
                        acknowledged = seen
                        await asyncio.sleep(0.005)
                child.kill()
                await child.wait()
                kills += 1
                await asyncio.gather(writing, return_exceptions=True)
                continue
            assert await writing == len(big)
            version = await tenant.finalize(upload, big)
        child.kill()  # while the version is validated
        await child.wait()
    child, address = await served_process(finetune_url, tmp_path / "objects")
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        tenant = Tenant(dataset_pb2_grpc.DatasetServiceStub(channel), project, uid)
        assert await tenant.finalize(upload, big) == await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))
        async with open_store(finetune_url, wait=True) as store, store.transaction() as connection:
            await connection.execute(text("UPDATE dataset_versions SET claim_time = claim_time - interval '1 minute'"))
        done = await tenant.validated(version.name)
        assert (done.state, done.sha256) == (done.STATE_READY, hashlib.sha256(big).hexdigest())
    child.kill()
    await child.wait()


async def test_readers_that_leave_hold_nothing(served: Served) -> None:
    tenant = served.tenant()
    version = await tenant.version((await tenant.dataset()).name, BIG * 6)

    def files() -> int:
        return sum(1 for fd in os.listdir("/proc/self/fd") if "/objects/" in os.path.realpath(f"/proc/self/fd/{fd}"))

    assert files() == 0
    for _ in range(5):
        call = tenant.stub.ReadDatasetVersion(pb.ReadDatasetVersionRequest(name=version.name), metadata=tenant.metadata(), timeout=20)
        assert (await call.read()).data == BIG[: 512 << 10]
        call.cancel()
    async with asyncio.timeout(10):
        while files():
            await asyncio.sleep(0.01)
