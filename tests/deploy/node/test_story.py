"""What helm tells the operator, word for word."""

import re

import pytest

from tests.deploy.node.installed import MODEL, RELEASE, Installed, shell


def commands(notes: str) -> list[str]:
    """The lines that helm indents: what to type."""
    return [line.strip() for line in notes.split("NOTES:", 1)[1].splitlines() if line.startswith("  ") and not line.startswith("  - ")]


def test_notes_verbatim(installed: Installed) -> None:
    first, trust, call = commands(installed.notes)
    assert "bootstrap" in first, "the fixture ran it: its key is the one below"
    port = re.search(r"svc/\S+ (\d+):", trust)
    assert port
    script = f"{trust}\nuntil (echo > /dev/tcp/127.0.0.1/{port[1]}) 2> /dev/null; do sleep 0.2; done\n{call}"
    said = shell(installed, script, ARGOSY_API_KEY=installed.key)
    assert MODEL in said


@pytest.mark.timeout(900)
def test_helm_test_makes_a_real_call(installed: Installed) -> None:
    said = installed.node.helm("test", RELEASE, "-n", installed.namespace, "--logs", "--timeout=180s", seconds=200)
    assert "Succeeded" in said
    assert re.search(rf"models/{MODEL} wrote .+ \(1 token\)", said)
