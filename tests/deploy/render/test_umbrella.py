"""The umbrella is its parts, and says nothing of its own."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.templates import BASE, CHARTS, PLATFORM, Object, Refusal, over, template
from tools.cluster.toolbox import Toolbox

MODELS: Object = {"models": {"gemma-3-270m": BASE | {"pool": "cpu", "replicas": 2}}}
RANDOM = {"argosy-keys", "argosy-ca", "argosy-tls"}  # Secrets that each rendering without a cluster makes anew


def comparable(objects: list[Object]) -> dict[tuple[str, str, str], Any]:
    found = {}
    for each in objects:
        key = each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]
        assert key not in found, key
        found[key] = sorted(each["data"]) if each["kind"] == "Secret" and each["metadata"]["name"] in RANDOM else each
    return found


def umbrella(toolbox: Toolbox, changes: Object | None = None) -> list[Object]:
    parts = {name: value for name, value in PLATFORM.items() if name != "global"}
    return template(toolbox.helm, "argosy", over({"global": PLATFORM["global"], "platform": parts, "models": MODELS}, changes or {}))


def test_umbrella_equals_parts(toolbox: Toolbox) -> None:
    whole = comparable(umbrella(toolbox))
    platform = comparable(template(toolbox.helm, "platform", PLATFORM))
    # A release of models alone makes no Secrets, and names those of the platform's.
    named = {"tls": {"mode": "existingSecret", "existingSecret": "argosy-tls"}, "keys": {"existingSecret": "argosy-keys"}}
    models = comparable(template(toolbox.helm, "models", {"global": PLATFORM["global"] | named} | MODELS))
    assert not platform.keys() & models.keys()
    assert whole == platform | models


def test_each_part_can_be_left_out(toolbox: Toolbox) -> None:
    both = comparable(umbrella(toolbox)).keys()
    platform = comparable(umbrella(toolbox, {"models": {"enabled": False}})).keys()
    models = comparable(umbrella(toolbox, {"platform": {"enabled": False}})).keys()
    assert platform and models and platform | models == both and not platform & models


def test_a_typo_is_refused_in_every_part(toolbox: Toolbox) -> None:
    typos = {"typo": 1, "global": {"typpo": 1}, "platform": {"gateway": {"replcas": 1}}, "models": {"defalts": {}}}
    with pytest.raises(Refusal) as refused:
        umbrella(toolbox, typos)
    for key in ("'typo'", "'typpo'", "'replcas'", "'defalts'"):
        assert key in str(refused.value)


def test_charts_are_links_and_no_archive() -> None:
    """Whoever installs from a clone needs no `helm dependency build`; and what a chart names is what it gets."""
    for chart in ("argosy", "platform", "models", "tenant"):
        wanted = yaml.safe_load((CHARTS / chart / "Chart.yaml").read_text())
        for dependency in wanted["dependencies"]:
            link = CHARTS / chart / "charts" / dependency["name"]
            assert link.is_symlink()
            assert link.resolve() == CHARTS / dependency["name"]
            assert yaml.safe_load((link / "Chart.yaml").read_text())["version"] == dependency["version"]
        assert wanted["kubeVersion"] == ">=1.34.0-0"
    assert not list(CHARTS.rglob("*.tgz"))


def test_operators_are_told_a_values_file_that_renders(toolbox: Toolbox) -> None:
    """The `my-pools.yaml` of docs/operators.md, with digests in place of its ellipses."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "operators.md").read_text()
    (block,) = [each for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "nodePools" in each]
    objects = template(toolbox.helm, "argosy", yaml.safe_load(block.replace("sha256:…", f"sha256:{'0' * 64}")))
    assert {each["metadata"]["name"] for each in objects if each["kind"] == "Deployment"} == {
        "argosy-gateway",
        "argosy-finetune",
        "argosy-model-gemma-3-270m",
    }
