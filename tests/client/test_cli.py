"""The command line as a user and as a script sees it."""

import json
import stat

import pytest
from typer.testing import CliRunner

from argosy import cli
from argosy.v1 import stream_pb2
from services.chassis.errors import DeadlineExceeded, FieldOutOfRange, Internal, QuotaExceeded, ResourceNotFound, ScopeMissing
from tests.fakes.gateway import KEY, fake_gateway

runner = CliRunner()


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("ARGOSY_ADDRESS", "ARGOSY_API_KEY", "ARGOSY_DEFAULT_MODEL", "ARGOSY_CA"):
        monkeypatch.delenv(name, raising=False)


def run(fake, *arguments, **more):
    return runner.invoke(cli.app, ["--address", fake.address, "--api-key", KEY, *arguments], **more)


def test_generate_streams_text_and_says_what_it_cost():
    with fake_gateway() as fake:
        result = run(fake, "generate", "Where to?")
        assert result.exit_code == 0
        assert result.stdout == "To sea.\n"
        assert "3 tokens in" in result.stderr and "3 out" in result.stderr
        assert fake.seen[-1].model == "models/a"  # the first one served


def test_json_is_one_event_a_line():
    with fake_gateway() as fake:
        lines = run(fake, "--json", "-m", "models/b", "generate", "-", input="Where to?").stdout.splitlines()
        kinds = [next(iter(json.loads(line).keys() - {"sequence"})) for line in lines]
        assert kinds == ["started", "text", "text", "text", "output_finished", "completed"]
        assert (fake.seen[-1].prompt, fake.seen[-1].model) == ("Where to?", "models/b")


def test_chat_keeps_the_history():
    with fake_gateway() as fake:
        result = run(fake, "chat", "--system", "Be brief.", input="One?\nTwo?\n")
        assert result.exit_code == 0
        assert [part.text for message in fake.seen[-1].messages for part in message.parts] == ["Be brief.", "One?", "To sea.", "Two?"]


def test_classify_and_sentiment():
    with fake_gateway() as fake:
        result = run(fake, "classify", "芯片", "-l", "科技", "-l", "体育")
        assert "科技" in result.stdout and "0.500" in result.stdout
        seen = json.loads(run(fake, "--json", "sentiment", "Fine.").stdout)
        assert [each["label"] for each in seen["results"][0]["labels"]] == ["positive", "neutral", "negative"]


def test_summarize_translate_answer_embed():
    with fake_gateway() as fake:
        assert run(fake, "summarize", "Long.", "--min-length", "2", "--max-length", "9").stdout == "To sea.\n"
        assert (fake.seen[-1].min_length, fake.seen[-1].max_length) == (2, 9)
        assert run(fake, "translate", "Hello", "--to", "fr", "--from", "en").stdout == "To sea.\n"
        assert fake.seen[-1].target_language == "fr"
        answered = run(fake, "answer", "Who?", "-p", "Anna sailed.")
        assert "Anna" in answered.stdout and "0-4" in answered.stdout and "0.250" in answered.stdout
        assert "1.000" in run(fake, "embed", "a", "b").stdout


def test_login_checks_and_keeps_the_key_for_its_owner_only():
    with fake_gateway() as fake:
        refused = runner.invoke(cli.app, ["login", "--address", fake.address, "--api-key", "wrong"])
        assert refused.exit_code == 3 and not cli.login_file().exists()
        assert runner.invoke(cli.app, ["login", "--address", fake.address, "--api-key", KEY]).exit_code == 0
        assert stat.S_IMODE(cli.login_file().stat().st_mode) == 0o600
        assert "models/c" in runner.invoke(cli.app, ["models"]).stdout


def test_keys_and_usage():
    with fake_gateway() as fake:
        assert run(fake, "keys", "create", "--days", "2").stdout == "s3\n"
        assert fake.seen[-1].api_key.HasField("expire_time")
        assert "projects/p/apiKeys/k" in run(fake, "keys", "list").stdout
        assert run(fake, "keys", "delete", "projects/p/apiKeys/k").exit_code == 0
        assert "56,789" in run(fake, "usage").stdout


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (FieldOutOfRange("config.sampling.temperature", asked=9, limit="0..2", unit=""), 2),
        (ScopeMissing("generate"), 3),
        (ResourceNotFound("model"), 4),
        (QuotaExceeded("tokens"), 6),
        (DeadlineExceeded(), 7),
        (Internal(), 1),
    ],
)
def test_exit_codes(refusal, code):
    with fake_gateway(refusals=[refusal]) as fake:
        result = run(fake, "--json", "-m", "models/a", "generate", "x")
        assert result.exit_code == code
        assert json.loads(result.stderr)["error"]["reason"] == refusal.reason


def test_a_fleet_that_is_not_there_is_one_sentence():
    result = runner.invoke(cli.app, ["--address", "127.0.0.1:1", "--api-key", KEY, "models"])
    assert result.exit_code == 5
    assert "No fleet answers at 127.0.0.1:1" in " ".join(result.stderr.split())


def test_a_stream_that_breaks_is_not_success():
    said = fake_gateway(breaks=(2, None))
    with said as fake:
        assert run(fake, "-m", "models/a", "generate", "x").exit_code == 5
        assert fake.script[-1].completed != stream_pb2.Completed()
