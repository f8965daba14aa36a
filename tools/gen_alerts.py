"""Write the alerts and dashboards of the platform chart from the one metrics catalogue, so that none asks for a metric nobody records.

`python tools/gen_alerts.py` writes; with `--check` it fails where a file differs. The chart puts its own namespaces and the place of the
runbooks where the files say `__NAMESPACES__` and `__RUNBOOKS__`.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from services.chassis.telemetry import METRICS, Telemetry

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "deploy" / "helm" / "platform" / "files"
RUNBOOKS = ROOT / "docs" / "runbooks"
NAMESPACES = "__NAMESPACES__"  # a label matcher, as `namespace=~"argosy|models"`
# What kube-state-metrics tells; without it these two alerts never fire, and the others do not need it.
CLUSTER = frozenset({"kube_pod_status_ready", "kube_pod_status_unschedulable"})
NAME = re.compile(r"\b(?:argosy|gen_ai|rpc|kube)_[a-z_]+")
COMMENT = "# Made by tools/gen_alerts.py from services/chassis/telemetry.py; change it there.\n"


@cache
def shown() -> Mapping[str, str]:
    """Each name that Prometheus stores → the catalogue's name: as a process really shows it, units and `_total` included."""
    names: dict[str, str] = {}
    for row in METRICS.values():
        telemetry = Telemetry.start("catalogue", {})
        telemetry.record(row.name, 1, dict.fromkeys(row.labels, "x"))
        for family in text_string_to_metric_families(telemetry.exposition().decode()):
            names.update((sample.name, row.name) for sample in family.samples)
    return names


def ours(metric: str, suffix: str = "", **labels: str) -> str:
    """A selector of the catalogue's metric in this release's namespaces.

    Args:
        metric: the catalogue's name.
        suffix: `_bucket`, `_sum` or `_count` of a histogram.
        labels: label → a value, values with `|` between them, or `!` and a value that it must not have.

    Raises:
        KeyError: the catalogue has no such metric or label.
    """
    if unknown := labels.keys() - {each.replace(".", "_") for each in METRICS[metric].labels}:
        raise KeyError(f"{metric} has no label {sorted(unknown)}")
    names = [name for name, source in shown().items() if source == metric and name.endswith(suffix) and not name.endswith("_created")]
    return f"{min(names, key=len)}{{{', '.join((NAMESPACES, *(_matcher(*each) for each in labels.items())))}}}"


def _matcher(label: str, wanted: str) -> str:
    operator = "!=" if wanted.startswith("!") else "=~" if "|" in wanted else "="
    return f'{label}{operator}"{wanted.lstrip("!")}"'


def by(function: str, labels: str, of: str) -> str:
    """An aggregation: `sum by (pod) (…)`."""
    return f"{function} by ({labels}) ({of})"


def rate(metric: str, labels: str, window: str = "5m", suffix: str = "", **matched: str) -> str:
    """What a counter grew by a second, summed by labels."""
    return by("sum", labels, f"rate({ours(metric, suffix, **matched)}[{window}])")


def grown(metric: str, labels: str, window: str, **matched: str) -> str:
    """What a counter grew by in the window, summed by labels."""
    return by("sum", labels, f"increase({ours(metric, **matched)}[{window}])")


def quantile(share: float, metric: str, labels: str) -> str:
    """The quantile of a histogram over five minutes."""
    return f"histogram_quantile({share}, {rate(metric, f'le, {labels}', suffix='_bucket')})"


@dataclass(frozen=True)
class Alert:
    """One alert, which has a page of the same name in docs/runbooks."""

    name: str
    severity: str  # page: somebody is wanted now; ticket: this week
    hold: str  # how long it must be so
    expression: str
    summary: str


STUCK = "UNSCHEDULABLE|IMAGE|NO_POD|NODE_LOST|LAUNCHER_AWAY|LAUNCHER_REFUSED"  # not SUSPENDED, as in a queue, nor STARTING
WAITING = by("sum", "namespace", ours("argosy.queue.length"))
REFUSED = grown("argosy.queue.refused", "namespace", "5m")
SHED = rate("argosy.queue.refused", "namespace", argosy_reason="SHED")
SETTLED = rate("argosy.ledger.settled", "namespace")
AWAY = by("max", "namespace, pod", ours("argosy.ledger.away"))
SPOOLED = by("max", "namespace, pod", ours("argosy.ledger.spooled"))
SPENT = grown("argosy.job.ended", "namespace", "15m", argosy_reason="ATTEMPTS_SPENT|OUT_OF_MEMORY")
PREDICTED = by("max", "namespace, argosy_work_class", ours("argosy.queue.predicted", argosy_work_class="INTERACTIVE"))

ALERTS: Sequence[Alert] = (
    Alert(
        "NoReadyReplica", "page", "2m",
        f"{by('max', 'namespace', ours('argosy.replica.ready'))} == 0 and on (namespace) ({WAITING} > 0 or {REFUSED} > 0)",
        "Callers ask and no replica of any model can answer.",
    ),
    Alert("QueueWait", "ticket", "10m", f"{PREDICTED} > 10", "A caller who came now would wait {{ $value | humanizeDuration }}."),
    Alert(
        "Shedding", "page", "5m", f"{SHED} > 0.01 * ({SETTLED} or {SHED})",
        "Over 1 % of the requests are turned away because the queue is longer than their deadline.",
    ),
    Alert(
        "LoadSlow", "ticket", "20m", f'kube_pod_status_ready{{{NAMESPACES}, condition="true", pod=~".*-model-.*"}} == 0',
        "{{ $labels.pod }} has not become ready for 20 minutes.",
    ),
    Alert(
        "PoolFull", "ticket", "10m", f'kube_pod_status_unschedulable{{{NAMESPACES}, pod=~".*-model-.*|ft-.*"}} == 1',
        "{{ $labels.pod }} finds no place on its pool.",
    ),
    Alert(
        "GpuUnhealthy", "page", "1m", f"{by('max', 'namespace', ours('argosy.gpu.unhealthy'))} > 0",
        "{{ $value }} GPUs of replicas are unhealthy; the gateway sends them no new work.",
    ),
    Alert(
        "DrainCut", "ticket", "0m", f"{grown('argosy.drain.cut', 'namespace, pod', '10m')} > 0",
        "A drain of {{ $labels.pod }} ended streams that were still running.",
    ),
    Alert(
        "StaleClusterView", "page", "1m", f"{by('max', 'namespace, pod', ours('argosy.cluster.view_age'))} > 120",
        "{{ $labels.pod }} has heard nothing of the cluster for {{ $value | humanizeDuration }}.",
    ),
    Alert(
        "WaitingForNode", "ticket", "15m",
        f"{by('max', 'namespace, argosy_reason', ours('argosy.attempt.waiting', argosy_reason=STUCK))} > 0",
        "{{ $value }} training attempts wait for a node ({{ $labels.argosy_reason }}).",
    ),
    Alert("AttemptsSpent", "ticket", "0m", f"{SPENT} > 0", "A tuning job failed because its attempts kept ending without progress."),
    Alert(
        "LedgerSpooling", "page", "1m", f"{AWAY} == 1 or {SPOOLED} > {32 << 20}",
        "{{ $labels.pod }} cannot reach the database and keeps its books in the journal.",
    ),
    Alert(
        "CertificateExpiring", "page", "10m",
        f"{by('min', 'namespace, pod, argosy_certificate', ours('argosy.certificate.life'))} < 0.25",
        "Under a quarter of the life of {{ $labels.pod }}'s {{ $labels.argosy_certificate }} certificate is left.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One graph. `lines` are expressions and what each is called."""

    title: str
    unit: str  # as Grafana names it
    lines: Sequence[tuple[str, str]]


def panel(title: str, unit: str, expression: str, legend: str) -> Panel:
    """A graph of one expression."""
    return Panel(title, unit, ((expression, legend),))


_GAP = "gen_ai.server.time_per_output_token"
_FIRST = "gen_ai.server.time_to_first_token"
_MODEL = "gen_ai_request_model"
DASHBOARDS: Mapping[str, tuple[str, Sequence[Panel]]] = {
    "fleet": (
        "Argosy: the fleet",
        (
            panel("Requests a second", "reqps", rate("argosy.ledger.settled", "argosy_outcome"), "{{argosy_outcome}}"),
            panel("Refused a second", "reqps", rate("argosy.queue.refused", "argosy_reason"), "{{argosy_reason}}"),
            Panel(
                "Time to first token", "s",
                ((quantile(0.5, _FIRST, _MODEL), "50 % {{gen_ai_request_model}}"), (quantile(0.95, _FIRST, _MODEL), "95 %")),
            ),
            panel("Time per output token, 95 %", "s", quantile(0.95, _GAP, _MODEL), "{{gen_ai_request_model}}"),
            panel(
                "Tokens a second", "short", rate("gen_ai.client.token.usage", "gen_ai_token_type", suffix="_sum"), "{{gen_ai_token_type}}"
            ),
            panel("Waiting", "short", by("sum", "argosy_work_class", ours("argosy.queue.length")), "{{argosy_work_class}}"),
            panel("Predicted wait", "s", by("max", "argosy_work_class", ours("argosy.queue.predicted")), "{{argosy_work_class}}"),
            Panel(
                "Replicas", "short",
                (
                    (f"max({ours('argosy.replica.ready')})", "ready"),
                    (f"max({ours('argosy.replica.barred')})", "barred"),
                    (f"max({ours('argosy.gpu.unhealthy')})", "unhealthy GPUs"),
                ),
            ),
            panel(
                "KV cache in use", "percentunit",
                f"1 - {by('sum', 'pod', ours('argosy.kv.tokens.free'))} / {by('sum', 'pod', ours('argosy.kv.tokens.total'))}", "{{pod}}",
            ),
            panel("Sequences a step", "short", quantile(0.5, "argosy.batch.rows", "pod"), "{{pod}}"),
            panel("Engine starts", "short", grown("argosy.engine.restarted", "pod", "15m"), "{{pod}}"),
            panel("Event loop lag", "s", quantile(0.99, "argosy.loop.lag", "pod"), "{{pod}}"),
        ),
    ),
    "operations": (
        "Argosy: operations",
        (
            panel("Age of the cluster view", "s", by("max", "pod", ours("argosy.cluster.view_age")), "{{pod}}"),
            panel("Attempts that wait", "short", by("max", "argosy_reason", ours("argosy.attempt.waiting")), "{{argosy_reason}}"),
            panel("Attempts ended", "short", grown("argosy.attempt.ended", "argosy_outcome", "15m"), "{{argosy_outcome}}"),
            panel(
                "Jobs ended", "short", grown("argosy.job.ended", "argosy_outcome, argosy_reason", "1h"),
                "{{argosy_outcome}} {{argosy_reason}}",
            ),
            panel("Journal", "bytes", by("sum", "pod", ours("argosy.ledger.spooled")), "{{pod}}"),
            panel("An entry in the books", "s", quantile(0.99, "argosy.ledger.duration", "argosy_operation"), "{{argosy_operation}}"),
            panel("Calls cut by drains", "short", grown("argosy.drain.cut", "pod", "15m"), "{{pod}}"),
            panel(
                "Certificates' remaining time", "s", by("min", "pod, argosy_certificate", ours("argosy.certificate.remaining")),
                "{{pod}} {{argosy_certificate}}",
            ),
            panel("Adapter pushes", "s", quantile(0.95, "argosy.adapter.push", "argosy_outcome"), "{{argosy_outcome}}"),
            panel(
                "Calls between services that failed", "reqps",
                rate("rpc.client.call.duration", "rpc_response_status_code", suffix="_count", rpc_response_status_code="!OK"),
                "{{rpc_response_status_code}}",
            ),
        ),
    ),
}  # fmt: skip


def rules() -> str:
    """The Prometheus rule groups as YAML."""
    group = {
        "name": "argosy",
        "rules": [
            {
                "alert": alert.name,
                "expr": alert.expression,
                "for": alert.hold,
                "labels": {"severity": alert.severity},
                "annotations": {"summary": alert.summary, "runbook_url": f"__RUNBOOKS__/{alert.name}.md"},
            }
            for alert in ALERTS
        ],
    }
    return f"{COMMENT}{yaml.safe_dump({'groups': [group]}, sort_keys=False, width=1_000)}"


def dashboard(uid: str, title: str, panels: Sequence[Panel]) -> str:
    """One Grafana dashboard: two panels a row."""
    made: list[dict[str, Any]] = [
        {
            "id": number + 1,
            "title": each.title,
            "type": "timeseries",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "fieldConfig": {"defaults": {"unit": each.unit}, "overrides": []},
            "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
            "targets": [
                {"refId": chr(ord("A") + place), "expr": expression, "legendFormat": legend}
                for place, (expression, legend) in enumerate(each.lines)
            ],
        }
        for number, each in enumerate(panels)
    ]
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0}
    page = {
        "uid": f"argosy-{uid}",
        "title": title,
        "tags": ["argosy"],
        "schemaVersion": 39,
        "timezone": "",
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source]},
        "panels": made,
    }
    return json.dumps(page, indent=1) + "\n"


def files() -> dict[Path, str]:
    """Every generated file and its text."""
    made = {FILES / "alerts.yaml": rules()}
    for uid, (title, panels) in DASHBOARDS.items():
        made[FILES / "dashboards" / f"{uid}.json"] = dashboard(uid, title, panels)
    return made


def main(words: Sequence[str]) -> int:
    """Write the files, or with --check say which differ."""
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    if "--check" in words:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run python tools/gen_alerts.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
