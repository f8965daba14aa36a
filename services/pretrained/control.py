"""A control token among plain text: what a template may say and a caller may not (pure)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Control:
    """A control token in a rendered prompt, between runs of plain text."""

    id: int
