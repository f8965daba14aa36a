"""The launchers' one suite (tests/protocols/launcher_contract.py) with a real API server, Job controller and scheduler."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.control_plane.grounds import ground as ground_of
from tests.deploy.reach import Reach
from tests.protocols.clusters import Cluster
from tests.protocols.launcher_contract import LauncherContract


class TestControlPlane(LauncherContract):
    @pytest.fixture
    def ground(self, control_plane: Reach, tmp_path: Path) -> Iterator[Cluster]:
        with ground_of(control_plane, tmp_path) as (ground, _):
            yield ground
