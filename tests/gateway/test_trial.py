"""The operator's two commands: the first API key, and a real call with a key that ends by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.gateway import keys
from services.gateway.server import gateway
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings
from services.gateway.store import StoreSettings
from services.gateway.trial import TrialFailed, trial
from tests.fakes.engine import fake_engine

PEPPER = "5a" * 32


def command(url: str, *words: str) -> "subprocess.CompletedProcess[str]":
    environ = os.environ | {"ARGOSY_DATABASE_URL": url, "ARGOSY_KEY_PEPPER": PEPPER}
    return subprocess.run(
        [sys.executable, "-m", "services.gateway", *words], env=environ, capture_output=True, text=True, timeout=60, check=False
    )


async def test_a_trial_is_a_real_call(postgres_url: str, tmp_path: Path) -> None:
    store = StoreSettings(database_url=postgres_url)
    async with fake_engine(says=["a", "bay"]) as engine:
        settings = GatewaySettings(inference_addresses=(engine.address,), key_pepper=PEPPER)
        async with gateway(settings, store=store, books=LedgerSettings(journal_dir=tmp_path), wait=True) as gate:
            assert gate.store is not None
            await gate.replicas.until(1)
            seen = await trial(gate.store, gate.address, None)
            assert seen.model.startswith("models/")
            assert seen.text
            assert seen.output_tokens > 0
            with pytest.raises(TrialFailed, match="NOT_FOUND"):
                await trial(gate.store, gate.address, None, "models/none")


async def test_a_trial_of_a_fleet_without_models_says_so(postgres_url: str, tmp_path: Path) -> None:
    store, books = StoreSettings(database_url=postgres_url), LedgerSettings(journal_dir=tmp_path)
    async with gateway(GatewaySettings(key_pepper=PEPPER), store=store, books=books, wait=True) as gate:
        assert gate.store is not None
        with pytest.raises(TrialFailed, match="serves no model yet"):
            await trial(gate.store, gate.address, None)


def test_the_first_key_is_printed_once(postgres_url: str) -> None:
    first = command(postgres_url, "bootstrap")
    assert first.returncode == 0, first.stderr
    assert keys.parse(first.stdout.strip()) is not None
    again = command(postgres_url, "bootstrap")
    assert (again.returncode, again.stdout) == (3, "")
    assert "bootstrap --another" in again.stderr
    another = command(postgres_url, "bootstrap", "--another")
    assert keys.parse(another.stdout.strip()) is not None
    assert another.stdout != first.stdout


def test_a_trial_of_nobody_says_so(postgres_url: str) -> None:
    refused = command(postgres_url, "trial", "gateway.example:8443")
    assert refused.returncode == 1
    assert "plaintext" in refused.stderr
    assert "Traceback" not in refused.stderr
