"""Requests as plans: which prompts to run, in what order, and what of their output the caller sees."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from argosy.v1 import config_pb2, content_pb2, generation_pb2, language_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis.errors import FieldInvalid, FieldOutOfRange, ModelCapability, PromptTooLong, UnsupportedLanguage
from services.inference import tasks
from services.inference.engine.calls import Hello
from services.inference.languages import Language, language
from services.pretrained.control import Control
from services.pretrained.templates import ChatTemplate, JinjaTemplate, Message, TemplateRefused, Tool, ToolCall
from services.pretrained.tokenizer import Tokenizer

__all__ = ["Plan", "Planner", "Segment", "messages_from_proto"]

PROMPT_BYTES = 256 * 1024  # before tokenising: it takes 1.3 s for 1 MB
SUMMARY_WINDOW_TOKENS = 4_096  # a document longer than this is summarised by parts first
PART_SUMMARY_TOKENS = 128
ROLES = {
    content_pb2.ROLE_SYSTEM: "system",
    content_pb2.ROLE_USER: "user",
    content_pb2.ROLE_ASSISTANT: "assistant",
    content_pb2.ROLE_TOOL: "tool",
}

Detect = Callable[[str], Awaitable[Language]]


@dataclass(frozen=True, slots=True)
class Segment:
    """One prompt of an output, and the text that stands before what it generates."""

    prompt: tuple[int, ...]
    before: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Outputs, each of segments in order. With `then`, these are parts nobody sees, and their texts give the next plan."""

    outputs: tuple[tuple[Segment, ...], ...]
    stopping: config_pb2.Stopping
    stops: tuple[str, ...] = ()  # the template's or the task's, beside the caller's: an output that meets one ended its turn
    end_token_ids: tuple[int, ...] = ()
    trim: bool = False  # drop blanks before the first visible character
    source_languages: tuple[str, ...] = ()
    then: Callable[[Sequence[str]], Awaitable["Plan"]] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Over all outputs."""
        return sum(len(segment.prompt) for output in self.outputs for segment in output)


class Planner:
    """Turns requests into plans for one model. Encoding leaves the event loop; a text over the byte cap is never encoded."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, hello: Hello) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.hello = hello

    async def plan(self, request: engine_pb2.GenerateRequest, detect: Detect) -> Plan:
        """The plan of any prompt. `detect` finds the language of a text."""
        stopping = request.config.stopping
        match request.WhichOneof("prompt"):
            case "text":
                return Plan(((Segment(await self.text(request.text)),),), stopping, end_token_ids=self.hello.end_token_ids)
            case "chat":
                chat = request.chat
                prompt = await self.chat(messages_from_proto(chat.messages), tools_from_proto(chat.tools))
                return Plan(((Segment(prompt),),), stopping, self.template.stops, self.hello.end_token_ids, trim=self.plain)
            case "summarize":
                return await self.summarize(request.summarize, stopping)
            case "translate":
                return await self.translate(request.translate, stopping, detect)
            case "answer":
                return await self.answer(request.answer, stopping)
            case _:
                raise FieldInvalid("prompt")

    @property
    def plain(self) -> bool:
        """The model has no template of its own."""
        return not isinstance(self.template, JinjaTemplate)

    async def text(self, text: str) -> tuple[int, ...]:
        """A raw prompt, after what the model expects before any text."""
        _cap(len(text.encode()))
        return (*self.tokenizer.prefix, *await self.tokenizer.aencode(text))

    async def chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """A dialogue through the template."""
        _cap(sum(len(message.text.encode()) for message in messages))
        if tools:  # a template may know them, but nothing here reads calls out of the answer yet
            raise ModelCapability("tools", "tools")
        return await asyncio.to_thread(self._rendered, messages, tools)

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        try:
            parts = self.template.render(messages, tools)
        except TemplateRefused as refused:
            raise FieldInvalid("messages", "template") from refused
        return tuple(self.tokenizer.encode_parts(parts))

    async def wording(self, wording: tasks.Wording) -> tuple[int, ...]:
        """A task's prompt, in the form this model takes."""
        if self.plain:
            return (*self.tokenizer.prefix, *await self.tokenizer.aencode(wording.plain))
        return await self.chat([Message("user", wording.instruction)])

    def parts(self, wording: tasks.Wording) -> list[str | Control]:
        """The prompt as text and control tokens, for tasks that need to know where in it a text lies."""
        if self.plain:
            return [*map(Control, self.tokenizer.prefix), wording.plain]
        return self.template.render([Message("user", wording.instruction)])

    def task(self, outputs: Sequence[Sequence[Segment]], stopping: config_pb2.Stopping) -> Plan:
        """A plan whose plain answers end at a line's end: the tokens that begin a line count as end tokens."""
        ends = self.hello.end_token_ids
        fixed = tuple(tuple(segments) for segments in outputs)
        if not self.plain:
            return Plan(fixed, stopping, end_token_ids=ends, trim=True)
        lines = tuple(token for token in self.tokenizer.newline_ids if token not in ends)
        return Plan(fixed, stopping, tasks.LINE_END, (*ends, *lines), trim=True)

    # --- tasks ------------------------------------------------------------------------------------------------------------------

    async def summarize(self, asked: language_pb2.SummarizeTextRequest, stopping: config_pb2.Stopping) -> Plan:
        """One prompt, or first one a window of a long text."""
        for name in ("max_output_tokens", "min_output_tokens"):
            if stopping.HasField(name):
                raise FieldInvalid(f"config.stopping.{name}", "use_max_length" if name.startswith("max") else "use_min_length")
        _cap(sum(len(document.encode()) for document in asked.documents))
        lengths = config_pb2.Stopping()
        lengths.CopyFrom(stopping)
        if asked.HasField("max_length"):
            lengths.max_output_tokens = asked.max_length
        if asked.HasField("min_length"):
            if asked.HasField("max_length") and asked.min_length > asked.max_length:
                raise FieldOutOfRange("min_length", asked.min_length, asked.max_length, "tokens")
            lengths.min_output_tokens = asked.min_length
        return await self._summary(list(asked.documents), asked.instruction, lengths)

    async def _summary(self, documents: list[str], instruction: str, lengths: config_pb2.Stopping) -> Plan:
        prompt = await self.wording(tasks.summarize(documents, instruction))
        frame = len(await self.wording(tasks.summarize([""], instruction)))
        wanted = lengths.max_output_tokens if lengths.HasField("max_output_tokens") else PART_SUMMARY_TOKENS
        if wanted >= self.hello.context - frame:
            raise FieldOutOfRange("max_length", wanted, self.hello.context - frame - 1, "tokens")
        size = min(SUMMARY_WINDOW_TOKENS, self.hello.context - frame - max(wanted, PART_SUMMARY_TOKENS))
        if len(prompt) - frame <= size:
            return self.task([[Segment(prompt)]], lengths)
        if size < 2 * PART_SUMMARY_TOKENS:
            raise PromptTooLong("documents", len(prompt), self.hello.context - wanted, "tokens")
        texts = [part for document in documents for part in await self.windows(document, size, size // 8)]
        segments = [[Segment(await self.wording(tasks.summarize([text], instruction)))] for text in texts]
        short = config_pb2.Stopping(max_output_tokens=PART_SUMMARY_TOKENS)

        async def then(parts: Sequence[str]) -> Plan:
            return await self._summary(["\n".join(part.strip() for part in parts)], instruction, lengths)

        return replace(self.task(segments, short), then=then)

    async def translate(self, asked: language_pb2.TranslateTextRequest, stopping: config_pb2.Stopping, detect: Detect) -> Plan:
        """An output a text; a text of several lines, or of more than half the context, in as many prompts."""
        target = _language(asked.target_language, "target_language")
        given = _language(asked.source_language, "source_language") if asked.source_language else None
        _cap(sum(len(text.encode()) for text in asked.texts))
        outputs, sources = [], []
        for text in asked.texts:
            source = given or await detect(text)
            sources.append(source.tag)
            frame = len(await self.wording(tasks.translate("", source, target)))
            size = (self.hello.context - frame) // 3  # a translation is at most about twice as long
            if size < 8:
                raise PromptTooLong("texts", frame, self.hello.context, "tokens")
            segments = []
            for before, line in tasks.cut_lines(text) if self.plain else [("", text)]:
                for place, part in enumerate(await self.windows(line, size, 0)):
                    prompt = await self.wording(tasks.translate(part, source, target))
                    segments.append(Segment(prompt, " " if place else before))
            outputs.append(segments)
        return replace(self.task(outputs, stopping), source_languages=tuple(sources))

    async def answer(self, asked: language_pb2.AnswerQuestionRequest, stopping: config_pb2.Stopping) -> Plan:
        """A written answer from all passages."""
        if asked.mode != language_pb2.ANSWER_MODE_GENERATIVE:
            raise FieldInvalid("mode", "generative_only")
        _cap(sum(len(passage.text.encode()) for passage in asked.passages) + len(asked.question.encode()))
        prompt = await self.wording(tasks.answer(asked.question, [passage.text for passage in asked.passages]))
        return self.task([[Segment(prompt)]], stopping)

    async def windows(self, text: str, size: int, overlap: int) -> list[str]:
        """A text in pieces of at most `size` tokens, cut between characters; each shares `overlap` tokens with the one before."""
        pieces = await asyncio.to_thread(self.tokenizer.pieces, text)
        data = text.encode()
        found = []
        for first, last in tasks.windows(len(pieces), size, overlap):
            if first < last:
                found.append(data[pieces[first].start_byte : pieces[last - 1].end_byte].decode())
        return found or [text]


def messages_from_proto(messages: Sequence[content_pb2.ChatMessage]) -> list[Message]:
    """Turns as values. Raises FieldInvalid for a role out of place, or a part that its role cannot have."""
    found = []
    for place, message in enumerate(messages):
        field = f"messages[{place}]"
        role = ROLES.get(message.role)
        if role is None or (role == "system" and place > 0):
            raise FieldInvalid(f"{field}.role")
        kinds = {part.WhichOneof("part") for part in message.parts}
        allowed = {"assistant": {"text", "reasoning", "tool_call"}, "tool": {"text", "tool_result"}}.get(role, {"text"})
        if not kinds or not kinds <= allowed:
            raise FieldInvalid(f"{field}.parts")
        texts = [part.text or part.tool_result.text for part in message.parts if part.WhichOneof("part") in ("text", "tool_result")]
        calls = [part.tool_call for part in message.parts if part.WhichOneof("part") == "tool_call"]
        found.append(
            Message(
                role,
                "".join(texts),
                "".join(part.reasoning for part in message.parts),
                tuple(ToolCall(call.id, call.name, call.arguments_json) for call in calls),
            )
        )
    return found


def tools_from_proto(tools: Sequence[content_pb2.ToolDeclaration]) -> list[Tool]:
    """Declarations as values."""
    return [Tool(tool.name, tool.description, tool.parameters_json_schema) for tool in tools]


def chat_of(request: generation_pb2.CountTokensRequest) -> tuple[list[Message], list[Tool]]:
    """The dialogue of a CountTokens request."""
    return messages_from_proto(request.chat.messages), tools_from_proto(request.chat.tools)


def _cap(size: int) -> None:
    if size > PROMPT_BYTES:
        raise PromptTooLong("prompt", size, PROMPT_BYTES)


def _language(tag: str, field: str) -> Language:
    known = language(tag)
    if known is None:
        raise UnsupportedLanguage(field)
    return known
