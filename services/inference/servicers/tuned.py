"""The caller's adapters, as this process knows them: what a digest is, once the engine has it, and whether it fits how prompts are made."""

import itertools
from collections import OrderedDict
from contextlib import aclosing

from services.chassis.errors import CallerLeft, NotStarted, ServiceError, StreamLost, WrongState
from services.inference.engine.calls import AdapterReady, Done, Evict, Prefetch
from services.inference.engine.host import EngineLost, EngineNotReady, Host
from services.inference.servicers.generating import refusal

__all__ = ["Tuned"]

KNOWN = 4_096  # adapters remembered; facts by digest do not grow old


class Tuned:
    """Asks the engine for adapters. An owner is a project's uid: another project's adapter is as unknown as none."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: OrderedDict[tuple[str, str], AdapterReady] = OrderedDict()  # by owner and digest, last used last
        self._number = itertools.count(1)

    def fits(self, ready: AdapterReady, fingerprint: str) -> None:
        """Raise WrongState where the adapter was trained on prompts that are made otherwise than here."""
        if ready.template_hash and ready.template_hash != fingerprint:
            raise WrongState("model", "TEMPLATE_MISMATCH")

    async def find(self, owner: str, digest: str, left_s: float, *, fresh: bool = False) -> AdapterReady:
        """What an adapter is; loaded first where nobody has asked before, or where `fresh` is set.

        Raises ResourceNotFound, StoreUnavailable, WrongState for one that no engine can use, or what became of the engine.
        """
        key = owner, digest
        known = self._known.get(key)
        if known is None or fresh:
            known = await self._prefetch(owner, digest, left_s)
            self._known[key] = known
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return known

    async def evict(self, owner: str, digest: str) -> bool:
        """Forget an adapter; whether it was loaded."""
        was = (owner, digest) in self._known and digest in self._host.load.adapters
        self._known.pop((owner, digest), None)
        await self._ask(Evict(self._id(), digest, owner))
        return was

    def loaded(self, owner: str) -> list[AdapterReady]:
        """Those of one owner that need no fetch, last used first."""
        here = set(self._host.load.adapters)
        return [ready for (of, digest), ready in reversed(self._known.items()) if of == owner and digest in here]

    async def _prefetch(self, owner: str, digest: str, left_s: float) -> AdapterReady:
        found = await self._ask(Prefetch(self._id(), digest, owner, left_s))
        if found is None:
            raise NotStarted
        if found.error is not None:
            raise _problem(found.error)
        return found

    async def _ask(self, asked: Prefetch | Evict) -> AdapterReady | None:
        ready: AdapterReady | None = None
        try:
            async with aclosing(self._host.submit(asked)) as messages:
                async for message in messages:
                    if isinstance(message, AdapterReady):
                        ready = message
                    elif isinstance(message, Done) and message.error is not None and ready is None:
                        raise _problem(message.error)
        except EngineNotReady:
            raise NotStarted from None
        except EngineLost:
            raise StreamLost from None
        return ready

    def _id(self) -> str:
        return f"argosy-adapter:{next(self._number)}"


def _problem(error: str) -> ServiceError:
    """Of an adapter alone: nothing was computed, so an eviction in between may be tried again."""
    found = refusal(error)
    return NotStarted() if isinstance(found, CallerLeft) else found
