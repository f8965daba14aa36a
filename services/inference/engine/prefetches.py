"""Who asked to have an adapter here, and what they are told. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from services.inference.engine.adapters import Adapters, Entry, State, key_of
from services.inference.engine.calls import AdapterReady, Done, FromEngine, Prefetch, Timings, Usage

NOTHING = Usage(0, 0, 0), Timings(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Asked:
    call: Prefetch
    entry: Entry
    until: float  # engine's clock, seconds


class Prefetches:
    """Each is answered once by `AdapterReady` and `Done`; what is returned or said goes out with the next step."""

    def __init__(self, adapters: Adapters, clock: Callable[[], float], say: Callable[[FromEngine], None]) -> None:
        self._adapters = adapters
        self._clock = clock
        self._say = say
        self._asked: dict[str, _Asked] = {}

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def due(self) -> float | None:
        """When the next one's deadline is; None: nobody waits."""
        return min((asked.until for asked in self._asked.values()), default=None)

    def refuse(self, call: Prefetch, word: str) -> None:
        """Not even asked for."""
        self._say(AdapterReady(call.id, call.digest, error=word))
        self._say(Done(call.id, *NOTHING, word))

    def add(self, call: Prefetch) -> None:
        """Have it fetched, or answer at once."""
        entry = self._adapters.use(key_of(call.owner, call.digest))
        self._asked[call.id] = _Asked(call, entry, self._clock() + call.deadline_s)
        if entry.state is not State.FETCHING:
            self._answer(call.id, seconds=0.0)

    def arrived(self, entry: Entry) -> None:
        """Its fetch has ended, one way or the other."""
        for id in [id for id, asked in self._asked.items() if asked.entry is entry]:
            self._answer(id, seconds=self._clock() - entry.began)

    def cancel(self, id: str) -> bool:
        """Whether it was one of these."""
        if id not in self._asked:
            return False
        self._end(id, "cancelled")
        return True

    def expire(self, now: float) -> None:
        """End those past their deadline."""
        for id in [id for id, asked in self._asked.items() if asked.until <= now]:
            self._end(id, "deadline")

    def lose(self, key: str, word: str) -> None:
        """The adapter will not come."""
        for id in [id for id, asked in self._asked.items() if asked.entry.key == key]:
            self._end(id, word)

    def _end(self, id: str, word: str) -> None:
        asked = self._asked.pop(id)
        self._adapters.release(asked.entry)
        self.refuse(asked.call, word)

    def _answer(self, id: str, seconds: float) -> None:
        entry = self._asked[id].entry
        adapter = entry.adapter
        if adapter is None:
            self._end(id, entry.error)
            return
        asked = self._asked.pop(id)
        self._adapters.release(entry)
        self._say(
            AdapterReady(
                id,
                asked.call.digest,
                seconds=seconds,
                labels=adapter.labels,
                temperature=adapter.temperature,
                pooling=adapter.pooling,
                max_tokens=adapter.max_tokens,
                method=adapter.method,
                template_hash=adapter.template_hash,
                rank=adapter.rank,
                memory_bytes=adapter.memory_bytes,
            )
        )
        self._say(Done(id, *NOTHING))
