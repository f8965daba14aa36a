"""Who runs in the next step. Pure.

Under a budget of tokens, every decoding sequence gets its one; what is left goes to prefill, by class, then fair share, then age. A
waiting sequence starts when its whole table fits, so only decoding asks for blocks later; when there are none, the youngest of the
lowest class goes back to waiting and keeps its tokens. A sequence with an adapter takes part while the adapter has a slot (`slots.py`).
"""

from services.inference.engine.blocks import Blocks, blocks_for
from services.inference.engine.calls import WorkClass
from services.inference.engine.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, Counters, Turns
from services.inference.engine.sequence import Sequence, State
from services.inference.engine.slots import Slots, Turn
from services.inference.engine.step import BLOCK_SIZE

Plan = list[tuple[Sequence, int]]


class Scheduler:
    """Knows every sequence that has not ended. Each planned sequence must be advanced, given back or removed before the next plan."""

    def __init__(self, blocks: Blocks, budget: int, most_running: int, slots: int = 0) -> None:
        self.blocks = blocks
        self.budget = budget  # tokens a step
        self.preemptions = 0
        self.counters = Counters()
        self.slots = Slots(slots, served=self.counters.__getitem__)
        self._most_running = most_running
        self._turns = [Turns(self.counters) for _ in WorkClass]  # by class, most urgent first
        self._running: dict[int, Sequence] = {}  # those with blocks, in order of admission
        self._prefilling: dict[int, Sequence] = {}
        self._decoding: dict[int, Sequence] = {}
        self._refused: tuple[int, int] | None = None  # (key, releases so far): no use to try before another release

    @property
    def running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def decoding(self) -> int:
        """Sequences that get one token a step."""
        return len(self._decoding)

    def waiting(self) -> list[Sequence]:
        """Those without blocks, in no order."""
        return [sequence for turns in self._turns for sequence in turns if sequence.state is State.WAITING] + self.slots.parked

    def add(self, sequence: Sequence, front: bool = False) -> None:
        """Take in a new sequence; `front` puts it before the others of its tenant."""
        self.counters.enter(sequence.tenant)
        if not sequence.adapter or self.slots.enter(sequence, front):
            self._turns[sequence.work_class].push(sequence, front)

    def rotate(self, now: float) -> list[Turn]:
        """Let slots change hands, by `now` on the engine's clock; the adapters of these turns must be installed before the next step."""
        turns = self.slots.rotate(now)
        for turn in turns:
            for sequence in turn.displaced:
                self._turns[sequence.work_class].remove(sequence)
                if sequence.key in self._running:
                    self._withdraw(sequence)
            for sequence in turn.started:
                self._turns[sequence.work_class].push(sequence)
        return turns

    def remove(self, sequence: Sequence, suspect: bool = False) -> None:
        """End it wherever it is. The one exit: all of its blocks are released here. `suspect`: its KV must not be found again."""
        if sequence.state is State.ENDED:
            return
        self._turns[sequence.work_class].remove(sequence)
        self._running.pop(sequence.key, None)
        self._prefilling.pop(sequence.key, None)
        self._decoding.pop(sequence.key, None)
        if sequence.adapter:
            self.slots.leave(sequence)
        self.blocks.release(sequence.withdraw(State.ENDED), suspect)
        self.counters.leave(sequence.tenant)

    def plan(self) -> Plan:
        """The next step, a sequence and how many of its tokens each, at most `budget` in all. Empty only if nothing is here."""
        self._grow()
        prefills: Plan = []
        room = self.budget - len(self._decoding)
        if room > 0:
            self._prefill(prefills, room)
        decodes = self._decoding
        if len(decodes) <= self.budget:
            plan = [(sequence, 1) for sequence in decodes.values()]
        else:
            plan = []
            for key in list(decodes)[: self.budget]:
                sequence = decodes.pop(key)
                decodes[key] = sequence  # to the end: the others are next
                plan.append((sequence, 1))
        plan += prefills
        return plan

    def advance(self, sequence: Sequence, count: int) -> None:
        """A step computed `count` tokens of it."""
        sequence.advance(count)
        if sequence.computed // BLOCK_SIZE > sequence.published:
            self._publish(sequence)
        if sequence.state is State.DECODING:
            self.counters.charge(sequence.tenant, OUTPUT_WEIGHT)
        elif sequence.pending:
            self._turns[sequence.work_class].push(sequence, front=True)
        else:
            sequence.state = State.DECODING
            del self._prefilling[sequence.key]
            self._decoding[sequence.key] = sequence

    def give_back(self, plan: Plan) -> None:
        """A step with these failed before it computed anything; plan again."""
        for sequence, count in reversed(plan):
            if sequence.state is State.PREFILLING:
                self.counters.charge(sequence.tenant, -INPUT_WEIGHT * count)
                self._turns[sequence.work_class].push(sequence, front=True)

    def _grow(self) -> None:
        for sequence in list(self._decoding.values()):
            if sequence.computed < sequence.capacity:
                continue
            while sequence.state is State.DECODING:
                block = self.blocks.take()
                if block is not None:
                    sequence.grow(block)
                    break
                self._preempt(max(self._running.values(), key=_expendable))

    def _prefill(self, plan: Plan, room: int) -> None:
        blocked = False
        for turns in self._turns:
            while room > 0 and not blocked and (head := turns.call()) is not None:
                if head.state is State.WAITING and not self._admit(head):
                    blocked = True
                else:
                    room -= self._take(plan, head, room)
                turns.enter(head.tenant)
        if blocked and room > 0 and self._prefilling:
            # Nothing overtakes the one that does not fit, or large prompts would starve; what already holds blocks goes on.
            planned = {sequence.key for sequence, _ in plan}
            for sequence in sorted(self._prefilling.values(), key=self._urgency):
                if room > 0 and sequence.key not in planned:
                    room -= self._take(plan, sequence, room)

    def _take(self, plan: Plan, sequence: Sequence, room: int) -> int:
        count = min(room, sequence.pending)
        self.counters.charge(sequence.tenant, INPUT_WEIGHT * count)
        self._turns[sequence.work_class].remove(sequence)
        plan.append((sequence, count))
        return count

    def _urgency(self, sequence: Sequence) -> tuple[int, int, int]:
        return sequence.work_class, self.counters[sequence.tenant], sequence.age

    def _admit(self, sequence: Sequence) -> bool:
        if self._refused == (sequence.key, self.blocks.releases):
            return False
        shared = self.blocks.hold(sequence.chain(sequence.shareable()))
        missing = blocks_for(len(sequence.tokens)) - len(shared)
        # A few blocks stay for those decoding, which would otherwise push the newcomer out again at once.
        while self.blocks.available < missing + len(self._decoding) // 4 or len(self._running) >= self._most_running:
            victim = max(self._running.values(), key=_expendable, default=None)
            if victim is None or victim.work_class <= sequence.work_class:
                self.blocks.release(shared)
                self._refused = (sequence.key, self.blocks.releases)
                return False
            self._preempt(victim)
        sequence.admit(shared + self.blocks.take_many(missing), len(shared))
        self._running[sequence.key] = self._prefilling[sequence.key] = sequence
        return True

    def _preempt(self, victim: Sequence) -> None:
        if self._withdraw(victim):
            self._turns[victim.work_class].push(victim, front=True)

    def _withdraw(self, victim: Sequence) -> bool:
        """Off the device, keeping its tokens. Whether it was decoding: no turns held it then."""
        self.preemptions += 1
        del self._running[victim.key]
        self._prefilling.pop(victim.key, None)
        decoding = self._decoding.pop(victim.key, None) is not None
        self.blocks.release(victim.withdraw(State.WAITING))
        return decoding

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.computed // BLOCK_SIZE
        keys = sequence.chain(full)
        for i in range(sequence.published, len(keys)):
            self.blocks.publish(sequence.blocks[i], keys[i], sequence.tenant, sequence.adapter)
        sequence.published = full


def _expendable(sequence: Sequence) -> tuple[int, int]:
    return sequence.work_class, sequence.age
