"""Two fleets for all stories: three replicas of a tiny model, and one replica of the weights that everybody gets. Each starts once."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet import model
from tests.fleet.running import Fleet, Tenant, running

TINY = {
    "ARGOSY_MODEL_NAME": "tiny",
    "ARGOSY_DTYPE": "float32",
    "ARGOSY_BACKEND": "eager",
    "ARGOSY_KV_TOKENS": "32768",
    "ARGOSY_THREADS": "1",
}


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Not pytest's own: it takes the search bit from its folders, and the database's account then cannot reach its files."""
    made = Path(tempfile.mkdtemp(prefix="argosy-fleet-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(folder: Path) -> Path:
    """The directory of the tiny model."""
    return model.save(folder / "tiny-model")


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path) -> dict[str, str]:
    """The variables of a fleet that serves it."""
    return TINY | {"ARGOSY_MODEL": str(tiny_model)}


@pytest.fixture(scope="session")
def tiny(folder: Path, tiny_settings: dict[str, str]) -> Iterator[Fleet]:
    """Three replicas, each with an engine process, behind one gateway."""
    with running(folder / "tiny", "models/tiny", ARGOSY_REPLICAS="3", **tiny_settings) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def real(folder: Path) -> Iterator[Fleet]:
    """One replica of the default weights, converted once into the user's cache."""
    with running(folder / "real", "models/gemma-3-270m") as fleet:
        yield fleet


@pytest.fixture
def tenant(tiny: Fleet) -> Tenant:
    """A project of the test's own on the tiny fleet."""
    return tiny.tenant()
