"""Charts as Helm renders them, without a cluster: objects, or the sentences of a refusal."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CHARTS = Path(__file__).resolve().parents[2] / "deploy" / "helm"
Object = dict[str, Any]


class Refusal(AssertionError):
    """Helm would not render; the text is what the operator reads."""


def template(
    helm: Path,
    chart: str,
    values: Mapping[str, Any],
    *arguments: str,
    release: str = "argosy",
    namespace: str = "argosy",
    apis: Sequence[str] = (),
) -> list[Object]:
    """The objects of a chart with these values; `apis` are what the cluster is said to have. Raises Refusal."""
    named = [word for api in apis for word in ("--api-versions", api)]
    text = _rendered(
        (str(helm), "template", release, str(CHARTS / chart), "-n", namespace, "-f", "-", *arguments, *named), json.dumps(values)
    )
    return [each for each in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if each]


@cache
def _rendered(words: tuple[str, ...], values: str) -> str:
    done = subprocess.run(words, input=values, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Refusal(done.stderr)
    return done.stdout


def find(objects: Sequence[Object], kind: str, name: str, namespace: str | None = None) -> Object:
    """The one object of this kind and name."""
    found = [
        each
        for each in objects
        if each["kind"] == kind and each["metadata"]["name"] == name and namespace in (None, each["metadata"].get("namespace"))
    ]
    assert len(found) == 1, f"{kind} {name}: {len(found)} of {sorted((o['kind'], o['metadata']['name']) for o in objects)}"
    return found[0]


def of(objects: Sequence[Object], kind: str) -> list[Object]:
    """All objects of a kind."""
    return [each for each in objects if each["kind"] == kind]


def variables(container: Object) -> dict[str, Any]:
    """A container's environment: name → value, or where it comes from."""
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", [])}


# Enough for the platform chart to render: one pool without GPUs, one base, a store of files, a database by URL.
BASE = {"weights": {"source": "image", "ref": "localhost/argosy-weights-gemma-3-270m", "digest": f"sha256:{'0' * 64}"}}
PLATFORM: Object = {
    "global": {
        "database": {"url": "postgresql://argosy:secret@10.99.0.1:5432/argosy"},
        "store": {"url": "file:///store", "existingClaim": "argosy-store"},
        "nodePools": {"cpu": {"match": {"argosy.dev/pool": ["cpu"]}, "gpu": {"mode": "none"}}},
    },
    "finetune": {"gpus": 0, "bases": {"gemma-3-270m": BASE}},
}


def over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Object:
    """`values` with `changes` merged in, maps deeply, as Helm merges two files."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = over(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return merged
