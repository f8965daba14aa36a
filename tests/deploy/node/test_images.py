"""Our images on a real node: restricted, on a read-only root, as nobody, with the weights mounted and out of reach."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from services.pretrained.weights import cache_directory
from tests.deploy.reach import Reach
from tools.images.debian import base
from tools.images.layers import code_layer, lock_layer
from tools.images.recipes import IMAGES, VENV

SMALL = 250_000_000  # bytes of the gateway, unpacked
SECONDS = 120  # for a pod on a busy machine: unpacking is done when it starts
POD = """
apiVersion: v1
kind: Pod
metadata: {name: %(name)s}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: it
    image: %(image)s
    imagePullPolicy: Never
    args: %(arguments)s
    %(command)s
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: tmp, mountPath: /tmp}%(mounts)s]
  volumes: [{name: tmp, emptyDir: {}}%(volumes)s]
"""
# What a pod sees of itself and of its disk; paths that take a write are faults.
LOOK = """
import json, os, pathlib, sys
def writable(path):
    try:
        (pathlib.Path(path) / "x").write_text("")
    except OSError as error:
        return error.strerror
    return "written"
status = pathlib.Path("/proc/self/status").read_text()
print(json.dumps({
    "uid": os.getuid(), "python": sys.executable, "home": os.environ["HOME"], "temporary": writable("/tmp"),
    "writes": [writable(path) for path in ("/", "/opt/argosy", "/base") if os.path.isdir(path)],
    "capabilities": [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")][0],
    "shells": [name for name in ("/bin/sh", "/bin/bash", "/usr/bin/apt-get", "/usr/bin/cc") if os.path.exists(name)],
    "base": sorted(os.listdir("/base")) if os.path.isdir("/base") else [],
}))
"""


def ran(node: Reach, namespace: str, image: str, arguments: list[str], command: str = "", weights: str = "") -> tuple[int, str]:
    """Run one pod to its end under the strictest pod security: its exit code and log."""
    name = f"run-{abs(hash((image, *arguments, weights))) % 10**8}"
    node.apply(
        namespace,
        POD
        % {
            "name": name,
            "image": image,
            "arguments": json.dumps(arguments),
            "command": command,
            "mounts": ", {name: base, mountPath: /base}" if weights else "",
            "volumes": f", {{name: base, image: {{reference: {weights!r}, pullPolicy: Never}}}}" if weights else "",
        },
    )
    try:
        node.wait(namespace, f"pod/{name}", "jsonpath={.status.containerStatuses[0].state.terminated}", SECONDS)
        pod = json.loads(node.kubectl("get", "pod", name, "-n", namespace, "-o", "json"))
        return pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], node.kubectl("logs", name, "-n", namespace)
    finally:
        node.kubectl("delete", "pod", name, "-n", namespace, "--wait=false")


def test_gateway_image_is_small_and_has_no_torch(node: Reach) -> None:
    (reference,) = node.load("gateway")
    with node.fresh_namespace() as namespace:
        code, log = ran(node, namespace, reference, ["-c", "import importlib.util as u; print(u.find_spec('torch'))"], "command: [python]")
    assert (code, log.strip()) == (0, "None")
    sizes = json.loads(node.kubectl("get", "nodes", "-o", "json"))["items"][0]["status"]["images"]
    assert [image["sizeBytes"] < SMALL for image in sizes if reference in (image["names"] or [])] == [True]


@pytest.mark.parametrize("name", ["gateway", "finetune", "inference", "trainer"])
def test_an_image_starts_restricted_on_a_read_only_root(node: Reach, name: str) -> None:
    """Its own entrypoint says which of its variables are wrong, and exits with 2: every import has worked by then."""
    (reference,) = node.load(name)
    assert reference == f"localhost/argosy-{name}:0.1.0"
    module = IMAGES[name].module
    with node.fresh_namespace() as namespace:
        code, log = ran(node, namespace, reference, ["-c", LOOK], "command: [python]")
        assert code == 0, log
        seen = json.loads(log)
        ended = ran(node, namespace, reference, [], "env: [{name: ARGOSY_LOG_LEVEL, value: LOUD}]")
    assert seen["uid"] == 65532
    assert seen["python"].startswith(f"{VENV}/bin/python")
    assert (seen["home"], seen["temporary"]) == ("/tmp/home", "written")
    assert seen["writes"] == ["Read-only file system"] * 2
    assert int(seen["capabilities"], 16) == 0
    assert seen["shells"] == []
    assert ended[0] == 2 and "ARGOSY_LOG_LEVEL" in ended[1], f"{module}: {ended}"


def test_image_weights_read_only(node: Reach) -> None:
    gateway, weights = node.load("gateway", "weights")
    with node.fresh_namespace() as namespace:
        code, log = ran(node, namespace, gateway, ["-c", LOOK], "command: [python]", weights)
    assert code == 0, log
    seen = json.loads(log)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(seen["base"])
    assert seen["writes"] == ["Read-only file system"] * 3


def test_a_layer_built_again_is_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the cache's, made at another time by an environment in another place: packages from their index, bytecode, tar."""
    kept = cache_directory(os.environ.get("ARGOSY_CACHE_DIR")) / "images"
    root = base(kept)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "bin").mkdir(parents=True)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", elsewhere)
    (elsewhere / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (elsewhere / "lib").symlink_to(Path(sys.prefix) / "lib")
    monkeypatch.setattr(sys, "executable", str(elsewhere / "bin" / "python"))
    for again, known in (
        (lock_layer(tmp_path, "gateway", root), lock_layer(kept, "gateway", root)),
        (code_layer(tmp_path, root), code_layer(kept, root)),
    ):
        assert again.path != known.path
        assert again.digest == known.digest
