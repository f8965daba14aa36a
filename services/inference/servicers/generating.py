"""Runs a plan on the engine and puts what happens into an outbox: tokens become whole characters, reasons become the wire's."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from argosy.v1 import content_pb2, stream_pb2, usage_pb2
from argosy.v1.stream_pb2 import FinishReason as Reason
from argosy.v1.stream_pb2 import GenerationEvent, OutputFinished, Phase, TokenLogprob
from services.chassis.errors import (
    CallerLeft,
    DeadlineExceeded,
    Internal,
    ModelCapability,
    NotStarted,
    ResourceNotFound,
    ServiceError,
    Shed,
    SlowConsumer,
    StoreUnavailable,
    StreamLost,
    WrongState,
)
from services.inference.engine.calls import AdapterReady, Done, Ended, FinishReason, Generate, Limits, PromptScored, Token, WorkClass
from services.inference.engine.host import EngineLost, Host, SlowReader
from services.inference.servicers.config import Asked, limits_from_proto
from services.inference.servicers.measured import Work
from services.inference.servicers.outbox import Outbox
from services.inference.servicers.plans import Plan, Segment
from services.inference.text import OutputText
from services.pretrained.tokenizer import Tokenizer

__all__ = ["Generation", "Spent", "Who", "refusal"]

PARALLEL_OUTPUTS = 16  # of one batch request; the rest wait here rather than in the engine's queue
DEADLINE_MARGIN_S = 0.1  # the engine ends this long before the wire's deadline, so that the status and usage still arrive

REASONS = {FinishReason.END_TOKEN: Reason.FINISH_REASON_STOP, FinishReason.TIME_LIMIT: Reason.FINISH_REASON_TIME_LIMIT}


@dataclass(frozen=True, slots=True)
class Who:
    """For whom the engine works: ids and the secret root of the project's prefix cache."""

    id: str  # of the generation
    tenant: str
    cache_salt: bytes
    work_class: WorkClass
    tuned: AdapterReady | None = None  # the adapter it works with, loaded once

    @property
    def adapter(self) -> str:
        """The adapter's digest; empty: the base alone."""
        return self.tuned.digest if self.tuned is not None else ""


@dataclass(slots=True)
class Spent:
    """The engine's own counts, summed over the calls of one request."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    queue_s: float | None = None  # of the first call
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def add(self, done: Done) -> None:
        """One call's counts."""
        self.input_tokens += done.usage.input_tokens
        self.cached_input_tokens += done.usage.cached_input_tokens
        self.output_tokens += done.usage.output_tokens
        self.queue_s = done.timings.queue_s if self.queue_s is None else self.queue_s
        self.prefill_s += done.timings.prefill_s
        self.decode_s += done.timings.decode_s

    def lose(self, prompt_tokens: int, output_tokens: int) -> None:
        """What is known of a call whose engine died without its counts. A token that came shows that the prompt was computed (F4)."""
        if output_tokens:
            self.input_tokens += prompt_tokens
            self.output_tokens += output_tokens

    def usage(self) -> usage_pb2.Usage:
        """As billed."""
        return usage_pb2.Usage(
            input_tokens=self.input_tokens, cached_input_tokens=self.cached_input_tokens, output_tokens=self.output_tokens
        )

    def timings(self) -> stream_pb2.Timings:
        """Where the time went."""
        return stream_pb2.Timings(queue=_duration(self.queue_s or 0.0), prefill=_duration(self.prefill_s), decode=_duration(self.decode_s))


def refusal(error: str) -> ServiceError:
    """What the caller is told for a `Done.error`."""
    match error:
        case "queue_full":
            return Shed()
        case "draining":
            return NotStarted()
        case "deadline":
            return DeadlineExceeded()
        case "cancelled":
            return CallerLeft()
        case "adapter_unknown":  # or another project's: nobody can tell which
            return ResourceNotFound("model")
        case "adapter_unavailable":
            return StoreUnavailable()
        case "adapter_refused" | "adapter_failed":
            return WrongState("model", error.upper())
        case "no_gradients":
            return ModelCapability("method", "gradient_x_input")
        case "unsupported":
            return ModelCapability("model", "this_engine")
        case "no_adapters":
            return ModelCapability("model", "adapters")
        case _:
            return Internal()


@dataclass(slots=True)
class _Output:
    """One output while it is written."""

    index: int
    text: OutputText
    said: list[str] = field(default_factory=list)  # kept for parts that nobody sees but the next plan
    held: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)  # first byte, token: until its text goes out
    ended: FinishReason | None = None


@dataclass(slots=True)
class Generation:
    """One request: its plan, the engine's calls for it, and where the events go."""

    host: Host
    tokenizer: Tokenizer
    context_tokens: int
    who: Who
    work: Work
    asked: Asked
    plan: Plan
    started: stream_pb2.Started
    outbox: Outbox
    left_s: Callable[[], float]  # to the deadline
    ceiling: int | None = None
    spent: Spent = field(default_factory=Spent)
    _failure: ServiceError | None = None  # why it is being ended
    _live: set[str] = field(default_factory=set)  # ids of the engine's calls
    _calls: int = 0
    _longest: int = 0
    _time_limit_s: float | None = None
    _end_at: float | None = None  # loop time of the soft limit

    def check(self) -> None:
        """Raise what can be known of the lengths before anything runs."""
        for output in self.plan.outputs:
            for segment in output:
                self._limits(self.plan, segment, 0)

    async def run(self) -> None:
        """Fill the outbox and close it, with an error if there was one. Cancelled: the engine's calls end within a step."""
        try:
            await self._run()
        except asyncio.CancelledError:
            self.outbox.close(CallerLeft())
            raise
        except Exception as error:
            public = _public(error)
            self.outbox.close(public, drop=isinstance(public, SlowConsumer))
        else:
            self.outbox.close()

    def abort(self, error: ServiceError) -> None:
        """End every call as soon as the engine can, as `error`; what they cost still comes back."""
        if self._failure is None:
            self._failure = error
            self.host.abort(*self._live)

    async def _run(self) -> None:
        self._time_limit_s = self.asked.time_limit_s(self.left_s())
        self._end_at = asyncio.get_running_loop().time() + self._time_limit_s if self._time_limit_s is not None else None
        if not self.asked.config.output.prompt_logprobs:
            self._start(())
        plan = self.plan
        while plan.then is not None:
            texts = await self._outputs(plan, visible=False)
            plan = await plan.then(texts)
        await self._outputs(plan, visible=True)
        effective = self.asked.effective(self._longest, plan.stopping.min_output_tokens, self._time_limit_s)
        completed = stream_pb2.Completed(usage=self.spent.usage(), effective_config=effective, timings=self.spent.timings())
        self.outbox.put(GenerationEvent(completed=completed))

    def _start(self, prompt_logprobs: Sequence[TokenLogprob]) -> None:
        self.started.prompt_tokens = self.plan.prompt_tokens
        self.started.prompt_logprobs.extend(prompt_logprobs)
        now = Timestamp()
        now.GetCurrentTime()
        self.started.create_time.CopyFrom(now)
        self.outbox.put(GenerationEvent(started=self.started))

    async def _outputs(self, plan: Plan, *, visible: bool) -> list[str]:
        """Run every output of a plan; those of a batch side by side."""
        if len(plan.outputs) == 1:
            return [await self._output(plan, 0, visible)]
        gate = asyncio.Semaphore(PARALLEL_OUTPUTS)

        async def one(index: int) -> str:
            async with gate:
                return await self._output(plan, index, visible)

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(index)) for index in range(len(plan.outputs))]
        return [task.result() for task in running]

    async def _output(self, plan: Plan, index: int, visible: bool) -> str:
        """The segments of one output in order. An output that ends before its time (length, time) has no further segment."""
        said: list[str] = []
        used = 0
        segments = plan.outputs[index]
        for place, segment in enumerate(segments):
            if visible and segment.before:
                self.outbox.text(index, segment.before, count=0)
            last = place + 1 == len(segments)
            ended = await self._call(plan, index, segment, used, visible=visible, finish=last)
            said += [segment.before, *ended.said]
            used += ended.text.tokens
            if not last and (ended.ended is not FinishReason.END_TOKEN or self._used_up(plan, used)):
                if visible:
                    self._finish(plan, ended, ended.ended or FinishReason.LENGTH)
                break
        return "".join(said)

    def _used_up(self, plan: Plan, used: int) -> bool:
        return plan.stopping.HasField("max_output_tokens") and used >= plan.stopping.max_output_tokens

    def _limits(self, plan: Plan, segment: Segment, used: int) -> Limits:
        stopping = plan.stopping
        if used:
            stopping = type(stopping)()
            stopping.CopyFrom(plan.stopping)
            if stopping.HasField("max_output_tokens"):
                stopping.max_output_tokens -= used
            stopping.min_output_tokens = max(0, stopping.min_output_tokens - used)
        room = self.context_tokens - len(segment.prompt)
        return limits_from_proto(stopping, room, plan.end_token_ids, self.ceiling, self.context_tokens)

    async def _call(self, plan: Plan, index: int, segment: Segment, used: int, *, visible: bool, finish: bool) -> _Output:
        """One engine call: the whole of a segment, or all `n` outputs of a single prompt."""
        if self._failure is not None:
            raise self._failure
        limits = self._limits(plan, segment, used)
        self._longest = max(self._longest, limits.max_output_tokens + used)
        outputs = self.asked.outputs if visible else 1
        stops = (*self.asked.stops, *plan.stops) if visible else plan.stops
        written = [_Output(index + n, OutputText(stops, min_tokens=limits.min_output_tokens, trim_start=plan.trim)) for n in range(outputs)]
        self._calls += 1
        left_s = self.left_s()
        call = Generate(
            id=self.who.id if self._calls == 1 else f"{self.who.id}:{self._calls}",
            prompt=segment.prompt,
            sampling=self.asked.sampling,
            limits=limits,
            deadline_s=max(0.0, left_s - min(DEADLINE_MARGIN_S, left_s / 2)),
            tenant=self.who.tenant,
            cache_salt=self.who.cache_salt,
            outputs=outputs,
            time_limit_s=None if self._end_at is None else max(0.0, self._end_at - asyncio.get_running_loop().time()),
            top_logprobs=self.asked.top_logprobs if visible else None,
            prompt_logprobs=visible and self.asked.config.output.prompt_logprobs,
            work_class=self.who.work_class,
            adapter=self.who.adapter,
            owner=self.who.tenant,
        )
        self._live.add(call.id)
        tokens = 0
        try:
            # Leaving it early ends the call within a step.
            with self.work.call(call) as told:
                async with aclosing(self.host.submit(call)) as messages:
                    async for message in messages:
                        match message:
                            case Token():
                                tokens += 1
                                self.work.token()
                                self._token(call, plan, written[message.index], message, visible)
                            case Ended():
                                self._ended(plan, written[message.index], message.reason, visible, finish)
                                told.reasons.append(written[message.index].ended or message.reason)
                            case PromptScored():
                                self._start(self._prompt_logprobs(call, message))
                            case Done():
                                told.done = message
                                self._done(message, written)
                            case _:
                                continue
        except EngineLost:
            self.spent.lose(len(call.prompt), tokens)
            raise
        finally:
            self._live.discard(call.id)
        return written[0]

    def _token(self, call: Generate, plan: Plan, output: _Output, token: Token, visible: bool) -> None:
        if output.ended is not None:
            return  # the steps between a stop sequence and the engine's hearing of it
        self.outbox.phase = Phase.PHASE_DECODE
        first_byte = output.text.fed_bytes
        text = output.text.feed(self.tokenizer.text_bytes(token.token_id))
        if token.logprob is not None:
            output.held.append((first_byte, self._logprob(token.token_id, token.logprob, token.top)))
        if visible:
            self._send(output, text, 1)
        else:
            output.said.append(text)
        if output.text.matched is not None:
            output.ended = FinishReason.STOPPED
            self.host.stop(call.id, token.index)

    def _send(self, output: _Output, text: str, count: int) -> None:
        shown = []
        while text and output.held and output.held[0][0] < output.text.settled_bytes:
            shown.append(output.held.popleft()[1])
        self.outbox.text(output.index, text, shown, count)

    def _ended(self, plan: Plan, output: _Output, reason: FinishReason, visible: bool, finish: bool) -> None:
        rest = output.text.finish()
        if visible:
            self._send(output, rest, 0)
        else:
            output.said.append(rest)
        if output.text.matched is not None:
            own = output.text.matched in plan.stops and output.text.matched not in self.asked.stops
            reason = FinishReason.END_TOKEN if own else FinishReason.STOPPED
        output.ended = reason
        if visible and finish:
            self._finish(plan, output, reason)

    def _finish(self, plan: Plan, output: _Output, reason: FinishReason) -> None:
        if reason in (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.ERROR) or self._failure is not None:
            return  # the status says it
        finished = OutputFinished(index=output.index)
        if plan.source_languages:
            finished.source_language = plan.source_languages[output.index]
        if reason is FinishReason.STOPPED:
            finished.reason, finished.stop_sequence = Reason.FINISH_REASON_STOP_SEQUENCE, output.text.matched or ""
        elif reason is FinishReason.LENGTH:
            asked = plan.stopping.HasField("max_output_tokens")
            finished.reason = Reason.FINISH_REASON_LENGTH if asked else Reason.FINISH_REASON_CONTEXT_LENGTH
        else:
            finished.reason = REASONS[reason]
        self.outbox.put(GenerationEvent(output_finished=finished), after=output.index)

    def _done(self, done: Done, written: Sequence[_Output]) -> None:
        self.spent.add(done)
        if done.error is not None:
            raise refusal(done.error)
        if self._failure is not None:
            raise self._failure
        if any(output.ended is FinishReason.CANCELLED for output in written):
            raise CallerLeft
        if any(output.ended is FinishReason.DEADLINE for output in written):
            raise DeadlineExceeded
        if any(output.ended in (None, FinishReason.ERROR) for output in written):
            raise Internal

    def _logprob(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        others = [TokenLogprob(token_id=id, token=self.tokenizer.token_bytes(id), logprob=value) for id, value in top]
        return TokenLogprob(token_id=token, token=self.tokenizer.token_bytes(token), logprob=logprob, top=others)

    def _prompt_logprobs(self, call: Generate, scored: PromptScored) -> list[TokenLogprob]:
        tops = scored.top or ((),) * len(scored.logprobs)
        rows = zip(call.prompt[1:], scored.logprobs, tops, strict=True)
        return [self._logprob(token, logprob, top) for token, logprob, top in rows]


def _public(error: BaseException) -> BaseException:
    """What the caller is told; of several outputs, for the first that failed (the others were cancelled for it)."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, SlowReader):
        return SlowConsumer()
    return StreamLost() if isinstance(error, EngineLost) else error


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(round(seconds * 1e9))
    return found


def served(model: content_pb2.ServedModel, digest: str) -> content_pb2.ServedModel:
    """What answers, with the digest of what is really loaded."""
    return content_pb2.ServedModel(version=model.version, base_digest=digest, adapter_digest=model.adapter_digest)
