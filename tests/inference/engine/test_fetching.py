import threading

import pytest

from services.inference.engine.adapters import Fetched
from services.inference.engine.fetching import Fetcher
from services.inference.engine.inbox import Inbox
from services.inference.engine.step import Adapter, AdapterProblem

ADAPTER = Adapter(weights=None, memory_bytes=1, rank=1)


def answers(fetcher: Fetcher, inbox: Inbox, *keys: str) -> list[Fetched]:
    found: list[Fetched] = []
    for key in keys:
        fetcher.ask(key)
    while len(found) < len(keys):
        messages = inbox.take(30.0)
        assert messages, "no answer"
        found += [message for message in messages if isinstance(message, Fetched)]
    return found


def test_owner_and_digest_are_asked_of_the_runner_off_the_callers_thread():
    asked: list[tuple[str, str, bool]] = []

    def fetch(owner: str, digest: str) -> Adapter:
        asked.append((owner, digest, threading.current_thread() is threading.main_thread()))
        return ADAPTER

    inbox = Inbox()
    assert answers(Fetcher(fetch, inbox), inbox, "owner/digest") == [Fetched("owner/digest", ADAPTER)]
    assert asked == [("owner", "digest", False)]


def test_a_store_that_is_away_for_a_moment_is_asked_again():
    tries = iter([AdapterProblem("adapter_unavailable", "away"), AdapterProblem("adapter_unavailable", "away"), None])

    def fetch(owner: str, digest: str) -> Adapter:
        problem = next(tries)
        if problem is not None:
            raise problem
        return ADAPTER

    inbox = Inbox()
    assert answers(Fetcher(fetch, inbox), inbox, "o/d") == [Fetched("o/d", ADAPTER)]


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        (AdapterProblem("adapter_unavailable", "away"), "adapter_unavailable"),
        (AdapterProblem("adapter_unknown", "none"), "adapter_unknown"),
        (AdapterProblem("adapter_refused", "nan"), "adapter_refused"),
        (ValueError("what a reader may raise"), "adapter_refused"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_word_and_the_thread_goes_on(failure: Exception, word: str):
    def fetch(owner: str, digest: str) -> Adapter:
        if digest == "good":
            return ADAPTER
        raise failure

    inbox = Inbox()
    fetcher = Fetcher(fetch, inbox, patience_s=0.0)
    assert answers(fetcher, inbox, "o/bad", "o/bad", "o/bad") == [Fetched("o/bad", None, word)] * 3
    assert answers(fetcher, inbox, "o/good") == [Fetched("o/good", ADAPTER)]


def test_a_slow_adapter_does_not_keep_the_next_waiting():
    slow = threading.Event()

    def fetch(owner: str, digest: str) -> Adapter:
        if digest == "slow":
            assert slow.wait(30)
        return ADAPTER

    inbox = Inbox()
    fetcher = Fetcher(fetch, inbox)
    fetcher.ask("o/slow")
    assert answers(fetcher, inbox, "o/quick") == [Fetched("o/quick", ADAPTER)]
    slow.set()
    assert inbox.take(30.0) == [Fetched("o/slow", ADAPTER)]
