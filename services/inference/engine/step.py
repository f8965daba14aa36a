"""One step of the engine, as values: what the loop asks of the tensors, and what it gets back. Pure.

The loop (`engine.py`) builds a list of `Row`; a `Runner` computes them as one packed row of tokens, without padding, and answers a
`RowResult` for each, in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.inference.engine.calls import Sampling, Weigh, Weighed

BLOCK_SIZE = 16  # tokens; the unit of the KV pool and of prefix sharing


@dataclass(slots=True)
class Draw:
    """Choose the next token from the logits of the row's last position."""

    sampling: Sampling
    index: int  # which of the call's outputs
    position: int  # tokens this output already has: with seed and index, the whole random counter
    history: Sequence[int]  # prompt and output so far, for the penalties
    prompt_length: int  # history[:prompt_length] is prompt: frequency and presence count the rest only
    barred: tuple[int, ...] = ()  # end tokens before min_output_tokens
    top_logprobs: int | None = None


@dataclass(slots=True)
class Probe:
    """Log-probabilities at given positions of the row; no choice is made."""

    targets: Sequence[tuple[int, int | None]]  # (offset in row.tokens, the next token's id, None: no target)
    probes: tuple[int, ...] = ()  # ids reported at each of these offsets
    first_probes: tuple[int, ...] = ()  # ids reported at the first of these offsets only
    top: int = 0  # alternatives reported at each offset, 0..5


@dataclass(slots=True)
class Row:
    """One sequence's share of a step."""

    key: int  # of the sequence, stable while it lives
    tokens: Sequence[int]  # computed in this step, at least one
    start: int  # position of tokens[0]; the KV of all before is in the blocks
    blocks: Sequence[int]  # block table; covers start + len(tokens)
    draw: Draw | None = None
    probe: Probe | None = None
    pool: bool = False  # add the last hidden states of these tokens to the key's running mean
    pool_ends: bool = False  # and return it
    adapter: int = 0  # slot of the adapter that computes it; 0: the base alone
    head: bool = False  # return what the adapter's head says of the mean, or without `pool`, of the last token


@dataclass(slots=True)
class RowResult:
    """`error` set: this row alone failed (NaN logits, say); the others stand."""

    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    target_logprobs: list[float | None] = field(default_factory=list)
    probe_logprobs: list[tuple[float, ...]] = field(default_factory=list)
    first_probe_logprobs: tuple[float, ...] = ()
    probe_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    vector: bytes | None = None  # a mean, or a head's logits; little-endian float32
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """One that was fetched and passed every check: what is known of it, and what its runner computes with."""

    weights: object  # the runner's own; opaque here
    memory_bytes: int
    rank: int
    labels: tuple[str, ...] = ()  # empty: it has no head
    temperature: float = 1.0
    pooling: str = "LAST"  # or MEAN
    max_tokens: int = 0
    method: str = ""
    template_hash: str = ""


class AdapterProblem(Exception):
    """An adapter cannot be had. `word` is one of `engine.ERRORS`; `why` is for our log and quotes nothing of the files."""

    def __init__(self, word: str, why: str) -> None:
        super().__init__(f"{word}: {why}")
        self.word = word


class DeviceLost(Exception):
    """No later step on this device can succeed. The engine's process ends on it, and its parent starts another."""


class Runner(Protocol):
    """Owns the model, the device and the KV pool. A step that raises has changed nothing that the loop relies on: it may be repeated."""

    vocabulary: int
    context: int  # tokens
    blocks: int  # in the pool; ids 0..blocks-1
    slots: int  # adapters that one step can mix, in slots 1..slots; 0: none

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """Compute the rows together. Raises MemoryError when the step was too large for the device."""
        ...

    def forget(self, key: int) -> None:
        """Drop what is kept by key (a running mean). Unknown keys are ignored."""
        ...

    def fetch(self, owner: str, digest: str) -> Adapter:
        """An adapter from the store, checked and made ready to install. Blocks; called off the loop's thread. Raises AdapterProblem."""
        ...

    def weigh(self, call: Weigh) -> Weighed:
        """What tokens are worth, by a forward and a backward pass. Blocks; called off the loop's thread."""
        ...

    def install(self, slot: int, adapter: Adapter | None) -> None:
        """Compute the rows of `slot` with this adapter from the next step on; None: nothing asks for the slot any more."""
        ...
