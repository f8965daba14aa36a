"""`GenerationConfig` as values, and back as it took effect. Bounds that need no model were checked before; those that do are here."""

import secrets
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from argosy.v1 import config_pb2
from services.chassis.errors import FieldOutOfRange, PromptTooLong
from services.inference.engine.calls import Hello, Limits, Sampling

__all__ = ["Asked", "asked_from_proto", "default_config", "limits_from_proto", "sampling_from_proto", "seconds"]

TIME_MARGIN_S = 0.250  # a soft limit ends this long before the deadline, so that the partial output arrives


def seconds(duration: Duration) -> float:
    """A protobuf duration as a number."""
    return duration.seconds + duration.nanos / 1e9


@dataclass(frozen=True, slots=True)
class Asked:
    """A caller's config for one model: `sampling` is resolved, lengths wait for the prompt's."""

    config: config_pb2.GenerationConfig
    sampling: Sampling
    outputs: int
    top_logprobs: int | None
    flush_s: float | None  # None: the default
    stops: tuple[str, ...]

    def time_limit_s(self, left_s: float) -> float | None:
        """Seconds until the soft limit with `left_s` to the deadline; None: not asked for."""
        if not self.config.stopping.HasField("time_limit"):
            return None
        return min(seconds(self.config.stopping.time_limit), max(0.0, left_s - TIME_MARGIN_S))

    def effective(self, max_output_tokens: int, min_output_tokens: int, time_limit_s: float | None) -> config_pb2.GenerationConfig:
        """Every parameter as it took effect."""
        sampling, stopping, output = self.sampling, self.config.stopping, self.config.output
        shown = config_pb2.GenerationConfig(
            sampling=config_pb2.Sampling(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
                seed=sampling.seed, n=self.outputs,
            ),
            penalties=config_pb2.Penalties(
                repetition=sampling.repetition, frequency=sampling.frequency, presence=sampling.presence, 
                logit_bias=dict(sampling.logit_bias),
            ),
            stopping=config_pb2.Stopping(
                max_output_tokens=max_output_tokens, min_output_tokens=min_output_tokens, stop_sequences=stopping.stop_sequences,
                ignore_end_token=stopping.ignore_end_token,
            ),
            output=config_pb2.OutputOptions(prompt_logprobs=output.prompt_logprobs),
        )  # fmt: skip
        if self.top_logprobs is not None:
            shown.output.top_logprobs = self.top_logprobs
        if self.flush_s is not None:
            shown.output.flush_interval.FromNanoseconds(round(self.flush_s * 1e9))
        if time_limit_s is not None:
            shown.stopping.time_limit.FromNanoseconds(round(time_limit_s * 1e9))
        return shown


def sampling_from_proto(config: config_pb2.GenerationConfig, defaults: Sampling, vocabulary: int) -> Sampling:
    """Unset fields become the model's defaults; an unset seed is drawn. Raises FieldOutOfRange for a token the model lacks."""
    asked, penalties = config.sampling, config.penalties
    for token in penalties.logit_bias:
        if token >= vocabulary:
            raise FieldOutOfRange("config.penalties.logit_bias", token, vocabulary - 1, "token id")

    def pick(message: config_pb2.Sampling | config_pb2.Penalties, name: str) -> float:
        return getattr(message, name) if message.HasField(name) else getattr(defaults, name)  # type: ignore[arg-type, no-any-return]

    return Sampling(
        seed=asked.seed if asked.HasField("seed") else secrets.randbits(63),
        temperature=pick(asked, "temperature"),
        top_p=pick(asked, "top_p"),
        top_k=int(pick(asked, "top_k")),
        min_p=pick(asked, "min_p"),
        repetition=pick(penalties, "repetition"),
        frequency=pick(penalties, "frequency"),
        presence=pick(penalties, "presence"),
        logit_bias=tuple(sorted(penalties.logit_bias.items())),
    )


def asked_from_proto(config: config_pb2.GenerationConfig, defaults: Sampling, vocabulary: int, *, most_outputs: int = 4) -> Asked:
    """The config for a model. `most_outputs`: 1 where a task has one output a text."""
    outputs = config.sampling.n if config.sampling.HasField("n") else 1
    if outputs > most_outputs:
        raise FieldOutOfRange("config.sampling.n", outputs, most_outputs, "outputs")
    output = config.output
    return Asked(
        config=config,
        sampling=sampling_from_proto(config, defaults, vocabulary),
        outputs=outputs,
        top_logprobs=output.top_logprobs if output.HasField("top_logprobs") else None,
        flush_s=seconds(output.flush_interval) if output.HasField("flush_interval") else None,
        stops=tuple(config.stopping.stop_sequences),
    )


def limits_from_proto(
    stopping: config_pb2.Stopping, room: int, end_token_ids: tuple[int, ...], ceiling: int | None = None, context: int | None = None
) -> Limits:
    """Lengths of one output with `room` tokens after the prompt. Unset is the smaller of room and ceiling; above it is refused."""
    if room < 1:
        limit = (context or 1) - 1
        raise PromptTooLong("prompt", limit + 1 - room, limit, "tokens")
    most = room if ceiling is None else min(room, ceiling)
    longest = stopping.max_output_tokens if stopping.HasField("max_output_tokens") else most
    if not 1 <= longest <= most:
        raise FieldOutOfRange("config.stopping.max_output_tokens", longest, most, "tokens")
    if stopping.min_output_tokens > longest:
        raise FieldOutOfRange("config.stopping.min_output_tokens", stopping.min_output_tokens, longest, "tokens")
    return Limits(longest, end_token_ids, stopping.min_output_tokens, stopping.ignore_end_token)


def default_config(hello: Hello) -> config_pb2.GenerationConfig:
    """What an unset field of a request means."""
    defaults = hello.default_sampling
    return config_pb2.GenerationConfig(
        sampling=config_pb2.Sampling(
            temperature=defaults.temperature, top_p=defaults.top_p, top_k=defaults.top_k, min_p=defaults.min_p, n=1
        ),
        penalties=config_pb2.Penalties(repetition=defaults.repetition, frequency=defaults.frequency, presence=defaults.presence),
        stopping=config_pb2.Stopping(min_output_tokens=0),
    )
