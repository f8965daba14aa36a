"""All that crosses the border between the process on the wire and the engine's process.

Values only: frozen, msgspec-encoded, no protobuf, no tensor. Parent to child: `Generate`, `Score`, `Embed`, `Label`, `Weigh`, `Prefetch`,
`Evict`, `Stop`, `Abort`, `Drain`. Child to parent: `Hello` once, then `Token`, `PromptScored`, `Ended`, `Done`, `Scored`, `Embedded`,
`Labelled`, `Weighed`, `AdapterReady`, `Load`. Both directions travel as a `Frame`: a tuple of messages a step, so that a batch of 32 tokens
costs one write.

A call may name an adapter by its digest; `owner` is then the project that it must belong to. An adapter that is not here is fetched while
the call waits beside the batch; one that is unknown, or another project's, ends the call with the same `adapter_unknown`.
"""

import enum

import msgspec


class FinishReason(enum.IntEnum):
    """Why one output ended. The wire maps each to a public reason or to a status."""

    END_TOKEN = 1  # the model ended its turn
    STOPPED = 2  # the parent matched a stop sequence and sent `Stop`
    LENGTH = 3  # `Limits.max_output_tokens`
    TIME_LIMIT = 4  # `time_limit_s`: soft, the partial output stands
    CANCELLED = 5  # `Abort`
    DEADLINE = 6  # `deadline_s`: hard
    ERROR = 7  # `Done.error` says which


class WorkClass(enum.IntEnum):
    """Lower runs first."""

    INTERACTIVE = 0
    BATCH = 1
    EXPLAIN = 2


class Sampling(msgspec.Struct, frozen=True):
    """Resolved values: the door has already replaced every unset field by the model's default."""

    seed: int  # any 64-bit value; output `index` and position make the rest of the random counter
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class Limits(msgspec.Struct, frozen=True):
    """When an output must end. All counts are tokens of one output."""

    max_output_tokens: int
    end_token_ids: tuple[int, ...]
    min_output_tokens: int = 0  # end tokens are barred until then
    ignore_end_token: bool = False


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Continue `prompt` `outputs` times (1..4)."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    limits: Limits
    deadline_s: float  # seconds left when sent; hard
    tenant: str  # fair share is counted by this
    cache_salt: bytes  # root of the prefix cache's key; secret of one tenant
    outputs: int = 1
    time_limit_s: float | None = None  # seconds; soft
    top_logprobs: int | None = None  # 0..5; None: no log-probabilities
    prompt_logprobs: bool = False
    work_class: WorkClass = WorkClass.INTERACTIVE
    adapter: str = ""  # digest; empty: the base alone
    owner: str = ""  # uid of the project that the adapter belongs to


class Score(msgspec.Struct, frozen=True, tag=True):
    """Log-probabilities of given continuations of one prefix, whose blocks they share.

    At each position from the prefix's last token to the one before a continuation's last, the log-probability of the next
    token is reported, and at each of these and after the last token, those of `probes`. No sampling.
    """

    id: str
    prefix: tuple[int, ...]  # at least one token
    continuations: tuple[tuple[int, ...], ...]
    deadline_s: float
    tenant: str
    cache_salt: bytes
    probes: tuple[int, ...] = ()
    first_probes: tuple[int, ...] = ()  # asked only at the prefix's last token; up to the vocabulary
    work_class: WorkClass = WorkClass.INTERACTIVE
    adapter: str = ""
    owner: str = ""


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Mean of the last hidden states of each input, float32, not normalised."""

    id: str
    inputs: tuple[tuple[int, ...], ...]
    deadline_s: float
    tenant: str
    cache_salt: bytes
    work_class: WorkClass = WorkClass.INTERACTIVE
    adapter: str = ""
    owner: str = ""


class Label(msgspec.Struct, frozen=True, tag=True):
    """What an adapter's head says of each input: logits, float32, before any temperature."""

    id: str
    inputs: tuple[tuple[int, ...], ...]
    adapter: str  # one with a head
    owner: str
    deadline_s: float
    tenant: str
    cache_salt: bytes
    work_class: WorkClass = WorkClass.INTERACTIVE


class Weigh(msgspec.Struct, frozen=True, tag=True):
    """What each token of a prompt is worth to one of several candidates: gradient × input, a forward and a backward pass beside the batch.

    A candidate's score is the log-probability of its continuation. With `contrast` it is the mean over its tokens, less the candidate's
    own contrast, and then a log-softmax over all. Without continuations the candidates are the labels of the adapter's head.
    """

    id: str
    prefix: tuple[int, ...]  # at least one token
    continuations: tuple[tuple[int, ...], ...]
    deadline_s: float  # to begin: a pass that runs is not cut
    tenant: str
    contrast: tuple[float, ...] = ()  # one a continuation, or none
    target: int | None = None  # which candidate; None: the likeliest
    adapter: str = ""
    owner: str = ""


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    """Have an adapter here: answered by `AdapterReady` when it is loaded, or with why it cannot be; then `Done`."""

    id: str
    digest: str
    owner: str
    deadline_s: float


class Evict(msgspec.Struct, frozen=True, tag=True):
    """Let go of an adapter and of what it cached: calls with it end as `adapter_unknown`, later ones fetch it anew. Answered by `Done`."""

    id: str
    digest: str
    owner: str = ""  # empty: whoever's it is


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End one output as STOPPED, before the next step."""

    id: str
    index: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End these calls as CANCELLED, before the next step. Unknown ids are ignored: aborting twice is safe."""

    ids: tuple[str, ...]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what runs; the child exits 0 when idle."""


Call = Generate | Score | Embed | Label  # what sequences are made of
Asked = Call | Weigh | Prefetch | Evict  # what is answered up to a `Done`
ToEngine = Generate | Score | Embed | Label | Weigh | Prefetch | Evict | Stop | Abort | Drain


class Usage(msgspec.Struct, frozen=True):
    """Exact counts over all outputs of a call, on every exit."""

    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """Seconds spent waiting, in prefill and in decode."""

    queue_s: float
    prefill_s: float
    decode_s: float


class Token(msgspec.Struct, frozen=True, tag=True):
    """One generated token. End tokens are counted in usage but not sent."""

    id: str
    index: int
    token_id: int
    logprob: float | None = None  # nats, before temperature and truncation
    top: tuple[tuple[int, float], ...] = ()


class PromptScored(msgspec.Struct, frozen=True, tag=True):
    """Log-probability of each prompt token but the first, given those before it."""

    id: str
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The last message about one output."""

    id: str
    index: int
    reason: FinishReason


class Done(msgspec.Struct, frozen=True, tag=True):
    """The last message about a call. `error` is a stable word for the log, never content: see `engine.ERRORS`."""

    id: str
    usage: Usage
    timings: Timings
    error: str | None = None


class Continuation(msgspec.Struct, frozen=True):
    """`logprobs[i]` belongs to the i-th token; `probes[i]` to the position before it, with one more row after the last."""

    logprobs: tuple[float, ...]
    probes: tuple[tuple[float, ...], ...] = ()


class Scored(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Score`, in the order asked; followed by `Done`."""

    id: str
    continuations: tuple[Continuation, ...]
    first_probes: tuple[float, ...] = ()


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Embed`: little-endian float32 vectors of the model's width; followed by `Done`."""

    id: str
    vectors: tuple[bytes, ...]


class Labelled(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Label`: little-endian float32 logits, one for each of the head's labels; followed by `Done`."""

    id: str
    logits: tuple[bytes, ...]


class Weighed(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Weigh`, in nats; followed by `Done`. With `error`, a word of `engine.ERRORS`, the rest says nothing."""

    id: str
    weights: tuple[float, ...] = ()  # one a token of the prefix
    scores: tuple[float, ...] = ()  # one a candidate
    target: int = 0  # which one the weights are for
    error: str | None = None


class AdapterReady(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Prefetch`. With `error`, a word of `engine.ERRORS`, the rest says nothing."""

    id: str
    digest: str
    seconds: float = 0.0  # from the first call for it until it was loaded; 0: it was here
    labels: tuple[str, ...] = ()  # of its head, in the order of the logits; empty: it has none
    temperature: float = 1.0
    pooling: str = "LAST"  # or MEAN
    max_tokens: int = 0  # of one window of a text to label, what precedes any text included
    method: str = ""  # CHAT, CLASSIFY or PREFERENCE
    template_hash: str = ""
    rank: int = 0
    memory_bytes: int = 0
    error: str | None = None


class Load(msgspec.Struct, frozen=True, tag=True):
    """What the gateway predicts waits from. Sent each 100 ms while anything runs, and on change."""

    waiting_sequences: int
    running_sequences: int
    queued_tokens: int  # prompt tokens not yet computed
    running_tokens: int  # output tokens still allowed to running sequences
    prefill_tokens_per_s: float  # measured, exponentially averaged; 0 until known
    decode_tokens_per_s: float
    free_blocks: int
    total_blocks: int
    cached_tokens: int  # since start: prompt tokens served from the prefix cache
    steps: int  # since start
    step_s: float  # mean of the recent steps
    batch: int  # sequences in the last step
    adapters: tuple[str, ...] = ()  # digests that need no fetch, most recently used last


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The child's first message, sent when it is warm."""

    model: str
    digest: str  # sha256 of the weights and config, hex
    architecture: str
    device: str
    dtype: str
    vocabulary: int
    context: int  # tokens, prompt and output together
    width: int  # of an embedding
    block_size: int
    blocks: int
    default_sampling: Sampling
    end_token_ids: tuple[int, ...]
    backend: str  # "fused", "eager" or "vllm": which forward runs
    adapter_slots: int = 0  # adapters that one step can mix; 0: none can be loaded
    embeds: bool = True  # whether `Embed` is answered


FromEngine = Hello | Token | PromptScored | Ended | Done | Scored | Embedded | Labelled | Weighed | AdapterReady | Load
