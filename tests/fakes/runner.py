"""A `Runner` without a model: the next token is a hash of the history, and every block is checked against what was written to it.

Its KV is the history itself: a position's cell holds a hash of all tokens up to it. A step that would attend over a cell written for
another history, or over an unwritten one, raises `WrongBlock`; so does one that writes into a block some other row of the step reads.
"""

import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import pack
from typing import Any

import msgspec

from services.inference.engine.calls import Hello, Sampling, Weigh, Weighed
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import BLOCK_SIZE, Adapter, AdapterProblem, Probe, Row, RowResult

START = 1


class WrongBlock(AssertionError):
    """The block table does not hold this row's history."""


def absorb(state: int, token: int) -> int:
    """The cell after `token`."""
    return zlib.crc32(pack("<q", token), state)


def start_of(adapter: str) -> int:
    """The cell before the first token: another for each adapter's digest, so that none can read what another wrote."""
    return zlib.crc32(adapter.encode(), START) if adapter else START


def history_of(tokens: Sequence[int], adapter: str = "") -> int:
    """The cell of the last of `tokens`."""
    state = start_of(adapter)
    for token in tokens:
        state = absorb(state, token)
    return state


def next_token(state: int, sampling: Sampling, index: int, position: int, vocabulary: int, barred: Sequence[int] = ()) -> int:
    """What the fake says after a history: its own for each seed, output and position, like a real sampler."""
    salt = 0 if sampling.temperature == 0 else sampling.seed * 31 + index * 7 + position + 1
    while (token := zlib.crc32(pack("<qq", state, salt)) % vocabulary) in barred:
        salt += 1_000_003
    return token


def alone(
    prompt: Sequence[int],
    sampling: Sampling,
    index: int,
    count: int,
    vocabulary: int,
    barred: Sequence[int] = (),
    adapter: str = "",
) -> list[int]:
    """`count` tokens as the fake would say them with nobody else there."""
    state, tokens = history_of(prompt, adapter), list[int]()
    for position in range(count):
        tokens.append(next_token(state, sampling, index, position, vocabulary, barred))
        state = absorb(state, tokens[-1])
    return tokens


def logprob(state: int, token: int) -> float:
    """Of `token` after a history; the same whoever asks."""
    return -(zlib.crc32(pack("<qq", state, token)) % 1000 + 1) / 100


class FakeRunner:
    """Scripted faults: `fails` is asked before each step and may raise; `spoils` names rows that answer nan.

    `most_tokens`: more in one step raise MemoryError. `gate`, when given, must be set for a step to run.
    """

    def __init__(
        self,
        blocks: int = 64,
        vocabulary: int = 1000,
        context: int = 4096,
        *,
        spoken: int | None = None,
        most_tokens: int | None = None,
        fails: Callable[[Sequence[Row]], None] | None = None,
        spoils: Callable[[Row], bool] | None = None,
        gate: threading.Event | None = None,
        slots: int = 0,
    ) -> None:
        self.blocks = blocks
        self.vocabulary = vocabulary
        self.context = context
        self.spoken = spoken or vocabulary  # ids below it are drawn
        self.most_tokens = most_tokens
        self.fails = fails
        self.spoils = spoils
        self.gate = gate
        self.slots = slots
        self.adapters: dict[tuple[str, str], Adapter] = {}  # what `fetch` finds, by owner and digest
        self.installed: dict[int, str] = {}  # slot → digest
        self.mixed = 0  # most adapters in one step
        self.steps = 0
        self.computed = 0  # tokens, in steps that succeeded
        self.widest = 0  # tokens of the largest step that succeeded
        self.batches: list[int] = []  # rows of each step that succeeded
        self.drawn = 0  # tokens, in steps that succeeded
        self.forgotten: set[int] = set()
        self.entered = threading.Event()  # a step waits at the gate, or is past it
        self._cells: list[list[int | None]] = [[None] * BLOCK_SIZE for _ in range(blocks)]
        self._means: dict[int, tuple[int, int]] = {}

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        self.steps += 1
        self.entered.set()
        if self.gate is not None:
            self.gate.wait()
        tokens = sum(len(row.tokens) for row in rows)
        if self.most_tokens is not None and tokens > self.most_tokens:
            raise MemoryError
        if self.fails is not None:
            self.fails(rows)
        self._check_writes(rows)
        self.mixed = max(self.mixed, len({row.adapter for row in rows} - {0}))
        results = [self._compute(row) for row in rows]
        self.computed += tokens
        self.drawn += sum(row.draw is not None for row in rows)
        self.widest = max(self.widest, tokens)
        self.batches.append(len(rows))
        return results

    def forget(self, key: int) -> None:
        self.forgotten.add(key)
        self._means.pop(key, None)

    def tune(self, owner: str, digest: str, **fields: Any) -> str:
        """Let an adapter exist; returns its digest."""
        known: dict[str, Any] = {"weights": digest, "memory_bytes": 1, "rank": 1}
        self.adapters[owner, digest] = Adapter(**known | fields)
        return digest

    def fetch(self, owner: str, digest: str) -> Adapter:
        if (owner, digest) not in self.adapters:
            raise AdapterProblem("adapter_unknown", "not scripted")
        return self.adapters[owner, digest]

    def weigh(self, call: Weigh) -> Weighed:
        """Each token is worth itself."""
        return Weighed(call.id, tuple(map(float, call.prefix)), (0.0,) * max(1, len(call.continuations)), call.target or 0)

    def install(self, slot: int, adapter: Adapter | None) -> None:
        if not 1 <= slot <= self.slots:
            raise WrongBlock(f"there is no slot {slot}")
        self.installed.pop(slot, None)
        if adapter is not None:
            self.installed[slot] = str(adapter.weights)

    def _check_writes(self, rows: Sequence[Row]) -> None:
        keys = [row.key for row in rows]
        if len(set(keys)) != len(keys):
            raise WrongBlock("a sequence has two rows in one step")
        writers: dict[int, int] = {}
        for row in rows:
            first, last = row.start // BLOCK_SIZE, (row.start + len(row.tokens) - 1) // BLOCK_SIZE
            for block in row.blocks[first : last + 1]:
                if writers.setdefault(block, row.key) != row.key:
                    raise WrongBlock(f"two rows write block {block}")
        for row in rows:
            for block in row.blocks[: -(-row.start // BLOCK_SIZE)]:
                if writers.get(block, row.key) != row.key:
                    raise WrongBlock(f"block {block} is read while another row writes it")

    def _compute(self, row: Row) -> RowResult:
        if not row.tokens:
            raise WrongBlock("a row without tokens")
        if len(row.blocks) * BLOCK_SIZE < row.start + len(row.tokens):
            raise WrongBlock(f"{len(row.blocks)} blocks for {row.start + len(row.tokens)} positions")
        if row.adapter and row.adapter not in self.installed:
            raise WrongBlock(f"slot {row.adapter} is empty")
        state = start_of(self.installed[row.adapter] if row.adapter else "")
        if row.draw is not None:
            history = row.draw.history
            if list(history[row.start : row.start + len(row.tokens)]) != list(row.tokens) or len(history) != row.start + len(row.tokens):
                raise WrongBlock("the draw's history is not the row's")
        states = []
        for position in range(row.start):
            cell = self._cells[row.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            if cell is None:
                raise WrongBlock(f"position {position} was never written")
            if row.draw is not None:
                state = absorb(state, row.draw.history[position])
                if cell != state:
                    raise WrongBlock(f"position {position} holds another history")
            state = cell
        for offset, token in enumerate(row.tokens):
            position = row.start + offset
            state = absorb(state, token)
            self._cells[row.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = state
            states.append(state)
        result = RowResult()
        if self.spoils is not None and self.spoils(row):
            return RowResult(error="nan")
        if row.draw is not None:
            draw = row.draw
            result.token = next_token(state, draw.sampling, draw.index, draw.position, self.spoken, draw.barred)
            if draw.top_logprobs is not None:
                result.logprob = logprob(state, result.token)
                result.top = tuple((i, logprob(state, i)) for i in range(draw.top_logprobs))
        if row.probe is not None:
            self._probe(row.probe, states, result)
        if row.pool:
            count, total = self._means.get(row.key, (0, 0))
            if count != row.start:
                raise WrongBlock(f"{count} positions in the mean before position {row.start}")
            self._means[row.key] = count + len(states), (total + sum(states)) % 2**32
            if row.pool_ends:
                result.vector = pack("<f", self._means[row.key][1])
        elif row.head:
            result.vector = pack("<f", state)
        return result

    @staticmethod
    def _probe(probe: Probe, states: Sequence[int], result: RowResult) -> None:
        for i, (offset, target) in enumerate(probe.targets):
            state = states[offset]
            result.target_logprobs.append(None if target is None else logprob(state, target))
            result.probe_logprobs.append(tuple(logprob(state, token) for token in probe.probes))
            result.probe_top.append(tuple((token, logprob(state, token)) for token in range(probe.top)))
            if i == 0:
                result.first_probe_logprobs = tuple(logprob(state, token) for token in probe.first_probes)


def embedding(tokens: Sequence[int]) -> bytes:
    """The fake's vector for an input."""
    state, total = START, 0
    for token in tokens:
        state = absorb(state, token)
        total += state
    return pack("<f", total % 2**32)


HELLO = Hello(
    model="fake",
    digest="00" * 32,
    architecture="FakeForCausalLM",
    device="cpu",
    dtype="float32",
    vocabulary=1000,
    context=4096,
    width=1,
    block_size=BLOCK_SIZE,
    blocks=64,
    default_sampling=Sampling(seed=0),
    end_token_ids=(0,),
    backend="eager",
)


def build(settings: EngineSettings) -> tuple[FakeRunner, Hello]:
    """For a host: a pool of `settings.kv_tokens` tokens, 1,024 unless told; adapter "tuned" of "owner" exists."""
    runner = FakeRunner((settings.kv_tokens or 1024) // BLOCK_SIZE, slots=2)
    runner.tune("owner", "tuned", labels=("x",), max_tokens=9)
    return runner, msgspec.structs.replace(HELLO, adapter_slots=2)


def build_nothing(settings: EngineSettings) -> tuple[FakeRunner, Hello]:
    """For a host: a model that cannot be loaded."""
    raise OSError("no such model")


HANG = 13  # a token on which `build_hanging`'s steps never return


def build_hanging(settings: EngineSettings) -> tuple[FakeRunner, Hello]:
    """For a host: a device that stops answering at a token."""
    runner, hello = build(settings)

    def fails(rows: Sequence[Row]) -> None:
        if any(HANG in row.tokens for row in rows):
            threading.Event().wait()

    runner.fails = fails
    return runner, hello


def build_once(settings: EngineSettings) -> tuple[FakeRunner, Hello]:
    """For a host: a model that can be loaded only once; the directory `settings.cache_dir` remembers."""
    assert settings.cache_dir is not None
    (Path(settings.cache_dir) / "loaded").touch(exist_ok=False)
    return build(settings)


def build_failing(settings: EngineSettings) -> tuple[FakeRunner, Hello]:
    """For a host: a forward that raises, quoting its tokens."""
    runner, hello = build(settings)

    def fails(rows: Sequence[Row]) -> None:
        raise ValueError(f"cannot compute {rows[0].tokens}")

    runner.fails = fails
    return runner, hello
