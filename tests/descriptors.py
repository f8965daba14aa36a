"""The protos as buf reads them, comments included: what the stubs, the bounds table and the comments are compared with."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from google.api import field_behavior_pb2, field_info_pb2, resource_pb2  # noqa: F401  registers the options
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.descriptor_pb2 import MethodDescriptorProto as Method

ROOT = Path(__file__).resolve().parent.parent
BUF = Path(sys.executable).with_name("buf")
OPTIONAL, REPEATED = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED


def buf(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([BUF, *arguments], cwd=ROOT, capture_output=True, check=False)


@functools.cache
def compiled() -> dict[str, FileDescriptorProto]:
    """What stubs are made of, by name: our own files, and the contracts of others that we serve (KEDA's)."""
    built = buf("build", "--as-file-descriptor-set", "-o", "-")
    assert built.returncode == 0, built.stderr.decode()
    found = FileDescriptorSet.FromString(built.stdout).file
    return {file.name: file for file in found if file.name.startswith("argosy")}


@functools.cache
def files() -> dict[str, FileDescriptorProto]:
    """Our own files by name, public and internal: those whose words are ours to choose."""
    return {name: file for name, file in compiled().items() if file.package.startswith("argosy.")}


@functools.cache
def messages() -> dict[str, DescriptorProto]:
    """Every message by full name, map entries left out."""

    def walk(prefix: str, nested: list[DescriptorProto]) -> Iterator[tuple[str, DescriptorProto]]:
        for message in nested:
            if not message.options.map_entry:
                yield f"{prefix}.{message.name}", message
                yield from walk(f"{prefix}.{message.name}", list(message.nested_type))

    return {name: message for file in files().values() for name, message in walk(file.package, list(file.message_type))}


@functools.cache
def enums() -> dict[str, EnumDescriptorProto]:
    top = {f"{file.package}.{enum.name}": enum for file in files().values() for enum in file.enum_type}
    return top | {f"{name}.{enum.name}": enum for name, message in messages().items() for enum in message.enum_type}


@functools.cache
def methods() -> dict[str, Method]:
    """By "package.Service/Method"."""
    return {
        f"{file.package}.{service.name}/{method.name}": method
        for file in files().values()
        for service in file.service
        for method in service.method
    }


@functools.cache
def comments() -> dict[str, str]:
    """Leading comment, on one line, by full name: messages, fields, oneofs."""
    found = {}
    for file in files().values():
        for location in file.source_code_info.location:
            name, path, here = file.package, list(location.path), file
            while len(path) >= 2 and here is not None:
                number, index, *path = path
                kind = type(here).DESCRIPTOR.fields_by_number[number]
                if not kind.is_repeated or kind.message_type is None:
                    break
                here = getattr(here, kind.name)[index]
                name = f"{name}.{here.name}" if hasattr(here, "name") else name
            else:
                if not path:
                    found[name] = " ".join(location.leading_comments.split())
    return found


@functools.cache
def requests() -> frozenset[str]:
    """Full names of every message that a caller can send, at any depth, what only the server sets left out."""
    waiting = [method.input_type.lstrip(".") for method in methods().values()]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in messages():
            continue
        seen.add(name)
        for field in messages()[name].field:
            if field_behavior_pb2.OUTPUT_ONLY not in field.options.Extensions[field_behavior_pb2.field_behavior]:
                waiting.append(field.type_name.lstrip("."))
    return frozenset(seen)
