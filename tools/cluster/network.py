"""The room that a real node lives in: a network, mounts and process ids of its own, joined to this machine by one cable.

Everything of the node and its pods is a descendant of one process, the first of the room. Killing that one ends them all, and the kernel
takes the mounts, the addresses and the routes with it. Nothing routes from the room to anywhere but this machine.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.cluster.commands import CommandFailed
from tools.cluster.processes import ClusterFailed, Process, Processes, wait_until

ROOMS = range(16)  # how many nodes may live side by side on one machine
SHORT_SECONDS = 60.0  # for a command that only sets something


@dataclass(frozen=True)
class Addresses:
    """The addresses of the room numbered `room`."""

    room: int

    @property
    def node(self) -> str:
        """The node, its control plane and its database."""
        return f"10.99.{self.room}.1"

    @property
    def machine(self) -> str:
        """This machine, as the node and its pods see it."""
        return f"10.99.{self.room}.254"

    @property
    def pods(self) -> str:
        """Where pods get their addresses."""
        return f"10.244.{self.room}.0/24"

    @property
    def services(self) -> str:
        """Where Services get theirs."""
        return f"10.96.{self.room}.0/24"

    @property
    def first_service(self) -> str:
        """The API server's own Service."""
        return f"10.96.{self.room}.1"

    @property
    def cable(self) -> str:
        """The interface on this machine."""
        return f"argosy{self.room}"


@dataclass(frozen=True)
class Room:
    """A room that stands."""

    first: Process
    addresses: Addresses

    def enter(self, argv: Sequence[str | Path]) -> list[str | Path]:
        """The command that runs `argv` inside. It forks: the real one is its child."""
        return ["nsenter", "--target", str(self.first.pid), "--net", "--mount", "--pid", "--", *argv]

    def run(self, *argv: str | Path, seconds: float = SHORT_SECONDS) -> str:
        """Run a command inside and return what it says.

        Raises:
            ClusterFailed: it ended badly, or not within `seconds`.
        """
        return _run(*self.enter(argv), seconds=seconds)


def build(processes: Processes, first: Path, kubelet_folder: Path) -> Room:
    """Make a room whose first process is `first`, a program that waits and buries orphans.

    Args:
        kubelet_folder: stands inside for /var/lib/kubelet, where device plugins register whatever a kubelet is told.
    """
    kubelet_folder.mkdir(parents=True)
    Path("/var/lib/kubelet").mkdir(parents=True, exist_ok=True)  # only a place to mount on
    flags = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    process = processes.start("room", ["unshare", *flags, first], enters=True)
    if not wait_until(lambda: process.alive and Path(os.readlink(f"/proc/{process.pid}/exe")) == first.resolve(), 10):
        raise ClusterFailed(f"no namespaces here: {processes.tail('room')}")
    room = Room(process, _plug_in(process))
    at = room.addresses
    # The sockets of the runtime live in /run; this one is the room's own and holds nothing of the machine's.
    room.run("mount", "-t", "tmpfs", "tmpfs", "/run")
    room.run("mount", "--bind", kubelet_folder, "/var/lib/kubelet")
    room.run("ip", "link", "set", "lo", "up")
    room.run("ip", "address", "add", f"{at.node}/24", "dev", "node0")
    room.run("ip", "link", "set", "node0", "up")
    # Components look for a default route when they choose an address. Nobody answers on it.
    room.run("ip", "route", "add", "default", "dev", "node0")
    room.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    for ours in (at.pods, at.services):
        _run("ip", "route", "replace", ours, "via", at.node)
    return room


def _plug_in(first: Process) -> Addresses:
    """Take the first free number: making its cable fails where somebody has it."""
    refused = ""
    for room in ROOMS:
        addresses = Addresses(room)
        try:
            _run("ip", "link", "add", addresses.cable, "type", "veth", "peer", "name", "node0", "netns", str(first.pid))
        except ClusterFailed as error:
            refused = str(error)
            continue
        _run("ip", "address", "add", f"{addresses.machine}/24", "dev", addresses.cable)
        _run("ip", "link", "set", addresses.cable, "up")
        return addresses
    raise ClusterFailed(f"no cable for a room: {refused}")


def _run(*argv: str | Path, seconds: float = SHORT_SECONDS) -> str:
    line = " ".join(str(word) for word in argv)
    try:
        done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, timeout=seconds)
    except OSError as error:
        raise CommandFailed(f"{argv[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterFailed(f"{line}: not done after {seconds:g} s") from error
    if done.returncode:
        raise ClusterFailed(f"{line}: {done.stderr or done.stdout}")
    return done.stdout
