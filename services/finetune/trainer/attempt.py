"""One attempt at a job, from claim to result: what happens when, and what ends it. Messages are `wire`'s, tensors `train`'s."""

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save

from services.chassis.objects import ObjectsUnavailable, SyncObjects
from services.finetune import nearest
from services.finetune.trainer import checkpoints, measures, neighbours
from services.finetune.trainer.control import (
    DONE,
    INPUT,
    LOST,
    TERMINATED,
    Action,
    Claim,
    Control,
    Failure,
    Fenced,
    Outcome,
    Part,
    Refused,
    Unanswered,
    Warned,
    failed,
)
from services.finetune.trainer.grants import Unusable, same_base
from services.finetune.trainer.model import Base, BaseUnsupported, load
from services.finetune.trainer.preference import PreferenceTrainer
from services.finetune.trainer.privacy import GuardTripped, PrivateTrainer, canary
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.reporting import INTERVAL_S, Reporter
from services.finetune.trainer.rows import Prepared, prepare
from services.finetune.trainer.spec import Method
from services.finetune.trainer.train import Evaluation, Trainer
from services.pretrained.fingerprint import fingerprint
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer

__all__ = ["DONE", "INPUT", "LOST", "TERMINATED", "Attempt"]

log = logging.getLogger(__name__)

_CANARIES = 16  # training examples by which stored private weights are told from spoilt ones


class _Ended(Exception):
    """The run is over for this process; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Attempt:
    """One process's work. `stop` is set by SIGTERM; `boundary` is called after every step, for tests that kill there."""

    control: Control
    objects: SyncObjects
    directory: Path
    stop: threading.Event
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    interval_s: float = INTERVAL_S
    boundary: Callable[[int], None] = lambda step: None
    committed: int = -1  # step of the newest checkpoint of this run
    previous: str = ""  # its manifest's digest

    def run(self) -> int:
        """Train to the end, or to where something ends it; the exit code."""
        try:
            claim = self.control.claim()
            with Reporter(self.control, self.interval_s) as reporter:
                return self._claimed(claim, reporter)
        except _Ended as ended:
            return ended.code
        except Unusable as unusable:
            log.error("the run cannot succeed", extra={"reason": unusable.failure.reason, "rule": unusable.failure.rule})
            return failed(self.control, unusable.failure)
        except BaseUnsupported:
            return failed(self.control, Failure("INTERNAL", "base.unsupported"))
        except GuardTripped as tripped:
            return failed(self.control, Failure("PRIVACY_GUARD", tripped.rule))
        except Refused:
            return failed(self.control, Failure("PRIVACY_GUARD", "privacy.ledger"))
        except FloatingPointError:
            return failed(self.control, Failure("DIVERGED"))
        except (torch.OutOfMemoryError, MemoryError):
            return failed(self.control, Failure("OUT_OF_MEMORY"))
        except (Fenced, Unanswered, ObjectsUnavailable) as error:
            log.warning("gave up", extra={"failure": type(error).__name__})
            return LOST

    def _claimed(self, claim: Claim, reporter: Reporter) -> int:
        began = time.perf_counter()
        tokenizer = Tokenizer.from_directory(self.directory)
        template = load_template(self.directory, tokenizer, tokenizer.prefix)
        digest = same_base(self.directory, claim)
        self._boundary(reporter)
        base = load(self.directory, self.device, claim.spec.gradient_checkpointing)
        prepared = prepare(self.objects, claim, Renderer.of(tokenizer, template, base.end_ids))
        reporter.warn(*prepared.warnings)
        self._boundary(reporter)
        trainer, before = self._trainer(claim, base, prepared, reporter)
        if claim.target_step:  # an earlier attempt may have ended it early
            trainer.target = min(trainer.target, claim.target_step)
        lowered = trainer.target < claim.target_step
        reporter.phase("training", step=trainer.done, target_step=trainer.target, early_stopped=lowered)
        reporter.flush()
        writer = checkpoints.Writer(lambda saved: self._commit(claim, saved, reporter))
        began_training = time.perf_counter() - began
        log.info("training", extra={"step": trainer.done, "target_step": trainer.target, "loaded_s": round(began_training, 2)})

        def seconds() -> float:
            return before + time.perf_counter() - began

        numbers: dict[str, float] = {}
        while trainer.done < trainer.target:
            self._boundary(reporter, trainer, writer, seconds)
            step = trainer.step()
            reporter.stepped(step, trainer.done / trainer.per_epoch)
            numbers["loss"] = step.loss
            if trainer.due():
                reporter.phase("evaluating")
                evaluation = trainer.evaluate()
                numbers |= self._numbers(trainer, evaluation)
                if trainer.judge(evaluation):
                    reporter.phase("training", target_step=trainer.target, early_stopped=True)
                reporter.evaluated(self._numbers(trainer, evaluation))
            last = trainer.done == trainer.target
            if last or (trainer.done % claim.spec.checkpoint_interval_steps == 0 and not writer.busy):
                writer.begin(checkpoints.capture(trainer, seconds(), numbers))
            self.boundary(trainer.done)
        writer.wait()
        self._boundary(reporter, trainer, writer, seconds)
        outcome = self._outcome(claim, trainer, prepared, digest, fingerprint(self.directory, tokenizer, template), reporter)
        outcome = replace(outcome, nearest=self._indexed(claim, trainer, prepared, tokenizer))
        reporter.flush()
        self.control.succeed(replace(outcome, seconds=seconds()))
        return DONE

    def _trainer(self, claim: Claim, base: Base, prepared: Prepared, reporter: Reporter) -> tuple[Trainer, float]:
        """A trainer at the newest checkpoint that is whole, or at the start; and the seconds trained before."""
        try:
            trainer = self._fresh(claim, base, prepared, reporter)
        except ValueError:
            raise Unusable(Failure("DATA_INVALID", "spec.targets")) from None
        for point in claim.resume:
            try:
                before = checkpoints.restore(trainer, checkpoints.read(self.objects, point, claim.spec_digest))
            except checkpoints.Damaged as damage:
                log.warning("a checkpoint is damaged", extra={"step": point.step, "why": str(damage)})
                reporter.warn(Warned("checkpoint.damaged", count=point.step))
                continue
            self.committed, self.previous = point.step, point.manifest_digest
            if isinstance(trainer, PrivateTrainer):
                trainer.resumed()
            return trainer, before
        if isinstance(trainer, PrivateTrainer):
            trainer.resumed()
        return trainer, 0.0

    def _fresh(self, claim: Claim, base: Base, prepared: Prepared, reporter: Reporter) -> Trainer:
        spec = replace(claim.spec, labels=prepared.labels)
        if spec.method is Method.PREFERENCE:
            if spec.lora is None or spec.privacy is not None:
                raise Unusable(Failure("DATA_INVALID", "spec.adapter"))
            return PreferenceTrainer(spec, base, prepared.train, prepared.validation)
        if spec.privacy is None:
            return Trainer(spec, base, prepared.train, prepared.validation)
        charged = 0.0 if claim.epsilon_left is None else max(0.0, spec.privacy.epsilon - claim.epsilon_left)
        return PrivateTrainer(spec, base, prepared.train, prepared.validation, charge=reporter.charge, charged=charged)

    def _boundary(
        self,
        reporter: Reporter,
        trainer: Trainer | None = None,
        writer: checkpoints.Writer | None = None,
        seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Between two steps: leave if told to, after a checkpoint where there is something to keep. Raises _Ended."""
        reporter.check()
        step = 0 if trainer is None else trainer.done
        if reporter.action is Action.CANCEL:
            self.control.stopped(step)
            raise _Ended(DONE)
        told = self.stop.is_set()
        if not told and reporter.action is not Action.PAUSE:
            return
        if trainer is not None and writer is not None:
            reporter.phase("committing")
            writer.wait()
            if self.committed < step:
                writer.begin(checkpoints.capture(trainer, seconds()))
                writer.wait()
        if told:
            raise _Ended(TERMINATED)
        self.control.stopped(max(0, self.committed))
        raise _Ended(DONE)

    def _commit(self, claim: Claim, saved: checkpoints.Saved, reporter: Reporter) -> None:
        """Store and commit; what is stored but never committed does not count."""
        prefix = f"{claim.prefix}step-{saved.step}/"
        found = checkpoints.store(self.objects, prefix, checkpoints.parts(saved))
        written = checkpoints.manifest(
            found,
            job=claim.job,
            attempt=claim.attempt,
            fence=claim.fence,
            step=saved.step,
            spec_digest=claim.spec_digest,
            previous=self.previous,
            metrics=saved.state["metrics"],
        )
        self.objects.put(f"{prefix}manifest.json", written)
        reporter.obey(self.control.commit(written))
        self.committed, self.previous = saved.step, hashlib.sha256(written).hexdigest()

    def _outcome(
        self, claim: Claim, trainer: Trainer, prepared: Prepared, base_digest: str, template_hash: str, reporter: Reporter
    ) -> Outcome:
        """Measure what is kept, the best where there was an evaluation, calibrate it, and store it as the result."""
        if trainer.best.tensors:
            trainer.put(trainer.best.tensors)
        metrics: dict[str, float] = {}
        heat = 1.0 if trainer.head is not None else 0.0
        if prepared.validation:
            reporter.phase("evaluating")
            evaluation = trainer.evaluate()
            metrics |= self._numbers(trainer, evaluation)
            if evaluation.logits is not None:
                labels = torch.tensor([example.label for example in prepared.validation])
                heat = measures.temperature(evaluation.logits, labels)
                metrics["calibration_error_before"] = measures.calibration_error(evaluation.logits, labels)
                metrics["calibration_error"] = measures.calibration_error(evaluation.logits, labels, heat)
                metrics["majority_accuracy"] = measures.majority(labels.tolist())
            elif claim.spec.lora is not None and claim.spec.method is Method.CHAT:
                with trainer.untuned():
                    loss = trainer.evaluate().loss
                metrics |= {"base_validation_loss": loss, "base_validation_perplexity": math.exp(min(loss, 20.0))}
        reporter.phase("committing")
        trained = trainer.snapshot()
        files = {"adapter.safetensors": save({name: value for name, value in trained.items() if not name.startswith("head.")})}
        if trainer.head is not None:
            files["head.safetensors"] = save({name[5:]: value for name, value in trained.items() if name.startswith("head.")})
        if isinstance(trainer, PrivateTrainer):
            again = load(self.directory, self.device)
            stored = Trainer(replace(trainer.spec, privacy=None), again, prepared.train)
            canary(trainer, stored, checkpoints.read_result(files), prepared.train[:_CANARIES])
        parts: tuple[Part, ...] = checkpoints.store(self.objects, f"{claim.prefix}result/", files)
        return Outcome(
            base_digest=base_digest,
            targets=trainer.targets,
            parts=parts,
            temperature=heat,
            max_tokens=claim.spec.seq_len if trainer.head is not None else 0,
            template_hash=template_hash if trainer.head is None else "",
            rows={"train": len(prepared.train), "validation": len(prepared.validation)},
            labels=prepared.labels,
            metrics=metrics,
            seconds=0.0,
            step=trainer.done,
            precision=trainer.precision,
            epsilon=trainer.epsilon if isinstance(trainer, PrivateTrainer) else None,
            accountant="prv" if isinstance(trainer, PrivateTrainer) else "",
        )

    def _indexed(self, claim: Claim, trainer: Trainer, prepared: Prepared, tokenizer: Tokenizer) -> str:
        """Store vectors of the rows beside the result; what the manifest promises of them. A private run has none: it would tell."""
        if claim.spec.privacy is not None or claim.spec.lora is None:
            return ""
        each = sum(len(example.ids) for example in prepared.train) / len(prepared.train)
        read = round(each * trainer.done * claim.spec.hyperparameters.batch_size)
        made = neighbours.index(trainer.base, tokenizer, prepared.learnt, claim.spec.seq_len, claim.spec.step_tokens, read)
        self.objects.put(f"{claim.prefix}result/{nearest.FILE}", made)
        return nearest.promise(made)

    @staticmethod
    def _numbers(trainer: Trainer, evaluation: Evaluation) -> dict[str, float]:
        """An evaluation by name."""
        numbers = {"validation_loss": evaluation.loss}
        if evaluation.numbers:
            return numbers | {f"validation_{name}": value for name, value in evaluation.numbers.items()}
        if evaluation.logits is None:
            return numbers | {"validation_perplexity": math.exp(min(evaluation.loss, 20.0))}
        labels = torch.tensor([example.label for example in trainer.validation])
        numbers["validation_accuracy"] = measures.accuracy(evaluation.logits, labels)
        numbers["validation_macro_f1"] = measures.macro_f1(evaluation.logits, labels)
        return numbers
