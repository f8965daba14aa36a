"""Messages for the engine's thread: put from any thread, taken by one that sleeps while there is nothing to do. Pure."""

import threading
from collections.abc import Iterable

from services.inference.engine.adapters import Fetched
from services.inference.engine.calls import ToEngine, Weighed

Message = ToEngine | Fetched | Weighed


class Inbox:
    """Bounded by the calls alive: each puts a few messages, and the engine refuses calls beyond its limit."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._closed = False
        self._changed = threading.Condition()

    def put(self, messages: Iterable[Message]) -> None:
        """Add in order and wake the taker."""
        with self._changed:
            self._messages.extend(messages)
            self._changed.notify()

    def close(self) -> None:
        """Nothing more will come: the next `take` returns None."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, wait_s: float | None) -> list[Message] | None:
        """All messages so far, sleeping until one comes, for `wait_s` seconds at most; None: however long. Returns None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._closed, wait_s)
            if self._closed:
                return None
            messages, self._messages = self._messages, []
            return messages
