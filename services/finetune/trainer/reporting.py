"""Progress at most 10 s apart, from a thread of its own: long steps and a silent control plane stop neither lease nor training."""

import threading
import time
from collections.abc import Mapping

from services.finetune.trainer.control import Action, Control, Report, Warned
from services.finetune.trainer.train import Step

__all__ = ["Reporter"]

INTERVAL_S = 4.0  # between reports; a lease of 30 s survives several lost ones
_METRICS = 252  # of one report; above, some steps are left out


class Reporter:
    """Collects what happened and tells it. `check` raises what ended the conversation."""

    def __init__(self, control: Control, interval_s: float = INTERVAL_S) -> None:
        self._control, self._interval_s = control, interval_s
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        self._error: BaseException | None = None
        self._action = Action.CONTINUE
        self._now = Report(phase="loading")
        self._steps: list[Step] = []
        self._evaluation: dict[str, float] = {}
        self._warnings: list[Warned] = []
        self._tokens = 0
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join(timeout=2 * self._interval_s)  # a call under way may wait for an answer that no one needs

    @property
    def action(self) -> Action:
        """What the control plane wants."""
        return self._action

    def obey(self, action: Action) -> None:
        """Take over what another call was told."""
        if action is not Action.CONTINUE:
            self._action = action

    def check(self) -> None:
        """Raises Fenced or Unanswered where a report did."""
        if self._error is not None:
            raise self._error

    def phase(self, phase: str, *, step: int = 0, target_step: int = 0, early_stopped: bool = False) -> None:
        """Tell soon what the run is doing."""
        with self._lock:
            now = self._now
            stopped = early_stopped or now.early_stopped
            self._now = Report(phase, step or now.step, target_step or now.target_step, stopped, now.epoch)
        self._wake.set()

    def stepped(self, step: Step, epoch: float) -> None:
        """A step is done."""
        with self._lock:
            self._steps.append(step)
            self._tokens += step.tokens
            now = self._now
            self._now = Report("training", step.number, now.target_step, now.early_stopped, epoch)

    def evaluated(self, numbers: Mapping[str, float]) -> None:
        """The validation rows are measured."""
        with self._lock:
            self._evaluation = dict(numbers)
        self._wake.set()

    def warn(self, *warnings: Warned) -> None:
        """Something to know."""
        with self._lock:
            self._warnings.extend(warnings)

    def flush(self) -> None:
        """Tell everything now. Raises Fenced or Unanswered."""
        self.check()
        self._send()

    def charge(self, epsilon: float) -> None:
        """Have the privacy ledger charged before a step spends it. Raises Fenced or Unanswered, and what a refusal raises."""
        self.check()
        self._send(epsilon)

    def _run(self) -> None:
        while not self._ended:
            try:
                self._send()
            except BaseException as error:
                self._error = error
                return
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _send(self, epsilon: float | None = None) -> None:
        with self._sending:
            with self._lock:
                now, steps, evaluation, warnings = self._now, self._steps, self._evaluation, self._warnings[:64]
                self._steps, self._evaluation, self._warnings = [], {}, self._warnings[64:]
                tokens = self._tokens
            report = Report(
                now.phase, now.step, now.target_step, now.early_stopped, now.epoch, tokens, time.perf_counter() - self._began,
                _metrics(steps), evaluation, tuple(warnings), epsilon,
            )  # fmt: skip
            self.obey(self._control.report(report))


def _metrics(steps: list[Step]) -> tuple[tuple[str, float, int], ...]:
    stride = -(-len(steps) * 4 // _METRICS) or 1
    chosen = steps[::-1][::stride][::-1]  # the newest always
    return tuple(
        (name, value, step.number)
        for step in chosen
        for name, value in (
            ("loss", step.loss),
            ("learning_rate", step.learning_rate),
            ("grad_norm", step.gradient_norm),
            ("tokens_per_second", step.tokens / max(step.seconds, 1e-9)),
        )
    )
