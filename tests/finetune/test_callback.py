"""Progress of trainers of the operator's own: what is read of a post, who may post, and what it does to the job."""

import asyncio
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from argosy.v1 import finetune_pb2 as pb
from services.chassis.channel import PlaintextRefused
from services.finetune import callback
from services.finetune.callback import BODY_BYTES, Malformed, Status, listening, parse, status_path
from services.finetune.settings import JobSettings
from tests.fakes.authority import Authority
from tests.finetune.test_control_plane import QUICK, house
from tests.finetune.trainer import world

UID = "11111111-1111-4111-8111-111111111111"
TOKEN = "ab" * 32
POST = {
    "trainerStatus": {
        "lastUpdatedTime": "2026-11-25T08:00:00+00:00",
        "progressPercentage": 25,
        "estimatedRemainingSeconds": 90,
        "metrics": [
            {"name": "loss", "value": "1.5"}, {"name": "eval_loss", "value": "2"}, {"name": "current_step", "value": "5"},
            {"name": "total_steps", "value": "20"}, {"name": "current_epoch", "value": "0.5"}, {"name": "grad_norm", "value": "nan"},
            {"name": "<script>", "value": "1"}, {"name": "x" * 65, "value": "1"}, {"name": "text", "value": "hello"}, "none",
        ],
    }
}  # fmt: skip


def test_a_post_is_read_and_what_is_no_number_or_no_name_is_dropped() -> None:
    status = parse(json.dumps(POST).encode())
    assert status == Status(5, 20, 25, 0.5, 90.0, (("loss", 1.5), ("validation_loss", 2.0)))
    assert status.place(3) == (5, 20)


@pytest.mark.parametrize(
    ("said", "known", "shown"), [({"progressPercentage": 40}, 0, (40, 100)), ({"progressPercentage": 100}, 7, (7, 0)), ({}, 7, (7, 0))]
)
def test_a_trainer_without_counters_is_shown_by_its_percentage_alone(said: dict[str, Any], known: int, shown: tuple[int, int]) -> None:
    assert parse(json.dumps({"trainerStatus": said}).encode()).place(known) == shown


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"trainerStatus": 1}', b'{"trainerStatus": {"metrics": 3}}', b"[" * 60_000])
def test_what_is_no_status_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        parse(body)


def test_a_post_full_of_metrics_is_cut() -> None:
    many = [{"name": f"m{n}", "value": 1e300} for n in range(500)]
    assert [value for _, value in parse(json.dumps({"trainerStatus": {"metrics": many}}).encode()).metrics] == [1e9] * 64


async def _raw(url: str, data: bytes) -> bytes:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


def _request(path: str = status_path(UID, 1), body: bytes = b"{}", **changed: str) -> bytes:
    headers = {"authorization": f"Bearer {TOKEN}", "content-length": str(len(body))} | {k.replace("_", "-"): v for k, v in changed.items()}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (_request(body=b'{"trainerStatus": {}}'), 200),
        (_request(body=b"no"), 400),
        (_request(authorization="Bearer x"), 401),
        (_request(authorization="Bearer " + "é" * 64), 401),
        (_request("/jobs/../etc/attempts/1/status"), 404),
        (_request().replace(b"POST", b"GET", 1), 405),
        (_request(content_length="many"), 411),
        (_request(content_length=str(BODY_BYTES + 1)), 413),
    ],
)
async def test_each_bad_request_gets_its_status(request_: bytes, code: int) -> None:
    async def take(uid: str, attempt: int, token: str, status: Status) -> bool:
        assert (uid, attempt, token) == (UID, 1, TOKEN)
        return True

    async with listening(take, "127.0.0.1:0") as url:
        assert (await _raw(url, request_)).split(b" ")[1] == str(code).encode()


async def test_a_head_without_end_is_hung_up_on_and_the_next_post_is_served() -> None:
    async def take(*_: Any) -> bool:
        return True

    async with listening(take, "127.0.0.1:0") as url:
        assert await _raw(url, b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 4_000) == b""
        assert (await _raw(url, _request(body=b'{"trainerStatus": {}}'))).startswith(b"HTTP/1.1 200")


async def test_tokens_are_not_taken_in_plaintext_off_this_machine() -> None:
    async def take(*_: Any) -> bool:
        return True

    with pytest.raises(PlaintextRefused):
        async with listening(take, "0.0.0.0:0"):
            raise AssertionError("it listens")


def _post(url: str, token: str, said: dict[str, Any]) -> int:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    asked = urllib.request.Request(url, json.dumps({"trainerStatus": said}).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(asked, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


async def test_over_TLS_a_post_needs_no_certificate_of_its_own_and_gets_the_renewed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "RELOAD_SECONDS", 0.02)
    authority, files = Authority(), [tmp_path / name for name in ("tls.crt", "tls.key", "ca.crt")]

    def renew() -> None:
        for path, pem in zip(files, (*authority.issue("127.0.0.1"), authority.pem), strict=True):
            path.write_bytes(pem)

    async def take(*_: Any) -> bool:
        return True

    def post(url: str) -> tuple[int, bytes]:
        context = ssl.create_default_context(cafile=str(files[2]))  # as transformers' callback makes it
        headers = {"Authorization": f"Bearer {TOKEN}"}
        asked = urllib.request.Request(url + status_path(UID, 1), json.dumps(POST).encode(), headers, method="POST")
        with urllib.request.urlopen(asked, timeout=5, context=context) as reply:
            host, _, port = url.removeprefix("https://").rpartition(":")
            return reply.status, ssl.get_server_certificate((host, int(port))).encode()

    renew()
    async with listening(take, "127.0.0.1:0", files[0], files[1]) as url:
        status, first = await asyncio.to_thread(post, url)
        assert status == 200 and url.startswith("https://")
        renew()
        async with asyncio.timeout(20):
            while (await asyncio.to_thread(post, url))[1] == first:
                await asyncio.sleep(0.02)
        with pytest.raises(urllib.error.URLError):  # whoever does not know the authority sends no token
            await asyncio.to_thread(urllib.request.urlopen, url, None, 5)


async def test_posts_become_events_and_only_the_current_attempt_may_post(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path, jobs=JobSettings(**_fields(QUICK), callback_address="127.0.0.1:0")) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        at = there.running.callback_url + status_path(job.uid, 1)
        said = POST["trainerStatus"]
        post = lambda token, url=at, said=said: asyncio.to_thread(_post, url, token, said)  # noqa: E731
        assert await post(trainer.attempt.token) == 401  # nothing is running yet
        await trainer.claims()
        assert await post("0" * 64) == 401
        assert await post(trainer.attempt.token, there.running.callback_url + status_path(job.uid, 2)) == 401
        assert await post(trainer.attempt.token) == 200
        assert await post(trainer.attempt.token) == 200  # at once again: not an event more
        await trainer.says(phase=pb.JOB_PHASE_TRAINING, device_seconds=3.0)  # the wrapper's report knows less, and takes nothing away
        found = await there.get(job)
        assert (found.step, found.phase, found.device_seconds) == (5, pb.JOB_PHASE_TRAINING, 3.0)
        assert found.HasField("estimated_end_time") and not found.target_step
        events = (await there("ListFineTuneJobEvents", pb.ListFineTuneJobEventsRequest(parent=job.name))).events
        shown = [event.progress for event in events if event.WhichOneof("event") == "progress"]
        assert [(each.step, each.target_step, each.epoch) for each in shown] == [(5, 20, 0.5)]
        metrics = {event.metric.name: event.metric.value for event in events if event.WhichOneof("event") == "metric"}
        assert metrics == {"loss": 1.5, "validation_loss": 2.0}
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=job.name))
        await there.until(job, lambda found: found.state == pb.FineTuneJob.STATE_CANCELLED)
        assert await post(trainer.attempt.token) == 401


async def test_the_first_post_and_the_last_are_written_however_soon_after_a_report(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path, jobs=JobSettings(**_fields(QUICK), callback_address="127.0.0.1:0")) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        at = there.running.callback_url + status_path(job.uid, 1)
        await trainer.claims()
        await trainer.says(phase=pb.JOB_PHASE_TRAINING)
        for percent, counted in ((0, {"total_steps": 8}), (12, {"current_step": 1, "total_steps": 8}), (100, {})):
            metrics = [{"name": name, "value": str(value)} for name, value in counted.items()]
            said = {"progressPercentage": percent, "metrics": metrics}
            assert await asyncio.to_thread(_post, at, trainer.attempt.token, said) == 200
        events = (await there("ListFineTuneJobEvents", pb.ListFineTuneJobEventsRequest(parent=job.name))).events
        shown = [(event.progress.step, event.progress.target_step) for event in events if event.WhichOneof("event") == "progress"]
        assert shown[-2:] == [(0, 8), (100, 100)], shown


def _fields(settings: JobSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in QUICK.__dataclass_fields__ if name != "callback_address"}


CHATS = world.chat_rows(24)
TRAINER = Path(__file__).parents[2] / "examples" / "trainers" / "chat_by_transformers.py"


@pytest.mark.timeout(110)
async def test_transformers_own_trainer_is_a_live_job_and_its_adapter_a_version(
    finetune_url: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    jobs = JobSettings(
        **_fields(QUICK) | {"trainer_command": (sys.executable, str(TRAINER)), "runs_dir": tmp_path / "runs"},
        callback_address="127.0.0.1:0",
    )
    async with house(finetune_url, base, tmp_path, jobs=jobs, launched=True) as there:
        made = await there.tenant.dataset("chats", "CHAT")
        version = await there.tenant.version(made.name, CHATS)
        spec = pb.FineTuneSpec(base_model="models/tiny", train_version=version.name, method=pb.TUNE_METHOD_CHAT)
        spec.hyperparameters.max_steps, spec.hyperparameters.batch_size = 4, 4
        spec.lora.rank = 2
        job = await there.create(spec=spec)
        found = await there.until(job, lambda found: found.state in (pb.FineTuneJob.STATE_SUCCEEDED, pb.FineTuneJob.STATE_FAILED))
        log = next(iter((tmp_path / "runs").glob("*/log")), None)
        assert found.state == pb.FineTuneJob.STATE_SUCCEEDED, log.read_text() if log else found
        assert (found.step, found.target_step) == (4, 4) and found.model_version.endswith("/versions/1")
        events = (await there("ListFineTuneJobEvents", pb.ListFineTuneJobEventsRequest(parent=job.name, page_size=500))).events
        shown = [(event.progress.step, event.progress.target_step) for event in events if event.WhichOneof("event") == "progress"]
        assert (0, 4) in shown  # posted by transformers itself when training began
        losses = [event.metric.value for event in events if event.WhichOneof("event") == "metric" and event.metric.name == "loss"]
        assert losses and all(0 < loss < 20 for loss in losses)
