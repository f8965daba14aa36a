"""What an upload costs: bytes a second over loopback gRPC until they are on disk, rows a second until they are validated, and memory.

Three processes: PostgreSQL, the fine-tuning service's datasets, and this client, whose messages are made before the clock starts. Bytes
count as uploaded when the service has said that they are stored: written, synced and named, each 8 MiB.

    python -m benchmarks.upload                      # 512 MiB, three times
    python -m benchmarks.upload --mib 2048 --runs 1  # and the service's memory over more
"""

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import google_crc32c
import grpc
import psutil
import uvloop

from argosy.v1 import dataset_pb2 as pb
from argosy.v1 import dataset_pb2_grpc
from benchmarks import record
from services.finetune.settings import DatasetSettings
from services.postgres import embedded_postgres
from tests.finetune.served import Tenant, datasets_served

CHUNK = 512 << 10
WRITE = "/argosy.v1.DatasetService/WriteUpload"
WORDS = tuple("the of council river bridge market price rain team goal minister court water energy school record winter festival".split())


def row(index: int, letters: int) -> bytes:
    """A row of about `letters` letters, unlike the others."""
    text = " ".join(
        WORDS[(index * 31 + place * (7 + index % 11)) % len(WORDS)] + str((index * place) % 97) for place in range(letters // 8)
    )
    return b'{"text":"%s","label":"topic %d"}\n' % (text.encode(), index % 4)


def data_of(size: int, letters: int) -> bytes:
    """Rows, at least `size` bytes of them."""
    found, length, index = [], 0, 0
    while length < size:
        found.append(row(index, letters))
        length += len(found[-1])
        index += 1
    return b"".join(found)


class Memory:
    """The most resident memory a process had while a block ran."""

    def __init__(self, pid: int) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self.before = self._process.memory_info().rss
        self.most = self.before

    def __enter__(self) -> "Memory":
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, self._process.memory_info().rss)

    @property
    def grew_mib(self) -> float:
        """Over what it had before."""
        return (self.most - self.before) / 2**20


def messages(upload: pb.Upload, data: bytes) -> Iterator[bytes]:
    """A WriteUpload's requests as they go over the wire."""
    yield pb.WriteUploadRequest(header=pb.UploadHeader(upload=upload.name, writer_epoch=upload.writer_epoch)).SerializeToString()
    for at in range(0, len(data), CHUNK):
        piece = data[at : at + CHUNK]
        yield pb.WriteUploadRequest(chunk=pb.UploadChunk(offset=at, data=piece, crc32c=google_crc32c.value(piece))).SerializeToString()


async def upload(tenant: Tenant, channel: grpc.aio.Channel, dataset: str, data: bytes) -> tuple[float, pb.DatasetVersion]:
    """Seconds until all bytes were said to be stored, and the version they became."""
    made = await tenant("CreateUpload", pb.CreateUploadRequest(parent=dataset))
    ready = list(messages(made, data))
    call = channel.stream_unary(WRITE, request_serializer=None, response_deserializer=pb.WriteUploadResponse.FromString)

    async def requests() -> AsyncIterator[bytes]:
        for message in ready:
            yield message

    began = time.perf_counter()
    reply = await call(requests(), metadata=tenant.metadata(), timeout=600)
    took = time.perf_counter() - began
    assert reply.persisted_bytes == len(data)
    return took, await tenant.finalize(made, data)


async def serve(database: str, folder: str, validate: bool) -> None:
    """The service's process."""
    settings = DatasetSettings(row_tokens=0)
    async with datasets_served(database, folder, settings, validate=validate, processes=True) as served:
        print(served.address, flush=True)
        await asyncio.Event().wait()


async def disk(folder: Path) -> float:
    """MiB a second that the disk takes in synced files of 8 MiB, by one writer."""

    def write() -> float:
        piece, began = os.urandom(8 << 20), time.perf_counter()
        for index in range(32):
            with (folder / f"probe-{index}").open("wb") as file:
                file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        took = time.perf_counter() - began
        for index in range(32):
            (folder / f"probe-{index}").unlink()
        return 32 * 8 / took

    return await asyncio.to_thread(write)


async def validated(tenant: Tenant, version: pb.DatasetVersion, pid: int) -> tuple[float, float, pb.DatasetVersion]:
    """Seconds until it was validated, the most memory in MiB that a validator had, and the version."""
    began, most = time.perf_counter(), 0
    while True:
        found = await tenant("GetDatasetVersion", pb.GetDatasetVersionRequest(name=version.name))
        if found.state != found.STATE_VALIDATING:
            return time.perf_counter() - began, most / 2**20, found
        for child in psutil.Process(pid).children():
            try:
                most = max(most, child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        await asyncio.sleep(0.05)


async def measure(asked: argparse.Namespace) -> None:
    """All figures."""
    record.header()
    with tempfile.TemporaryDirectory(dir=asked.folder) as found:
        folder = Path(found)
        print(f"- disk: {await disk(folder):.0f} MiB/s in synced files of 8 MiB, one writer, nothing else")
        async with embedded_postgres(folder / "postgres") as database:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "benchmarks.upload",
                "--serve",
                database,
                str(folder / "objects"),
                *(() if asked.validate else ("--no-validate",)),
                stdout=asyncio.subprocess.PIPE,
            )
            assert child.stdout is not None
            address = (await child.stdout.readline()).decode().strip()
            try:
                await against(asked, address, child.pid)
            finally:
                child.terminate()
                await child.wait()


async def against(asked: argparse.Namespace, address: str, pid: int) -> None:
    """Figures of a service that is up."""
    async with grpc.aio.insecure_channel(address) as channel:
        tenant = Tenant(dataset_pb2_grpc.DatasetServiceStub(channel), "bench")
        dataset = await tenant.dataset()
        _, version = await upload(tenant, channel, dataset.name, data_of(32 << 20, 200))  # warm
        if asked.validate:
            await tenant.validated(version.name)
        data = data_of(asked.mib << 20, 200)
        rates, grown, speeds, peaks = [], [], [], []
        for run in range(asked.runs):
            fresh = data + row(10_000_000 + run, 200)  # other bytes: another version
            before = psutil.Process(pid).cpu_times()
            with Memory(pid) as memory:
                took, version = await upload(tenant, channel, dataset.name, fresh)
            after = psutil.Process(pid).cpu_times()
            rates.append(len(fresh) / took / 2**20)
            grown.append(memory.grew_mib)
            print(f"  service CPU: {after.user - before.user + after.system - before.system:.2f} s of {took:.2f} s", file=sys.stderr)
            if asked.validate:
                seconds, peak, found = await validated(tenant, version, pid)
                assert found.state == found.STATE_READY, found
                speeds.append(found.report.rows / seconds)
                peaks.append(peak)
        record.table(
            ("Figure", "Value"),
            (f"upload of {asked.mib} MiB, MiB/s", record.spread(rates, ".0f")),
            ("service's memory grew by, MiB", record.spread(grown, ".0f")),
            *(
                (("rows validated a second", record.spread(speeds, ".0f")), ("validator's memory, MiB", record.spread(peaks, ".0f")))
                if speeds
                else ()
            ),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the objects lie; the system's temporary folder by default")
    parser.add_argument("--no-validate", dest="validate", action="store_false")
    parser.add_argument("--serve", nargs=2, metavar=("DATABASE", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    uvloop.run(serve(*asked.serve, asked.validate) if asked.serve else measure(asked))


if __name__ == "__main__":
    main()
