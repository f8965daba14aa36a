"""The protos keep their promises, and the committed stubs say what the protos say."""

import importlib
import re
import subprocess

import pytest
from google.api.field_behavior_pb2 import OUTPUT_ONLY, field_behavior
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from services.chassis.errors import REASONS
from tests.descriptors import BUF, REPEATED, ROOT, buf, comments, compiled, enums, files, messages, methods, requests
from tools import gen_protos

SAME_AS_UNSET = re.compile(r"Unset or 0|Unset: 0|0: |0 unless")  # said by a number's comment: absence needs no value of its own
NUMBERS = {getattr(FieldDescriptorProto, f"TYPE_{name}") for name in ("INT32", "INT64", "UINT32", "UINT64", "FLOAT", "DOUBLE")}
STANDARD = ("name", "uid", "display_name", "labels", "etag", "state", "error", "create_time", "update_time", "start_time", "end_time")
RESOURCES = (
    *(
        f"argosy.v1.{kind}"
        for kind in (
            "Model",
            "ModelVersion",
            "ModelAlias",
            "Evaluation",
            "Dataset",
            "DatasetVersion",
            "Upload",
            "FineTuneJob",
            "Checkpoint",
            "Deletion",
        )
    ),
    "argosy.admin.v1.Project",
    "argosy.admin.v1.ApiKey",
    "argosy.admin.v1.QuotaPolicy",
)
INFERENCE = ("generation", "language", "embedding", "explanation")


def words(name: str) -> set[str]:
    return set(name.split("_"))


def fields() -> list[tuple[str, FieldDescriptorProto]]:
    return [(f"{name}.{field.name}", field) for name, message in messages().items() for field in message.field]


def test_lint_and_format() -> None:
    lint = buf("lint")
    assert lint.returncode == 0, lint.stdout.decode()
    for module in ("public", "internal"):
        formatted = buf("format", "--diff", "--exit-code", f"protos/{module}")
        assert formatted.returncode == 0, formatted.stdout.decode()


def test_A30_no_url_path_or_struct_field() -> None:
    banned = {"url", "urls", "uri", "uris", "path", "paths", "file", "filename", "host", "endpoint", "href"}
    assert [name for name, field in fields() if words(field.name) & banned] == []
    types = {".google.protobuf.Struct", ".google.protobuf.Value", ".google.protobuf.ListValue", ".google.protobuf.Any"}
    assert [name for name, field in fields() if field.type_name in types] == []
    assert not [
        name for name in files() if any(dependency.endswith(("struct.proto", "any.proto")) for dependency in files()[name].dependency)
    ]


def test_A17_A18_no_template_or_pattern_field() -> None:
    banned = {"template", "jinja", "regex", "pattern", "grammar", "kwargs", "script", "code"}
    ours = "argosy.internal.training.v1.AdapterManifest."  # says what was used; nothing is rendered or run by it
    allowed = {"argosy.v1.Cost.currency_code", f"{ours}template_hash", f"{ours}code_version"}  # ISO 4217
    assert [name for name, field in fields() if words(field.name) & banned and name not in allowed] == []


def test_A24_no_field_of_a_pod() -> None:
    banned = {"image", "command", "env", "environment", "volume", "mount", "annotation", "annotations", "node", "account", "namespace"}
    assert [name for name, field in fields() if words(field.name) & banned] == []


def test_public_imports_no_internal() -> None:
    for name, file in files().items():
        if name.startswith("argosy/"):
            assert all(dependency.startswith(("argosy/", "google/")) for dependency in file.dependency), name
    # A second proof, by the compiler: the public module builds where the internal one does not exist.
    alone = subprocess.run([BUF, "lint", "protos/public"], cwd=ROOT, capture_output=True, check=False)
    assert alone.returncode == 0, alone.stdout.decode()
    admin = {name for name, file in files().items() if any("/admin/" in dependency for dependency in file.dependency)}
    assert all("/admin/" in name for name in admin)


def bare(file: FileDescriptorProto) -> bytes:
    """Without what only a reader of the source needs."""
    copy = FileDescriptorProto()
    copy.CopyFrom(file)
    copy.ClearField("source_code_info")

    def strip(message: DescriptorProto) -> None:
        for field in [*message.field, *message.extension]:
            field.ClearField("json_name")
        for nested in message.nested_type:
            strip(nested)

    for message in copy.message_type:
        strip(message)
    return copy.SerializeToString(deterministic=True)


def test_stubs_say_what_the_protos_say() -> None:
    """The descriptors inside the stubs are those of the protos; needs no generator, so it holds without a network."""
    for name, file in files().items():
        stub = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
        held = FileDescriptorProto.FromString(stub.DESCRIPTOR.serialized_pb)
        assert bare(held) == bare(file), f"{name}: run `make protos`"


def test_each_proto_has_its_stubs_and_each_stub_its_proto() -> None:
    wanted = set()
    for name, file in compiled().items():
        stem = f"clients/{'internal' if name.startswith('argosy_internal') else 'python'}/{name.removesuffix('.proto')}"
        wanted |= {f"{stem}_pb2.py", f"{stem}_pb2.pyi"} | ({f"{stem}_pb2_grpc.py", f"{stem}_pb2_grpc.pyi"} if file.service else set())
    assert {str(path) for path in gen_protos.stubs(ROOT)} == wanted


def test_stubs_carry_the_comments() -> None:
    text = (ROOT / "clients/python/argosy/v1/config_pb2.pyi").read_text("utf-8")
    assert comments()["argosy.v1.Sampling.temperature"] in text


def test_stubs_on_protobuf_6_and_7() -> None:
    """The generator's own environment is the oldest we promise: protobuf 6.33, grpcio 1.81.1. This process is the newest."""
    python = gen_protos.ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-protos: `make check` makes it")
    modules = [str(path.with_suffix("")).split("/", 2)[2].replace("/", ".") for path in gen_protos.stubs(ROOT) if path.suffix == ".py"]
    roots = ":".join(str(ROOT / target) for _, _, target in gen_protos.PASSES)
    script = (
        "import google.protobuf, importlib, sys\n"
        f"assert google.protobuf.__version__.startswith('6.33.'), google.protobuf.__version__\n"
        f"for name in {sorted(modules)!r}: importlib.import_module(name)\n"
    )
    old = subprocess.run([python, "-W", "error", "-c", script], env={"PYTHONPATH": roots}, capture_output=True, text=True, check=False)
    assert old.returncode == 0, old.stderr
    for name in modules:
        importlib.import_module(name)


def test_enums_start_unspecified() -> None:
    for name, enum in enums().items():
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.rsplit(".", 1)[1]).upper()
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0), name
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value), name


def test_every_method_and_field_has_a_comment() -> None:
    named = [*methods(), *(name for name, _ in fields()), *messages()]
    assert [name for name in named if len(comments().get(name.replace("/", "."), "")) < 4] == []


def test_every_request_field_says_what_unset_means() -> None:
    silent = []
    for name in sorted(requests()):
        for field in messages()[name].field:
            if field.HasField("oneof_index") and not field.proto3_optional:
                continue  # one of several: the oneof says it
            if OUTPUT_ONLY not in field.options.Extensions[field_behavior]:
                said = comments()[f"{name}.{field.name}"]
                if not re.search(r"Required|Unset|Empty|Ignored by", said):
                    silent.append(f"{name}.{field.name}")
    assert silent == []


def test_presence() -> None:
    """A number whose zero differs from its absence is `optional`; so is a bool whose absence means true."""
    wrong = []
    for name in sorted(requests()):
        for field in messages()[name].field:
            said = comments()[f"{name}.{field.name}"]
            if field.label == REPEATED or field.proto3_optional or OUTPUT_ONLY in field.options.Extensions[field_behavior]:
                continue
            if field.type in NUMBERS and not SAME_AS_UNSET.search(said):
                wrong.append(f"{name}.{field.name}")
            if field.type == FieldDescriptorProto.TYPE_BOOL and "Unset or true" in said:
                wrong.append(f"{name}.{field.name}")
    assert wrong == []


def test_streams_share_the_request_of_their_twin() -> None:
    streams = [name for name in methods() if "/Stream" in name]
    assert len(streams) == 5
    for name in streams:
        twin = methods()[name.replace("/Stream", "/")]
        assert methods()[name].input_type == twin.input_type
        assert methods()[name].server_streaming and not twin.server_streaming
        assert methods()[name].output_type == ".argosy.v1.GenerationEvent"


def test_inference_requests_begin_and_replies_end_alike() -> None:
    for stem in INFERENCE:
        file = files()[f"argosy/v1/{stem}.proto"]
        for method in (method for service in file.service for method in service.method):
            asked = messages()[method.input_type.lstrip(".")]
            assert [(field.name, field.number) for field in asked.field[:3]] == [("model", 1), ("request_id", 2), ("work_class", 3)]
            if any(field.name == "config" for field in asked.field):
                assert asked.field[-1].name == "config"
            if method.output_type not in {".argosy.v1.GenerationEvent", ".argosy.v1.GenerationResult"}:
                assert [field.name for field in messages()[method.output_type.lstrip(".")].field[-2:]] == ["model", "usage"]


def test_numbers_follow_the_order_shown() -> None:
    """From 1, without a hole; only resources leave standard numbers free."""
    for name, message in messages().items():
        numbers = [field.number for field in message.field]
        assert numbers == sorted(numbers), name
        if name not in RESOURCES:
            assert numbers == list(range(1, len(numbers) + 1)), name


@pytest.mark.parametrize("name", RESOURCES)
def test_resources_begin_with_the_standard_fields(name: str) -> None:
    for field in messages()[name].field:
        if field.number <= 12:
            assert field.name == (*STANDARD, "expire_time")[field.number - 1]
        else:
            assert field.name not in STANDARD


def test_lists_have_pages() -> None:
    public = {name: method for name, method in methods().items() if not name.startswith("argosy.internal.")}
    lists = [method for name, method in public.items() if name.split("/")[1].startswith(("List", "Query"))]
    assert len(lists) >= 3
    for method in lists:
        asked = {field.name for field in messages()[method.input_type.lstrip(".")].field}
        assert asked >= {"page_size", "page_token"}
        assert messages()[method.output_type.lstrip(".")].field[-1].name == "next_page_token"


def test_error_reasons_are_those_that_are_raised() -> None:
    """The enum, its comments and the ServiceError family name the same reasons and codes."""
    prefix = "ERROR_REASON_"
    reasons = {value.name.removeprefix(prefix) for value in enums()["argosy.v1.ErrorReason"].value} - {"UNSPECIFIED"}
    assert reasons == set(REASONS)
    for reason in reasons:
        assert comments()[f"argosy.v1.ErrorReason.{prefix}{reason}"].startswith(f"{REASONS[reason].code}: ")


def test_the_generator_stays_one_protobuf_major_behind() -> None:
    pins = gen_protos.PINS.read_text("utf-8")
    assert "\ngrpcio-tools==1.81.1\n" in pins
    assert re.search(r"\nprotobuf==6\.33\.", pins)
