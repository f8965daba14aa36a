"""One sequence of tokens on its way through the engine, and when it ends. Pure.

    WAITING → PREFILLING → DECODING → ENDED        a preemption leads back to WAITING and keeps the tokens

A sequence is an output of a `Generate`, a continuation of a `Score` or an input of an `Embed`. Its rows are derived from what is
computed so far, so a step that failed is repeated by asking again.
"""

import enum
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from services.inference.engine.blocks import child_key
from services.inference.engine.calls import FinishReason, Limits, WorkClass
from services.inference.engine.step import BLOCK_SIZE, Draw, Probe, Row


class State(enum.IntEnum):
    """Where a sequence is. PREFILLING and DECODING hold blocks."""

    WAITING = 0
    PREFILLING = 1
    DECODING = 2
    ENDED = 3


@dataclass(slots=True)
class Report:
    """Log-probabilities wanted along the way: at each position from `first` to before `first + len(targets)`."""

    first: int
    targets: Tokens[int | None]  # the token that follows each position; None: only probes are asked there
    probes: tuple[int, ...] = ()
    first_probes: tuple[int, ...] = ()  # at `first` only
    top: int = 0
    given: int = 0  # how many of them the caller has

    @property
    def position(self) -> int:
        """The next one."""
        return self.first + self.given

    @property
    def complete(self) -> bool:
        """Whether nothing is left to report."""
        return self.given == len(self.targets)


class Sequence:
    """Its tokens, its blocks and its limits. Without `draw` it ends when all is computed."""

    __slots__ = (
        "_end_tokens",
        "_row",
        "adapter",
        "age",
        "blocks",
        "cached",
        "capacity",
        "computed",
        "draw",
        "head",
        "index",
        "key",
        "keys",
        "limits",
        "live",
        "pool",
        "produced",
        "prompt_length",
        "published",
        "reached",
        "report",
        "root",
        "slot",
        "state",
        "tenant",
        "tokens",
        "work_class",
    )

    def __init__(
        self,
        key: int,
        tokens: Tokens[int],
        *,
        tenant: str,
        work_class: WorkClass = WorkClass.INTERACTIVE,
        root: bytes | None = None,
        index: int = 0,
        draw: Draw | None = None,
        limits: Limits | None = None,
        report: Report | None = None,
        pool: bool = False,
        adapter: str = "",
        live: object = None,
    ) -> None:
        self.key = key
        self.age = key  # keys count up: a smaller one came earlier
        self.live = live  # the call it belongs to; opaque here
        self.tokens = list(tokens)
        self.prompt_length = len(self.tokens)
        self.tenant = tenant
        self.work_class = work_class
        self.root = root  # of its prefix keys; None: neither looks up nor publishes
        self.index = index
        self.draw = draw
        self.limits = limits
        self.report = report
        self.pool = pool
        self.adapter = adapter  # what it is known by; empty: the base alone
        self.slot = 0  # of the adapter, while it has one
        self.head = False  # answered by the adapter's head
        self.state = State.WAITING
        self.blocks: list[int] = []
        self.capacity = 0  # positions its blocks cover
        self.computed = 0  # positions whose KV is in its blocks
        self.reached = 0  # most positions ever computed: a preemption takes nothing from the bill, nor adds to it
        self.cached: int | None = None  # positions found in the prefix cache when first admitted
        self.produced = 0  # output tokens, the end token included
        self.keys: list[bytes] = []
        self.published = 0  # blocks looked at for publishing
        self._end_tokens = frozenset(limits.end_token_ids) if limits and not limits.ignore_end_token else frozenset[int]()
        self._row: Row | None = None
        if draw is not None:
            draw.history = self.tokens
            draw.barred = self._barred()

    def __repr__(self) -> str:
        return f"Sequence({self.key}, {self.state.name}, {self.computed}/{len(self.tokens)})"

    @property
    def pending(self) -> int:
        """Positions not yet computed."""
        return len(self.tokens) - self.computed

    def shareable(self) -> int:
        """Leading blocks that may come from the cache: the rest has results to give, at the very least for the last token."""
        if self.root is None or self.pool:
            return 0
        wanted = len(self.tokens) - 1
        if self.report is not None and not self.report.complete:
            wanted = min(wanted, self.report.position)
        return wanted // BLOCK_SIZE

    def chain(self, count: int) -> list[bytes]:
        """Keys of the first `count` blocks, all full."""
        for i in range(len(self.keys), count):
            parent = self.keys[-1] if self.keys else self.root
            if parent is None:
                return []
            self.keys.append(child_key(parent, self.tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]))
        return self.keys[:count]

    def admit(self, blocks: list[int], shared: int) -> None:
        """Start, or start again, with `blocks`, of which the first `shared` are computed."""
        self.blocks.extend(blocks)
        self.capacity = len(self.blocks) * BLOCK_SIZE
        self.computed = shared * BLOCK_SIZE
        self.published = shared
        if self.cached is None:
            self.cached = self.computed
        self.state = State.PREFILLING

    def grow(self, block: int) -> None:
        """Cover one block more."""
        self.blocks.append(block)
        self.capacity += BLOCK_SIZE

    def withdraw(self, state: State) -> list[int]:
        """Leave the device as WAITING or ENDED and return the blocks to release."""
        blocks, self.blocks = self.blocks, []
        self.capacity = self.computed = 0
        self.state = state
        self._row = None  # it refers to the former block table
        return blocks

    def row(self, count: int) -> Row:
        """The next `count` positions. A decoding sequence reuses one row: the runner keeps none after its step."""
        row = self._row
        if row is not None:
            return row
        start, end = self.computed, self.computed + count
        ends = end == len(self.tokens)
        row = Row(self.key, self.tokens[start:end], start, self.blocks, pool=self.pool, pool_ends=self.pool and ends)
        row.adapter, row.head = self.slot, self.head and ends
        if ends:
            row.draw = self.draw
        if self.report is not None and not self.report.complete:
            row.probe = self._probe(self.report, start, end)
        if self.state is State.DECODING and row.probe is None:
            self._row = row
        return row

    def _probe(self, report: Report, start: int, end: int) -> Probe | None:
        position = report.position
        wanted = report.targets[report.given : report.given + end - position]
        if position < start or not wanted or end <= position:
            return None
        targets = [(position - start + i, target) for i, target in enumerate(wanted)]
        return Probe(targets, report.probes, () if report.given else report.first_probes, report.top)

    def advance(self, count: int) -> None:
        """`count` more positions are computed."""
        self.computed += count
        self.reached = max(self.reached, self.computed)

    def append(self, token: int) -> FinishReason | None:
        """Take a drawn token; return why the sequence ends with it, or None. An end token is counted, not kept."""
        limits, draw = self.limits, self.draw
        assert limits is not None and draw is not None  # only a sequence that draws gets a token
        self.produced += 1
        if token in self._end_tokens and self.produced > limits.min_output_tokens:
            return FinishReason.END_TOKEN
        row = self._row
        if row is not None:
            row.tokens[0] = token  # type: ignore[index]  # made by this class as a list of one
            row.start = self.computed
        self.tokens.append(token)
        draw.position = self.produced
        if draw.barred:
            draw.barred = self._barred()
        return FinishReason.LENGTH if self.produced >= limits.max_output_tokens else None

    def _barred(self) -> tuple[int, ...]:
        limits = self.limits
        if limits is None or not self._end_tokens or self.produced >= limits.min_output_tokens:
            return ()
        return limits.end_token_ids
