"""What an alias may point to, and what a move needs (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from services.chassis.errors import FieldInvalid, GateNotPassed

PASSED = "PASSED"


@dataclass(frozen=True, slots=True)
class Aim:
    """What an alias points to: a stable version, and perhaps a second one that gets `percent` of the callers."""

    target: int
    split: int | None = None
    percent: int | None = None

    def versions(self) -> tuple[int, ...]:
        """Their numbers, the stable one first."""
        return (self.target,) if self.split is None else (self.target, self.split)

    def shares(self) -> tuple[tuple[int, int], ...]:
        """(version, percent), the stable one first; they sum to 100."""
        if self.split is None or self.percent is None:
            return ((self.target, 100),)
        return (self.target, 100 - self.percent), (self.split, self.percent)


@dataclass(frozen=True, slots=True)
class Evidence:
    """An evaluation, as far as a move looks at it. `current` is the alias's target when it was asked for; None: there was none."""

    uid: str
    state: str
    candidate: int
    current: int | None
    alias: str


def aimed(before: Aim | None, version: int, percent: int) -> Aim:
    """Where an alias points after `version` gets `percent` of the callers; the others stay where they are.

    Raises:
        FieldInvalid: a share of nothing, or beside itself.
    """
    if percent == 100:
        return Aim(version)
    if before is None:
        raise FieldInvalid("percent", "alias_points_nowhere")
    if version == before.target:
        raise FieldInvalid("version", "is_target")
    return Aim(before.target, version, percent)


def needs_gate(before: Aim | None, after: Aim) -> bool:
    """Whether more callers than now get a version that is not the stable one. Going back to the stable one needs no proof."""
    if before is None:
        return True
    stable = dict(before.shares())
    return any(version != before.target and percent > stable.get(version, 0) for version, percent in after.shares())


def check_gate(evidence: Evidence | None, before: Aim | None, version: int, alias: str) -> None:
    """Return if an evaluation has shown `version` to be better than what the alias points to now.

    Raises:
        GateNotPassed: none was named, it was not passed, or it was about something else.
    """
    if evidence is None:
        raise GateNotPassed("evaluation")
    current = before.target if before is not None else None
    if (evidence.state, evidence.candidate, evidence.current, evidence.alias) != (PASSED, version, current, alias):
        raise GateNotPassed("evaluation")


def imagined(row: Mapping[Any, Any] | None, name: str, aim: Aim) -> dict[Any, Any]:
    """An alias's row as a move would leave it."""
    now = datetime.now(UTC)
    made = {"name": name, "uid": "", "revision": 0, "create_time": now, "update_time": now}
    return {**(row or made), "target": aim.target, "split": aim.split, "split_percent": aim.percent}
