"""Whose turn it is: a virtual counter of weighted tokens for each tenant, the smallest first. Pure.

The Virtual Token Counter of arXiv 2401.00588: a tenant that comes back starts at the smallest counter of those at work, so neither
idling nor arriving late buys an advantage, and the counters of two tenants that both wait stay within a constant of each other.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from services.inference.engine.sequence import Sequence

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2
REMEMBERED = 4096  # tenants at rest whose counter is kept


class Counters:
    """Weighted tokens served to each tenant."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._present: dict[str, int] = {}  # tenant → its sequences in the engine
        self._floor = 0  # where a newcomer to an empty engine starts

    def __getitem__(self, tenant: str) -> int:
        return self._served.get(tenant, self._floor)

    def enter(self, tenant: str) -> None:
        """One more sequence of this tenant is here."""
        if tenant not in self._present:
            lowest = min((self._served[other] for other in self._present), default=self._floor)
            self._served[tenant] = max(self._served.get(tenant, 0), lowest)
            self._present[tenant] = 0
        self._present[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One of its sequences ended."""
        self._present[tenant] -= 1
        if self._present[tenant]:
            return
        del self._present[tenant]
        if not self._present:
            self._floor = max(self._floor, self._served[tenant])
        if len(self._served) > REMEMBERED + len(self._present):
            resting = sorted((served, name) for name, served in self._served.items() if name not in self._present)
            for _, name in resting[: len(resting) // 2]:
                del self._served[name]

    def charge(self, tenant: str, weighted_tokens: int) -> None:
        """Count what a step served, or with a negative number, what it failed to."""
        self._served[tenant] += weighted_tokens


class Turns:
    """Sequences of one work class that want prefill: each tenant's in order of age, tenants by their counter."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._queues: dict[str, OrderedDict[int, Sequence]] = {}
        self._heap: list[tuple[int, int, str]] = []  # (counter when pushed, age of the head, tenant); one entry a tenant, maybe stale
        self._entered: set[str] = set()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for sequence in queue.values())

    def push(self, sequence: Sequence, front: bool = False) -> None:
        """Queue it last, or first among those of its tenant that hold no blocks."""
        tenant = sequence.tenant
        queue = self._queues.setdefault(tenant, OrderedDict())
        head = next(iter(queue.values()), None)
        queue[sequence.key] = sequence
        if front and head is not None:
            queue.move_to_end(sequence.key, last=False)
            # A head that holds blocks goes first, or the two could wait for each other.
            if head.blocks and not sequence.blocks:
                queue.move_to_end(head.key, last=False)
        if tenant not in self._entered:
            self.enter(tenant)

    def enter(self, tenant: str) -> None:
        """Let a tenant be called again, after `call`."""
        queue = self._queues.get(tenant)
        if queue and tenant not in self._entered:
            self._entered.add(tenant)
            heapq.heappush(self._heap, (self._counters[tenant], next(iter(queue.values())).age, tenant))

    def call(self) -> Sequence | None:
        """The head of the tenant whose turn it is; that tenant is not called again before `enter`."""
        while self._heap:
            counter, _, tenant = self._heap[0]
            queue = self._queues.get(tenant)
            if not queue:
                heapq.heappop(self._heap)
                self._entered.discard(tenant)
            elif counter != self._counters[tenant]:
                heapq.heapreplace(self._heap, (self._counters[tenant], next(iter(queue.values())).age, tenant))
            else:
                heapq.heappop(self._heap)
                self._entered.discard(tenant)
                return next(iter(queue.values()))
        return None

    def remove(self, sequence: Sequence) -> bool:
        """Take it out, if it is here."""
        queue = self._queues.get(sequence.tenant)
        if queue is None or queue.pop(sequence.key, None) is None:
            return False
        if not queue:
            del self._queues[sequence.tenant]
        return True
