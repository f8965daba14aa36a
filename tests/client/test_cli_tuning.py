"""Tuning from a terminal: what is shown, what is printed for scripts, and the exit codes."""

import json
import struct
import zlib
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from argosy import cli
from argosy.cli.live import Story, curve, duration, money
from argosy.pictures import PANEL, WIDTH, braille, draw
from argosy.v1 import dataset_pb2, finetune_pb2, usage_pb2
from services.chassis.errors import Draining, FieldOutOfRange
from tests.fakes.gateway import KEY, fake_gateway
from tests.fakes.tuning import Job, job_events

GOLDEN = Path(__file__).parent / "golden"
ROWS = "label\ttext\ntechnology\tA chip\nsports\tA goal\n"
runner = CliRunner()


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cli.session.out, "_width", 110)
    monkeypatch.setattr(cli.session.err, "_width", 110)
    for name in ("ARGOSY_ADDRESS", "ARGOSY_API_KEY", "ARGOSY_DEFAULT_MODEL", "ARGOSY_CA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "news.tsv"
    path.write_text(ROWS)
    return path


def run(fake, *arguments):
    return runner.invoke(cli.app, ["--address", fake.address, "--api-key", KEY, *map(str, arguments)])


def tune(fake, rows, *more):
    return run(fake, "tune", rows, "--base", "gemma-3-270m", "--method", "classify", *more)


def lines(text):
    return [line.rstrip() for line in text.splitlines()]


def test_tune_shows_report_quote_log_version_and_time(rows):
    with fake_gateway() as fake:
        result = tune(fake, rows)
        assert result.exit_code == 0, result.output
        assert lines(result.stdout) == lines((GOLDEN / "tune.txt").read_text())


def test_tune_for_scripts_is_json_lines(rows):
    with fake_gateway() as fake:
        result = tune(fake, rows, "--json")
        assert result.exit_code == 0 and result.stderr == ""
        said = [json.loads(line) for line in result.stdout.splitlines()]
        kinds = [next(iter(each)) for each in said]
        assert kinds == ["dataset_version", "job", *["event"] * len(fake.log), "model_version"]
        assert said[1]["job"]["quote"]["steps"] == {"low": 8.0, "high": 8.0}


def test_options_reach_the_job(rows, tmp_path):
    held = tmp_path / "held.csv"
    held.write_text("label,text\nsports,Another goal\n")
    options = ("--held-out", held, "--model", "desk", "--rank", 4, "--epochs", 2, "--max-cost", "1.5", "--seed", 9, "--no-wait", "--dora")
    with fake_gateway() as fake:
        assert tune(fake, rows, *options).exit_code == 0
        job = next(each for each in fake.seen if isinstance(each, finetune_pb2.CreateFineTuneJobRequest)).fine_tune_job
        assert (job.model, job.spec.lora.rank, job.spec.lora.dora, job.spec.seed) == ("projects/p/models/desk", 4, True, 9)
        assert (job.spec.hyperparameters.epochs, job.max_cost.nanos) == (2, 1_500_000_000)
        assert job.spec.validation_version == "projects/p/datasets/held/versions/2"
        assert not fake.watched_from


def test_a_quote_trains_nothing(rows):
    with fake_gateway() as fake:
        result = tune(fake, rows, "--quote")
        asked = [each for each in fake.seen if isinstance(each, finetune_pb2.CreateFineTuneJobRequest)]
        assert [each.validate_only for each in asked] == [True] and result.exit_code == 0
        assert "0.000360 USD" in result.stdout and "2.00 GiB" in result.stdout and not fake.watched_from


def test_bad_rows_are_shown_by_line_offset_field_and_rule(rows):
    bad = [
        dataset_pb2.RowError(line=3, byte_offset=27, field="label", rule="V7.empty", severity=dataset_pb2.ROW_SEVERITY_ERROR),
        dataset_pb2.RowError(line=1_204, byte_offset=98_765, rule="V4.json", severity=dataset_pb2.ROW_SEVERITY_ERROR),
    ]
    with fake_gateway(bad_rows=bad) as fake:
        result = tune(fake, rows)
        assert result.exit_code == 2
        assert lines(result.stdout) == lines((GOLDEN / "rejected.txt").read_text())
        assert "first line 3 in label: V7.empty" in " ".join(result.stderr.split())


def test_a_wrong_option_is_told_before_a_byte_is_sent(rows):
    with fake_gateway() as fake:
        for wrong in (("--full", "--rank", 8), ("--max-cost", "lots"), ("--text-column", "body")):
            assert tune(fake, rows, *wrong).exit_code == 2
        assert run(fake, "tune", rows, "--base", "a", "--method", "guess").exit_code == 2
        assert not fake.uploads
        fake.refusals.append(FieldOutOfRange("dataset", asked=1, limit="2", unit=""))
        assert tune(fake, rows).exit_code == 2


def test_the_next_run_goes_on_with_an_upload_that_broke_off(rows, monkeypatch):
    monkeypatch.setattr("argosy.datasets.FRUITLESS", 0)
    with fake_gateway(stuck=Draining(0.01)) as fake:
        assert tune(fake, rows).exit_code == 5
        fake.stuck = None
        assert tune(fake, rows, "--no-wait").exit_code == 0
        assert len(fake.uploads) == 1 and next(iter(fake.uploads.values())).message.writer_epoch == 2
        assert json.loads(cli.tune.uploads_file().read_text()) == {}


def test_a_job_that_fails_has_its_own_exit_code(rows):
    failed = Job(name="projects/p/fineTuneJobs/0b7d", state=Job.STATE_FAILED, state_reason=finetune_pb2.JOB_REASON_OUT_OF_MEMORY)
    log = job_events()[:3]
    with fake_gateway(job=failed, log=log) as fake:
        result = tune(fake, rows)
        assert result.exit_code == 8 and "OUT_OF_MEMORY" in result.stderr


def test_a_cost_limit_ends_the_view_and_says_how_to_go_on(rows):
    paused = Job(name="projects/p/fineTuneJobs/0b7d", state=Job.STATE_PAUSED, max_cost=usage_pb2.Cost(currency_code="USD", nanos=10**9))
    log = job_events()[:4]
    log.append(finetune_pb2.JobEvent(sequence=5, state=finetune_pb2.StateChanged(state=Job.STATE_PAUSED, reason=2)))
    with fake_gateway(job=paused, log=log) as fake:
        result = run(fake, "jobs", "watch", "0b7d")
        assert result.exit_code == 8
        assert "cost limit of 1.00 USD: argosy jobs resume 0b7d --max-cost" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("jobs",), "SUCCEEDED"),
        (("jobs", "list", "--filter", "state = RUNNING"), "0b7d"),
        (("jobs", "show", "0b7d"), "projects/p/models/news/versions/1"),
        (("jobs", "events", "0b7d", "--after", "12"), "servable on 3"),
        (("jobs", "checkpoints", "0b7d"), "45,800,000"),
        (("jobs", "cancel", "0b7d"), "SUCCEEDED"),
        (("jobs", "pause", "0b7d"), "SUCCEEDED"),
        (("jobs", "resume", "0b7d", "--max-cost", "2"), "SUCCEEDED"),
        (("jobs", "delete", "0b7d"), "erasure running"),
        (("models",), "models/a"),
        (("models", "list"), "32,768"),
        (("models", "show", "news"), "→ news/1"),
        (("models", "show", "news/1"), "calibration error 0.081 before, 0.019 after"),
        (("models", "versions", "news"), "accuracy 0.96"),
        (("models", "promote", "news/1", "--held-out", "held/1"), "mcnemar_exact"),
        (("models", "promote", "news/1", "--force"), "aliases/prod → news/1"),
        (("models", "rollback", "news"), "→ news/4"),
        (("models", "delete", "news/1", "--cascade"), "with it more"),
        (("datasets",), "dataset"),
        (("datasets", "show", "rows"), "sha256"),
        (("datasets", "errors", "rows/1"), "nothing was found"),
        (("datasets", "redact", "rows/1"), "versions/9"),
        (("datasets", "delete", "rows"), "projects/p/deletions/d"),
        (("explain", "new chip"), "+0.500"),
        (("nearest", "new chip", "-k", "2"), "+0.900"),
        (("plot", "0b7d"), "loss"),
        (("plot", "0b7d", "--metric", "validation_accuracy"), "validation_accuracy"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_commands_show_and_print_json(arguments, shown):
    with fake_gateway() as fake:
        result = run(fake, *arguments)
        assert result.exit_code == 0, result.output
        assert shown in result.stdout
        machine = run(fake, *arguments, "--json")
        assert machine.exit_code == 0, machine.output
        assert [json.loads(line) for line in machine.stdout.splitlines()] or arguments[0] == "datasets"


def test_the_nearest_rows_are_shown_in_order_and_the_text_goes_whole():
    with fake_gateway() as fake:
        result = run(fake, "-m", "news/2", "nearest", "new chip", "--top", "2", "--json")
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(each["dataset_version"], each.get("row", "0")) for each in rows] == [
            ("projects/p/datasets/rows/versions/1", "1"), ("projects/p/datasets/rows/versions/1", "0"),
        ]  # fmt: skip
        asked = fake.seen[-1]
        assert (asked.text, asked.top_k, asked.model) == ("new chip", 2, "models/news/versions/2")
        run(fake, "nearest", "new chip")
        assert not fake.seen[-1].HasField("top_k"), "the service chooses"


def test_a_candidate_that_is_not_better_is_exit_code_8():
    with fake_gateway(passes=False) as fake:
        result = run(fake, "models", "promote", "news/1", "--held-out", "held/1")
        assert result.exit_code == 8 and "✗" in result.stdout and "GATE_NOT_PASSED" in result.stderr
        assert run(fake, "models", "promote", "news/1").exit_code == 2


def test_files_in_and_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    with fake_gateway() as fake:
        assert run(fake, "models", "import", "news", tmp_path, "--method", "classify", "--base", "a", "-l", "x").exit_code == 0
        assert fake.imported[2] == b"weights"
        result = run(fake, "models", "export", "news/1", "--to", tmp_path / "news.tar")
        assert (tmp_path / "news.tar").read_bytes() == fake.archive and f"{len(fake.archive):,}" in result.stdout


def test_a_tuned_model_is_asked_by_its_bare_name():
    with fake_gateway(models=["models/a", "models/news", "projects/p/models/news"]) as fake:
        assert run(fake, "-m", "news", "classify", "A chip").exit_code == 0
        assert fake.seen[-1].model == "projects/p/models/news" and not fake.seen[-1].HasField("zero_shot")
        run(fake, "-m", "news/2", "classify", "A chip")
        assert fake.seen[-1].model == "projects/p/models/news/versions/2"
        run(fake, "-m", "a", "classify", "A chip", "-l", "x", "-l", "y")
        assert fake.seen[-1].model == "models/a"
        run(fake, "classify", "--json", "A chip")
        assert fake.seen[-1].model == "models/a"


def test_json_after_two_dashes_is_text():
    with fake_gateway() as fake:
        assert run(fake, "generate", "--", "--json").stdout == "To sea.\n"
        assert fake.seen[-1].prompt == "--json"


def test_a_picture_is_a_png(tmp_path):
    with fake_gateway() as fake:
        assert run(fake, "plot", "0b7d", "--png", tmp_path / "x.png").exit_code == 0
        assert run(fake, "plot", "0b7d", "--metric", "nonsense").exit_code == 2
    raw = (tmp_path / "x.png").read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", raw[16:24])
    assert (width, height) == (WIDTH, 2 * PANEL)  # loss and validation_accuracy
    at, body = 8, b""
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at : at + 8])
        data = raw[at + 8 : at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + data)
        body += data if kind == b"IDAT" else b""
        at += 12 + size
    pixels = zlib.decompress(body)
    assert len(pixels) == height * (1 + 3 * width)
    assert len(set(pixels)) > 8  # not blank


def test_curves_fall_where_the_numbers_fall():
    with pytest.raises(ValueError, match="nothing to plot"):
        draw({"loss": []})
    with pytest.raises(ValueError, match="nothing to plot"):
        braille([])
    drawn = braille([(0, 1.0), (100, 0.0)], width=8, height=4)
    assert drawn[0].startswith("     1 ┤⠑") and drawn[3].rstrip().endswith("⢄") and drawn[-1].split() == ["0", "100"]
    assert all("\u2800" <= letter <= "\u28ff" for line in drawn[:4] for letter in line.partition("┤")[2])
    assert draw({"loss": [(1, 2.0)]}).startswith(b"\x89PNG")
    assert curve([(step, -step) for step in range(8)]) == "█▇▆▅▄▃▂▁"
    assert len(curve([(step, step) for step in range(1_000)])) <= 48
    assert curve([(1, 3.0)]) == "▁" and curve([]) == ""


def test_a_live_view_adds_up():
    story = Story(name="0b7d")
    for event in job_events():
        story.take(event)
    assert story.headline == "SUCCEEDED" and story.step == 8 and story.servable.replicas == 3
    assert [value for _, value in story.series["loss"]] == [1.0, 0.5, 2 / 6, 0.25]
    console = Console(width=100, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(story)
    shown = console.export_text()
    console.file.close()
    for part in ("8/8 steps", "1,234 tokens/s", "loss", "0.25", "validation_accuracy", "V9.too_long", "0.000420 USD for 21.0 s"):
        assert part in shown


def test_numbers_read_well():
    assert (duration(4.23), duration(185), duration(3_725)) == ("4.2 s", "3 min 05 s", "1 h 02 min")
    assert money(usage_pb2.Cost(currency_code="EUR", nanos=2_500_000_000)) == "2.50 EUR"
