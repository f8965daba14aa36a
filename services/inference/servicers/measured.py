"""A request's work on the engine, as spans and metrics: names and numbers, never content."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry import trace

from argosy.v1 import usage_pb2
from services.chassis.errors import ServiceError
from services.chassis.telemetry import Telemetry
from services.inference.engine.calls import Asked, Done, FinishReason
from services.inference.engine.host import Host

__all__ = ["EngineCall", "Work"]

SPANS = 32  # engine calls of one request that are shown: a classification of a thousand texts makes thousands
OPERATIONS = {  # of a request's oneof field: the conventions' word where they have one, else the method's name
    "text": "text_completion",
    "chat": "chat",
    "summarize": "SummarizeText",
    "translate": "TranslateText",
    "classify": "ClassifyText",
    "embed": "embeddings",
    "answer": "AnswerQuestion",
    "explain": "Explain",
}


@dataclass(slots=True)
class EngineCall:
    """What one call to the engine said of itself."""

    done: Done | None = None
    reasons: list[FinishReason] = field(default_factory=list)  # one for each output that ended


@dataclass(slots=True)
class Work:
    """One request inside a replica. `task` is the name of its oneof field, `model` what is loaded."""

    telemetry: Telemetry
    host: Host
    task: str
    model: str
    _began: float = field(default_factory=time.monotonic)
    _first_at: float | None = None
    _calls: int = 0

    @property
    def _names(self) -> dict[str, str]:
        return {"gen_ai.operation.name": OPERATIONS.get(self.task, self.task), "gen_ai.request.model": self.model}

    def token(self) -> None:
        """A token has come."""
        if self._first_at is None:
            self._first_at = time.monotonic()

    @contextmanager
    def call(self, call: Asked) -> Iterator[EngineCall]:
        """A span for a call to the engine while the block runs, with its waiting, prefill and decode below it."""
        self._calls += 1
        told, began_ns = EngineCall(), time.time_ns()
        if self._calls > SPANS:
            yield told
            return
        names = self._names
        if adapter := getattr(call, "adapter", ""):
            names["argosy.adapter.digest"] = adapter
        span = self.telemetry.tracer.start_span(f"engine {type(call).__name__.lower()}", attributes=names, start_time=began_ns)
        try:
            yield told
        except BaseException as error:
            span.set_attribute("error.type", _type(error))
            span.set_status(trace.StatusCode.ERROR)  # without the error's text, which may quote the request
            raise
        finally:
            if span.is_recording():
                self._end(span, told, began_ns)

    def _end(self, span: trace.Span, told: EngineCall, began_ns: int) -> None:
        at_ns = began_ns
        if told.reasons:
            span.set_attribute("gen_ai.response.finish_reasons", [reason.name for reason in told.reasons])
        if (done := told.done) is not None:
            below, timings = trace.set_span_in_context(span), done.timings
            for name, seconds in (("queue", timings.queue_s), ("prefill", timings.prefill_s), ("decode", timings.decode_s)):
                if seconds > 0:
                    part = self.telemetry.tracer.start_span(name, below, start_time=at_ns)
                    at_ns += round(seconds * 1e9)
                    part.end(at_ns)
            span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": done.usage.input_tokens,
                    "gen_ai.usage.cache_read.input_tokens": done.usage.cached_input_tokens,
                    "gen_ai.usage.output_tokens": done.usage.output_tokens,
                    "argosy.batch.rows": self.host.load.batch,
                }
            )
        span.end(max(time.time_ns(), at_ns))

    @contextmanager
    def measured(self, used: Callable[[], usage_pb2.Usage]) -> Iterator[None]:
        """The request's metrics, once the block is left; `used` is asked then."""
        kind = self._names | {"argosy.service": "inference"}
        failed: dict[str, str] = {}
        try:
            yield
        except BaseException as error:
            failed = {"error.type": _type(error)}
            raise
        finally:
            record, usage, ended = self.telemetry.record, used(), time.monotonic()
            record("gen_ai.server.request.duration", ended - self._began, kind | failed)
            record("gen_ai.client.token.usage", usage.input_tokens, kind | {"gen_ai.token.type": "input"})
            record("gen_ai.client.token.usage", usage.output_tokens, kind | {"gen_ai.token.type": "output"})
            if self._first_at is not None:
                record("gen_ai.server.time_to_first_token", self._first_at - self._began, kind)
                if usage.output_tokens > 1:
                    record("gen_ai.server.time_per_output_token", (ended - self._first_at) / (usage.output_tokens - 1), kind)


def _type(error: BaseException) -> str:
    """The stable reason of ours; of others the type."""
    return error.reason if isinstance(error, ServiceError) else type(error).__name__
