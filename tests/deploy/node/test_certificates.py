"""Certificates that are renewed in a running installation, by a Secret and a kubelet as it is in life."""

import asyncio
import base64
import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.deploy.node.installed import RELEASE, Installed
from tests.deploy.node.load import streaming
from tests.fakes.authority import Authority

STREAMS = 8
PORTS = {"gateway": (8443, 9090), "finetune": (8600, 9090), "model": (8500, 9090)}


def shown(installed: Installed, context: ssl.SSLContext) -> set[int]:
    """The serial numbers of the certificates on every TLS port of every pod."""
    found = set()
    for component, ports in PORTS.items():
        for pod in installed.get("pods", "-l", f"app.kubernetes.io/component={component}")["items"]:
            for port in ports:
                name, address = f"{RELEASE}-{component}.{installed.namespace}.svc", (pod["status"]["podIP"], port)
                with context.wrap_socket(socket.create_connection(address, 10), server_hostname=name) as connection:
                    found.add(int(connection.getpeercert()["serialNumber"], 16))  # type: ignore[index, arg-type]
    return found


async def until(condition: Callable[[], bool], seconds: float = 180) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(1)


@pytest.mark.timeout(900)
async def test_F30_certificate_rotation_drops_no_stream(installed: Installed, tmp_path: Path) -> None:
    """A certificate of the same authority takes the old one's place, under streams: every port shows it, and no stream notices."""

    def data(name: str) -> dict[str, bytes]:
        return {key: base64.b64decode(value) for key, value in installed.get("secret", f"{RELEASE}-{name}")["data"].items()}

    kept, signer = data("tls"), data("ca")
    old = x509.load_pem_x509_certificate(kept["tls.crt"])
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    chain, key = Authority.of(signer["tls.crt"], signer["tls.key"]).issue(*names, "127.0.0.1")
    new = {"tls.crt": chain, "tls.key": key, "ca.crt": kept["ca.crt"]}
    for name, content in new.items():
        (tmp_path / name).write_bytes(content)
    context = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    context.set_alpn_protocols(["h2"])  # without it gRPC hangs up
    assert await asyncio.to_thread(shown, installed, context) == {old.serial_number}

    def put(files: dict[str, bytes], mark: str) -> None:
        patch: dict[str, Any] = {"data": {name: base64.b64encode(content).decode() for name, content in files.items()}}
        kubectl = installed.node.kubectl
        kubectl("patch", "secret", f"{RELEASE}-tls", "-n", installed.namespace, "--type=merge", "-p", json.dumps(patch))
        # A kubelet looks after a Secret when it looks after the pod: at once if the pod has changed, else within a minute or two.
        kubectl("annotate", "pods", "--all", "-n", installed.namespace, f"argosy.dev/test={mark}", "--overwrite")

    serial = x509.load_pem_x509_certificate(chain).serial_number
    try:
        async with installed.tenant() as client, streaming(client, STREAMS) as load:
            await load.more(1)
            await asyncio.to_thread(put, new, "renewed")
            await until(lambda: shown(installed, context) == {serial})
            await load.more(2 * STREAMS)
    finally:
        await asyncio.to_thread(put, kept, "as-before")
    assert load.broken == [] and load.open == 0
