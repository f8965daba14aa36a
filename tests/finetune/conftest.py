"""The tiny base of this folder's tests: made once, since transformers takes seconds to load."""

from pathlib import Path
from typing import Any

import pytest

from tests.finetune.trainer import world


@pytest.fixture(scope="session")
def base(tmp_path_factory: Any) -> Path:
    return world.base(tmp_path_factory.mktemp("base"))
