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

    @property
    def held_bytes(self) -> int:
        """Bytes of an unfinished character."""
        return len(self._decoder.getstate()[0])

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
        self._cut_bytes = 0
        self.matched: str | None = None

    @property
    def held_bytes(self) -> int:
        """UTF-8 bytes fed but not given out: held back, or cut by the match."""
        return self._cut_bytes + len(self._held.encode())

    def feed(self, text: str) -> str:
        """The text that is safe to send. After a match nothing is: `matched` says which, and the rest is cut."""
        if self.matched is not None:
            self._cut_bytes += len(text.encode())
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            safe, cut, self._held = self._held[:start], self._held[start:], ""
            self._cut_bytes = len(cut.encode())
            return safe
        border = len(self._held) - max(self._overlap(stop) for stop in self._stops)
        safe, self._held = self._held[:border], self._held[border:]
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
    fed_bytes: int = 0
    _utf8: Utf8Stream = field(default_factory=Utf8Stream)
    _matcher: StopMatcher = field(init=False)
    _started: bool = False

    def __post_init__(self) -> None:
        self._matcher = StopMatcher(self.stops)

    @property
    def matched(self) -> str | None:
        """The stop sequence that ended the output."""
        return self._matcher.matched

    @property
    def settled_bytes(self) -> int:
        """Bytes whose text has been given out: tokens that begin before it may be shown."""
        return self.fed_bytes - self._utf8.held_bytes - self._matcher.held_bytes

    def feed(self, data: bytes) -> str:
        """One token's bytes in, text that may be sent out."""
        self.tokens += 1
        self.fed_bytes += len(data)
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
