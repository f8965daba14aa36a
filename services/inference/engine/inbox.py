"""Messages for the engine's thread: put from any thread, taken by one that sleeps while there is nothing to do. Pure."""

import threading
from collections.abc import Iterable

from services.inference.engine.calls import ToEngine


class Inbox:
    """Bounded by the calls alive: each puts a few messages, and the engine refuses calls beyond its limit."""

    def __init__(self) -> None:
        self._messages: list[ToEngine] = []
        self._closed = False
        self._changed = threading.Condition()

    def put(self, messages: Iterable[ToEngine]) -> None:
        """Add in order and wake the taker."""
        with self._changed:
            self._messages.extend(messages)
            self._changed.notify()

    def close(self) -> None:
        """Nothing more will come: the next `take` returns None."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, wait: bool) -> list[ToEngine] | None:
        """All messages so far; with `wait`, at least one, sleeping until it comes. None once closed."""
        with self._changed:
            while wait and not self._messages and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            messages, self._messages = self._messages, []
            return messages
