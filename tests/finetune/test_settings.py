from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import services.finetune
from services.finetune.settings import DatasetSettings, FineTuneSettings, JobQuotas, JobSettings

SOURCES = [file for file in Path(services.finetune.__path__[0]).rglob("*.py") if file.name != "settings.py"]


@pytest.mark.parametrize("kind", [FineTuneSettings, JobSettings, JobQuotas, DatasetSettings])
def test_every_setting_is_read_by_something(kind: Any) -> None:
    code = "\n".join(file.read_text() for file in SOURCES)
    assert [field.name for field in fields(kind) if f".{field.name}" not in code] == []
