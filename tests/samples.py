"""The smallest request of each type that passes its bounds: what tests over every method start from."""

import importlib
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor

from argosy.v1 import content_pb2, dataset_pb2
from services.chassis.bounds import BOUNDS
from tests.descriptors import files

for proto in files():
    importlib.import_module(proto.removesuffix(".proto").replace("/", ".") + "_pb2")  # into the pool

MODEL = "models/tiny"
SAMPLES = {  # a value of each pattern
    "{s}": "a-1",
    "{model}": MODEL,
    "{language}": "en",
    "projects/{s}": "projects/p",
    "projects/{s}/apiKeys/{s}": "projects/p/apiKeys/k",
    "projects/{s}/quotaPolicy": "projects/p/quotaPolicy",
    "(projects/{s}/)?models/{s}": MODEL,
    "models/{s}": MODEL,
    **{
        name: name.replace("{s}", "1")
        for name in (
            "projects/{s}/models/{s}",
            "projects/{s}/models/{s}/versions/{s}",
            "projects/{s}/models/{s}/aliases/{s}",
            "projects/{s}/models/{s}/evaluations/{s}",
            "projects/{s}/datasets/{s}",
            "projects/{s}/datasets/{s}/versions/{s}",
            "projects/{s}/datasets/{s}/uploads/{s}",
            "projects/{s}/fineTuneJobs/{s}",
            "projects/{s}/fineTuneJobs/{s}/checkpoints/{s}",
            "projects/{s}/deletions/{s}",
        )
    },
    "[0-9a-f]{64}": "0" * 64,
    "[0-9a-f-]{36}": "0b5f1d3e-8c1a-4e53-9c43-1f6f8a3f9b10",
    "[a-z0-9_.-]+": "adapter.safetensors",
    "[,;|\t]": ";",
    "[A-Za-z0-9_-]+": "tool",
    "[A-Z]+": "EUR",
    r"[a-z_]+(\.[a-z_]+)?": "models.read",
    "[a-z0-9._-]{1,63}": "team",
}
UUID = "0b5f1d3e-8c1a-4e53-9c43-1f6f8a3f9b10"


def new(name: str) -> Any:
    """An empty message by its full name."""
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))()


def sample(field: FieldDescriptor, rule: dict[str, Any], salt: int = 0) -> Any:
    """A small value that the rule allows; `salt` makes another."""
    if field.message_type is not None:
        return smallest(field.message_type.full_name)
    if field.enum_type is not None:
        return content_pb2.ROLE_USER if field.name == "role" else 1
    if field.type == FieldDescriptor.TYPE_STRING:
        if rule.get("uuid4"):
            return UUID
        if "pattern" in rule:
            return SAMPLES[rule["pattern"]]
        return f"{salt}" * max(1, rule["bytes"][0])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"x" * rule["size"][0]
    return rule["range"][1]


def smallest(name: str) -> Any:
    """A message that passes with as little in it as possible."""
    message = new(name)
    rules = BOUNDS[name]
    for oneof in message.DESCRIPTOR.oneofs:
        if rules.get(oneof.name, {}).get("given"):
            put(message, oneof.fields[0], rules[oneof.fields[0].name])
    for field in message.DESCRIPTOR.fields:
        rule = rules[field.name]
        if rule.get("ignored") or field.containing_oneof is not None:
            continue
        numbers = () if field.has_presence else rule.get("range", (0,))
        least = next(iter(rule.get("count", rule.get("bytes", rule.get("size", numbers)))), 0)
        if least > 0 or (rule.get("given") and not field.is_repeated):
            put(message, field, rule, max(1, least) if field.is_repeated else 1)
    match name:
        case "argosy.v1.AnswerQuestionRequest":
            message.passages.add(text="It rained.")
        case "argosy.v1.CreateDatasetRequest":
            message.dataset.format = dataset_pb2.DATASET_FORMAT_CHAT
        case "argosy.v1.UpdateDatasetRequest":
            message.dataset.name = "projects/p/datasets/d"
        case "argosy.v1.CreateModelRequest":
            message.model.base_model = MODEL
        case "argosy.v1.UpdateModelRequest":
            message.model.name = "projects/p/models/m"
        case "argosy.admin.v1.CreateApiKeyRequest":
            message.api_key.scopes.append("generate")
        case "argosy.admin.v1.UpdateApiKeyRequest":
            message.api_key.name = "projects/p/apiKeys/k"
        case "argosy.admin.v1.UpdateProjectRequest":
            message.project.name = "projects/p"
    return message


def put(message: Any, field: FieldDescriptor, rule: dict[str, Any], count: int = 1, value: Any = None) -> None:
    """Set `field`, or fill its list or map with `count` values."""
    here = getattr(message, field.name)
    if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        for salt in range(count):
            key = salt if entry["key"].type != FieldDescriptor.TYPE_STRING else f"k{salt}"
            here[key] = sample(entry["value"], rule["values"]) if value is None else value
    elif field.is_repeated:
        values = [sample(field, rule, salt % 10) for salt in range(count)] if value is None else [value] * count
        if rule.get("unique") and value is None and field.type == FieldDescriptor.TYPE_STRING:
            values = [f"{each}{chr(97 + salt // 26)}{chr(97 + salt % 26)}" for salt, each in enumerate(values)]
        here.extend(values)
    elif field.message_type is not None:
        here.CopyFrom(sample(field, rule) if value is None else value)
    else:
        setattr(message, field.name, sample(field, rule) if value is None else value)
