"""What the harness is made of, without a cluster: the cache, the name server, and what a machine without tools is told."""

import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.cluster import cache
from tools.cluster.cluster import ROOT
from tools.cluster.names import Names, reply

ONE_TEST = "tests/deploy/control_plane/test_harness.py::test_pools_have_the_gpus_they_say"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARGOSY_CLUSTER_CACHE", str(tmp_path))
    return tmp_path


def test_two_makers_make_one_part(store: Path) -> None:
    made, together = [], threading.Barrier(4)

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "program").write_text("x")

    def want() -> None:
        together.wait(10)
        assert (cache.kept("part", [b"v1"], make) / "program").read_text() == "x"

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    assert cache.kept("part", [b"v2"], make) != cache.kept("part", [b"v1"], make), "another version is another folder"


def test_a_failed_maker_leaves_nothing_that_counts(store: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.kept("part", [b"v1"], dies)
    kept = cache.kept("part", [b"v1"], lambda folder: (folder / "whole").touch())
    assert [path.name for path in kept.iterdir()] == ["whole"]
    assert not [path for path in store.iterdir() if ".new-" in path.name]


class Known:
    """Two names: one with a cluster address, one headless with two endpoints."""

    def addresses(self, name: str) -> list[str] | None:
        return {"web.ns.svc.cluster.local": ["10.96.0.7"], "model.ns.svc.cluster.local": ["10.244.0.2", "10.244.0.3"]}.get(name)


def question(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", 77, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def answered(packet: bytes) -> tuple[int, int]:
    """Response code and number of answers."""
    _, flags, _, answers, _, _ = struct.unpack("!HHHHHH", packet[:12])
    return flags & 0xF, answers


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("web.ns.svc.cluster.local", 1, (0, 1)),
        ("model.ns.svc.cluster.local", 1, (0, 2)),
        ("web.ns.svc.cluster.local", 28, (0, 0)),  # an IPv6 address: there is the name, and none of that kind
        ("example.com", 1, (3, 0)),
        ("web.ns.svc.ns.svc.cluster.local", 1, (3, 0)),  # what a search list tries first
    ],
)
def test_names_are_answered(name: str, kind: int, expected: tuple[int, int]) -> None:
    names: Any = Known()
    packet = reply(question(name, kind), names)
    assert answered(packet) == expected
    assert packet[:2] == question(name)[:2]
    if expected == (0, 1):
        assert packet.endswith(bytes([10, 96, 0, 7]))


@given(st.binary(max_size=64))
def test_no_packet_breaks_the_name_server(packet: bytes) -> None:
    names: Any = Known()
    try:
        reply(packet, names)
    except ValueError:
        return


def test_a_service_without_an_address_has_its_ready_endpoints() -> None:
    names = Names.__new__(Names)
    names._services = {("ns", "model"): {"spec": {"clusterIP": "None"}}}
    ready, gone = (
        {"addresses": ["10.244.0.2"], "conditions": {"ready": True}},
        {"addresses": ["10.244.0.3"], "conditions": {"ready": False}},
    )
    names._slices = {("ns", "x"): {"metadata": {"labels": {"kubernetes.io/service-name": "model"}}, "endpoints": [ready, gone]}}
    assert names.addresses("model.ns.svc.cluster.local") == ["10.244.0.2"]
    assert names.addresses("other.ns.svc.cluster.local") is None


@pytest.mark.parametrize(("required", "code", "said"), [("", 0, "1 skipped"), ("0,1", 1, "tier 1 is required and cannot run")])
def test_a_machine_without_tools_says_so_loudly(tmp_path: Path, required: str, code: int, said: str) -> None:
    environment = {
        "PATH": "/nowhere",
        "HOME": str(tmp_path),
        "ARGOSY_CLUSTER_CACHE": str(tmp_path),
        "ARGOSY_REQUIRE_TIERS": required,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", ONE_TEST]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert said in done.stdout
    assert "fetching aws-cdk" in done.stderr + done.stdout, "what was tried is shown as it happens"
    if not required:
        assert "TIER 1 DID NOT RUN: 1 tests skipped" in done.stdout


def test_a_lent_cluster_is_not_installed_on_without_values(tmp_path: Path) -> None:
    lent = {"ARGOSY_TEST_CLUSTER": "existing", "KUBECONFIG": str(tmp_path / "kubeconfig"), "ARGOSY_CLUSTER_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "tools.cluster", "install"]
    done = subprocess.run(command, env={**os.environ, **lent}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("a lent cluster needs VALUES=")


def test_status_says_down_of_a_cluster_that_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.cluster", "status", "--folder", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "down\n")
