"""Where a replica's files come from: an image, a claim, or a fetch that the rollout waits for."""

import pytest

from services.pretrained import prefetch
from tests.deploy.render.conftest import DIGEST, H100, Models, model
from tests.deploy.templates import Object, find, of, over

NAME = ("Deployment", "argosy-model-m")
FOLDER = DIGEST.replace(":", "-")
HUB: Object = {"source": "hf", "ref": "org/name", "digest": DIGEST, "size": "40Gi", "revision": "abc"}


def pod_of(objects: list[Object]) -> Object:
    return dict(find(objects, *NAME)["spec"]["template"]["spec"])


def volume(pod: Object) -> Object:
    (found,) = (each for each in pod["volumes"] if each["name"] == "weights")
    return {key: value for key, value in found.items() if key != "name"}


def mount(container: Object) -> Object:
    (found,) = (each for each in container["volumeMounts"] if each["name"] == "weights")
    return dict(found)


def test_an_image_is_pinned_and_mounted_at_its_root(models: Models) -> None:
    """subPath is ignored without an error on such a volume, so the files are at the root."""
    pod = pod_of(models({"m": model(weights={"pullPolicy": "Always"})}))
    assert volume(pod) == {"image": {"reference": f"registry/weights@{DIGEST}", "pullPolicy": "Always"}}
    assert mount(pod["containers"][0]) == {"name": "weights", "mountPath": "/weights", "readOnly": True}
    assert "initContainers" not in pod


def test_images_need_a_cluster_that_mounts_them(models: Models) -> None:
    assert "mounts no images" in models.refusal({"m": model()}, kube="1.34.2")
    assert models({"m": model(weights={"source": "pvc", "claim": "c", "path": "p", "ref": "", "digest": ""})}, kube="1.34.2")


def test_a_claim_that_exists(models: Models) -> None:
    for given, folder in (({"path": "chat/8b", "digest": ""}, "chat/8b"), ({"digest": DIGEST}, FOLDER)):
        objects = models({"m": model(weights={"source": "pvc", "claim": "shared-weights", "ref": "", **given})})
        pod = pod_of(objects)
        assert volume(pod) == {"persistentVolumeClaim": {"claimName": "shared-weights", "readOnly": True}}
        assert mount(pod["containers"][0])["subPath"] == folder
        assert "initContainers" not in pod
        assert not of(objects, "Job") + of(objects, "PersistentVolumeClaim")


@pytest.mark.parametrize(
    ("weights", "source"),
    [(HUB, "hf://org/name"), ({**HUB, "source": "pvc", "ref": "s3://bucket/chat"}, "s3://bucket/chat")],
)
def test_prefetch_gates_rollout(models: Models, weights: Object, source: str) -> None:
    """A Job fills the claim; the pods wait for the folder that it makes, and mount nothing else of the claim."""
    objects = models({"m": model(weights=weights)})
    (job,), (claim,) = of(objects, "Job"), of(objects, "PersistentVolumeClaim")
    fetch, pod = job["spec"]["template"]["spec"], pod_of(objects)
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["resources"]["requests"]["storage"] == "40Gi"
    assert volume(fetch) == {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    assert volume(pod) == {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"], "readOnly": True}}
    assert fetch["serviceAccountName"] == pod["serviceAccountName"]  # whom a cloud lets read the bucket
    words = fetch["containers"][0]["command"]
    assert words[:3] == ["python", "-m", prefetch.__name__]
    assert words[3:] == [source, f"/weights/{FOLDER}", "--digest", DIGEST, "--revision", "abc"]
    (wait,) = pod["initContainers"]
    assert wait["command"] == [*words, "--wait"]
    assert mount(pod["containers"][0])["subPath"] == FOLDER
    assert "subPath" not in mount(wait)
    (policy,) = (each for each in of(objects, "NetworkPolicy") if each["metadata"]["name"] == "argosy-weights-m")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert find(objects, *NAME)["spec"]["progressDeadlineSeconds"] > job["spec"]["activeDeadlineSeconds"]


def test_the_fetching_pods_are_no_replicas(models: Models) -> None:
    """A Service or a budget that took them for some would route to them."""
    objects = models({"m": model(weights=HUB)})
    (job,) = of(objects, "Job")
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert not find(objects, "Service", "argosy-model-m")["spec"]["selector"].items() <= labels.items()
    assert labels["app.kubernetes.io/component"] == "weights"


def test_another_fetch_is_another_job(models: Models) -> None:
    """A Job's template can never be changed."""

    def name(**weights: str) -> str:
        (job,) = of(models({"m": model(weights={**HUB, **weights})}), "Job")
        return str(job["metadata"]["name"])

    assert name() == name(size="50Gi") != name(revision="def")


def test_a_token_of_the_hub(models: Models) -> None:
    objects = models({"m": model(weights={**HUB, "tokenSecret": {"name": "hub"}})})
    (job,) = of(objects, "Job")
    (found,) = (each for each in job["spec"]["template"]["spec"]["containers"][0]["env"] if each["name"] == "HF_TOKEN")
    assert found["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert "HF_TOKEN" not in {each["name"] for each in pod_of(objects)["containers"][0]["env"]}


def test_a_disk_of_the_node(models: Models) -> None:
    """Each pod fetches onto its own; there is no claim to share and no Job."""
    objects = models({"m": model(weights=HUB)}, {"h100": over(H100, {"cacheClass": "local-nvme"})})
    pod = pod_of(objects)
    spec = volume(pod)["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (spec["storageClassName"], spec["resources"]["requests"]["storage"]) == ("local-nvme", "40Gi")
    (fetch,) = pod["initContainers"]
    assert "--wait" not in fetch["command"]
    assert mount(pod["containers"][0])["subPath"] == FOLDER
    assert not of(objects, "Job") + of(objects, "PersistentVolumeClaim")
    egress = find(objects, "NetworkPolicy", "argosy-model")["spec"]["egress"]
    assert 443 in {port["port"] for rule in egress for port in rule["ports"]}
