"""Which adapters hold a slot of the device, and whose turn is next. Pure.

A step mixes at most `count` adapters. A sequence whose adapter holds a slot runs like any other; one whose adapter holds none is parked
beside the queues, where it blocks nobody. An adapter keeps its slot for a time slice as long as it has work; then it yields to one that
waits: the most urgent class first, then the tenant that was served least, then whoever began to wait first. So among adapters of one
tenant and class, each of n gets a slot within ceil(n / count) slices, however long the others' work is.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count as counting

from services.inference.engine.sequence import Sequence

SLICE_S = 4.0  # most answers end within it; beside it, what a sequence that is put back computes again is little


@dataclass(slots=True)
class Holder:
    """An adapter with a slot."""

    slot: int
    since: float  # engine's clock, seconds
    used: int  # counts up: the smallest was idle longest
    active: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)  # waiting or running with it

    @property
    def work_class(self) -> int:
        """The most urgent of its work."""
        return min(sequence.work_class for sequence in self.active.values())


@dataclass(slots=True)
class Parked:
    """An adapter without a slot, and who waits for it."""

    since: int  # counts up: who began to wait first
    queue: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class Turn:
    """`adapter` takes `slot`: `displaced` must leave the device and are parked again, `started` may run."""

    slot: int
    adapter: str
    displaced: list[Sequence]
    started: list[Sequence]


class Slots:
    """`served` tells how much a tenant has had, in any unit; the smaller goes first."""

    def __init__(self, count: int, slice_s: float = SLICE_S, served: Callable[[str], int] = lambda tenant: 0) -> None:
        self._served = served
        self._slice_s = slice_s
        self._free = list(range(1, count + 1))  # a heap: low slots first, so that those in use lie side by side
        self._holders: dict[str, Holder] = {}
        self._parked: dict[str, Parked] = {}
        self._ticks = counting()

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._holders

    @property
    def parked(self) -> list[Sequence]:
        """Sequences whose adapter has no slot, in no order."""
        return [sequence for parked in self._parked.values() for sequence in parked.queue.values()]

    def enter(self, sequence: Sequence, front: bool = False) -> bool:
        """Whether it may run now; else it is parked, with `front` before the others of its adapter."""
        holder = self._holders.get(sequence.adapter)
        if holder is not None:
            self._start(sequence, holder)
            return True
        parked = self._parked.get(sequence.adapter)
        if parked is None:
            parked = self._parked[sequence.adapter] = Parked(next(self._ticks))
        parked.queue[sequence.key] = sequence
        if front:
            parked.queue.move_to_end(sequence.key, last=False)
        return False

    def leave(self, sequence: Sequence) -> None:
        """It has ended."""
        holder, parked = self._holders.get(sequence.adapter), self._parked.get(sequence.adapter)
        if holder is not None:
            holder.active.pop(sequence.key, None)
            holder.used = next(self._ticks)
        elif parked is not None:
            parked.queue.pop(sequence.key, None)
            if not parked.queue:
                del self._parked[sequence.adapter]

    def rotate(self, now: float) -> list[Turn]:
        """Slots that change hands before the next step."""
        turns: list[Turn] = []
        while self._parked and self._could_place(now):
            adapter = min(self._parked, key=self._urgency)
            place = self._place(now, self._urgency(adapter)[0])
            if place is None:
                break
            slot, displaced = place
            parked = self._parked.pop(adapter)
            holder = self._holders[adapter] = Holder(slot, now, next(self._ticks))
            for sequence in parked.queue.values():
                self._start(sequence, holder)
            turns.append(Turn(slot, adapter, displaced, list(parked.queue.values())))
        return turns

    def forget(self, adapter: str) -> int | None:
        """Take back the slot of an adapter for which nothing runs; returns it, or None if it held none."""
        holder = self._holders.pop(adapter, None)
        if holder is None:
            return None
        assert not holder.active  # its calls have ended before
        heapq.heappush(self._free, holder.slot)
        return holder.slot

    def _start(self, sequence: Sequence, holder: Holder) -> None:
        sequence.slot = holder.slot
        holder.active[sequence.key] = sequence

    def _urgency(self, adapter: str) -> tuple[int, int, int]:
        parked = self._parked[adapter]
        head = next(iter(parked.queue.values()))
        return min(sequence.work_class for sequence in parked.queue.values()), self._served(head.tenant), parked.since

    def _could_place(self, now: float) -> bool:
        """Asked before each step, however many wait: so without looking at them."""
        return bool(self._free) or any(
            not holder.active or now - holder.since >= self._slice_s or holder.work_class > 0 for holder in self._holders.values()
        )

    def _place(self, now: float, work_class: int) -> tuple[int, list[Sequence]] | None:
        """A slot for work of this class, and who must leave it: free, then longest idle, then less urgent, then past its slice."""
        if self._free:
            return heapq.heappop(self._free), []
        idle = [name for name, holder in self._holders.items() if not holder.active]
        if idle:
            return self._holders.pop(min(idle, key=lambda name: self._holders[name].used)).slot, []
        classes = {name: holder.work_class for name, holder in self._holders.items()}
        due = [
            name
            for name, holder in self._holders.items()
            if classes[name] > work_class or (classes[name] == work_class and now - holder.since >= self._slice_s)
        ]
        if not due:
            return None
        name = max(due, key=lambda name: (classes[name], -self._holders[name].since, -self._holders[name].slot))
        holder = self._holders.pop(name)
        self._parked[name] = Parked(next(self._ticks), holder.active)
        return holder.slot, list(holder.active.values())
