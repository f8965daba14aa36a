"""Argosy on the real node, installed once for the tests of this folder that use it."""

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.node.installed import Installed, install
from tests.deploy.reach import Reach


@pytest.fixture(scope="session")
def installed(node: Reach) -> Iterator[Installed]:
    """The platform, two replicas of a tiny model, and a way in."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="argosy-installed-"))
        yield install(node, Path(folder), f"argosy-{uuid.uuid4().hex[:6]}", stack)
