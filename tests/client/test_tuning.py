"""Tuning through the library: what breaks goes on where it stood, and what fails says where."""

import os
import threading
import uuid

import pytest

import argosy
from argosy import errors, names, specs
from argosy.chunks import CHUNK_BYTES, HashedFile
from argosy.layouts import layout_of
from argosy.v1 import dataset_pb2, finetune_pb2, model_pb2
from services.chassis.errors import (
    ArtifactRejected,
    Draining,
    EventSequenceAhead,
    HasDependants,
    PrivacyBudgetExceeded,
    ResourceNotFound,
    SlowConsumer,
    StreamLost,
    UnsupportedFormat,
    UploadFenced,
)
from tests.fakes.gateway import KEY, fake_gateway
from tests.fakes.tuning import Job, job_events

ROWS = "label\ttext\ntechnology\tA chip\nsports\tA goal\n"


def client(fake, **more):
    return argosy.Client(fake.address, KEY, model="models/a", **more)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "News rows.tsv"
    path.write_text(ROWS)
    return path


@pytest.fixture
def big(tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_bytes(os.urandom(5 * CHUNK_BYTES + 123))
    return path


def test_a_file_becomes_a_version_a_job_and_a_model(rows):
    seen, sent = [], []
    with fake_gateway() as fake, client(fake) as library:
        tuning = library.tune(
            rows, base="gemma-3-270m", method="classify", rank=8, seed=4, max_cost="2.5 EUR", sent=lambda *each: sent.append(each)
        )
        assert tuning.quote.steps.high == 8
        asked = next(each for each in fake.seen if isinstance(each, finetune_pb2.CreateFineTuneJobRequest))
        assert uuid.UUID(asked.request_id).version == 4
        job = asked.fine_tune_job
        assert (job.spec.base_model, job.model) == ("models/gemma-3-270m", "projects/p/models/news-rows")
        assert job.spec.train_version == "projects/p/datasets/news-rows/versions/1"
        assert (job.spec.lora.rank, job.spec.seed, job.max_cost.currency_code, job.max_cost.nanos) == (8, 4, "EUR", 2_500_000_000)
        assert not job.spec.HasField("hyperparameters") and not job.spec.HasField("validation_fraction")
        assert tuning.wait(seen=seen.append).name == "projects/p/models/news/versions/1"
    assert [each.sequence for each in seen] == [each.sequence for each in job_events()]
    assert ("upload", len(ROWS), len(ROWS)) in sent and sent[-1] == ("check", len(ROWS), len(ROWS))
    layout = fake.datasets["projects/p/datasets/news-rows"].layout
    assert (layout.encoding, layout.delimiter) == (dataset_pb2.DATASET_ENCODING_CSV, "\t")


async def test_the_asyncio_client_tunes_as_well(rows, big):
    with fake_gateway(cuts=[CHUNK_BYTES]) as fake:
        async with argosy.AsyncClient(fake.address, KEY) as library:
            tuning = await library.tune(rows, base="gemma-3-270m", method="classify", held_out=rows, quote_only=True)
            assert tuning.name == "" and tuning.job.spec.validation_version
            await library.datasets.create("big", "chat")
            assert (await library.datasets.upload("big", big)).total_bytes == big.stat().st_size
            assert [each.sequence async for each in library.jobs.watch("0b7d")] == [each.sequence for each in fake.log]
            assert (await library.jobs.wait("0b7d")).state == Job.STATE_SUCCEEDED
            assert (await library.registry.promote("news/1", "heldout/1")).evaluation.measured_rows == 132
            with pytest.raises(errors.ChecksumMismatch):
                assert [part async for part in library.datasets.read("big/1")] == [b"rows"]


def test_an_upload_that_breaks_goes_on_where_it_stood(big):
    with fake_gateway(cuts=[CHUNK_BYTES, 2 * CHUNK_BYTES, 1]) as fake, client(fake) as library:
        library.datasets.create("big", "chat")
        made = library.datasets.upload("big", big)
        upload = next(iter(fake.uploads.values()))
        assert bytes(upload.data) == big.read_bytes() and made.total_bytes == len(upload.data)
        assert [first for first, _ in fake.writes] == [0, CHUNK_BYTES, 3 * CHUNK_BYTES, 4 * CHUNK_BYTES]
        assert upload.message.writer_epoch == 4


def test_another_process_goes_on_with_an_upload(big):
    with fake_gateway() as fake, client(fake) as library:
        library.datasets.create("big", "chat")
        opened = []
        fake.cuts = [2 * CHUNK_BYTES]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("argosy.datasets.FRUITLESS", 0)
            with pytest.raises(errors.ArgosyError):
                library.datasets.upload("big", big, opened=opened.append)
        fake.cuts.clear()
    with fake_gateway(uploads=fake.uploads, datasets=fake.datasets) as fresh, client(fresh) as library:
        library.datasets.upload("big", big, resume=opened[0])
        assert fresh.writes[0][0] == 2 * CHUNK_BYTES
        assert bytes(fresh.uploads[opened[0]].data) == big.read_bytes()


def test_an_upload_that_is_gone_begins_anew(big):
    with fake_gateway() as fake, client(fake) as library:
        library.datasets.create("big", "chat")
        assert library.datasets.upload("big", big, resume="projects/p/datasets/big/uploads/none").total_bytes
        assert len(fake.uploads) == 1


def test_a_fenced_writer_gives_up(big):
    with fake_gateway() as fake, client(fake) as library:
        library.datasets.create("big", "chat")

        def overtaken(done, total):
            upload = next(iter(fake.uploads.values()))
            upload.message.writer_epoch = 9

        with pytest.raises(errors.UploadFenced):
            library.datasets.upload("big", big, progress=overtaken)
        assert len(fake.writes) == 1


def test_an_upload_that_never_gets_on_says_why(big, monkeypatch):
    monkeypatch.setattr("argosy.datasets.FRUITLESS", 1)
    with fake_gateway(stuck=Draining(0.01)) as fake, client(fake) as library:
        library.datasets.create("big", "chat")
        with pytest.raises(errors.Unavailable) as caught:
            library.datasets.upload("big", big)
        assert caught.value.reason == "DRAINING"


def test_an_empty_file_is_refused_before_a_call(tmp_path):
    (tmp_path / "x.jsonl").touch()
    with fake_gateway() as fake, client(fake) as library:
        with pytest.raises(ValueError, match="empty"):
            library.datasets.upload("big", tmp_path / "x.jsonl")
        assert not fake.uploads


def test_bad_rows_are_an_error_with_their_lines(rows):
    bad = [dataset_pb2.RowError(line=3, byte_offset=27, field="label", rule="V7.empty", severity=dataset_pb2.ROW_SEVERITY_ERROR)]
    with fake_gateway(bad_rows=bad) as fake, client(fake) as library:
        with pytest.raises(errors.DatasetRejected, match=r"line 3 in label: V7.empty") as caught:
            library.tune(rows, base="gemma-3-270m", method="classify")
        assert caught.value.row_errors == tuple(bad) and caught.value.version.report.errors == 1
        assert not any(isinstance(each, finetune_pb2.CreateFineTuneJobRequest) for each in fake.seen)


def test_skipping_bad_rows_is_asked_of_the_fleet(rows):
    with fake_gateway() as fake, client(fake) as library:
        library.tune(rows, base="gemma-3-270m", method="classify", skip_bad_rows=True)
        finals = [each for each in fake.seen if isinstance(each, dataset_pb2.FinalizeUploadRequest)]
        assert [each.on_error for each in finals] == [dataset_pb2.ON_ROW_ERROR_SKIP]


def test_a_dataset_that_exists_is_used_and_reads_new_files_as_they_are(rows):
    with fake_gateway() as fake, client(fake) as library:
        library.datasets.create("news-rows", "classify")
        assert library.datasets.ensure("news-rows", "classify", layout=layout_of(rows)).layout.delimiter == "\t"
        updates = [each for each in fake.seen if isinstance(each, dataset_pb2.UpdateDatasetRequest)]
        assert [list(each.update_mask.paths) for each in updates] == [["layout"]]
        library.datasets.ensure("news-rows", "classify", layout=layout_of(rows))
        assert len([each for each in fake.seen if isinstance(each, dataset_pb2.UpdateDatasetRequest)]) == 1
        with pytest.raises(ValueError, match="another format"):
            library.datasets.ensure("news-rows", "chat")


@pytest.mark.parametrize("cut", [None, SlowConsumer(), Draining(), StreamLost(3)])
def test_a_watch_that_breaks_goes_on_at_its_cursor(cut):
    with fake_gateway(watch_cuts=[(3, cut), (0, cut), (4, cut)]) as fake, client(fake) as library:
        seen = [each.sequence for each in library.jobs.watch("0b7d")]
        assert seen == [each.sequence for each in fake.log]
        assert [at for at in fake.watched_from if at] and fake.watched_from[0] == 0
        assert sorted(fake.watched_from) == fake.watched_from and set(fake.watched_from) == {0, 3, 7}


def test_a_watch_that_hears_nothing_raises_the_last_error(monkeypatch):
    with fake_gateway(watch_cuts=[(0, Draining())] * 50) as fake, client(fake) as library:
        with pytest.raises(errors.Unavailable) as caught:
            list(library.jobs.watch("0b7d", patience_s=0.0))
        assert caught.value.reason == "DRAINING" and fake.watched_from


def test_a_cursor_past_the_end_is_not_asked_again():
    with fake_gateway(watch_cuts=[(0, EventSequenceAhead(15))]) as fake, client(fake) as library:
        with pytest.raises(errors.EventSequenceAhead) as caught:
            list(library.jobs.watch("0b7d", after=3))
        assert caught.value.metadata["last"] == "15" and len(fake.watched_from) == 1


def test_an_event_that_is_newer_than_the_library_does_no_harm():
    log = job_events()
    log.insert(1, finetune_pb2.JobEvent(sequence=1))
    for number, event in enumerate(log, 1):
        event.sequence = number
    with fake_gateway(log=log) as fake, client(fake) as library:
        assert len(list(library.jobs.watch("0b7d"))) == len(log) and len(fake.watched_from) == 1


def test_leaving_a_watch_hangs_up():
    hung_up = threading.Event()
    with fake_gateway(hold_watch=hung_up) as fake, client(fake) as library:
        events = library.jobs.watch("0b7d")
        assert next(events).sequence == 1
        assert not hung_up.is_set()
        events.close()
        assert hung_up.wait(10)


def test_a_job_that_fails_is_an_error():
    failed = Job(name="projects/p/fineTuneJobs/0b7d", state=Job.STATE_FAILED, state_reason=finetune_pb2.JOB_REASON_DATA_INVALID)
    failed.error.message = "A row cannot be learnt from."
    failed.error.metadata.update(rule="V7.one_class", line="12")
    with fake_gateway(job=failed) as fake, client(fake) as library:
        with pytest.raises(errors.JobFailed, match=r"rule V7.one_class, line 12.*DATA_INVALID") as caught:
            library.jobs.wait("0b7d")
        assert caught.value.job.state == Job.STATE_FAILED


def test_moves_of_a_job_name_it_in_full():
    with fake_gateway() as fake, client(fake) as library:
        for move in (library.jobs.cancel, library.jobs.pause, library.jobs.resume, library.jobs.get):
            move("0b7d")
            assert fake.seen[-1].name == "projects/p/fineTuneJobs/0b7d"
        library.jobs.resume("projects/p/fineTuneJobs/x", max_cost=3)
        assert (fake.seen[-1].name, fake.seen[-1].max_cost.nanos) == ("projects/p/fineTuneJobs/x", 3_000_000_000)
        assert [each.step for each in library.jobs.checkpoints("0b7d")] == [8]
        assert [each.name for each in library.jobs.list(filter="state = RUNNING")] == [fake.job.name]
        assert fake.seen[-1].filter == "state = RUNNING"


def test_promotion_needs_evidence():
    with fake_gateway() as fake, client(fake) as library:
        done = library.registry.promote("news/3", "heldout/1", alias="live", percent=10, margin=0.01)
        assert [each.version for each in done.alias.targets] == ["projects/p/models/news/versions/3"]
        move = fake.seen[-1]
        assert (move.name, move.percent, move.force) == ("projects/p/models/news/aliases/live", 10, False)
        assert move.evaluation == "projects/p/models/news/evaluations/e"
        asked = next(each for each in fake.seen if isinstance(each, model_pb2.CreateEvaluationRequest)).evaluation
        assert (asked.alias, asked.margin, asked.dataset_version) == ("live", 0.01, "projects/p/datasets/heldout/versions/1")
        with pytest.raises(ValueError, match="evidence"):
            library.registry.promote("news/3")
        fake.passes = False
        with pytest.raises(errors.EvaluationNotPassed, match="models/a") as caught:
            library.registry.promote("news/3", "heldout/1")
        assert caught.value.evaluation.measured_rows == 132
        assert isinstance(caught.value, errors.GateNotPassed)
        library.registry.promote("news/3", "heldout/1", force=True)
        assert (fake.seen[-1].force, fake.seen[-1].evaluation) == (True, "")
        assert library.registry.rollback("news").targets[0].version.endswith("/4")


def test_an_export_that_breaks_goes_on_and_has_its_name_only_when_whole(tmp_path):
    target = tmp_path / "news.tar"
    with fake_gateway(cuts=[1, 1]) as fake, client(fake) as library:
        assert library.registry.export("news/1", target) == len(fake.archive)
        assert target.read_bytes() == fake.archive and list(tmp_path.iterdir()) == [target]
        offsets = [each.offset for each in fake.seen if isinstance(each, model_pb2.ExportModelVersionRequest)]
        assert offsets == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]


def test_an_adapter_is_imported_file_by_file(tmp_path):
    with fake_gateway() as fake, client(fake) as library:
        with pytest.raises(ValueError, match="adapter_config"):
            library.registry.import_adapter("news", tmp_path, method="classify")
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.safetensors").write_bytes(os.urandom(CHUNK_BYTES + 9))
        (tmp_path / "README.md").write_text("never sent")
        library.registry.import_adapter("news", tmp_path, method="classify", labels=["a", "b"])
        assert fake.imported == {1: b"{}", 2: (tmp_path / "adapter_model.safetensors").read_bytes()}


def test_deleting_tells_a_version_from_the_whole():
    with fake_gateway() as fake, client(fake) as library:
        library.datasets.delete("rows")
        assert fake.seen[-1].name == "projects/p/datasets/rows"
        library.datasets.delete("rows/2", cascade=True)
        assert (fake.seen[-1].name, fake.seen[-1].cascade) == ("projects/p/datasets/rows/versions/2", True)
        library.registry.delete("news")
        assert fake.seen[-1].name == "projects/p/models/news"
        assert library.registry.delete("projects/p/models/news/versions/3").target == "projects/p/models/news/versions/3"


def test_explain_asks_for_what_was_said():
    with fake_gateway() as fake, client(fake) as library:
        told = library.explain("new chip", "technology", cheap=True, unit="token")
        assert [each.span.text for each in told.attributions] == ["new", "chip"]
        assert (fake.seen[-1].classify.label, fake.seen[-1].method, fake.seen[-1].unit) == ("technology", 2, 2)
        library.explain("Once upon", continuation=" a time", labels=())
        assert fake.seen[-1].generation.continuation == " a time" and not fake.seen[-1].HasField("classify")
        for wrong in ({"unit": "page"}, {"continuation": "x", "label": "y"}):
            with pytest.raises(ValueError):
                library.explain("x", **wrong)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (UnsupportedFormat("V1", 1, 0), errors.UnsupportedFormat),
        (ArtifactRejected("A16.key", 0, 0), errors.ArtifactRejected),
        (HasDependants(), errors.HasDependants),
        (PrivacyBudgetExceeded(), errors.PrivacyBudgetExceeded),
        (UploadFenced(), errors.UploadFenced),
        (ResourceNotFound("name"), errors.NotFound),
    ],
)
def test_reasons_are_types(refusal, kind):
    with fake_gateway() as fake, client(fake) as library:
        library.project()
        fake.refusals.append(refusal)
        with pytest.raises(kind) as caught:
            library.datasets.get("rows")
        assert type(caught.value) is kind and caught.value.reason == refusal.reason


def test_names_are_completed():
    assert names.base("a") == names.base("models/a") == "models/a"
    assert names.own("projects/p", "models", "news") == names.own("projects/p", "models", "models/news") == "projects/p/models/news"
    for spelled in ("news/3", "news/versions/3", "projects/p/models/news/versions/3", "projects/p/models/news/3"):
        assert names.version("projects/p", "models", spelled) == "projects/p/models/news/versions/3"
    for wrong in ("news", "projects/p/models/news", "projects/p/models/7"):
        with pytest.raises(ValueError, match="names no version"):
            names.version("projects/p", "models", wrong)


def test_layouts_follow_the_suffix_and_check_the_columns(tmp_path, rows):
    assert layout_of(tmp_path / "x.jsonl").encoding == dataset_pb2.DATASET_ENCODING_JSONL
    with pytest.raises(ValueError, match="no column 'body' but label, text"):
        layout_of(rows, text_columns=["body"])
    bare = tmp_path / "bare.csv"
    bare.write_text('"a, b",c\n')
    layout = layout_of(bare, text_columns=["1"], label_column="2", header=False)
    assert layout.HasField("header") and not layout.header and list(layout.text_columns) == ["1"]
    assert layout_of(rows, delimiter="tab").delimiter == "\t"


def test_specs_leave_unset_what_is_left_out():
    spec = specs.spec("a", "d/1", "chat", epochs=1, patience=2, epsilon=8)
    assert spec.hyperparameters.HasField("epochs") and not spec.hyperparameters.HasField("batch_size")
    assert spec.HasField("lora") and not spec.lora.HasField("rank")
    assert (spec.early_stopping.patience, spec.privacy.epsilon) == (2, 8)
    assert specs.spec("a", "d/1", "chat", full=True).WhichOneof("adapter") == "full"
    for wrong in ({"full": True, "rank": 8}, {"delta": 1e-5}):
        with pytest.raises(ValueError):
            specs.spec("a", "d/1", "chat", **wrong)
    with pytest.raises(ValueError, match="classify, chat, preference"):
        specs.spec("a", "d/1", "guess")
    assert specs.cost("0.25 eur").currency_code == "EUR" and specs.cost(1).nanos == 10**9
    for wrong in ("a lot", -1, "nan", "inf"):
        with pytest.raises(ValueError, match="no amount"):
            specs.cost(wrong)


def test_a_file_is_hashed_once_whatever_is_read_again(big):
    import hashlib

    file = HashedFile(big)
    whole = b"".join(file.read(offset) for offset in range(0, file.total_bytes, CHUNK_BYTES))
    assert file.read(CHUNK_BYTES) == whole[CHUNK_BYTES : 2 * CHUNK_BYTES]
    assert file.sha256() == hashlib.sha256(big.read_bytes()).hexdigest()
    late = HashedFile(big)
    assert late.read(3 * CHUNK_BYTES) == whole[3 * CHUNK_BYTES : 4 * CHUNK_BYTES]
    assert late.sha256() == file.sha256()
    file.close()
    late.close()
