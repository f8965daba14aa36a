"""`argosy`: the fleet from a terminal.

Tables and live text for people, `--json` for scripts. Exit codes: 0 done, 2 the request is wrong, 3 the key is not good enough, 4 not
found, 5 the fleet cannot be reached or is shedding, 6 a limit or quota, 7 the timeout passed, 8 a job or an evaluation came to nothing,
1 anything else.
"""

from argosy.cli import account, ask, datasets, explain, jobs, models, plot, session, tune
from argosy.cli.session import app, login_file

__all__ = ["account", "app", "ask", "datasets", "explain", "jobs", "login_file", "main", "models", "plot", "session", "tune"]


def main() -> None:
    """The console script."""
    app()
