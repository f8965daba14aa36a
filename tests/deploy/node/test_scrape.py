"""What Prometheus reads of running pods, by the certificates and names that the monitors give it, and what the alerts ask for."""

import base64
import http.client
import re
import socket
import ssl
from pathlib import Path

import pytest

from tests.deploy.node.installed import RELEASE, Installed
from tools.gen_alerts import ALERTS, NAME, shown

COMPONENTS = ("gateway", "finetune", "model")
# Counters that begin with the first of what they count.
NOT_YET = {"argosy.queue.refused", "argosy.job.ended", "argosy.ledger.settled", "argosy.attempt.ended"}


@pytest.fixture
def trusted(installed: Installed, tmp_path: Path) -> ssl.SSLContext:
    """The fleet's authority and certificate, as a monitor names them."""
    for name, text in installed.get("secret", f"{RELEASE}-tls")["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(text))
    context = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    return context


def scraped(installed: Installed, component: str, context: ssl.SSLContext) -> dict[str, str]:
    """Pod → its metrics, each asked for by the address of the pod and the name of its Service."""
    found = {}
    for pod in installed.get("pods", "-l", f"app.kubernetes.io/component={component}")["items"]:
        address = (pod["status"]["podIP"], 9090)
        name = f"{RELEASE}-{component}.{installed.namespace}.svc"  # any name under the namespace is in the generated certificate
        with context.wrap_socket(socket.create_connection(address, 10), server_hostname=name) as connection:
            connection.sendall(f"GET /metrics HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            found[pod["metadata"]["name"]] = response.read().decode()
    return found


def test_scrape_matches_rules(installed: Installed, trusted: ssl.SSLContext) -> None:
    """Each metric of ours that an alert asks for is shown by some pod, but for those that count what has not happened."""
    texts = [text for component in COMPONENTS for text in scraped(installed, component, trusted).values()]
    series = {match[1] for text in texts for match in re.finditer(r"^([a-z_]+)[{ ]", text, re.MULTILINE)}
    asked = {name for alert in ALERTS for name in NAME.findall(alert.expression) if name in shown()}
    assert not {name for name in asked - series if shown()[name] not in NOT_YET}


@pytest.mark.parametrize("component", COMPONENTS)
def test_nobody_reads_metrics_without_the_fleets_certificate(installed: Installed, trusted: ssl.SSLContext, component: str) -> None:
    assert scraped(installed, component, trusted)
    stranger = ssl.create_default_context(cafile=installed.ca)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        scraped(installed, component, stranger)
