"""The cluster's name server: Services and their ready endpoints as addresses, and nothing of the world outside.

`python -m tools.cluster.names KUBECONFIG ADDRESS`. Answers A questions for <service>.<namespace>.svc.cluster.local over UDP.
"""

import socket
import struct
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path

from tools.cluster.api import Api, ApiFailed, Body

DOMAIN = "cluster.local"
SERVICES, SLICES = "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"
A = 1  # a question for an IPv4 address
NO_SUCH_NAME = 3
TTL_SECONDS = 2
RETRY_SECONDS = 1.0
Key = tuple[str, str]  # namespace, name


class Names:
    """What the API says of Services, kept by two watches."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._services: dict[Key, Body] = {}
        self._slices: dict[Key, Body] = {}

    def follow(self) -> None:
        """Start both watches."""
        for path, known in ((SERVICES, self._services), (SLICES, self._slices)):
            threading.Thread(target=self._watch, args=(path, known), daemon=True).start()

    def addresses(self, name: str) -> list[str] | None:
        """The addresses of a full name; None where there is no such name."""
        labels = name.lower().rstrip(".").removesuffix(f".svc.{DOMAIN}").split(".")
        if len(labels) != 2 or not name.lower().rstrip(".").endswith(f".svc.{DOMAIN}"):
            return None
        service = self._services.get((labels[1], labels[0]))
        if service is None:
            return None
        own = service["spec"].get("clusterIP")
        return self._endpoints(labels[1], labels[0]) if own in (None, "", "None") else [own]

    def _endpoints(self, namespace: str, service: str) -> list[str]:
        found = []
        for (where, _), piece in list(self._slices.items()):
            if where == namespace and piece["metadata"].get("labels", {}).get("kubernetes.io/service-name") == service:
                for endpoint in piece.get("endpoints") or []:
                    if endpoint.get("conditions", {}).get("ready") is not False:
                        found += endpoint["addresses"]
        return found

    def _watch(self, path: str, known: dict[Key, Body]) -> None:
        while True:
            try:
                current = {_key(item) for item in self._api.get(path)["items"]}
                for gone in set(known) - current:
                    known.pop(gone, None)
                for change, thing in self._api.follow(path):
                    if change == "DELETED":
                        known.pop(_key(thing), None)
                    else:
                        known[_key(thing)] = thing
            except (ApiFailed, OSError, HTTPException) as error:
                print("watching again after", error, flush=True)
                time.sleep(RETRY_SECONDS)


def _key(thing: Body) -> Key:
    return thing["metadata"]["namespace"], thing["metadata"]["name"]


def reply(question: bytes, names: Names) -> bytes:
    """The answer to one packet.

    Raises:
        ValueError: the packet is no question that we can read.
    """
    if len(question) < 12 or question[2] & 0x80:
        raise ValueError("not a question")
    labels, at = [], 12
    while at < len(question) and question[at]:
        length = question[at]
        if length > 63:
            raise ValueError("a compressed question")
        labels.append(question[at + 1 : at + 1 + length].decode("ascii"))
        at += 1 + length
    end = at + 5  # the empty label, type and class
    if end > len(question):
        raise ValueError("cut short")
    kind = struct.unpack("!H", question[at + 1 : at + 3])[0]
    found = names.addresses(".".join(labels))
    records = b"".join(_record(address) for address in found or []) if kind == A else b""
    count = len(found or []) if kind == A else 0
    flags = 0x8580 | (NO_SUCH_NAME if found is None else 0)  # a reply, with authority, recursion as asked
    return question[:2] + struct.pack("!HHHHH", flags, 1, count, 0, 0) + question[12:end] + records


def _record(address: str) -> bytes:
    """An A record whose name points back at the question."""
    return struct.pack("!HHHIH", 0xC00C, A, 1, TTL_SECONDS, 4) + socket.inet_aton(address)


def main() -> None:
    """Serve for ever."""
    names = Names(Api(Path(sys.argv[1])))
    names.follow()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind((sys.argv[2], 53))
        while True:
            packet, asker = listener.recvfrom(4096)
            try:
                listener.sendto(reply(packet, names), asker)
            except (ValueError, OSError) as error:
                print("no answer:", error, flush=True)


if __name__ == "__main__":
    main()
