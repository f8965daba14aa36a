"""The bounds table: complete, in agreement with the protos' comments, and exact at every edge. Any message may be checked alone."""

import math
import random
import re
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argosy.admin.v1 import api_key_pb2, project_pb2, usage_pb2
from argosy.v1 import config_pb2, content_pb2, embedding_pb2, generation_pb2, language_pb2, model_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis import bounds
from services.chassis.bounds import BOUNDS, PROMPT_BYTES, check
from services.chassis.errors import FieldInvalid, FieldOutOfRange, PromptTooLong, ServiceError
from tests.descriptors import comments, messages, requests
from tests.samples import MODEL, UUID, new, put, smallest

DERANDOMISED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
SHARED = {"argosy.v1.ToolDeclaration": 8_192 - 4}  # its three texts share one limit


def clear(name: str, field: str) -> tuple[Any, FieldDescriptor, dict[str, Any]]:
    message = smallest(name)
    message.ClearField(field)
    return message, message.DESCRIPTOR.fields_by_name[field], BOUNDS[name][field]


def refused(message: Message) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        check(message)
    return caught.value


def with_rule(key: str) -> list[tuple[str, str]]:
    return [(name, field) for name, rules in BOUNDS.items() for field, rule in rules.items() if key in rule]


# --- the table ------------------------------------------------------------------------------------------------------------------------


def test_every_request_field_has_bounds() -> None:
    """A new field of a request fails here until the table bounds it; a dropped one until the table forgets it."""
    assert set(BOUNDS) == requests()
    for name, message in messages().items():
        if name not in BOUNDS:
            continue
        oneofs = {oneof.name for oneof in message.oneof_decl if not oneof.name.startswith("_")}
        assert set(BOUNDS[name]) <= {field.name for field in message.field} | oneofs, name
        assert {field.name for field in message.field} <= set(BOUNDS[name]), name
        for field in new(name).DESCRIPTOR.fields:
            where, rule = f"{name}.{field.name}", BOUNDS[name].get(field.name)
            assert rule is not None, f"{where} has no bounds"
            if rule.get("ignored"):
                continue
            if field.is_repeated:
                assert "count" in rule, f"{where}: how many?"
            if field.type == FieldDescriptor.TYPE_STRING:
                assert "bytes" in rule or "uuid4" in rule, f"{where}: how long?"
            if field.type == FieldDescriptor.TYPE_BYTES:
                assert "size" in rule, f"{where}: how long?"
            if field.type in bounds.FLOATS or (field.type in bounds.INTEGERS and where != "argosy.v1.Sampling.seed"):
                assert "range" in rule, f"{where}: between what?"
            if field.message_type is not None and field.message_type.full_name == "google.protobuf.Duration":
                assert "seconds" in rule, f"{where}: how long?"


def number(value: float) -> str:
    return f"{value:,}"


def seconds(value: float) -> str:
    if 0 < value < 1:
        return f"{value * 1_000:g} ms"
    return f"{value // 86_400:,} days" if value >= 86_400 else f"{value:g} s"


def phrases(rule: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a comment must say; of each tuple one."""
    said: list[tuple[str, ...]] = []
    if "range" in rule:
        least, most = (number(n) for n in rule["range"])
        said.append((f"above {least}, to {most}",) if rule.get("open") else (f"{least}..{most}", f"0..10^{len(str(rule['range'][1])) - 1}"))
    if "values" in rule and "range" in rule["values"]:
        least, most = (number(n) for n in rule["values"]["range"])
        said.append((f"{least}..{most}",))
    if "count" in rule:
        least, most = (number(n) for n in rule["count"])
        said.append((f"{least}..{most}", f"≤{most}"))
    if "bytes" in rule and rule.get("pattern") != "{s}":
        least, most = (number(n) for n in rule["bytes"])
        exact = rule["bytes"][0] == rule["bytes"][1]
        whole = {3: "3 capital letters", 36: "UUID", 64: "64 hex digits"}
        said.append((whole[rule["bytes"][0]],) if exact else (f"{least}..{most} bytes", f"{least}..{most} of ", f"≤{most} bytes"))
    if "size" in rule:
        least, most = (number(n) for n in rule["size"])
        said.append((f"{least}..{most} bytes",))
    if "seconds" in rule:
        least, most = rule["seconds"]
        first = seconds(least).removesuffix(" days") if least >= 86_400 else seconds(least) if least else 0
        said.append((f"{first}..{seconds(most)}",))
    return said


def test_bounds_match_comments() -> None:
    """What a reader is promised is what is checked: each limit of the table stands in its field's comment."""
    wrong = []
    for name, rules in BOUNDS.items():
        for field, rule in rules.items():
            said = comments()[f"{name}.{field}"]
            for any_of in phrases(rule):
                if not any(phrase in said for phrase in any_of):
                    wrong.append(f"{name}.{field}: {' or '.join(any_of)!r} is not in {said!r}")
            if rule.get("uuid4") and "UUID4" not in said:
                wrong.append(f"{name}.{field}: a UUID4, says the table")
            if rule.get("prompt") and "without NUL" not in said and rule["bytes"][0]:
                wrong.append(f"{name}.{field}: NUL is refused")
    assert not wrong, "\n".join(wrong)


def test_comments_promise_no_other_limits() -> None:
    """The other way round: a range in a comment is one that the table holds."""
    wrong = []
    for name, rules in BOUNDS.items():
        for field, rule in rules.items():
            if rule.get("ignored"):
                continue
            for least, most in re.findall(
                r"(?<![\w.])(-?[\d,]+)\.\.([\d,]+)(?![\w.^]|,\d)(?! s\b| days| ms)", comments()[f"{name}.{field}"]
            ):
                held = [rule.get(key) for key in ("range", "count", "bytes", "size")] + [rule.get("values", {}).get("range")]
                if [int(least.replace(",", "")), int(most.rstrip(",").replace(",", ""))] not in held:
                    wrong.append(f"{name}.{field}: {least}..{most}")
    assert not wrong, "\n".join(wrong)


def test_the_smallest_of_each_request_passes() -> None:
    for name in BOUNDS:
        check(smallest(name))


# --- every edge -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "field"), with_rule("range"))
def test_each_range_holds_its_ends_and_nothing_beyond(name: str, field: str) -> None:
    message, descriptor, rule = clear(name, field)
    least, most = rule["range"]
    floating = descriptor.type in bounds.FLOATS
    inside = [math.nextafter(least, math.inf) * 2 + 1e-6 if rule.get("open") else least, most]
    for value in inside:
        setattr(message, field, value)
        check(message)
    beyond: list[Any] = [most + 1, *([least] if rule.get("open") else [])]
    if floating:
        beyond += [math.nan, math.inf, -math.inf, most + 1e-4, least - 1e-4]
    elif descriptor.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64):
        beyond += [least - 1, -1 << 31]
    unsigned = descriptor.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)
    widest = (2**32 if descriptor.type == FieldDescriptor.TYPE_UINT32 else 2**64 if unsigned else 2**63) - 1
    for value in (value for value in beyond if floating or (value <= widest and (least or value >= 0 or not unsigned))):
        setattr(message, field, value)
        error = refused(message)
        assert isinstance(error, FieldOutOfRange) and error.metadata["field"] == field
        assert error.metadata["limit"] in {str(least), str(most)}
        assert error.metadata["asked"] == (f"{getattr(message, field):.7g}" if floating else str(value))


@pytest.mark.parametrize(("name", "field"), with_rule("bytes"))
def test_each_text_holds_its_length_in_bytes(name: str, field: str) -> None:
    message, descriptor, rule = clear(name, field)
    least, most = rule["bytes"]
    path = f"{field}[0]" if descriptor.is_repeated else field
    count = max(1, rule["count"][0]) if descriptor.is_repeated else 1
    filler = [str(n) * max(1, least) for n in range(1, count)]

    def write(value: str) -> None:
        message.ClearField(field)
        if descriptor.is_repeated:
            getattr(message, field).extend([value, *filler])
        else:
            setattr(message, field, value)

    if "pattern" not in rule and not rule.get("uuid4"):
        longest = SHARED.get(name, most)
        longest -= sum(map(len, filler)) if longest == PROMPT_BYTES else 0
        for value in ("x" * least, "x" * longest, "é" * (longest // 2)):
            write(value)
            check(message)
        write("a\0b")
        assert (type(error := refused(message)), error.field) == (FieldInvalid, path)
    for size in {most + 1, least - 1} - {-1}:
        write("x" * size)
        error = refused(message)
        assert isinstance(error, FieldInvalid if rule.get("uuid4") else PromptTooLong if size > PROMPT_BYTES else FieldOutOfRange), error
        assert error.field == path or (size == 0 and error.field == field)
        if not rule.get("uuid4"):
            assert error.metadata["asked"] == str(size) and error.metadata["unit"] == "bytes"
    if most > 2:
        write("é" * (most // 2 + 1))  # more bytes than characters
        assert refused(message).field == path


@pytest.mark.parametrize(("name", "field"), with_rule("size"))
def test_each_chunk_holds_its_size(name: str, field: str) -> None:
    least, most = BOUNDS[name][field]["size"]
    for size, fine in [(least, True), (most, True), (most + 1, False), *([(least - 1, False)] if least else [])]:
        message, _, _ = clear(name, field)
        setattr(message, field, b"\0" * size)
        if fine:
            check(message)
        else:
            error = refused(message)
            assert (type(error), error.field, error.metadata["unit"]) == (FieldOutOfRange, field, "bytes")


@pytest.mark.parametrize(("name", "field"), [pair for pair in with_rule("count") if pair[1] != "update_mask"])
def test_each_list_and_map_holds_its_count(name: str, field: str) -> None:
    least, most = BOUNDS[name][field]["count"]
    for count in {least, min(most, 3) if field == "group_by" else most}:
        message, descriptor, rule = clear(name, field)
        if field == "group_by":
            message.group_by.extend(range(1, count + 1))
        else:
            put(message, descriptor, rule, count)
        if field == "scopes":  # the pattern wants letters only
            message.ClearField(field)
            message.scopes.extend(f"s{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(count))
        if field == "tools":
            for n, tool in enumerate(message.tools):
                tool.name = f"tool{n}"
        if field == "passages":
            for n, passage in enumerate(message.passages):
                passage.id = f"p{n}"
            if not count:
                message.mode = language_pb2.ANSWER_MODE_GENERATIVE
        check(message)
    for count in {most + 1, least - 1} - {-1}:
        message, descriptor, rule = clear(name, field)
        put(message, descriptor, rule, count)
        error = refused(message)
        assert (type(error), error.field) == (FieldOutOfRange, field)
        assert (error.metadata["asked"], error.metadata["unit"]) == (str(count), "items")


@pytest.mark.parametrize(("name", "field"), with_rule("seconds"))
def test_each_duration_holds_its_ends(name: str, field: str) -> None:
    least, most = BOUNDS[name][field]["seconds"]
    shortest, longest = (round(limit * 10**9) for limit in (least, most))
    for nanos, fine in [(shortest, True), (longest, True), (shortest - 1, False), (longest + 1, False)]:
        message, _, _ = clear(name, field)
        getattr(message, field).FromNanoseconds(nanos)
        if fine:
            check(message)
        else:
            error = refused(message)
            assert (type(error), error.field, error.metadata["unit"]) == (FieldOutOfRange, field, "seconds")
    message, _, _ = clear(name, field)
    getattr(message, field).seconds, getattr(message, field).nanos = 1, -1
    assert type(refused(message)) is FieldInvalid


def test_each_enum_refuses_what_it_does_not_know() -> None:
    tried = 0
    for name, rules in BOUNDS.items():
        for field in new(name).DESCRIPTOR.fields:
            if field.enum_type is None or rules[field.name].get("ignored"):
                continue
            message, descriptor, rule = clear(name, field.name)
            put(message, descriptor, rule, value=77)
            error = refused(message)
            assert (type(error), error.field) == (FieldInvalid, f"{field.name}[0]" if field.is_repeated else field.name)
            tried += 1
    assert tried >= 12


def test_each_needed_thing_is_missed() -> None:
    for name, field in with_rule("given"):
        message = smallest(name)
        if field in message.DESCRIPTOR.oneofs_by_name:
            message.ClearField(message.WhichOneof(field))
        elif message.DESCRIPTOR.fields_by_name[field].containing_oneof is not None:
            setattr(message, field, 0)
        elif message.DESCRIPTOR.fields_by_name[field].is_repeated:
            getattr(message, field).append(0)
        else:
            message.ClearField(field)
        error = refused(message)
        assert isinstance(error, FieldInvalid) and (error.field or "").removesuffix("[0]") == field, name


# --- A2, A15 by name ------------------------------------------------------------------------------------------------------------------


def chat(**changes: Any) -> generation_pb2.ChatRequest:
    said = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text="Hello")])
    return generation_pb2.ChatRequest(**{"model": MODEL, "request_id": UUID, "messages": [said], **changes})


def sampling(**values: Any) -> config_pb2.GenerationConfig:
    return config_pb2.GenerationConfig(sampling=config_pb2.Sampling(**values))


MANY = dict.fromkeys(range(10**5), 1.0)
A2 = {
    "max_tokens": (config_pb2.GenerationConfig(stopping={"max_output_tokens": 10**6}), "stopping.max_output_tokens", "1000000", "262144"),
    "no_tokens": (config_pb2.GenerationConfig(stopping={"max_output_tokens": 0}), "stopping.max_output_tokens", "0", "1"),
    "n": (sampling(n=10**9), "sampling.n", "1000000000", "4"),
    "no_outputs": (sampling(n=0), "sampling.n", "0", "1"),
    "logprobs": (config_pb2.GenerationConfig(output={"top_logprobs": 10**5}), "output.top_logprobs", "100000", "5"),
    "stop_strings": (config_pb2.GenerationConfig(stopping={"stop_sequences": ["x"] * 10**4}), "stopping.stop_sequences", "10000", "8"),
    "logit_biases": (config_pb2.GenerationConfig(penalties={"logit_bias": MANY}), "penalties.logit_bias", "100000", "300"),
    "nan_temperature": (sampling(temperature=math.nan), "sampling.temperature", "nan", "2"),
    "inf_temperature": (sampling(temperature=math.inf), "sampling.temperature", "inf", "2"),
    "minus_inf_temperature": (sampling(temperature=-math.inf), "sampling.temperature", "-inf", "0"),
    "zero_top_p": (sampling(top_p=0), "sampling.top_p", "0", "0"),
    "top_k": (sampling(top_k=2**32 - 1), "sampling.top_k", "4294967295", "1000"),
    "min_p": (sampling(min_p=-0.5), "sampling.min_p", "-0.5", "0"),
    "repetition": (config_pb2.GenerationConfig(penalties={"repetition": 0}), "penalties.repetition", "0", "0"),
    "bias": (config_pb2.GenerationConfig(penalties={"logit_bias": {50_256: math.nan}}), "penalties.logit_bias[50256]", "nan", "100"),
}  # fmt: skip


@pytest.mark.parametrize("case", A2)
def test_A2_numbers(case: str) -> None:
    """At the gateway in the caller's request, and in the pod in the gateway's."""
    config, field, asked, limit = A2[case]
    inside = engine_pb2.GenerateRequest(generation_id="g", request_id=UUID, model={"version": MODEL}, text="x", config=config)
    for message in (chat(config=config), generation_pb2.GenerateTextRequest(model=MODEL, prompt="x", config=config), inside):
        error = refused(message)
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE")
        assert error.metadata["field"] == f"config.{field}"
        assert (error.metadata["asked"], error.metadata["limit"]) == (asked, limit)


def test_A2_empty_prompt() -> None:
    empty = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text="")])
    for message, field in [
        (generation_pb2.GenerateTextRequest(model=MODEL), "prompt"),
        (chat(messages=[]), "messages"),
        (chat(messages=[empty]), "messages[0].parts[0].text"),
        (generation_pb2.CountTokensRequest(model=MODEL, prompt=""), "prompt"),
        (embedding_pb2.EmbedTextsRequest(model=MODEL, texts=["a", ""]), "texts[1]"),
    ]:
        error = refused(message)
        assert (type(error), error.field, error.metadata["asked"]) == (FieldOutOfRange, field, "0")


def test_A2_a_million_prompts() -> None:
    for message, field, limit in [
        (embedding_pb2.EmbedTextsRequest(model=MODEL, texts=["x"] * 10**6), "texts", "256"),
        (language_pb2.ClassifyTextRequest(model=MODEL, texts=["x"] * 10**6), "texts", "256"),
        (language_pb2.TranslateTextRequest(model=MODEL, texts=["x"] * 10**6, target_language="fr"), "texts", "64"),
        (language_pb2.SummarizeTextRequest(model=MODEL, documents=["x"] * 10**6), "documents", "16"),
    ]:
        error = refused(message)
        assert (type(error), error.field, error.metadata["limit"]) == (FieldOutOfRange, field, limit)


def test_A1_the_prompt_is_capped_over_all_its_texts() -> None:
    half = "y" * (PROMPT_BYTES // 2)
    check(embedding_pb2.EmbedTextsRequest(model=MODEL, texts=[half, half]))
    error = refused(embedding_pb2.EmbedTextsRequest(model=MODEL, texts=[half, half, "z"]))
    assert isinstance(error, PromptTooLong)
    assert error.metadata == {"field": "texts[2]", "asked": str(PROMPT_BYTES + 1), "limit": str(PROMPT_BYTES), "unit": "bytes"}
    turn = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text=half)])
    check(chat(messages=[turn, turn]))
    error = refused(chat(messages=[turn, turn, turn]))
    assert (type(error), error.field) == (PromptTooLong, "messages[2].parts[0].text")
    tools = [content_pb2.ToolDeclaration(name=f"t{n}", description="d" * 8_000) for n in range(33)]
    assert type(refused(chat(tools=tools))) is PromptTooLong


def test_a_million_parts_do_not_hold_the_loop() -> None:
    """A dialogue of tiny parts is given up at the 4,096th message: what a check costs is bounded, not only what is asked."""
    crowd = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text="x")] * 63)
    error = refused(chat(messages=[crowd] * 1_024))
    assert isinstance(error, FieldOutOfRange)
    assert error.metadata == {"field": "messages[63].parts[62]", "asked": "4097", "limit": "4096", "unit": "items"}
    check(chat(messages=[crowd] * 63))


@pytest.mark.parametrize(
    "segment",
    ["..", "../x", "/etc", "a/../b", "%2e%2e", "a%2fb", "A", "a_b", "a.b", "", "a\n", "a\\b", "C:", "ａ", "а", "é", "a" * 64, "a b", "a\r"],
)
def test_A15_names(segment: str) -> None:
    for message in (
        project_pb2.GetProjectRequest(name=f"projects/{segment}"),
        project_pb2.CreateProjectRequest(project_id=segment),
        api_key_pb2.GetApiKeyRequest(name=f"projects/p/apiKeys/{segment}"),
        model_pb2.GetModelRequest(name=f"projects/{segment}/models/m"),
        generation_pb2.GenerateTextRequest(model=f"models/{segment}", prompt="x"),
    ):
        error = refused(message)
        assert isinstance(error, FieldInvalid | FieldOutOfRange) and error.code == "INVALID_ARGUMENT"
        assert segment == "" or segment not in str(error.metadata.get("field"))  # paths only: never a name


OWN = "projects/p/models/m"


@pytest.mark.parametrize("name", ["models/gemma-3-270m", OWN, f"{OWN}/versions/12", f"{OWN}/aliases/prod"])
def test_model_names(name: str) -> None:
    check(generation_pb2.GenerateTextRequest(model=name, prompt="x"))


@pytest.mark.parametrize("name", ["gemma", "models/m/versions/1", f"{OWN}/versions/0", f"{OWN}/", "models/m\n"])
def test_names_of_no_model(name: str) -> None:
    assert refused(generation_pb2.GenerateTextRequest(model=name, prompt="x")).field == "model"


@pytest.mark.parametrize("uuid", ["1", UUID[:-1], UUID.replace("-4", "-1"), f"{UUID} ", f"{UUID}\n", "z" * 36])
def test_request_ids(uuid: str) -> None:
    assert type(refused(chat(request_id=uuid))) is FieldInvalid
    check(chat(request_id=""))
    check(chat(request_id=UUID.upper()))


# --- rules over several fields --------------------------------------------------------------------------------------------------------


def turn(role: str, **part: Any) -> content_pb2.ChatMessage:
    return content_pb2.ChatMessage(role=f"ROLE_{role}", parts=[content_pb2.ContentPart(**part)])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([("USER", {"text": "x"}), ("SYSTEM", {"text": "x"})], "messages[1].role"),
        ([("SYSTEM", {"text": "x"}), ("SYSTEM", {"text": "x"})], "messages[1].role"),
        ([("USER", {"reasoning": "x"})], "messages[0].parts[0].reasoning"),
        ([("USER", {"tool_call": {"id": "1", "name": "f"}})], "messages[0].parts[0].tool_call"),
        ([("TOOL", {"tool_call": {"id": "1", "name": "f"}})], "messages[0].parts[0].tool_call"),
        ([("ASSISTANT", {"tool_result": {"call_id": "1"}})], "messages[0].parts[0].tool_result"),
        ([("TOOL", {"text": "x"})], "messages[0].parts[0].text"),
    ],
)
def test_roles_and_parts(messages: list[tuple[str, dict[str, Any]]], field: str) -> None:
    said = [turn(role, **part) for role, part in messages]
    for message, at in [
        (chat(messages=said), ""),
        (generation_pb2.CountTokensRequest(model=MODEL, chat={"messages": said}), "chat."),
        (engine_pb2.GenerateRequest(generation_id="g", request_id=UUID, chat=chat(messages=said)), "chat."),
    ]:
        error = refused(message)
        assert (type(error), error.field) == (FieldInvalid, at + field)


def test_a_whole_dialogue_passes() -> None:
    called = turn("ASSISTANT", tool_call={"id": "1", "name": "add", "arguments_json": "{"})
    said = [turn("SYSTEM", text="Be brief."), turn("USER", text="2+2?"), turn("ASSISTANT", reasoning="add"), called]
    said.append(turn("TOOL", tool_result={"call_id": "1", "text": "4"}))
    check(chat(messages=said, tools=[{"name": "add"}], tool_choice="TOOL_CHOICE_NONE"))
    assert refused(chat(tools=[{"name": "add"}, {"name": "add"}])).field == "tools[1]"
    error = refused(chat(tools=[{"name": "a", "description": "d" * 4_096, "parameters_json_schema": "s" * 4_096}]))
    assert (error.field, error.metadata["asked"], error.metadata["limit"]) == ("tools[0]", "8193", "8192")


def test_lengths_in_order() -> None:
    config = config_pb2.GenerationConfig(stopping={"min_output_tokens": 9, "max_output_tokens": 8})
    error = refused(chat(config=config))
    assert (error.field, error.metadata["asked"], error.metadata["limit"]) == ("config.stopping.min_output_tokens", "9", "8")
    config.stopping.min_output_tokens = 8
    check(chat(config=config))
    error = refused(language_pb2.SummarizeTextRequest(model=MODEL, documents=["x"], min_length=9, max_length=8))
    assert (error.field, error.metadata["limit"]) == ("min_length", "8")


def test_a_summary_names_its_own_lengths() -> None:
    config = config_pb2.GenerationConfig(stopping={"max_output_tokens": 8})
    asked = language_pb2.SummarizeTextRequest(model=MODEL, documents=["x"])
    inside = engine_pb2.GenerateRequest(generation_id="g", request_id=UUID, summarize=asked, config=config)
    asked.config.CopyFrom(config)
    for message in (asked, inside):
        assert (type(error := refused(message)), error.field) == (FieldInvalid, "config.stopping.max_output_tokens")


def test_several_outputs_only_where_they_make_sense() -> None:
    config = sampling(n=2)
    check(chat(config=config))
    check(generation_pb2.GenerateTextRequest(model=MODEL, prompt="x", config=config))
    translate = language_pb2.TranslateTextRequest(model=MODEL, texts=["x"], target_language="fr")
    inside = engine_pb2.GenerateRequest(generation_id="g", request_id=UUID, translate=translate, config=config)
    for message in (
        inside,
        language_pb2.SummarizeTextRequest(model=MODEL, documents=["x"], config=config),
        language_pb2.TranslateTextRequest(model=MODEL, texts=["x"], target_language="fr", config=config),
        language_pb2.AnswerQuestionRequest(model=MODEL, question="x", mode="ANSWER_MODE_GENERATIVE", config=config),
    ):
        assert refused(message).field == "config.sampling.n"


def test_answers_fit_their_mode() -> None:
    generative, extractive = language_pb2.ANSWER_MODE_GENERATIVE, language_pb2.ANSWER_MODE_EXTRACTIVE
    passages = [language_pb2.Passage(id="a", text="x"), language_pb2.Passage(id="b", text="y")]

    def ask(**more: Any) -> language_pb2.AnswerQuestionRequest:
        return language_pb2.AnswerQuestionRequest(model=MODEL, question="who?", **more)

    check(ask(mode=generative))
    check(ask(passages=passages, top_k=2))
    check(ask(passages=passages[:1], mode=extractive))
    assert refused(ask()).field == "passages"
    assert refused(ask(passages=passages, config={})).field == "config"
    assert refused(ask(mode=generative, top_k=1)).field == "top_k"
    assert refused(ask(passages=[passages[0], passages[0]])).field == "passages[1]"
    assert refused(ask(passages=[passages[0], {"text": "y"}])).field == "passages[1].id"
    ids = {"generation_id": "g", "request_id": UUID}
    assert refused(engine_pb2.GenerateRequest(**ids, answer=ask(passages=passages))).field == "answer.mode"
    assert refused(engine_pb2.EncodeRequest(**ids, answer=ask(mode=generative))).field == "answer.mode"
    check(engine_pb2.EncodeRequest(**ids, answer=ask(passages=passages)))


def test_labels_and_their_number() -> None:
    def classify(**more: Any) -> language_pb2.ClassifyTextRequest:
        return language_pb2.ClassifyTextRequest(model=MODEL, texts=["x"], **more)

    labels = {"labels": ["科技", "政治", "体育"]}
    check(classify(zero_shot=labels, top_k=3))
    check(classify(top_k=64))  # how many the model was tuned on is for the pod to say
    check(classify(preset="LABEL_PRESET_SENTIMENT", top_k=3))
    assert refused(classify(zero_shot=labels, top_k=4)).metadata == {"field": "top_k", "asked": "4", "limit": "3", "unit": "labels"}
    assert refused(classify(preset="LABEL_PRESET_SENTIMENT", top_k=4)).field == "top_k"
    assert refused(classify(zero_shot={"labels": ["a", "a"]})).field == "zero_shot.labels[1]"
    assert refused(classify(zero_shot={"labels": ["a"]})).metadata["limit"] == "2"


def test_vectors_fit_a_reply() -> None:
    check(embedding_pb2.EmbedTextsRequest(model=MODEL, texts=["x"] * 256, dimensions=3_072))
    error = refused(embedding_pb2.EmbedTextsRequest(model=MODEL, texts=["x"] * 256, dimensions=3_073))
    assert (error.field, error.metadata["limit"]) == ("dimensions", "3072")


def test_usage_ranges() -> None:
    def query(days: float, interval: str = "USAGE_INTERVAL_DAY") -> usage_pb2.QueryUsageRequest:
        asked = usage_pb2.QueryUsageRequest(parent="projects/p", interval=interval)
        asked.start_time.FromSeconds(1_700_000_000)
        asked.end_time.FromSeconds(round(1_700_000_000 + days * 86_400))
        return asked

    check(query(366))
    check(query(31, "USAGE_INTERVAL_HOUR"))
    for message in (query(367), query(0), query(-1), query(32, "USAGE_INTERVAL_HOUR")):
        assert refused(message).field == "end_time"
    wild = query(1)
    wild.end_time.seconds = 2**62
    assert (type(error := refused(wild)), error.field) == (FieldInvalid, "end_time")


def test_masks_and_maps() -> None:
    change = project_pb2.UpdateProjectRequest(project={"name": "projects/p"}, update_mask={"paths": ["display_name", "*", "labels.team"]})
    check(change)
    change.update_mask.paths.append("a b")
    assert refused(change).field == "update_mask.paths[3]"
    change = project_pb2.UpdateProjectRequest(project={"name": "projects/p"}, update_mask={"paths": ["labels"] * 33})
    assert refused(change).field == "update_mask.paths"
    secret = "what-a-caller-wrote" * 9
    error = refused(project_pb2.UpdateProjectRequest(project={"name": "projects/p", "labels": {secret: "x"}}))
    assert error.field == "project.labels" and secret not in str(error.metadata)


def test_what_only_the_server_sets_is_not_read() -> None:
    check(project_pb2.UpdateProjectRequest(project={"name": "projects/p", "uid": "\0", "state": 77}))


def test_a_message_without_rules_is_refused() -> None:
    with pytest.raises(LookupError, match=r"argosy\.v1\.LabelScore"):
        check(content_pb2.LabelScore(label="x"))


# --- C3 -------------------------------------------------------------------------------------------------------------------------------


FLOATS = [(name, field) for name, field in with_rule("range") if new(name).DESCRIPTOR.fields_by_name[field].type in bounds.FLOATS]


@given(st.floats(width=32), st.sampled_from(FLOATS))
@DERANDOMISED
def test_C3_a_float_passes_if_and_only_if_it_is_inside(value: float, pair: tuple[str, str]) -> None:
    name, field = pair
    message, _, _ = clear(name, field)
    setattr(message, field, value)
    least, most = BOUNDS[name][field]["range"]
    if (least < value if BOUNDS[name][field].get("open") else least <= value) and value <= most:
        check(message)
    else:
        assert refused(message).field == field


WILD_TEXT = ["", "a", "\0", "é" * 40, "x" * 300, MODEL, "projects/p", UUID, "en", "\u202e", "{{7*7}}", "../../etc"]
WILD_FLOAT = [0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 3.4e38, 1e-45, 2.0]


def wild(descriptor: Any, dice: random.Random, density: float, depth: int = 0) -> Any:
    """A message of the type with anything in it that the wire allows, in `density` of its fields."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if dice.random() > density:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            target = getattr(message, field.name)
            for key in range(dice.choice([0, 1, 3])):
                entry = field.message_type.fields_by_name
                if entry["key"].type == FieldDescriptor.TYPE_STRING:
                    target[dice.choice(WILD_TEXT)] = wild_value(entry["value"], dice, density, depth)
                else:
                    target[key * dice.choice([1, 2**20])] = dice.choice(WILD_FLOAT)
            continue
        for _ in range(dice.choice([0, 1, 2, 5]) if field.is_repeated else 1):
            value = wild_value(field, dice, density, depth)
            if field.is_repeated:
                getattr(message, field.name).append(value)
            elif field.message_type is not None:
                getattr(message, field.name).CopyFrom(value)
            else:
                setattr(message, field.name, value)
    return message


def wild_value(field: FieldDescriptor, dice: random.Random, density: float, depth: int) -> Any:
    if field.message_type is not None:
        return wild(field.message_type, dice, density, depth + 1) if depth < 6 else message_factory.GetMessageClass(field.message_type)()
    if field.type in bounds.FLOATS:
        return dice.choice(WILD_FLOAT)
    if field.type == FieldDescriptor.TYPE_STRING:
        return dice.choice(WILD_TEXT)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return dice.choice([b"", b"\0", b"\xff" * 300])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return dice.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64):
        return dice.choice([0, 1, 4, 1_000, 2**32 - 1])
    return dice.choice([-(2**31), -1, 0, 1, 2, 77, 2**31 - 1])


def resolve(message: Any, path: str) -> None:
    """Fail unless `path` leads to a field of `message`."""
    if not path:
        return
    for step in path.split("."):
        name, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", step).groups()  # type: ignore[union-attr]
        assert name in message.DESCRIPTOR.fields_by_name or name in message.DESCRIPTOR.oneofs_by_name, path
        here = getattr(message, name, None)
        message = here if index is None else here[int(index)]


ROOTS = sorted(name for name in BOUNDS if name.endswith("Request"))


@given(seed=st.integers(0, 2**63), root=st.sampled_from(ROOTS))
@settings(DERANDOMISED, max_examples=10_000)
def test_C3_anything_is_passed_or_refused_by_name(seed: int, root: str) -> None:
    """Ten thousand wild requests: never another exception, never a changed message, always a path that exists."""
    dice = random.Random(seed)
    message = smallest(root) if dice.random() < 0.7 else new(root)  # most are nearly right, so that the depths are reached
    message.MergeFrom(wild(message.DESCRIPTOR, dice, dice.choice([0.1, 0.3, 0.6])))
    before = message.SerializeToString(deterministic=True)
    try:
        check(message)
    except (FieldInvalid, FieldOutOfRange, PromptTooLong) as error:
        resolve(message, error.field or "")
    assert message.SerializeToString(deterministic=True) == before
