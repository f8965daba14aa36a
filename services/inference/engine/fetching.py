"""Fetches adapters beside the step loop: a thread that asks the runner, and tells the engine's inbox."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from services.inference.engine.adapters import Fetched
from services.inference.engine.inbox import Inbox
from services.inference.engine.step import Adapter, AdapterProblem

PATIENCE_S = 8.0  # that a store may be away before the calls that wait are told
PAUSES_S = (0.1, 0.2, 0.4, 0.8)  # between tries, the last again and again
THREADS = 2  # one slow adapter does not keep the next waiting

log = logging.getLogger(__name__)


class Fetcher:
    """`ask` from the engine's thread; answers come as `Fetched`. `fetch` blocks and raises AdapterProblem."""

    def __init__(self, fetch: Callable[[str, str], Adapter], inbox: Inbox, patience_s: float = PATIENCE_S) -> None:
        self._fetch = fetch
        self._inbox = inbox
        self._patience_s = patience_s
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()  # bounded by the calls alive, as the inbox is
        self._threads = 0

    def ask(self, key: str) -> None:
        """Fetch it, soon. The threads start with the first question and end with the process."""
        self._asked.put(key)
        if self._threads < THREADS:
            self._threads += 1
            threading.Thread(target=self._run, name=f"adapters {self._threads}", daemon=True).start()

    def _run(self) -> None:
        while True:
            key = self._asked.get()
            self._inbox.put((self._answer(key),))

    def _answer(self, key: str) -> Fetched:
        owner, _, digest = key.rpartition("/")
        began = time.monotonic()
        tries = 0
        while True:
            try:
                adapter = self._fetch(owner, digest)
            except AdapterProblem as problem:
                pause_s = PAUSES_S[min(tries, len(PAUSES_S) - 1)]
                if problem.word == "adapter_unavailable" and time.monotonic() + pause_s - began < self._patience_s:
                    tries += 1
                    time.sleep(pause_s)
                    continue
                log.warning("an adapter was not loaded: %s", problem, extra={"adapter": digest})
                return Fetched(key, None, problem.word)
            except Exception as failure:  # whatever reading a file may raise: the calls that wait must be told
                log.error("an adapter could not be read", extra={"adapter": digest, "failure": type(failure).__name__})
                return Fetched(key, None, "adapter_refused")
            log.info("an adapter is loaded", extra={"adapter": digest, "seconds": round(time.monotonic() - began, 3)})
            return Fetched(key, adapter)
