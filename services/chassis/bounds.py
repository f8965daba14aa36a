"""What a request may hold: one table (`bounds.toml`) and a few rules over several fields, the same at the gateway and in the pod.

Generic over protobuf reflection, so no stub is imported. The rules of a message type are compiled at its first check. Everything is
refused, nothing is bent; a refusal names the field's path and numbers, never a value that could be content.
"""

import functools
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from services.chassis.errors import FieldInvalid, FieldOutOfRange, PromptTooLong

TABLE: dict[str, Any] = tomllib.loads((Path(__file__).parent / "bounds.toml").read_text("utf-8"))
BOUNDS: dict[str, dict[str, dict[str, Any]]] = TABLE["bounds"]  # message's full name → field or oneof → rules
PROMPT_BYTES: int = TABLE["prompt_bytes"]
MESSAGES: int = TABLE["messages"]
VECTOR_VALUES = 786_432  # texts × dimensions of one reply: 3 MiB of floats
DECLARATION_BYTES = 8_192  # name, description and schema of one tool
SENTIMENT_LABELS = 3
USAGE_DAYS, HOURLY_DAYS = 366, 31  # ranges of QueryUsage

UUID4 = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}")
MASK_PATH = re.compile(r"\*|[a-z][a-z0-9_]{0,62}(\.[a-z][a-z0-9_]{0,62}){0,3}")
SECOND_NS = 1_000_000_000
TIMESTAMP_SECONDS = (-62_135_596_800, 253_402_300_799)  # years 1 to 9999, as protobuf says
INTEGERS = {getattr(FieldDescriptor, f"TYPE_{name}") for name in ("INT32", "INT64", "UINT32", "UINT64", "SINT32", "SINT64")}
FLOATS = {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE}


class _Reading:
    """What one check adds up: bytes of prompt, the field that took them over the limit, and messages at every depth."""

    __slots__ = ("messages", "over", "prompt")

    def __init__(self) -> None:
        self.prompt = 0
        self.over = ""
        self.messages = 0

    def add(self, size: int, path: str) -> None:
        self.prompt += size
        if self.prompt > PROMPT_BYTES and not self.over:
            self.over = path


Check = Callable[[Any, str, _Reading], None]  # value, path, reading
Together = Callable[[Any, str], None]  # message, and its path with a dot behind, or ""


def check(message: Message) -> None:
    """Return if every field of `message`, at every depth, is within its bounds.

    Raises:
        FieldOutOfRange: a number, length, count or duration; says what was asked, the limit and its unit.
        FieldInvalid: missing, malformed, unknown or not allowed beside another field.
        PromptTooLong: one text, or all together, over 262,144 bytes.
        LookupError: the table has no rule for a field that is set; a test keeps that from happening.
    """
    reading = _Reading()
    _walk(message, "", reading)
    if reading.over:
        raise PromptTooLong(reading.over, reading.prompt, PROMPT_BYTES, "bytes")


def _walk(message: Any, at: str, reading: _Reading) -> None:
    reading.messages += 1
    if reading.messages > MESSAGES:  # 65,536 parts would hold the loop for 250 ms
        raise FieldOutOfRange(at.removesuffix("."), reading.messages, MESSAGES, "items")
    descriptor = message.DESCRIPTOR
    plan = _PLANS.get(descriptor.full_name) or _compile(descriptor)
    for missing in plan.needed:
        missing(message, at)
    for field, value in message.ListFields():
        plan.checks[field.number](value, at + field.name, reading)
    for rule in plan.together:
        rule(message, at)


# --- compiling the table --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """The rules of one message type."""

    needed: tuple[Together, ...]  # what must not be missing
    checks: Mapping[int, Check]  # by field number, for fields that are set
    together: tuple[Together, ...]


_PLANS: dict[str, _Plan] = {}


def _compile(descriptor: Descriptor) -> _Plan:
    rules = BOUNDS.get(descriptor.full_name)
    if rules is None:
        raise LookupError(f"bounds.toml has no message {descriptor.full_name}")
    if absent := [field.name for field in descriptor.fields if field.name not in rules]:
        raise LookupError(f"bounds.toml has no {descriptor.full_name}.{absent[0]}")
    needed = [need for field in descriptor.fields if (need := _needed(field, rules[field.name])) is not None]
    needed += [functools.partial(_chosen, oneof.name) for oneof in descriptor.oneofs if rules.get(oneof.name, {}).get("given")]
    checks = {field.number: _field(field, rules[field.name]) for field in descriptor.fields}
    plan = _PLANS[descriptor.full_name] = _Plan(tuple(needed), checks, TOGETHER.get(descriptor.full_name, ()))
    return plan


def _chosen(oneof: str, message: Any, at: str) -> None:
    if message.WhichOneof(oneof) is None:
        raise FieldInvalid(at + oneof, "missing")


def _needed(field: FieldDescriptor, rule: Mapping[str, Any]) -> Together | None:
    """Refuses a message where `field` is missing and must not be; None: it may be missing."""
    name = field.name
    if rule.get("ignored"):
        return None
    if field.is_repeated:
        least, unit = rule.get("count", (0, 0))[0], "items"
    elif field.has_presence:
        if not rule.get("given") or field.containing_oneof is not None:
            return None

        def given(message: Any, at: str) -> None:
            if not message.HasField(name):
                raise FieldInvalid(at + name, "missing")

        return given
    elif field.enum_type is not None:
        if not rule.get("given"):
            return None

        def specified(message: Any, at: str) -> None:
            if not getattr(message, name):
                raise FieldInvalid(at + name, "missing")

        return specified
    else:
        least = rule.get("size", rule.get("bytes", rule.get("range", (0, 0))))[0]
        unit = "bytes" if "bytes" in rule or "size" in rule else _unit(field)
    if least <= 0:
        return None

    def enough(message: Any, at: str) -> None:
        if not getattr(message, name):
            raise FieldOutOfRange(at + name, 0, least, unit)

    return enough


def _field(field: FieldDescriptor, rule: Mapping[str, Any]) -> Check:
    if rule.get("ignored"):
        return _pass
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return _map(rule, _value(kind.fields_by_name["key"], rule["keys"]), _value(kind.fields_by_name["value"], rule["values"]))
    return _list(rule, _value(field, rule)) if field.is_repeated else _value(field, rule)


def _value(field: FieldDescriptor, rule: Mapping[str, Any]) -> Check:
    """The check of one value: of a singular field, an item, a key or a map's value."""
    if field.message_type is not None:
        return _message(field.message_type, rule)
    if field.enum_type is not None:
        return _enum(frozenset(field.enum_type.values_by_number) - ({0} if rule.get("given") else set()))
    if field.type in FLOATS or (field.type in INTEGERS and "range" in rule):
        return _number(rule, _unit(field))
    if field.type == FieldDescriptor.TYPE_STRING:
        return _text(rule)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(rule)
    if field.type in INTEGERS or field.type == FieldDescriptor.TYPE_BOOL:
        return _pass
    raise LookupError(f"bounds.py has no rule for the type of {field.full_name}")


def _unit(field: FieldDescriptor) -> str:
    """What the field's number counts, or ""."""
    short = ".".join(field.full_name.rsplit(".", 2)[-2:])
    return next((unit for unit, fields in TABLE["units"].items() if field.name in fields or short in fields), "")


# --- one value ------------------------------------------------------------------------------------------------------------------------


def _pass(value: Any, path: str, reading: _Reading) -> None:
    """Any value of the type."""


def _number(rule: Mapping[str, Any], unit: str) -> Check:
    least, most = rule["range"]
    beyond = bool(rule.get("open"))  # the least itself is outside

    def number(value: Any, path: str, reading: _Reading) -> None:
        if not least <= value <= most or (beyond and value == least):  # a NaN compares false
            asked = f"{value:.7g}" if isinstance(value, float) else value
            raise FieldOutOfRange(path, asked, least if value <= least else most, unit)

    return number


def _text(rule: Mapping[str, Any]) -> Check:
    least, most = rule.get("bytes", (36, 36) if rule.get("uuid4") else (0, PROMPT_BYTES))
    prompt = bool(rule.get("prompt"))
    pattern = UUID4 if rule.get("uuid4") else re.compile(_expand(rule["pattern"]), re.ASCII) if "pattern" in rule else None
    form = "uuid4" if rule.get("uuid4") else "pattern"

    def text(value: str, path: str, reading: _Reading) -> None:
        size = len(value) if value.isascii() else len(value.encode())
        if not least <= size <= most:
            if prompt and size > most == PROMPT_BYTES:
                raise PromptTooLong(path, size, most, "bytes")
            if form == "uuid4":
                raise FieldInvalid(path, form)
            raise FieldOutOfRange(path, size, least if size < least else most, "bytes")
        if "\0" in value:
            raise FieldInvalid(path, "nul")
        if pattern is not None and value and not pattern.fullmatch(value):
            raise FieldInvalid(path, form)
        if prompt:
            reading.add(size, path)

    return text


def _bytes(rule: Mapping[str, Any]) -> Check:
    least, most = rule["size"]

    def size(value: bytes, path: str, reading: _Reading) -> None:
        if not least <= len(value) <= most:
            raise FieldOutOfRange(path, len(value), least if len(value) < least else most, "bytes")

    return size


def _expand(pattern: str) -> str:
    """`pattern` with {s} and the other names of the table's [patterns] written out."""
    for name in ("model", "language", "s"):
        pattern = pattern.replace("{" + name + "}", TABLE["patterns"][name])
    return pattern


def _enum(known: frozenset[int]) -> Check:
    def enum(value: int, path: str, reading: _Reading) -> None:
        if value not in known:
            raise FieldInvalid(path, "enum")

    return enum


def _message(kind: Descriptor, rule: Mapping[str, Any]) -> Check:
    match kind.full_name:
        case "google.protobuf.Duration":
            return _duration(rule)
        case "google.protobuf.Timestamp":
            return _timestamp
        case "google.protobuf.FieldMask":
            return _mask(rule)

    def inner(value: Any, path: str, reading: _Reading) -> None:
        _walk(value, path + ".", reading)

    return inner


def _duration(rule: Mapping[str, Any]) -> Check:
    least, most = (math.floor(s * SECOND_NS + 0.5) for s in rule["seconds"])

    def duration(value: Any, path: str, reading: _Reading) -> None:
        if abs(value.nanos) >= SECOND_NS or value.seconds * value.nanos < 0:
            raise FieldInvalid(path, "duration")
        asked = value.seconds * SECOND_NS + value.nanos
        if not least <= asked <= most:
            raise FieldOutOfRange(path, f"{asked / SECOND_NS:.9g}", rule["seconds"][int(asked > most)], "seconds")

    return duration


def _timestamp(value: Any, path: str, reading: _Reading) -> None:
    if not (TIMESTAMP_SECONDS[0] <= value.seconds <= TIMESTAMP_SECONDS[1] and 0 <= value.nanos < SECOND_NS):
        raise FieldInvalid(path, "timestamp")


def _mask(rule: Mapping[str, Any]) -> Check:
    """Paths are checked against their message by the method that knows it."""
    most = rule["count"][1]

    def mask(value: Any, path: str, reading: _Reading) -> None:
        if len(value.paths) > most:
            raise FieldOutOfRange(f"{path}.paths", len(value.paths), most, "items")
        for index, each in enumerate(value.paths):
            if not MASK_PATH.fullmatch(each):
                raise FieldInvalid(f"{path}.paths[{index}]", "pattern")

    return mask


def _list(rule: Mapping[str, Any], item: Check) -> Check:
    least, most = rule["count"]
    unique = bool(rule.get("unique"))

    def items(value: Any, path: str, reading: _Reading) -> None:
        if not least <= len(value) <= most:
            raise FieldOutOfRange(path, len(value), least if len(value) < least else most, "items")
        for index, each in enumerate(value):
            item(each, f"{path}[{index}]", reading)
        if unique:
            _differ(value, path)

    return items


def _map(rule: Mapping[str, Any], key: Check, value: Check) -> Check:
    least, most = rule["count"]

    def entries(found: Any, path: str, reading: _Reading) -> None:
        if not least <= len(found) <= most:
            raise FieldOutOfRange(path, len(found), most, "items")
        for name, each in found.items():
            inside = f"{path}[{name}]" if isinstance(name, int) else path  # a caller's string stays out of the reply
            key(name, inside, reading)
            value(each, inside, reading)

    return entries


# --- rules over several fields --------------------------------------------------------------------------------------------------------


def _differ(values: Iterable[Any], path: str) -> None:
    seen = set()
    for index, each in enumerate(values):
        if each in seen:
            raise FieldInvalid(f"{path}[{index}]", "repeated")
        seen.add(each)


def turns_fit_roles(message: Any, at: str) -> None:
    """SYSTEM only first; reasoning and calls from ASSISTANT; results from TOOL, and nothing else from TOOL."""
    names = message.DESCRIPTOR.fields_by_name["messages"].message_type.fields_by_name["role"].enum_type.values_by_name
    system, assistant, tool = (names[f"ROLE_{role}"].number for role in ("SYSTEM", "ASSISTANT", "TOOL"))
    for i, said in enumerate(message.messages):
        if said.role == system and i:
            raise FieldInvalid(f"{at}messages[{i}].role", "system_only_first")
        for j, part in enumerate(said.parts):
            which = part.WhichOneof("part")
            fits = said.role == tool if which == "tool_result" else said.role == assistant if which != "text" else said.role != tool
            if not fits:
                raise FieldInvalid(f"{at}messages[{i}].parts[{j}].{which}", "part_not_of_this_role")


def tools_differ(message: Any, at: str) -> None:
    """No two declared tools of one name."""
    _differ((tool.name for tool in message.tools), f"{at}tools")


def declaration_fits(message: Any, at: str) -> None:
    """Name, description and schema of a tool share 8 KiB."""
    size = sum(len(text.encode()) for text in (message.name, message.description, message.parameters_json_schema))
    if size > DECLARATION_BYTES:
        raise FieldOutOfRange(at.removesuffix("."), size, DECLARATION_BYTES, "bytes")


def lengths_in_order(least: str, most: str) -> Together:
    """The rule that `least` is not above `most`, where both are set."""

    def in_order(message: Any, at: str) -> None:
        if message.HasField(least) and message.HasField(most) and getattr(message, least) > getattr(message, most):
            raise FieldOutOfRange(at + least, getattr(message, least), getattr(message, most), "tokens")

    return in_order


def one_output(message: Any, at: str) -> None:
    """`n` is for GenerateText and Chat."""
    if message.config.sampling.HasField("n"):
        raise FieldInvalid(f"{at}config.sampling.n", "not_of_this_method")


def summary_names_its_lengths(message: Any, at: str) -> None:
    """SummarizeText has lengths of its own: those in Stopping must be unset."""
    for name in ("max_output_tokens", "min_output_tokens"):
        if message.config.stopping.HasField(name):
            raise FieldInvalid(f"{at}config.stopping.{name}", "not_of_this_method")


def answer_fits_mode(message: Any, at: str) -> None:
    """EXTRACTIVE needs passages and takes no config; `top_k` is its own. Passages can be told apart."""
    if _extractive(message):
        if not message.passages:
            raise FieldOutOfRange(f"{at}passages", 0, 1, "items")
        if message.HasField("config"):
            raise FieldInvalid(f"{at}config", "not_of_this_mode")
    elif message.HasField("top_k"):
        raise FieldInvalid(f"{at}top_k", "not_of_this_mode")
    if len(message.passages) > 1:
        for index, passage in enumerate(message.passages):
            if not passage.id:
                raise FieldInvalid(f"{at}passages[{index}].id", "missing")
        _differ((passage.id for passage in message.passages), f"{at}passages")


def _extractive(question: Any) -> bool:
    mode: int = question.mode
    return mode != int(question.DESCRIPTOR.fields_by_name["mode"].enum_type.values_by_name["ANSWER_MODE_GENERATIVE"].number)


def top_k_within_labels(message: Any, at: str) -> None:
    """No more labels come back than there are; how many a model was tuned on is for the pod to say."""
    source = message.WhichOneof("label_source")
    labels = {"zero_shot": len(message.zero_shot.labels), "preset": SENTIMENT_LABELS}.get(source, message.top_k)
    if message.top_k > labels:
        raise FieldOutOfRange(f"{at}top_k", message.top_k, labels, "labels")


def vectors_fit_reply(message: Any, at: str) -> None:
    """texts × dimensions; where `dimensions` is unset the pod checks it with the model's size."""
    if message.dimensions * len(message.texts) > VECTOR_VALUES:
        raise FieldOutOfRange(f"{at}dimensions", message.dimensions, VECTOR_VALUES // len(message.texts), "values")


def range_in_order(message: Any, at: str) -> None:
    """`end_time` above `start_time`, by at most 366 days, or 31 by the hour."""
    if not (message.HasField("start_time") and message.HasField("end_time")):
        return
    hour = message.DESCRIPTOR.fields_by_name["interval"].enum_type.values_by_name["USAGE_INTERVAL_HOUR"].number
    most = HOURLY_DAYS if message.interval == hour else USAGE_DAYS
    asked = (message.end_time.ToNanoseconds() - message.start_time.ToNanoseconds()) / (86_400 * SECOND_NS)
    if not 0 < asked <= most:
        raise FieldOutOfRange(f"{at}end_time", f"{asked:.6g}", 0 if asked <= 0 else most, "days after start_time")


def key_has_scopes(message: Any, at: str) -> None:
    """A new key may do something."""
    if not message.api_key.scopes:
        raise FieldOutOfRange(f"{at}api_key.scopes", 0, 1, "items")


def named(resource: str) -> Together:
    """The rule that an update says what it updates."""

    def has_name(message: Any, at: str) -> None:
        if not getattr(message, resource).name:
            raise FieldOutOfRange(f"{at}{resource}.name", 0, 1, "bytes")

    return has_name


def dataset_has_format(message: Any, at: str) -> None:
    """A new dataset says what its rows are."""
    if not message.dataset.format:
        raise FieldInvalid(f"{at}dataset.format", "missing")


def model_has_base(message: Any, at: str) -> None:
    """A new model says what it builds on."""
    if not message.model.base_model:
        raise FieldOutOfRange(f"{at}model.base_model", 0, 1, "bytes")


def engine_generates(message: Any, at: str) -> None:
    """The config that counts obeys the rules of the method whose request it came with; an EXTRACTIVE answer is not generated."""
    which = message.WhichOneof("prompt")
    if which not in {"text", "chat"}:
        one_output(message, at)
    if which == "summarize":
        summary_names_its_lengths(message, at)
    if which == "answer" and _extractive(message.answer):
        raise FieldInvalid(f"{at}answer.mode", "not_of_this_method")


def engine_encodes(message: Any, at: str) -> None:
    """A GENERATIVE answer is not encoded."""
    if message.WhichOneof("task") == "answer" and not _extractive(message.answer):
        raise FieldInvalid(f"{at}answer.mode", "not_of_this_method")


TOGETHER: dict[str, tuple[Together, ...]] = {
    "argosy.v1.ChatRequest": (turns_fit_roles, tools_differ),
    "argosy.v1.ChatPrompt": (turns_fit_roles, tools_differ),
    "argosy.v1.ToolDeclaration": (declaration_fits,),
    "argosy.v1.Stopping": (lengths_in_order("min_output_tokens", "max_output_tokens"),),
    "argosy.v1.ClassifyTextRequest": (top_k_within_labels,),
    "argosy.v1.SummarizeTextRequest": (lengths_in_order("min_length", "max_length"), summary_names_its_lengths, one_output),
    "argosy.v1.TranslateTextRequest": (one_output,),
    "argosy.v1.AnswerQuestionRequest": (answer_fits_mode, one_output),
    "argosy.v1.EmbedTextsRequest": (vectors_fit_reply,),
    "argosy.admin.v1.QueryUsageRequest": (range_in_order,),
    "argosy.admin.v1.CreateApiKeyRequest": (key_has_scopes,),
    "argosy.v1.CreateDatasetRequest": (dataset_has_format,),
    "argosy.v1.UpdateDatasetRequest": (named("dataset"),),
    "argosy.v1.UpdateModelRequest": (named("model"),),
    "argosy.v1.CreateModelRequest": (model_has_base,),
    "argosy.admin.v1.UpdateProjectRequest": (named("project"),),
    "argosy.admin.v1.UpdateApiKeyRequest": (named("api_key"),),
    "argosy.internal.engine.v1.GenerateRequest": (engine_generates,),
    "argosy.internal.engine.v1.EncodeRequest": (engine_encodes,),
}
