"""What NOTES and docs/operators.md tell an operator to type: the same three commands, of programs and options that exist."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from services.gateway.__main__ import main
from tests.deploy.templates import CHARTS, PLATFORM, Object, find, over, template
from tools.cluster.toolbox import Toolbox

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "operators.md").read_text()


def notes(toolbox: Toolbox, changes: Object | None = None, chart: str = "platform") -> str:
    """As `helm install` prints them; no cluster is asked."""
    words = [toolbox.helm, "install", "argosy", CHARTS / chart, "-n", "argosy", "--dry-run=client", "-f", "-"]
    values = json.dumps(over(PLATFORM, changes or {}))
    done = subprocess.run(words, input=values, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


def commands(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("  ") and not line.startswith("  - ")]


def test_notes_tell_three_commands_and_the_page_tells_the_same(toolbox: Toolbox) -> None:
    told = commands(notes(toolbox))
    assert len(told) == 3
    for command in told:
        assert f"\n{command}\n" in PAGE
        assert shlex.split(command)  # quotes are balanced
    assert "bootstrap" in told[0] and "argosy-ca.crt" in told[1] and told[2].endswith("argosy models list")


def test_notes_name_what_was_rendered(toolbox: Toolbox) -> None:
    objects, text = template(toolbox.helm, "platform", PLATFORM), notes(toolbox)
    (deployment,) = re.findall(r"deploy/(\S+)", text)
    (service,) = re.findall(r"svc/(\S+)", text)
    (secret,) = re.findall(r"get secret -n argosy (\S+)", text)
    find(objects, "Deployment", deployment)
    find(objects, "Service", service)
    assert "ca.crt" in find(objects, "Secret", secret)["data"]


def test_notes_say_what_was_not_installed(toolbox: Toolbox) -> None:
    assert "monitoring.coreos.com/v1" in notes(toolbox)
    assert "queueing by Kueue" in notes(toolbox, {"finetune": {"queueName": "training"}})
    assert "a way in from outside" not in notes(toolbox, {"gateway": {"service": {"type": "LoadBalancer"}}})
    own = {"global": {"tls": {"mode": "existingSecret", "existingSecret": "mine"}}}
    assert "get secret -n argosy mine " in notes(toolbox, own)
    assert "certificates of yours" not in notes(toolbox, own)


def test_the_test_pod_asks_as_the_gateways_own_command_does(toolbox: Toolbox, capsys: pytest.CaptureFixture[str]) -> None:
    """`helm test` must fail for what is not there, and never for how it was asked."""
    container = find(template(toolbox.helm, "platform", over(PLATFORM, {"tests": {"model": "m"}})), "Pod", "argosy-test")["spec"][
        "containers"
    ][0]
    command = [*container["command"], *container["args"]]
    assert command[:3] == ["python", "-m", "services.gateway"]
    assert command[3:] == ["trial", "--ca", "/etc/argosy/tls/ca.crt", "argosy-gateway.argosy.svc:8443", "--model=models/m"]
    with pytest.raises(SystemExit) as left:
        main([*command[3:], "--help"])
    assert left.value.code == 0
    assert "address" in capsys.readouterr().out


def test_every_page_that_is_linked_is_there() -> None:
    folder = Path(__file__).resolve().parents[3] / "docs"
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (folder / link).exists(), link


def test_every_value_that_the_page_names_is_one(toolbox: Toolbox) -> None:
    """`gateway.maxStreamSeconds` and the like, against the schemas."""
    known = {chart: json.loads((CHARTS / chart / "values.schema.json").read_text()) for chart in ("platform", "models", "tenant", "common")}
    for path in re.findall(r"`((?:gateway|finetune|networkPolicy|monitoring|admissionPolicy|priorityClasses|global)\.[a-zA-Z.]+)", PAGE):
        assert any(_has(schema, schema, path.split(".")) for schema in known.values()), path


def _has(schema: Object, root: Object, path: list[str]) -> bool:
    there = root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if not path:
        return True
    return path[0] in there.get("properties", {}) and _has(there["properties"][path[0]], root, path[1:])
