"""Bring a cluster up, say how it is, install Argosy on it, take it down: `python -m tools.cluster COMMAND`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from argosy.errors import ArgosyError
from tools.cluster import cache
from tools.cluster.cluster import DEFAULT_NAME, Cluster, folder_of
from tools.cluster.commands import CommandFailed
from tools.cluster.packages import ToolMissing
from tools.cluster.processes import ClusterFailed
from tools.cluster.toolbox import Toolbox

if TYPE_CHECKING:
    from tools.cluster.installation import Installation


def main() -> int:
    """0, or 1 and a sentence; what `up` and `tools` write to standard output is made for `eval`."""
    arguments = _asked()
    toolbox = Toolbox()
    cluster = Cluster(arguments.folder.absolute() if arguments.folder else folder_of(arguments.name))
    try:
        match arguments.command:
            case "tools":
                print(f"export PATH={toolbox.clients}:{toolbox.control_plane}:$PATH")
            case "up":
                facts = cluster.up(arguments.tier, toolbox)
                print(f"export KUBECONFIG={facts.kubeconfig} ARGOSY_TEST_CLUSTER=existing PATH={toolbox.clients}:$PATH")
            case "down":
                if arguments.when_stdin_closes:
                    sys.stdin.buffer.read()
                if _lent() and arguments.release:
                    _installation(cluster, toolbox, arguments).remove()
                cluster.down()
            case "load":
                cluster.node(toolbox).import_images([archive.absolute() for archive in arguments.archives])
            case "claim":
                cluster.claim(arguments.namespace)
            case "install":
                if not _lent():
                    cluster.up(2, toolbox)
                installation = _installation(cluster, toolbox, arguments)
                installation.install()
                door = installation.open()
                installation.show(door)
                print(installation.next_commands(door))
            case "status":
                return _status(cluster)
    except (ArgosyError, ClusterFailed, CommandFailed, ToolMissing) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster and print how to use it")
    up.add_argument("--tier", type=int, choices=(1, 2), default=1, help="1: control plane and fake nodes; 2: one real node")
    down = commands.add_parser("down", help="end it and leave nothing")
    down.add_argument("--when-stdin-closes", action="store_true", help="first wait for that: for who may be killed before the end")
    commands.add_parser("status", help="what runs")
    load = commands.add_parser("load", help="give the real node images from archives, since it has no registry")
    load.add_argument("archives", type=Path, nargs="+")
    claim = commands.add_parser("claim", help="make a claim `argosy-store` in a namespace, on the folder that all pods may share")
    claim.add_argument("namespace")
    install = commands.add_parser("install", help="start a real node, install Argosy on it by helm, and show its main job")
    commands.add_parser("tools", help="fetch or build every program of tier 1 and print where they are")
    for command in commands.choices.values():
        command.add_argument("--name", default=DEFAULT_NAME, help="several clusters may live side by side under different names")
        command.add_argument("--folder", type=Path, help="keep it here instead of in the cache, under its name")
    install.add_argument("--values", type=Path, help="a values file of yours, on top of ours; a lent cluster needs one")
    down.add_argument("--release", action="store_true", help="on a lent cluster: uninstall Argosy, and leave the rest")
    return parser.parse_args()


def _lent() -> Path | None:
    """A cluster that somebody lends by saying so twice, so that it is never production by accident."""
    if os.environ.get("ARGOSY_TEST_CLUSTER") != "existing":
        return None
    config = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    return None if (config.parent / "cluster.json").exists() else config  # one of ours needs no loan


def _installation(cluster: Cluster, toolbox: Toolbox, arguments: argparse.Namespace) -> "Installation":
    from tools.cluster.installation import Installation  # brings the client and the demo along, which `up` and `down` do without

    if config := _lent():
        return Installation(config, toolbox, cache.root() / "lent", None, getattr(arguments, "values", None))
    return Installation(cluster.folder / "kubeconfig", toolbox, cluster.installed, cluster, getattr(arguments, "values", None))


def _status(cluster: Cluster) -> int:
    facts = cluster.facts
    if facts and cluster.alive():
        print(f"up: tier {facts.tier}, KUBECONFIG={facts.kubeconfig}")
        return 0
    dead = ", ".join(process.name for process in cluster.processes.all() if not process.alive)
    print("down" if facts is None else f"broken: {dead} ended; logs in {cluster.folder / 'log'}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
