"""`python -m tests.fleet.process`: the process of `python -m services.fleet`, with what its engines say and its spans written down.

ARGOSY_TEST_TRUTH names a folder. `calls.jsonl` gets a line for every call that an engine has finished or was lost with: what crossed the
border of the engine's process, counted here and by nobody else. `spans.jsonl` gets every span.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

import services.fleet
import services.inference.server
from services.chassis.telemetry import Telemetry
from services.inference.engine.calls import Done, Embed, Ended, FinishReason, FromEngine, Generate, Label, Score, ToEngine, Token, Weigh
from services.inference.engine.host import ProcessHost

FOLDER = Path(os.environ.get("ARGOSY_TEST_TRUTH", "."))


class Witness(ProcessHost):
    """Counts what goes in and comes out, call by call."""

    def _post(self, message: ToEngine) -> None:
        if isinstance(message, Generate | Score | Embed | Label | Weigh):
            # What a score or an embedding comes to, shared prefixes and all, only the engine knows.
            self._counts()[message.id] = [len(message.prompt) if isinstance(message, Generate) else -1, 0]
        super()._post(message)

    def _received(self, messages: Sequence[FromEngine]) -> None:
        for message in messages:
            match message:
                case Token() | Ended(reason=FinishReason.END_TOKEN):
                    self._counts()[message.id][1] += 1
                case Done() if message.id in self._counts():  # a prefetch ends so as well, and no tenant pays for it
                    self._write(message.id, message)
        super()._received(messages)

    def _gone(self, why: str) -> None:
        for call in list(self._counts()):
            self._write(call, None)
        super()._gone(why)

    def _counts(self) -> dict[str, list[int]]:
        return self.__dict__.setdefault("_seen", {})

    def _write(self, call: str, done: Done | None) -> None:
        prompt, tokens = self._counts().pop(call)
        if prompt < 0:
            prompt = done.usage.input_tokens if done is not None else 0
        line: dict[str, object] = {"generation": call.partition(":")[0], "input": prompt, "output": tokens, "done": done is not None}
        if done is not None:
            line |= {"said_input": done.usage.input_tokens, "said_output": done.usage.output_tokens}
        _append("calls.jsonl", line)


class Spans(SpanExporter):
    """Spans as lines."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            context = span.get_span_context()
            _append(
                "spans.jsonl",
                {
                    "trace": f"{context.trace_id:032x}",
                    "span": f"{context.span_id:016x}",
                    "parent": f"{span.parent.span_id:016x}" if span.parent else "",
                    "name": span.name,
                    "attributes": dict(span.attributes or {}),
                },
            )
        return SpanExportResult.SUCCESS


def _append(name: str, line: dict[str, object]) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    services.inference.server.ProcessHost = Witness  # type: ignore[misc]
    Telemetry.start = partial(Telemetry.start, spans=Spans())  # type: ignore[method-assign]
    sys.exit(services.fleet.main())
