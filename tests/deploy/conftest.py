"""The tiers: what a machine cannot run is skipped with a line that says so, or fails where `ARGOSY_REQUIRE_TIERS` names the tier."""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from tests.deploy.reach import Reach
from tools.cluster.cluster import ROOT
from tools.cluster.node import lacking
from tools.cluster.packages import ToolMissing
from tools.cluster.toolbox import Toolbox

if TYPE_CHECKING:
    from tests.deploy.node.installed import Installed

HERE = Path(__file__).parent
TIERS = {"render": 0, "control_plane": 1, "node": 2, "faults": 3}
NEEDS: dict[int, Callable[[Toolbox], Any]] = {  # in a rising order: a tier needs what is below it too
    0: lambda tools: tools.clients,
    1: lambda tools: tools.control_plane,
    2: lambda tools: tools.node,
}
SETUP_SECONDS = {1: 300, 2: 900, 3: 900}  # of a test's time limit: the first of a session also starts the cluster, and loads its images
_toolbox = Toolbox()
_missing: dict[int, str] = {}
_skipped: Counter[int] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    for tier in range(4):
        config.addinivalue_line("markers", f"tier{tier}: needs what tier {tier} of docs/adr/0016-cluster-harness.md needs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (tier := _tier(item)) is not None:
            item.add_marker(f"tier{tier}")
            if tier and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(SETUP_SECONDS[tier]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch and build before the first test: it may take ten minutes, and no test's time limit should pay for it."""
    wanted = max((tier for item in session.items if (tier := _tier(item)) is not None), default=-1)
    if wanted < 0 or session.config.option.collectonly:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        for tier, need in NEEDS.items():
            reason = "" if tier > wanted else _lacks(tier, need)
            for above in range(tier, 4) if reason else ():
                _missing.setdefault(above, reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    tier = _tier(item)
    if tier is not None and tier in _missing:
        _unavailable(tier, _missing[tier])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for tier, count in sorted(_skipped.items()):
        terminalreporter.write_line(f"TIER {tier} DID NOT RUN: {count} tests skipped: {_missing[tier]}", red=True, bold=True)


def _tier(item: pytest.Item) -> int | None:
    return TIERS.get(item.path.relative_to(HERE).parts[0]) if item.path.is_relative_to(HERE) else None


def _lacks(tier: int, need: Callable[[Toolbox], Any]) -> str:
    """Why this machine cannot run the tier; empty where it can."""
    if tier == 1 and _existing():
        return ""
    if tier == 1 and sys.platform != "linux":
        return "Kubernetes' own programs run on Linux"
    if tier == 2 and (reason := lacking()):
        return reason
    try:
        need(_toolbox)
    except ToolMissing as error:
        return str(error)
    return ""


def _unavailable(tier: int, reason: str) -> NoReturn:
    if str(tier) in os.environ.get("ARGOSY_REQUIRE_TIERS", "").split(","):
        pytest.fail(f"tier {tier} is required and cannot run: {reason}", pytrace=False)
    _skipped[tier] += 1
    pytest.skip(f"tier {tier} cannot run here: {reason}")


def _existing() -> Path | None:
    """A cluster that somebody lends to the tests by saying so twice, so that it is never production by accident."""
    if os.environ.get("ARGOSY_TEST_CLUSTER") != "existing":
        return None
    return Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")


def _lent(tier: int, toolbox: Toolbox) -> Reach | None:
    """The lent cluster, unless it is one of the harness's own of another tier."""
    config = _existing()
    reach = Reach(config, toolbox, existing=True) if config else None
    return reach if reach and reach.tier in (None, tier) else None


@contextmanager
def _started(tier: int, toolbox: Toolbox) -> Iterator[Reach]:
    """A cluster of this session's own; a second process takes it down, so that a killed session leaves nothing either."""
    above = Path(tempfile.mkdtemp(prefix=f"argosy-tier{tier}-"))
    above.chmod(0o711)  # the database's account passes through
    command, folder = [sys.executable, "-m", "tools.cluster"], above / "cluster"
    closes = [*command, "down", "--folder", folder, "--when-stdin-closes"]
    with subprocess.Popen(closes, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True):
        up = [*command, "up", f"--tier={tier}", "--folder", folder]
        done = subprocess.run(up, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        if done.returncode:
            pytest.fail(f"tier {tier} did not come up: {done.stderr}", pytrace=False)
        yield Reach(folder / "kubeconfig", toolbox, existing=False)
    shutil.rmtree(above, ignore_errors=True)


@pytest.fixture(scope="session")
def toolbox() -> Toolbox:
    """Where helm, kubectl and the rest are."""
    return _toolbox


@pytest.fixture(scope="session")
def control_plane(toolbox: Toolbox) -> Iterator[Reach]:
    """Tier 1: a real control plane with fake nodes, or the cluster that was lent."""
    if reach := _lent(1, toolbox):
        yield reach
        return
    with _started(1, toolbox) as reach:
        yield reach


@pytest.fixture(scope="session")
def node(toolbox: Toolbox) -> Iterator[Reach]:
    """Tier 2: one real node with two fake GPUs, a PostgreSQL and a folder that pods share; it has only the images that a test loads."""
    if (reach := _lent(2, toolbox)) and reach.tier == 2:
        yield reach
        return
    with _started(2, toolbox) as reach:
        yield reach


@pytest.fixture(scope="session")
def installed(node: Reach) -> "Iterator[Installed]":
    """The platform, two replicas of a tiny model, and a way in: installed once for all tests of tiers 2 and 3 that use it."""
    from tests.deploy.node.installed import install  # makes a model: rendering charts needs no torch

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="argosy-installed-"))
        yield install(node, Path(folder), f"argosy-{uuid.uuid4().hex[:6]}", stack)
