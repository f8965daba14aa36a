"""vLLM behind the engine's border: `PYTHON -m services.inference.engine.vllm SETTINGS FD PARENT BUILD`, in an environment that has vLLM.

For models beyond one GPU: vLLM splits them by its own means (tensor and pipeline parallel). The messages, their order, usage on every
exit, finish reasons, limits and the drain are those of `calls`; what it cannot do here ends a call as `unsupported`: embeddings, labels of
a head, gradients, adapters. Its draws follow its own random numbers, so a seed repeats itself here and not on the other engine.

A `Score` becomes one generated token after each prefix of each continuation, whose prompts share vLLM's prefix cache.
"""

import asyncio
import functools
import importlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from services.inference.engine.calls import (
    Abort,
    AdapterReady,
    Continuation,
    Done,
    Drain,
    Embed,
    Ended,
    Evict,
    FinishReason,
    FromEngine,
    Generate,
    Hello,
    Label,
    Load,
    Prefetch,
    PromptScored,
    Score,
    Scored,
    Stop,
    Timings,
    ToEngine,
    Token,
    Usage,
    Weigh,
    Weighed,
)
from services.inference.engine.child import at, ignore_signals, log_as_json
from services.inference.engine.frames import FrameError, encode, to_engine
from services.inference.engine.generation import architecture_of, sampling_of
from services.inference.engine.live import MOST_OUTPUTS, refusal
from services.inference.engine.meter import Meter
from services.inference.engine.settings import EngineSettings
from services.pretrained import weights

LOAD_EVERY_S = 0.1
MOST_IDS = 128  # whose log-probabilities vLLM gives at one position; more are asked for in turns
MOST_ASKED = 8 * MOST_IDS  # by turns; beyond it the whole vocabulary is asked for once
SEED_STEP = 0x9E3779B97F4A7C15  # between the outputs of a call
# What an operator may say to vLLM. Nothing that loads code, listens, or changes what a token means.
ALLOWED = frozenset(
    (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "gpu_memory_utilization",
        "max_model_len",
        "max_num_batched_tokens",
        "block_size",
        "quantization",
        "kv_cache_dtype",
        "cpu_offload_gb",
        "enforce_eager",
        "distributed_executor_backend",
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
    )
)

log = logging.getLogger("services.inference.engine.vllm")


class ArgumentRefused(ValueError):
    """An engine argument that is not an operator's to give; one sentence."""


def arguments(settings: EngineSettings, directory: Path) -> dict[str, Any]:
    """Keywords of AsyncEngineArgs. Raises ArgumentRefused."""
    found: dict[str, Any] = {
        "model": str(directory),
        "dtype": settings.dtype,
        "max_num_seqs": settings.max_sequences,
        "max_logprobs": -1,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        "enable_log_requests": False,
    }
    if settings.max_step_tokens is not None:
        found["max_num_batched_tokens"] = settings.max_step_tokens
    if settings.kv_tokens is not None:
        found["max_model_len"] = settings.kv_tokens
    for pair in settings.engine_args:
        name, equals, value = pair.partition("=")
        if name not in ALLOWED or not equals:
            raise ArgumentRefused(
                f"{pair!r} is not one of vLLM's arguments that may be set here: {', '.join(sorted(ALLOWED))}, as name=value"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def sampled(call: Generate, index: int) -> dict[str, Any]:
    """Keywords of SamplingParams for one output of a call."""
    sampling, limits = call.sampling, call.limits
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition,
        "frequency_penalty": sampling.frequency,
        "presence_penalty": sampling.presence,
        "logit_bias": dict(sampling.logit_bias) or None,
        "seed": (sampling.seed + index * SEED_STEP) % 2**63,
        "max_tokens": limits.max_output_tokens,
        "min_tokens": 0 if limits.ignore_end_token else min(limits.min_output_tokens, limits.max_output_tokens),
        # Ours to say, not the model's configuration's.
        "ignore_eos": True,
        "stop_token_ids": [] if limits.ignore_end_token else list(limits.end_token_ids),
        "logprobs": call.top_logprobs,
        "prompt_logprobs": (call.top_logprobs or 0) if call.prompt_logprobs and index == 0 else None,
        "detokenize": False,
    }


def top(found: Mapping[int, Any], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest of one position, likeliest first."""
    ranked = sorted((each.rank, token, each.logprob) for token, each in found.items() if each.rank is not None and each.rank <= count)
    return tuple((token, float(logprob)) for _, token, logprob in ranked)


def places(call: Score) -> dict[tuple[int, ...], tuple[int, ...]]:
    """What is asked after which tokens of a `Score`: for each prefix of each continuation, the ids whose log-probabilities are wanted."""
    wanted: dict[tuple[int, ...], dict[int, None]] = {(): dict.fromkeys((*call.first_probes, *call.probes))}
    for continuation in call.continuations:
        for length in range(len(continuation) + 1):
            ids = wanted.setdefault(continuation[:length], dict.fromkeys(call.probes))
            if length < len(continuation):
                ids[continuation[length]] = None
    return {after: tuple(ids) for after, ids in wanted.items() if ids}


def answered(call: Score, found: Mapping[tuple[int, ...], Mapping[int, float]]) -> Scored:
    """The answer, once each place of `places` is known."""
    continuations = tuple(
        Continuation(
            tuple(found[continuation[:place]][token] for place, token in enumerate(continuation)),
            tuple(tuple(found[continuation[:place]][probe] for probe in call.probes) for place in range(len(continuation) + 1))
            if call.probes
            else (),
        )
        for continuation in call.continuations
    )
    return Scored(call.id, continuations, tuple(found[()][probe] for probe in call.first_probes))


@dataclass(eq=False)
class Live:
    """A call under way."""

    call: Generate | Score
    began: float
    tasks: "list[asyncio.Task[FinishReason]]" = field(default_factory=list)
    reasons: dict[int, FinishReason] = field(default_factory=dict)  # why an output was cut, by index
    alarms: list[asyncio.TimerHandle] = field(default_factory=list)
    over: int = 0  # tasks that have ended
    produced: int = 0
    cached: int | None = None
    first: float | None = None  # when the first token came
    error: str | None = None


class Engine:
    """Messages in, events out, over one AsyncLLM. For one event loop.

    Args:
        engine: an AsyncLLM.
        params: makes SamplingParams from keywords, for streams of new tokens alone.
        hello: what this engine says of itself.
        settings: limits.
        send: takes the events of one turn of the loop.
    """

    def __init__(
        self, engine: Any, params: Callable[..., Any], hello: Hello, settings: EngineSettings, send: Callable[[Sequence[FromEngine]], None]
    ) -> None:
        self.ended = asyncio.Event()  # drained
        self._engine, self._params, self._hello, self._settings, self._send = engine, params, hello, settings, send
        self._lives: dict[str, Live] = {}
        self._events: list[FromEngine] = []
        self._draining = False
        self._meter = Meter()
        self._waiting = self._running = self._cached = 0
        self._usage = 0.0  # share of the KV pool
        self._stepped_at = 0.0
        self._changed = True

    # vLLM's own report of a step; its stat logger calls this.

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Note what a step did."""
        now = asyncio.get_running_loop().time()
        if scheduler is not None:
            self._waiting, self._running = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs, scheduler.num_running_reqs
            self._usage = scheduler.kv_cache_usage
            self._cached += scheduler.prefix_cache_stats.hits
            self._changed = True
        if iteration is not None and (iteration.num_prompt_tokens or iteration.num_generation_tokens):
            # A step after a pause took no longer than the pause tells.
            seconds = min(now - self._stepped_at, 10.0) if self._stepped_at else 0.0
            self._meter.add(iteration.num_prompt_tokens, iteration.num_generation_tokens, self._running, seconds)
            self._changed = True
        self._stepped_at = now

    def take(self, message: ToEngine) -> None:
        """Act on one message."""
        match message:
            case Generate() | Score():
                self._begin(message)
            case Embed() | Label():
                self._say(_nothing(message.id, "unsupported"))
            case Weigh():
                self._say(Weighed(message.id, error="unsupported"), _nothing(message.id, "unsupported"))
            case Prefetch():
                self._say(AdapterReady(message.id, message.digest, error="no_adapters"))
                self._say(_nothing(message.id, "no_adapters"))
            case Evict():
                self._say(_nothing(message.id))  # none is here
            case Stop(id=id, index=index):
                if (live := self._lives.get(id)) is not None and isinstance(live.call, Generate):
                    self._cut(live, FinishReason.STOPPED, index)
            case Abort(ids=ids):
                for id in ids:
                    if (live := self._lives.get(id)) is not None:
                        self._cut(live, FinishReason.CANCELLED)
            case Drain():
                self._draining = True
                self._rest()

    async def report(self) -> None:
        """Send the load each 100 ms while steps are made, and on change."""
        while True:
            if self._changed:
                self._changed = False
                self._say(self.load())
            await asyncio.sleep(LOAD_EVERY_S)  # a period, not a wait for something

    def load(self) -> Load:
        """Where the engine stands. Queued tokens are whole prompts that have no token yet: vLLM does not say how far a prefill is."""
        blocks = self._hello.blocks
        queued = allowed = 0
        for live in self._lives.values():
            if isinstance(live.call, Generate):
                queued += len(live.call.prompt) if live.first is None else 0
                allowed += live.call.limits.max_output_tokens * live.call.outputs - live.produced
            else:
                queued += len(live.call.prefix)
        return Load(
            waiting_sequences=self._waiting,
            running_sequences=self._running,
            queued_tokens=queued,
            running_tokens=allowed,
            prefill_tokens_per_s=self._meter.prefill.per_s,
            decode_tokens_per_s=self._meter.decode.per_s,
            free_blocks=blocks if not self._lives else blocks - round(self._usage * blocks),
            total_blocks=blocks,
            cached_tokens=self._cached,
            steps=self._meter.steps,
            step_s=self._meter.step_s,
            batch=self._meter.batch,
        )

    # How a call begins and ends.

    def _begin(self, call: Generate | Score) -> None:
        if call.id in self._lives:
            log.error("a call came twice", extra={"call": call.id})
            return
        word = self._refusal(call)
        if word is not None:
            if isinstance(call, Generate):
                self._say(*(Ended(call.id, index, FinishReason.ERROR) for index in range(min(call.outputs, MOST_OUTPUTS))))
            self._say(_nothing(call.id, word))
            return
        loop = asyncio.get_running_loop()
        live = self._lives[call.id] = Live(call, loop.time())
        self._changed = True
        live.alarms.append(loop.call_later(call.deadline_s, self._cut, live, FinishReason.DEADLINE))
        if isinstance(call, Generate):
            if call.time_limit_s is not None:
                live.alarms.append(loop.call_later(call.time_limit_s, self._cut, live, FinishReason.TIME_LIMIT))
            live.tasks = [asyncio.create_task(self._output(live, call, index)) for index in range(call.outputs)]
        else:
            live.tasks = [asyncio.create_task(self._score(live, call))]
        for index, task in enumerate(live.tasks):
            task.add_done_callback(functools.partial(self._over, live, index))
        if call.deadline_s <= 0:
            self._cut(live, FinishReason.DEADLINE)

    def _refusal(self, call: Generate | Score) -> str | None:
        if self._draining:
            return "draining"
        if call.adapter:
            return "no_adapters"
        if len(self._lives) >= self._settings.max_waiting + self._settings.max_sequences:
            return "queue_full"
        return refusal(call, self._hello.vocabulary, self._hello.context, self._hello.blocks)

    def _cut(self, live: Live, reason: FinishReason, index: int | None = None) -> None:
        for place, task in enumerate(live.tasks):
            if index in (None, place) and not task.done() and place not in live.reasons:
                live.reasons[place] = reason
                task.cancel()

    async def _output(self, live: Live, call: Generate, index: int) -> FinishReason:
        """One output of a generation; why it ended."""
        reason = FinishReason.ERROR
        try:
            ends = () if call.limits.ignore_end_token else call.limits.end_token_ids
            async for found in self._asked(call, call.prompt, sampled(call, index), f"{call.id}/{index}"):
                if index == 0:
                    self._note(live, call, found)
                output = found.outputs[0]
                ended = output.finish_reason == "stop"
                for place, token in enumerate(output.token_ids):
                    live.first = live.first or asyncio.get_running_loop().time()
                    live.produced += 1
                    if ended and place == len(output.token_ids) - 1 and token in ends:
                        continue  # counted, not sent
                    ranked = output.logprobs[place] if output.logprobs else None
                    logprob = float(ranked[token].logprob) if ranked is not None else None
                    self._say(Token(call.id, index, token, logprob, top(ranked, call.top_logprobs or 0) if ranked is not None else ()))
                if output.finish_reason is not None:
                    reason = FinishReason.END_TOKEN if ended else FinishReason.LENGTH if output.finish_reason == "length" else reason
        except Exception as failure:  # of this call alone, unless the engine is dead: then the process ends
            self._failed(live, failure)
        if reason is FinishReason.ERROR:
            live.error = live.error or "step_failed"
        return reason

    def _note(self, live: Live, call: Generate, found: Any) -> None:
        """What the first output says of the prompt."""
        if live.cached is None:
            live.cached = found.num_cached_tokens or 0
            if call.prompt_logprobs and found.prompt_logprobs:
                rows = list(zip(call.prompt[1:], found.prompt_logprobs[1:], strict=True))
                ranked = tuple(top(row, call.top_logprobs) for _, row in rows) if call.top_logprobs else ()
                self._say(PromptScored(call.id, tuple(float(row[token].logprob) for token, row in rows), ranked))

    async def _score(self, live: Live, call: Score) -> FinishReason:
        try:
            wanted = places(call)
            found: dict[tuple[int, ...], dict[int, float]] = {after: {} for after in wanted}
            async with asyncio.TaskGroup() as group:
                for number, (after, ids) in enumerate(_turns(wanted)):
                    group.create_task(self._position(live, call, number, after, ids, found[after]))
            self._say(answered(call, found))
        except Exception as failure:  # as above
            self._failed(live, failure)
        return FinishReason.END_TOKEN

    async def _position(
        self, live: Live, call: Score, number: int, after: tuple[int, ...], ids: tuple[int, ...] | None, found: dict[int, float]
    ) -> None:
        """Log-probabilities of `ids`, None for all, of the token that follows."""
        asked: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
        asked |= {"logprobs": -1} if ids is None else {"logprob_token_ids": list(ids)}
        async for reply in self._asked(call, (*call.prefix, *after), asked, f"{call.id}/{number}"):
            if number == 0 and live.cached is None:
                live.cached = reply.num_cached_tokens or 0
            for row in reply.outputs[0].logprobs or ():
                found.update({token: float(each.logprob) for token, each in row.items()})

    def _asked(self, call: Generate | Score, prompt: tuple[int, ...], keywords: dict[str, Any], id: str) -> Any:
        """One request to vLLM; closing what it returns aborts it."""
        # The salt parts tenants: without it one's prompt would be found in another's cache.
        inputs = {"prompt_token_ids": list(prompt), "cache_salt": call.cache_salt.hex() + call.tenant}
        return self._engine.generate(inputs, self._params(**keywords), id, priority=int(call.work_class))

    def _failed(self, live: Live, failure: BaseException) -> None:
        log.error("a call failed", extra={"call": live.call.id} | at(failure))
        live.error = "step_failed"
        if self._engine.errored:
            log.critical("vLLM is dead")
            self._send(self._events)
            os._exit(1)  # the host starts another

    def _over(self, live: Live, index: int, task: "asyncio.Task[FinishReason]") -> None:
        """A task has ended, or was cut off, perhaps before it began."""
        reason = live.reasons.get(index, FinishReason.CANCELLED) if task.cancelled() else task.result()
        if isinstance(live.call, Generate):
            self._say(Ended(live.call.id, index, reason))
        elif task.cancelled():
            live.error = "deadline" if reason is FinishReason.DEADLINE else "cancelled"
        live.over += 1
        if live.over == len(live.tasks):
            self._finish(live)

    def _finish(self, live: Live) -> None:
        """The one exit of a call: say what it cost."""
        del self._lives[live.call.id]
        for alarm in live.alarms:
            alarm.cancel()
        call, now = live.call, asyncio.get_running_loop().time()
        asked = len(call.prompt) if isinstance(call, Generate) else len(call.prefix) + sum(map(len, call.continuations))
        first = live.first or now
        usage = Usage(asked, min(live.cached or 0, asked), live.produced)
        self._changed = True
        # vLLM does not part queue from prefill in a stream that was cut: both are in `prefill_s`.
        self._say(Done(call.id, usage, Timings(0.0, first - live.began, now - first), live.error))
        self._rest()

    def _rest(self) -> None:
        if self._draining and not self._lives:
            asyncio.get_running_loop().call_soon(self.ended.set)

    def _say(self, *events: FromEngine) -> None:
        """All that is said in one turn of the loop goes out as one frame."""
        if not self._events and events:
            asyncio.get_running_loop().call_soon(self._flush)
        self._events.extend(events)

    def _flush(self) -> None:
        events, self._events = self._events, []
        self._send(events)


def _nothing(id: str, error: str | None = None) -> Done:
    """The end of a call for which nothing was computed."""
    return Done(id, Usage(0, 0, 0), Timings(0.0, 0.0, 0.0), error)


def _turns(wanted: Mapping[tuple[int, ...], tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """The places, as often as vLLM must be asked about each; None: about every token at once."""
    for after, ids in wanted.items():
        if len(ids) > MOST_ASKED:
            yield after, None
            continue
        for begin in range(0, len(ids), MOST_IDS):
            yield after, ids[begin : begin + MOST_IDS]


class _Wire(asyncio.Protocol):
    """The child's end of the socket."""

    def __init__(self) -> None:
        self.take: Callable[[ToEngine], None] | None = None
        self.closed = asyncio.Event()
        self._reader = to_engine()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._reader.feed(data)
        except FrameError as failure:
            log.critical("the parent sent what is not a frame", extra=at(failure))
            self._transport.abort()
            return
        for message in messages:
            if self.take is not None:
                self.take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def send(self, events: Sequence[FromEngine]) -> None:
        """One frame."""
        if events and not self._transport.is_closing():
            self._transport.write(encode(events))


async def serve(settings: EngineSettings, connection: socket.socket) -> None:
    """Load, say hello, answer until the parent hangs up or has drained us."""
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_unix_connection(_Wire, sock=connection)
    directory = Path(settings.directory or settings.model)
    digest = weights.digest(directory, weights.cache_directory(settings.cache_dir))
    vllm: Any = importlib.import_module("vllm")
    loggers: Any = importlib.import_module("vllm.v1.metrics.loggers")
    sampling: Any = importlib.import_module("vllm.sampling_params")
    served: list[Engine] = []

    class Steps(loggers.StatLoggerBase):  # type: ignore[misc]  # vLLM has no types here
        """Passes each step's numbers on."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            """As vLLM calls it."""

        def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
            """See Engine.record."""
            for each in served:
                each.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            """Our own log says it."""

    made: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    engine = made.from_engine_args(vllm.AsyncEngineArgs(**arguments(settings, directory)), stat_loggers=[Steps])
    try:
        hello = _hello(settings, directory, digest, engine.vllm_config)
        params = functools.partial(sampling.SamplingParams, output_kind=sampling.RequestOutputKind.DELTA)
        running = Engine(engine, params, hello, settings, wire.send)
        served.append(running)
        wire.take = running.take
        wire.send([hello])
        log.info("engine ready", extra={"backend": "vllm", "version": vllm.__version__})
        reporting = asyncio.create_task(running.report(), name="load")
        ending = [asyncio.create_task(event.wait()) for event in (wire.closed, running.ended)]
        await asyncio.wait((*ending, reporting), return_when=asyncio.FIRST_COMPLETED)
        for task in (*ending, reporting):
            task.cancel()
    finally:
        engine.shutdown()


def _hello(settings: EngineSettings, directory: Path, digest: str, config: Any) -> Hello:
    sampling, ends = sampling_of(directory)
    block, blocks = config.cache_config.block_size, config.cache_config.num_gpu_blocks
    return Hello(
        model=settings.model,
        digest=digest,
        architecture=architecture_of(directory),
        device=str(config.device_config.device_type),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        vocabulary=config.model_config.get_vocab_size(),
        context=min(config.model_config.max_model_len, block * blocks),
        width=config.model_config.get_hidden_size(),
        block_size=block,
        blocks=blocks,
        default_sampling=sampling,
        end_token_ids=ends,
        backend="vllm",
        embeds=False,
    )


def main(settings_json: str, fd: str, parent: str, _build: str) -> int:
    """Serve until told otherwise. Returns the exit status: 0 after a drain or when the parent is gone."""
    # The socket's end, not a signal, says that the parent is gone: vLLM's own processes must be ended with this one.
    if os.getppid() != int(parent):
        return 0
    os.setpgid(0, 0)  # vLLM's core does not notice that this process was killed: the host ends the whole group
    ignore_signals()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    log_as_json()
    try:
        settings = msgspec.json.decode(settings_json.encode(), type=EngineSettings)
        asyncio.run(serve(settings, socket.socket(fileno=int(fd))))
    except Exception as failure:  # before the first call there is no content to leak, and an operator needs the sentence
        log.critical("the model was not loaded: %s", failure, extra=at(failure))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
