"""Weighs tokens beside the step loop: a thread of low priority, one call at a time, that tells the engine's inbox (pure)."""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.inference.engine.calls import Weigh, Weighed
from services.inference.engine.inbox import Inbox

# A quarter of the step loop's share where both want the same core. Not the lowest: this thread holds the interpreter lock at times, and
# would keep it from the loop while others' processes keep it from the processor.
NICENESS = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    call: Weigh
    until: float  # monotonic seconds


class Weigher:
    """`ask` and `forget` from the engine's thread; answers come as `Weighed`. `weigh` blocks for as long as two passes take."""

    def __init__(self, weigh: Callable[[Weigh], Weighed], inbox: Inbox) -> None:
        self._weigh = weigh
        self._inbox = inbox
        self._asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()  # bounded by the engine, which refuses more
        self._wanted: set[str] = set()  # not begun
        self._thread: threading.Thread | None = None

    def ask(self, call: Weigh) -> None:
        """Weigh it, in turn. The thread starts with the first call and ends with the process."""
        self._wanted.add(call.id)
        self._asked.put(_Asked(call, time.monotonic() + call.deadline_s))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="weighing", daemon=True)
            self._thread.start()

    def forget(self, id: str) -> None:
        """Nobody waits for it any more: if it has not begun, it will not."""
        self._wanted.discard(id)

    def _run(self) -> None:
        if sys.platform == "linux":  # threads that this one's sums are spread over inherit it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            asked = self._asked.get()
            self._inbox.put((self._answer(asked),))

    def _answer(self, asked: _Asked) -> Weighed:
        id = asked.call.id
        if id not in self._wanted:
            return Weighed(id, error="cancelled")
        self._wanted.discard(id)
        if time.monotonic() >= asked.until:
            return Weighed(id, error="deadline")
        try:
            return self._weigh(asked.call)
        except Exception as failure:  # whatever a model may raise is fenced here; its text may quote the input
            log.error("tokens could not be weighed", extra={"failure": type(failure).__name__})
            return Weighed(id, error="step_failed")
