"""Bring a cluster up, say how it is, take it down: `python -m tools.cluster up|down|status|load|claim|tools`."""

import argparse
import sys
from pathlib import Path

from tools.cluster.cluster import DEFAULT_NAME, Cluster, folder_of
from tools.cluster.commands import CommandFailed
from tools.cluster.packages import ToolMissing
from tools.cluster.processes import ClusterFailed
from tools.cluster.toolbox import Toolbox


def main() -> int:
    """0, or 1 and a sentence; standard output is made for `eval`."""
    parser = argparse.ArgumentParser(prog="python -m tools.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster and print how to use it")
    up.add_argument("--tier", type=int, choices=(1, 2), default=1, help="1: control plane and fake nodes; 2: one real node")
    down = commands.add_parser("down", help="end it and leave nothing")
    down.add_argument("--when-stdin-closes", action="store_true", help="first wait for that: for who may be killed before the end")
    status = commands.add_parser("status", help="what runs")
    load = commands.add_parser("load", help="give the real node images from archives, since it has no registry")
    load.add_argument("archives", type=Path, nargs="+")
    claim = commands.add_parser("claim", help="make a claim `argosy-store` in a namespace, on the folder that all pods may share")
    claim.add_argument("namespace")
    for command in (up, down, status, load, claim):
        command.add_argument("--name", default=DEFAULT_NAME, help="several clusters may live side by side under different names")
        command.add_argument("--folder", type=Path, help="keep it here instead of in the cache, under its name")
    commands.add_parser("tools", help="fetch or build every program of tier 1 and print where they are")
    arguments = parser.parse_args()
    toolbox = Toolbox()
    try:
        if arguments.command == "tools":
            print(f"export PATH={toolbox.clients}:{toolbox.control_plane}:$PATH")
            return 0
        cluster = Cluster(arguments.folder.absolute() if arguments.folder else folder_of(arguments.name))
        if arguments.command == "up":
            facts = cluster.up(arguments.tier, toolbox)
            print(f"export KUBECONFIG={facts.kubeconfig} ARGOSY_TEST_CLUSTER=existing PATH={toolbox.clients}:$PATH")
        elif arguments.command == "down":
            if arguments.when_stdin_closes:
                sys.stdin.buffer.read()
            cluster.down()
        elif arguments.command == "load":
            cluster.node(toolbox).import_images([archive.absolute() for archive in arguments.archives])
        elif arguments.command == "claim":
            cluster.claim(arguments.namespace)
        elif not cluster.alive():
            print("down" if cluster.facts is None else "broken: " + ", ".join(p.name for p in cluster.processes.all() if not p.alive))
            return 1
        else:
            print(f"up: tier {cluster.facts.tier if cluster.facts else '?'}, KUBECONFIG={cluster.folder / 'kubeconfig'}")
    except (ClusterFailed, CommandFailed, ToolMissing) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
