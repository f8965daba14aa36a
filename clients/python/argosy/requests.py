"""Requests from plain Python values: the same for the blocking and the asyncio client."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from argosy.v1 import config_pb2, content_pb2, explanation_pb2, generation_pb2, language_pb2

Message = content_pb2.ChatMessage | Mapping[str, str] | tuple[str, str]
_ROLES = {"system": content_pb2.ROLE_SYSTEM, "user": content_pb2.ROLE_USER, "assistant": content_pb2.ROLE_ASSISTANT}


def request_id() -> str:
    """A new UUID4: it makes a repeat of the call safe."""
    return str(uuid.uuid4())


def duration(seconds: float) -> Duration:
    """Seconds as the proto's Duration, to the microsecond."""
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def config(
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    n: int | None = None,
    max_output_tokens: int | None = None,
    min_output_tokens: int | None = None,
    stop: Sequence[str] = (),
    time_limit_s: float | None = None,
    repetition_penalty: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    top_logprobs: int | None = None,
    prompt_logprobs: bool = False,
) -> config_pb2.GenerationConfig:
    """A `GenerationConfig` from flat keywords. What is left out stays unset: the model's default. Bounds are the service's to check."""
    message = config_pb2.GenerationConfig(
        sampling=config_pb2.Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, n=n),
        penalties=config_pb2.Penalties(
            repetition=repetition_penalty, frequency=frequency_penalty, presence=presence_penalty, logit_bias=dict(logit_bias or {})
        ),
        stopping=config_pb2.Stopping(max_output_tokens=max_output_tokens, min_output_tokens=min_output_tokens, stop_sequences=stop),
        output=config_pb2.OutputOptions(top_logprobs=top_logprobs, prompt_logprobs=prompt_logprobs),
    )
    if time_limit_s is not None:
        message.stopping.time_limit.CopyFrom(duration(time_limit_s))
    return message


def message(said: Message) -> content_pb2.ChatMessage:
    """`("user", "Hello")`, `{"role": "user", "content": "Hello"}` or a ChatMessage. Raises ValueError for another role."""
    if isinstance(said, content_pb2.ChatMessage):
        return said
    role, text = (said["role"], said["content"]) if isinstance(said, Mapping) else said
    if role not in _ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(_ROLES)}; build a ChatMessage for others")
    return content_pb2.ChatMessage(role=_ROLES[role], parts=[content_pb2.ContentPart(text=text)])


def chat(
    messages: str | Iterable[Message],
    model: str,
    settings: config_pb2.GenerationConfig | None,
    tools: Iterable[content_pb2.ToolDeclaration] = (),
) -> generation_pb2.ChatRequest:
    """A dialogue; a bare string is one user message."""
    said = [("user", messages)] if isinstance(messages, str) else messages
    return generation_pb2.ChatRequest(
        model=model, request_id=request_id(), messages=[message(each) for each in said], tools=tools, config=settings
    )


_UNITS = {
    "word": explanation_pb2.ATTRIBUTION_UNIT_WORD,
    "token": explanation_pb2.ATTRIBUTION_UNIT_TOKEN,
    "sentence": explanation_pb2.ATTRIBUTION_UNIT_SENTENCE,
}


def explain(
    text: str,
    label: str | None,
    *,
    labels: Sequence[str],
    continuation: str | None,
    cheap: bool,
    unit: str,
    model: str,
) -> explanation_pb2.ExplainRequest:
    """A label of a text, or a continuation of it, to explain. Raises ValueError for both at once and for another unit."""
    if unit not in _UNITS:
        raise ValueError(f"unit {unit!r} is none of {', '.join(_UNITS)}")
    methods = explanation_pb2.ATTRIBUTION_METHOD_GRADIENT_X_INPUT, explanation_pb2.ATTRIBUTION_METHOD_OCCLUSION
    request = explanation_pb2.ExplainRequest(
        model=model, request_id=request_id(), method=methods[0] if cheap else methods[1], unit=_UNITS[unit]
    )
    if continuation is not None:
        if label is not None or labels:
            raise ValueError("either a label is explained or a continuation")
        request.generation.CopyFrom(explanation_pb2.GenerationTarget(prompt=text, continuation=continuation))
        return request
    request.classify.CopyFrom(explanation_pb2.ClassifyTarget(text=text, label=label))
    if labels:
        request.classify.zero_shot.labels.extend(labels)
    return request


def passages(texts: str | Iterable[str] | Mapping[str, str]) -> list[language_pb2.Passage]:
    """Passages with ids: those of the mapping, else their position."""
    if isinstance(texts, str):
        texts = [texts]
    named = texts.items() if isinstance(texts, Mapping) else ((str(position), text) for position, text in enumerate(texts))
    return [language_pb2.Passage(id=key, text=text) for key, text in named]
