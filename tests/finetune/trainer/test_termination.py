"""What a trainer leaves for whoever runs its container: a word, never a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.finetune.trainer import __main__ as process


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "termination-log"
    file.touch()
    given = {
        "TRAINING_ADDRESS": "127.0.0.1:1", "JOB": "j", "ATTEMPT": "1", "TOKEN_FILE": str(tmp_path / "token"), "STORE_URL": "memory://",
        "BASE_DIRECTORY": str(tmp_path), "TERMINATION_FILE": str(file),
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(f"ARGOSY_{name}", value)
    monkeypatch.setattr(process, "configure_logs", lambda level: None)
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    return file


@pytest.mark.parametrize(("code", "reason"), [(0, "DONE"), (65, "INPUT"), (75, "LOST"), (143, "TERMINATED"), (9, "OTHER")])
def test_the_exit_code_is_left_with_a_word(file: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    monkeypatch.setattr(process, "train", lambda own, stop: code)
    assert process.main() == code
    assert json.loads(file.read_text()) == {"code": code, "reason": reason}


def test_a_crash_leaves_its_kind_and_not_what_it_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(own: Any, stop: Any) -> int:
        raise ValueError("a row of somebody's")

    monkeypatch.setattr(process, "train", train)
    with pytest.raises(ValueError):
        process.main()
    assert json.loads(file.read_text()) == {"code": 1, "reason": "ValueError"}


def test_where_there_is_no_such_file_none_is_made(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "train", lambda own, stop: 0)
    file.unlink()
    assert process.main() == 0
    assert not file.exists()
