"""What a job will be, before it is one: whether its project may have it (pure)."""

from services.chassis.errors import QuotaExceeded
from services.chassis.identity import Caller


def affordable(who: Caller, nanos: int = 0, seconds: float = 0.0) -> None:
    """Return if the day's budget and device time, as the gateway knows them, leave room for work that costs at least this.

    Raises:
        QuotaExceeded: nothing is left, or less than that.
    """
    for subject, asked, left in (("cost_per_day", nanos, who.job_nanos_left), ("gpu_seconds_per_day", seconds, who.job_seconds_left)):
        if left is not None and (left <= 0 or asked > left):
            raise QuotaExceeded(subject, round(asked), left)
