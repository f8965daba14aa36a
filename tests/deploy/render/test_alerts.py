"""Alerts, metrics and runbooks hold together: each alert asks for a metric somebody records, and has a page that says what to do."""

import json
import re
from pathlib import Path

import pytest
import yaml

from services.chassis.telemetry import METRICS
from tests.deploy.templates import PLATFORM, find, of, over, template
from tools.cluster.toolbox import Toolbox
from tools.gen_alerts import ALERTS, CLUSTER, DASHBOARDS, FILES, NAME, RUNBOOKS, files, ours, shown

ROOT = Path(__file__).resolve().parents[3]
APIS = ("monitoring.coreos.com/v1",)


def test_generated_files_are_the_catalogues_own() -> None:
    for path, text in files().items():
        assert path.read_text() == text, f"{path.name} is stale: run python tools/gen_alerts.py"
    assert set(FILES.rglob("*.*")) == set(files())


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_alert_has_metric_and_runbook(alert: object) -> None:
    known = shown().keys() | CLUSTER
    asked = set(NAME.findall(alert.expression))  # type: ignore[attr-defined]
    asked = {name for name in asked if not any(name in row.replace(".", "_") for metric in METRICS.values() for row in metric.labels)}
    assert asked and asked <= known
    page = (RUNBOOKS / f"{alert.name}.md").read_text()  # type: ignore[attr-defined]
    for name in asked:
        assert (name if name in CLUSTER else shown()[name]) in page
    for part in ("## Look\n```\n", "## Do\n"):
        assert part in page
    assert f"({alert.name}.md)" in (RUNBOOKS / "README.md").read_text()  # type: ignore[attr-defined]


def test_every_runbook_has_its_alert_and_every_link_a_page() -> None:
    pages = {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == {alert.name for alert in ALERTS}
    for page in RUNBOOKS.glob("*.md"):
        assert {link for link in re.findall(r"\]\(([A-Za-z]+)\.md\)", page.read_text())} <= pages


def test_every_dashboard_asks_for_metrics_there_are() -> None:
    labels = {label.replace(".", "_") for metric in METRICS.values() for label in metric.labels}
    for _, panels in DASHBOARDS.values():
        for panel in panels:
            for expression, _ in panel.lines:
                names = set(NAME.findall(expression)) - labels
                assert names and names <= shown().keys(), panel.title


def test_a_metric_or_label_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        ours("argosy.queue.lenght")
    with pytest.raises(KeyError):
        ours("argosy.queue.length", argosy_reason="SHED")


def test_every_metric_of_an_alert_is_recorded_by_a_service() -> None:
    """A row of the catalogue that nobody records would make an alert that never fires."""
    code = "".join(path.read_text() for path in (ROOT / "services").rglob("*.py") if path.name != "telemetry.py")
    asked = {shown()[name] for alert in ALERTS for name in NAME.findall(alert.expression) if name in shown()}
    assert not [name for name in asked if f'"{name}"' not in code]


def test_rules_speak_of_the_releases_own_namespaces(toolbox: Toolbox) -> None:
    values = over(
        PLATFORM,
        {"gateway": {"modelNamespaces": ["gpus"]}, "monitoring": {"runbooks": "https://wiki.example/argosy", "labels": {"release": "p"}}},
    )
    objects = template(toolbox.helm, "platform", values, apis=APIS)
    rule = find(objects, "PrometheusRule", "argosy")
    assert rule["metadata"]["labels"]["release"] == "p"
    (group,) = rule["spec"]["groups"]
    assert [each["alert"] for each in group["rules"]] == [alert.name for alert in ALERTS]
    for each in group["rules"]:
        assert 'namespace=~"argosy|gpus|argosy-jobs"' in each["expr"]
        assert "__" not in each["expr"]
        assert each["annotations"]["runbook_url"] == f"https://wiki.example/argosy/{each['alert']}.md"
    assert "{{ $value | humanizeDuration }}" in group["rules"][1]["annotations"]["summary"]  # Prometheus' own braces, not Helm's


def test_dashboards_are_json_that_grafana_finds(toolbox: Toolbox) -> None:
    boards = [
        each for each in of(template(toolbox.helm, "platform", PLATFORM), "ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]
    ]
    assert len(boards) == len(DASHBOARDS)
    for board in boards:
        ((name, text),) = board["data"].items()
        made = json.loads(text)
        assert name.endswith(".json") and made["uid"].startswith("argosy-")
        assert all('namespace=~"' in target["expr"] for panel in made["panels"] for target in panel["targets"])


def test_monitors_ask_over_mutual_tls(toolbox: Toolbox) -> None:
    monitors = of(template(toolbox.helm, "platform", PLATFORM, apis=APIS), "PodMonitor")
    assert [each["metadata"]["name"] for each in monitors] == ["argosy-gateway", "argosy-finetune"]
    for monitor in monitors:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint["port"], endpoint["scheme"]) == ("metrics", "https")
        assert {"ca", "cert", "keySecret", "serverName"} <= endpoint["tlsConfig"].keys()


def test_rules_are_yaml_that_prometheus_reads() -> None:
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
            assert rule["expr"].count("(") == rule["expr"].count(")")
            assert rule["labels"]["severity"] in ("page", "ticket")
