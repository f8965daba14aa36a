"""What images are made from, without making them: the Dockerfile, the recipes and the locks agree, and packing is exact."""

import hashlib
import io
import json
import os
import re
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.images.archive import Layer, Owner, pack, write
from tools.images.lock import pins
from tools.images.recipes import ENVIRONMENT, IMAGES, LOCKS, ROOT, SOURCES, USER

DOCKERFILE = SOURCES / "Dockerfile"
NAME = re.compile(r"[A-Za-z0-9._-]+")


def stages() -> dict[str, list[str]]:
    """Each stage's instructions, its own FROM first and those of the stages it begins with before them."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    found: dict[str, list[str]] = {}
    own: list[str] = []
    for line in (line.strip() for line in joined.splitlines()):
        if line.startswith("FROM "):
            _, parent, *name = line.split()
            own = [*found.get(parent, []), line]
            found[name[1] if name else "image"] = own
        elif line and not line.startswith("#"):
            own.append(line)
    return found


def copies(stage: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each COPY: the stage it takes from or nothing, and its sources."""
    for line in stage:
        if line.startswith("COPY "):
            words = line.split()[1:]
            origin = words[0].removeprefix("--from=") if words[0].startswith("--from=") else ""
            yield origin, words[1 if origin else 0 : -1]


def test_dockerfile_is_one_file_with_one_argument() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^ARG (\w+)", text, re.M) == ["SERVICE"]
    assert text.rstrip().endswith("FROM ${SERVICE}")
    assert set(IMAGES) <= set(stages())


def test_dockerfile_copies_what_exists() -> None:
    known = stages()
    context = (SOURCES / "Dockerfile.dockerignore").read_text().split()
    for stage in known.values():
        for origin, sources in copies(stage):
            assert not origin or origin in known
            for source in () if origin else sources:
                if source != "wheel[s]":  # a pattern, so that it may be absent
                    assert (ROOT / source).exists(), source
                    assert any(source.startswith(kept[1:]) for kept in context if kept.startswith("!")), source


@pytest.mark.parametrize("name", IMAGES)
def test_dockerfile_and_recipe_are_one_image(name: str) -> None:
    image, known = IMAGES[name], stages()
    stage = known[name]
    entrypoints = [line.removeprefix("ENTRYPOINT ") for line in stage if line.startswith("ENTRYPOINT ")]
    assert [json.loads(entrypoint) for entrypoint in entrypoints] == [image.entrypoint]
    origins = [origin for origin, _ in copies(stage) if origin]
    ran = [line for origin in origins for line in known[origin] if line.startswith("RUN python install.py ")]
    assert ran == [
        *(f"RUN python install.py packages {lock}.lock /layer" for lock in image.locks),
        "RUN python install.py code /source /layer",
    ]
    assert [line for line in stage if line.startswith("USER ")] == [f"USER {USER}:{USER}"]
    variables = [line for line in stage if line.startswith("ENV ")]
    assert dict(pair.split("=", 1) for line in variables for pair in line.split()[1:]) == ENVIRONMENT
    assert (ROOT / image.module.replace(".", "/") / "__main__.py").exists()


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_a_hash_and_is_the_tested_version(name: str) -> None:
    text = (SOURCES / f"{name}.lock").read_text()
    for block in re.split(r"\n(?=[A-Za-z])", text)[1:]:
        assert "--hash=sha256:" in block, block
    tested = pins((ROOT / "constraints.txt").read_text())
    locked = pins(text)
    assert locked
    assert {pin: version for pin, version in locked.items() if version.partition("+")[0] != tested.get(pin, version)} == {}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_has_what_the_project_asks_for(name: str) -> None:
    """A dependency that is not locked yet: run `python -m tools.images lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [
        line for lock in IMAGES[name].locks for extra in LOCKS[lock].extras for line in project["optional-dependencies"][extra]
    ]
    wanted = {re.sub(r"[-_.]+", "-", match[0]).lower() for line in asked if (match := NAME.match(line))}
    locked = [set(pins((SOURCES / f"{lock}.lock").read_text())) for lock in IMAGES[name].locks]
    assert wanted - set().union(*locked) == set()
    assert sum(map(len, locked)) == len(set().union(*locked)), "a package in two layers is there twice"
    assert ("torch" in set().union(*locked)) == name.startswith(("inference", "trainer"))


def tree(root: Path, text: str = "print()") -> Path:
    (root / "b").mkdir(parents=True)
    (root / "b" / "run").write_text(text)
    (root / "b" / "run").chmod(0o700)
    (root / "a").symlink_to("b/run")
    (root / "c").write_bytes(b"\0" * 5000)
    return root


def test_a_layer_is_its_content_alone(tmp_path: Path) -> None:
    first, second = tree(tmp_path / "one"), tree(tmp_path / "two")
    os.utime(second / "b" / "run", (1, 1))
    (second / "c").chmod(0o600)
    owners = {"c": Owner(USER, 0o600)}
    layers = [pack(first, tmp_path / "1.tar", "x", owners), pack(second, tmp_path / "2.tar", "x", owners)]
    assert layers[0].digest == layers[1].digest == hashlib.sha256((tmp_path / "1.tar").read_bytes()).hexdigest()
    assert layers[0].size == (tmp_path / "1.tar").stat().st_size
    with tarfile.open(tmp_path / "1.tar") as tar:
        seen = {member.name: (member.uid, member.mode, member.mtime) for member in tar}
    assert seen == {"a": (0, 0o777, 315532800), "b": (0, 0o755, 315532800), "b/run": (0, 0o755, 315532800), "c": (USER, 0o600, 315532800)}
    other = pack(tree(tmp_path / "three", "print(1)"), tmp_path / "3.tar", "x", owners)
    assert other.digest != layers[0].digest


def test_a_device_in_a_layer_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither"):
        pack(tmp_path, tmp_path.parent / f"{tmp_path.name}.tar", "x")
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.tar*")) == []


def test_an_archive_is_an_oci_layout_and_a_docker_archive(tmp_path: Path) -> None:
    layers: list[Layer] = [pack(tree(tmp_path / name, name), tmp_path / f"{name}.tar", name) for name in ("low", "high")]
    digest = write(tmp_path / "image.tar", "localhost/x:1", layers, {"User": "65532:65532"}, {"a": "b"})
    written = (tmp_path / "image.tar").stat().st_ino
    assert write(tmp_path / "image.tar", "localhost/x:1", layers, {"User": "65532:65532"}, {"a": "b"}) == digest
    assert (tmp_path / "image.tar").stat().st_ino == written, "what is there is left"
    with tarfile.open(tmp_path / "image.tar") as tar:
        files = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
    for name, content in files.items():
        if name.startswith("blobs/sha256/"):
            assert hashlib.sha256(content).hexdigest() == name.rpartition("/")[2]
    (named,) = json.loads(files["index.json"])["manifests"]
    assert named["digest"] == f"sha256:{digest}"
    assert named["annotations"]["io.containerd.image.name"] == "localhost/x:1"
    manifest = json.loads(files[f"blobs/sha256/{digest}"])
    assert [layer["digest"] for layer in manifest["layers"]] == [f"sha256:{layer.digest}" for layer in layers]
    config = json.loads(files["blobs/" + manifest["config"]["digest"].replace(":", "/")])
    assert config["config"] == {"User": "65532:65532", "Labels": {"a": "b"}}
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    (docker,) = json.loads(files["manifest.json"])
    assert docker["RepoTags"] == ["localhost/x:1"]
    assert set(docker["Layers"]) | {docker["Config"]} <= set(files)
    with tarfile.open(fileobj=io.BytesIO(files[docker["Layers"][1]])) as top:
        assert {member.name for member in top} == {"a", "b", "b/run", "c"}
