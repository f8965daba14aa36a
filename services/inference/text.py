"""Tokens as bytes become text: whole characters only, and never a part of a stop sequence (pure)."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["OutputText", "StopMatcher", "Utf8Stream"]


class Utf8Stream:
    """Bytes in, whole characters out. A character split over tokens waits; bytes that never become one end as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left when no byte can follow: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Finds the stop sequence that completes first and holds back every character that could still begin one.

    Of two that complete at the same character the longer wins, so the result does not depend on where chunks are cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to send. After a match nothing is: `matched` says which, and the rest is cut."""
        if self.matched is not None or not text:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            safe, self._held = self._held[:start], ""
            return safe
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe

    def finish(self) -> str:
        """Held text that turned out to begin no stop sequence."""
        rest, self._held = self._held, ""
        return "" if self.matched is not None else rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a beginning of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


@dataclass(slots=True)
class OutputText:
    """One output's text. Stop sequences are looked for only from token `min_tokens` on: before it no ending is wanted.

    `trim_start` drops blank characters before the first visible one (task prompts leave a space to the model).
    """

    stops: Sequence[str] = ()
    min_tokens: int = 0
    trim_start: bool = False
    tokens: int = 0
    _utf8: Utf8Stream = field(default_factory=Utf8Stream)
    _matcher: StopMatcher = field(init=False)
    _started: bool = False

    def __post_init__(self) -> None:
        self._matcher = StopMatcher(self.stops)

    @property
    def matched(self) -> str | None:
        """The stop sequence that ended the output."""
        return self._matcher.matched

    def feed(self, data: bytes) -> str:
        """One token's bytes in, text that may be sent out."""
        self.tokens += 1
        text = self._utf8.feed(data)
        return self._visible(text if self.tokens <= self.min_tokens else self._matcher.feed(text))

    def finish(self) -> str:
        """The rest, when no token follows; nothing after a stop sequence."""
        if self.matched is not None:
            return ""
        return self._visible(self._matcher.feed(self._utf8.finish()) + self._matcher.finish())

    def _visible(self, text: str) -> str:
        if self.trim_start and not self._started:
            text = text.lstrip()
        self._started = self._started or bool(text)
        return text
