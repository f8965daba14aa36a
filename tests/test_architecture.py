"""What import-linter cannot say about the house."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from argosy_internal.engine.v1 import engine_pb2
from services.gateway.access import ACCESS, SCOPES
from services.gateway.servicers.forwarded import SERVICES as FORWARDED

ROOT = Path(__file__).parents[1]
DRAWERS = {"util", "utils", "common", "helper", "helpers", "misc", "base", "manager", "managers", "shared", "lib"}
SERVICES = ("gateway", "inference", "finetune", "fleet")
MACHINE = re.compile(r"(?<![\w./])/(?:root|home/\w|Users/\w|work/\w|mnt/\w|tmp/(?!(?:x|home)\b)\w)")
REGISTRY = re.compile(
    r"pythonhosted\.org|pypi\.org|docker\.io|ghcr\.io|quay\.io|nvcr\.io|(?:extra-)?index-url|https?://[^/\s\"']*:[^/\s\"']*@"
)
ELSEWHERE = re.compile(r"(?:tests/)?deploy/|tools/images/")  # what speaks of places in a container, whose /tmp is nobody's machine
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would add, so that an export without a repository is looked at, too."""
    git = shutil.which("git")
    if git is not None and (ROOT / ".git").exists():
        listed = subprocess.run(
            [git, "ls-files", "-co", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return sorted({ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()})
    hidden = (".venv", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache", "build")
    found = (path for pattern in patterns or ("*",) for path in ROOT.rglob(pattern))
    return sorted({path for path in found if path.is_file() and not any(part in hidden for part in path.relative_to(ROOT).parts)})


def written() -> list[Path]:
    """Python that people wrote."""
    return [path for path in tracked("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def public() -> Iterator[tuple[Path, ServiceDescriptor]]:
    """Every public service, with the proto file it stands in."""
    for proto in sorted((ROOT / "protos" / "public").rglob("*.proto")):
        module = ".".join(proto.relative_to(ROOT / "protos" / "public").with_suffix("").parts) + "_pb2"
        for service in importlib.import_module(module).DESCRIPTOR.services_by_name.values():
            yield proto, service


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_drawer_names() -> None:
    for path in written():
        parts = {part.removesuffix(".py").removeprefix("test_") for part in path.relative_to(ROOT).parts}
        assert not parts & DRAWERS, path
    for path in (path for path in written() if path.is_relative_to(ROOT / "services")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith(("Manager", "Helper", "Util", "Utils")), f"{path.name}: {node.name}"


def test_two_services_stand_behind_each_chassis_module() -> None:
    users: dict[str, set[str]] = defaultdict(set)
    inner: dict[str, set[str]] = {}
    modules = {path.stem for path in (ROOT / "services" / "chassis").glob("*.py")} - {"__init__"}
    for path in (path for path in written() if path.is_relative_to(ROOT / "services")):
        owner = path.relative_to(ROOT / "services").parts[0].removesuffix(".py")
        used = {module for module in modules if f"services.chassis.{module}" in imports(path)}
        if owner == "chassis":
            inner[path.stem] = used
        else:
            for module in used:
                users[module].add(owner)
    for _ in modules:  # what a module needs has that module's users, too
        for module, used in inner.items():
            for each in used:
                users[each] |= users[module]
    assert {module: users[module] for module in modules if len(users[module] & set(SERVICES)) < 2} == {}


def test_every_rpc_has_scope_cost_idempotency() -> None:
    methods = {f"/{service.full_name}/{method.name}": method for _, service in public() for method in service.methods}
    assert methods.keys() == ACCESS.keys()
    for path, method in methods.items():
        row = ACCESS[path]
        assert row.scope is None or row.scope in SCOPES, path
        assert row.stream == method.server_streaming, path


def test_every_public_service_has_a_servicer_of_its_stem() -> None:
    seen = 0
    for proto, service in public():
        if service in FORWARDED:
            continue
        module = importlib.import_module(f"services.gateway.servicers.{proto.stem}")
        servicer = getattr(module, f"{service.name}r")
        assert [method.name for method in service.methods if not callable(getattr(servicer, method.name, None))] == []
        seen += 1
    assert seen >= 8 and {service.full_name for service in FORWARDED} == {
        f"argosy.v1.{name}Service" for name in ("Dataset", "FineTune", "Model")
    }
    engine = importlib.import_module("services.inference.servicers.engine").EngineServicer
    assert all(callable(getattr(engine, method.name, None)) for method in engine_pb2.DESCRIPTOR.services_by_name["EngineService"].methods)


def test_only_argosy_is_in_the_client_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "clients" / "python", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("argosy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"argosy"}
    assert {"argosy/py.typed", "argosy/client.py", "argosy/v1/generation_pb2.py", "argosy/v1/generation_pb2.pyi"} <= set(names)
    assert "Requires-Dist: argosy-platform" not in metadata


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md"])
def test_documents_name_only_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:services|clients|protos|tests|tools|examples|benchmarks|docs|deploy)/[\w./-]*)`", text)
    assert named or document != "ARCHITECTURE.md"
    assert [name for name in named if not (ROOT / name).exists()] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
    if document == "ARCHITECTURE.md":
        assert len(text.splitlines()) <= 150


WIRE = ("services.fleet", "services.gateway.__main__", "services.inference.__main__", "services.inference.engine.host")


@pytest.mark.parametrize("module", WIRE)
def test_the_process_that_answers_the_wire_has_no_torch(module: str) -> None:
    unwanted = "torch transformers kubernetes safetensors.torch pandas argosy.client argosy.aio"
    program = f"import sys, {module}; print(*(name for name in '{unwanted}'.split() if name in sys.modules))"
    path = [str(ROOT), str(ROOT / "clients" / "python"), str(ROOT / "clients" / "internal")]
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {program}"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []


def test_no_machine_and_no_registry_is_named() -> None:
    found = []
    for path in tracked():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        name = str(path.relative_to(ROOT))
        matches = [match.group() for match in (*MACHINE.finditer(text), *REGISTRY.finditer(text))]
        found += [f"{name}: {match}" for match in matches if not (match.startswith("/tmp") and ELSEWHERE.match(name))]
    assert found == []


def test_nothing_unpickles_and_no_model_brings_code() -> None:
    """Tests may write pickles, to see them refused."""
    for path in written():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            hostile = path.is_relative_to(ROOT / "tests")  # what a test writes to see it refused
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not hostile:
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                assert (owner, node.func.attr) not in {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("np", "load")}, path
        if not path.is_relative_to(ROOT / "tests"):
            assert not {name.split(".")[0] for name in imports(path)} & UNPICKLERS, path
