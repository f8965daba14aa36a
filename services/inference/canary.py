"""A golden prompt at idle priority: a replica whose answer changes, or is not a number, stops being ready (F10)."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

from services.inference.engine.calls import Done, Generate, Limits, Sampling, Token, WorkClass
from services.inference.engine.host import EngineLost, Host

__all__ = ["Canary"]

TOKENS = 8
DEADLINE_S = 30.0
TENANT = "argosy-canary"

log = logging.getLogger(__name__)


class Canary:
    """Asks the same question every `every_s`; the first answer is the golden one."""

    PROMPT = "One, two, three,"

    def __init__(self, host: Host, prompt: Sequence[int], every_s: float) -> None:
        self._host = host
        self._prompt = tuple(prompt)
        self._every_s = every_s
        self._golden: tuple[int, ...] | None = None
        self._number = itertools.count(1)

    @asynccontextmanager
    async def watching(self, well: Callable[[], Awaitable[None]], ill: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Ask while inside; call `ill` when an answer is wrong, `well` when it is right again."""
        task = asyncio.create_task(self._watch(well, ill), name="canary")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _watch(self, well: Callable[[], Awaitable[None]], ill: Callable[[], Awaitable[None]]) -> None:
        healthy = True
        while True:
            try:
                right = await self.ask()
                if right is False:  # in bfloat16 a busy batch may tip a close choice: once is no verdict
                    right = await self.ask()
            except EngineLost:
                return  # whoever follows the engine sees it too
            if right is not None and right != healthy:
                healthy = right
                log.log(logging.INFO if right else logging.ERROR, "golden prompt %s", "answered as before" if right else "answered wrongly")
                await (well if right else ill)()
            await asyncio.sleep(self._every_s)

    async def ask(self) -> bool | None:
        """Whether the answer is the golden one; None: the engine was too busy to say."""
        call = Generate(
            id=f"{TENANT}:{next(self._number)}",
            prompt=self._prompt,
            sampling=Sampling(seed=0, temperature=0.0),
            limits=Limits(TOKENS, (), ignore_end_token=True),
            deadline_s=DEADLINE_S,
            tenant=TENANT,
            cache_salt=TENANT.encode(),
            work_class=WorkClass.EXPLAIN,
        )
        said: list[int] = []
        error = None
        async with aclosing(self._host.submit(call)) as messages:
            async for message in messages:
                if isinstance(message, Token):
                    said.append(message.token_id)
                elif isinstance(message, Done):
                    error = message.error
        if error is not None:
            return False if error in ("not_finite", "step_failed") else None
        if len(said) < TOKENS:
            return None  # out of time: busy, not wrong
        if self._golden is None:
            self._golden = tuple(said)
        return tuple(said) == self._golden
