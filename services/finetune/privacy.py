"""What private jobs may spend of one dataset, together: the basic composition of their promises (pure).

Each job's own (epsilon, delta) is counted by its accountant (`trainer/privacy.py`). Of several jobs on the same rows both numbers add up:
the oldest theorem of the field, true whatever the jobs are and however a later one was chosen after seeing an earlier one. It is never
less than what was spent; tighter ones exist, and need more assumptions than a table can check.
"""

from dataclasses import dataclass

__all__ = ["Budget", "Spent"]


@dataclass(frozen=True, slots=True)
class Spent:
    """A promise, or several added up."""

    epsilon: float = 0.0
    delta: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """Of one dataset: what its jobs have spent or reserved, and how far they may go."""

    spent: Spent
    epsilon: float  # ceiling; 0: none
    rows: int  # of the version asked about

    @property
    def delta(self) -> float:
        """Ceiling of all deltas: above 1 / rows a promise allows one row to be published as it is."""
        return 1.0 / max(1, self.rows)

    def allows(self, asked: Spent) -> bool:
        """Whether a job with this promise may run, too; the last bit of a float decides nothing."""
        slack = 1 + 1e-9
        enough = not self.epsilon or self.spent.epsilon + asked.epsilon <= self.epsilon * slack
        return enough and self.spent.delta + asked.delta <= self.delta * slack
