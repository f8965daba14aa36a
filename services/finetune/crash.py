"""Named places at which a test may end the process as a power cut would: `ARGOSY_TEST_CRASH=name`, or `name:count` for the n-th time."""

import os

_asked, _, _count = os.environ.get("ARGOSY_TEST_CRASH", "").partition(":")
_left = [int(_count or 1)]


def point(name: str) -> None:
    """End the process here if it was asked for; otherwise nothing."""
    if name == _asked:
        _left[0] -= 1
        if _left[0] == 0:
            os._exit(86)
