"""Chat messages as prompts. The template is the operator's own copy in the model's directory, never a caller's (A17)."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.pretrained.control import Control

__all__ = ["ChatTemplate", "JinjaTemplate", "Message", "PlainTemplate", "TemplateRefused", "Tool", "ToolCall", "load_template"]

_TEMPLATE_BYTES = 256 * 1024
_PLAIN_NAMES = {"system": "", "user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}


class TemplateRefused(Exception):
    """The model's template does not take these messages, by role or by order."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made in an earlier turn."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool."""

    role: str
    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may ask for."""

    name: str
    description: str
    parameters_json_schema: str


class Splitter(Protocol):
    """Finds control tokens in a template's own text."""

    def split_control(self, text: str) -> list[str | Control]:
        """Plain runs and control tokens."""
        ...


@dataclass(frozen=True, slots=True)
class PlainTemplate:
    """For models that were never taught turns: `User: …`, `Assistant: …`, one a line.

    `name` is reported as a capability; an answer ends at `stops` beside the end tokens.
    """

    prefix: tuple[int, ...] = ()  # the model's beginning-of-text token
    name: str = "plain"
    tools: bool = False
    stops: tuple[str, ...] = ("\nUser:", "\nAssistant:", "\nTool:")

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[str | Control]:
        """The prompt up to where the answer begins: plain text and control tokens. Raises TemplateRefused."""
        if tools:
            raise TemplateRefused("this model takes no tools")
        lines = [f"{_PLAIN_NAMES[message.role]}{message.text.strip()}\n" for message in messages]
        return [*map(Control, self.prefix), "".join(lines) + "Assistant:"]


@dataclass(frozen=True, slots=True)
class JinjaTemplate:
    """The `chat_template` of the model's directory, rendered with marks in place of the callers' texts.

    Control tokens are looked for between the marks only; then the texts go in. A mark is random for each call, so no text can
    hold one. A template that tests or trims a text sees the mark instead: it renders as for any ordinary text.
    """

    source: str
    control: Splitter
    variables: tuple[tuple[str, str], ...] = ()  # bos_token and the like
    name: str = "model"
    stops: tuple[str, ...] = ()
    tools: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", re.search(r"\btools\b", self.source) is not None)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[str | Control]:
        """The prompt up to where the answer begins: plain text and control tokens. Raises TemplateRefused."""
        if tools and not self.tools:
            raise TemplateRefused("this model takes no tools")
        salt = secrets.token_hex(8)
        texts: list[str] = []

        def mark(text: str) -> str:
            if not text:
                return ""
            texts.append(text)
            return f"\ue000{salt}:{len(texts) - 1}\ue001"

        try:
            rendered = (
                _environment()
                .from_string(self.source)
                .render(
                    messages=[_for_template(message, mark) for message in messages],
                    tools=[self._declared(tool, mark) for tool in tools] or None,
                    add_generation_prompt=True,
                    **dict(self.variables),
                )
            )
        except Exception as error:  # a template may raise anything: it is a program
            raise TemplateRefused(type(error).__name__) from error
        parts: list[str | Control] = []
        for place, piece in enumerate(re.split(f"\ue000{salt}:([0-9]+)\ue001", rendered)):
            if place % 2:
                parts.append(texts[int(piece)])
            else:
                parts += self.control.split_control(piece)
        return parts

    def _declared(self, tool: Tool, mark: Callable[[str], str]) -> dict[str, Any]:
        """A tool as templates expect it. Strings that spell a control token are marked, escaped as the template's `tojson` would."""
        schema = json.loads(tool.parameters_json_schema) if tool.parameters_json_schema else {"type": "object", "properties": {}}

        def safe(value: Any) -> Any:
            if isinstance(value, str):
                spelled = any(isinstance(part, Control) for part in self.control.split_control(value))
                return mark(json.dumps(value, ensure_ascii=False)[1:-1]) if spelled else value
            if isinstance(value, dict):
                return {safe(key): safe(item) for key, item in value.items()}
            return [safe(item) for item in value] if isinstance(value, list) else value

        declared = {"name": tool.name, "description": tool.description, "parameters": schema}
        return {"type": "function", "function": {key: safe(value) for key, value in declared.items()}}


ChatTemplate = PlainTemplate | JinjaTemplate


def load_template(directory: Path, control: Splitter, prefix: Iterable[int] = (), file: Path | None = None) -> ChatTemplate:
    """The operator's template: `file`, else the one beside the weights, else the plain one.

    Beside the weights: chat_template.jinja, then `chat_template` in tokenizer_config.json. Raises TemplateRefused over 256 KiB or
    when it does not parse: a replica that would fail each chat does not start.
    """
    config: dict[str, Any] = {}
    path = directory / "tokenizer_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
    source = config.get("chat_template")
    beside = directory / "chat_template.jinja"
    if file is not None or beside.exists():
        source = (file or beside).read_text(encoding="utf-8")
    if isinstance(source, list):  # named variants: the default one
        source = next((item["template"] for item in source if item.get("name") == "default"), None)
    if not source:
        return PlainTemplate(prefix=tuple(prefix))
    if len(source.encode()) > _TEMPLATE_BYTES:
        raise TemplateRefused("chat_template over 256 KiB")
    try:
        _environment().from_string(source)
    except TemplateError as error:
        raise TemplateRefused(type(error).__name__) from error
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return JinjaTemplate(source, control, tuple((name, _spelling(config.get(name))) for name in names))


def _environment() -> ImmutableSandboxedEnvironment:
    """Fresh for each call: nothing a template sets outlives it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def raise_exception(message: str) -> None:
        raise TemplateRefusal(message)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


class TemplateRefusal(TemplateError):
    """A template's own `raise_exception`."""


def _for_template(message: Message, mark: Callable[[str], str]) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": mark(message.text)}
    if message.reasoning:
        shown["reasoning_content"] = mark(message.reasoning)
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": mark(call.name), "arguments": mark(call.arguments_json)}}
            for call in message.tool_calls
        ]
    return shown


def _spelling(value: Any) -> str:
    """tokenizer_config.json names a token by its spelling or by an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
