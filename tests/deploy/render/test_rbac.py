"""Who is given which rights: the rendered roles as a golden, one line a rule. What the API server makes of them is tier 1's."""

from pathlib import Path

import pytest

from tests.deploy.templates import PLATFORM, Object, of, over, template
from tools.cluster.toolbox import Toolbox

GOLDEN = Path(__file__).with_name("rights.txt")
JOBSET = "jobset.x-k8s.io/v1alpha2"


def granted(objects: list[Object]) -> list[str]:
    """Subject, scope and rule of every binding; a binding to a role that is not rendered would be a KeyError."""
    roles = {(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]): each for each in objects if "rules" in each}
    lines = []
    for binding in of(objects, "RoleBinding") + of(objects, "ClusterRoleBinding"):
        namespace = binding["metadata"].get("namespace")
        role = roles[binding["roleRef"]["kind"], namespace, binding["roleRef"]["name"]]
        (subject,) = binding["subjects"]
        for rule in role["rules"]:
            what = ",".join(f"{group or 'core'}/{resource}" for group in rule["apiGroups"] for resource in rule["resources"])
            lines.append(f"{subject['namespace']}/{subject['name']} in {namespace or 'the cluster'}: {what} {' '.join(rule['verbs'])}")
    return sorted(lines)


def test_rbac_golden(toolbox: Toolbox) -> None:
    changes = {"gateway": {"gpuHealth": True, "modelNamespaces": ["argosy", "gpus"]}}
    platform = granted(template(toolbox.helm, "platform", over(PLATFORM, changes)))
    tenant = granted(template(toolbox.helm, "tenant", {}, namespace="acme-jobs", release="acme"))
    several_nodes = [line for line in granted(template(toolbox.helm, "platform", PLATFORM, apis=(JOBSET,))) if line not in platform]
    made = ["# platform", *platform, "# tenant", *tenant, "# platform, where JobSet is", *several_nodes]
    assert made == GOLDEN.read_text().splitlines()


def test_pods_of_replicas_are_read_only_where_that_was_asked_for(toolbox: Toolbox) -> None:
    assert not [line for line in granted(template(toolbox.helm, "platform", PLATFORM)) if "argosy-gateway" in line and "pods" in line]


@pytest.mark.parametrize("chart", ["platform", "tenant"])
def test_nothing_may_be_done_with_everything(toolbox: Toolbox, chart: str) -> None:
    for each in template(toolbox.helm, chart, PLATFORM if chart == "platform" else {}):
        for rule in each.get("rules", []) if each["kind"] in ("Role", "ClusterRole") else []:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
            assert not {"secrets", "pods/exec", "serviceaccounts/token", "roles", "rolebindings"} & set(rule["resources"])
