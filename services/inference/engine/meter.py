"""Measured rates of the recent steps, for the gateway's prediction of waits. Pure."""

KEEP = 0.95  # share of the past that each step leaves: the mean of about the last twenty


class Rate:
    """Tokens a second: averaged sums, so that a long step weighs as much as it lasted."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One step's share."""
        self._tokens = self._tokens * KEEP + tokens
        self._seconds = self._seconds * KEEP + seconds

    @property
    def per_s(self) -> float:
        """0 until known."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0


class Meter:
    """What the steps so far have shown."""

    def __init__(self) -> None:
        self.prefill = Rate()
        self.decode = Rate()
        self.steps = 0
        self.step_s = 0.0
        self.batch = 0

    def add(self, prefill_tokens: int, decode_tokens: int, sequences: int, seconds: float) -> None:
        """Count one step. Its whole time is held against both kinds: that is what a newcomer would see."""
        self.step_s = seconds if self.steps == 0 else self.step_s * KEEP + seconds * (1 - KEEP)
        self.steps += 1
        self.batch = sequences
        if prefill_tokens:
            self.prefill.add(prefill_tokens, seconds)
        if decode_tokens:
            self.decode.add(decode_tokens, seconds)
