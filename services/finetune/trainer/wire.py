"""The control plane over gRPC: every message the trainer sends or reads is made here, and every call is repeated until answered."""

import hashlib
import logging
import math
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from argosy.v1 import dataset_pb2, finetune_pb2
from argosy_internal.training.v1 import training_pb2, training_pb2_grpc
from services.chassis.certificates import Certificates
from services.chassis.channel import ENGINE, PlaintextRefused, is_local
from services.finetune import nearest
from services.finetune.rows import Layout
from services.finetune.trainer.control import (
    Action,
    Claim,
    Failure,
    Fenced,
    Grant,
    Outcome,
    Refused,
    Report,
    ResumePoint,
    Unanswered,
    code_version,
)
from services.finetune.trainer.spec import CHECKPOINT_INTERVAL_STEPS, SEQ_LEN, EarlyStopping, Hyperparameters, Lora, Method, Privacy, Spec

__all__ = ["WireControl", "spec_from_proto"]

log = logging.getLogger(__name__)

CALL_S = 30.0  # one try of a call that verifies a checkpoint's digests
PATIENCE_S = 600.0  # without an answer the process gives up; a control plane restarts in about a minute
_AGAIN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED})
_LOST = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND})

R = TypeVar("R", bound=Message)


class WireControl:
    """A TrainingService client for one run. Safe from several threads: reports, commits and the loop call it at once."""

    def __init__(
        self,
        address: str,
        job: str,
        attempt: int,
        token: str | Path,
        *,
        certificates: Certificates | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`token` goes with every call, read from its file if it is one: a cluster renews it there.

        Raises PlaintextRefused for another machine without `certificates`, which may be renewed while the run goes on.
        """
        if certificates is None and not is_local(address):
            raise PlaintextRefused("send a job's token to", address)
        self._address, self._certificates, self._version = address, certificates, 0
        self._channels: list[grpc.Channel] = []
        self._lock = threading.Lock()
        self._connect()
        self._token = token
        self._job, self._attempt, self._patience_s = job, attempt, patience_s
        self._nonce = str(uuid.uuid4())
        self._fence, self._sequence, self._hyper = 0, 0, {}  # type: int, int, dict[str, str]
        self._claimed: training_pb2.ClaimRunResponse | None = None
        self._targeted = 0

    def _connect(self) -> None:
        """A channel with what the certificate files hold now. The one before it serves the calls that run on it; older ones are closed."""
        options: list[tuple[str, Any]] = list(ENGINE.items())
        if self._certificates is None:
            self._channels.append(grpc.insecure_channel(self._address, options))
        else:
            self._version = self._certificates.look()
            self._channels.append(grpc.secure_channel(self._address, self._certificates.channel_credentials(), options))
        while len(self._channels) > 2:
            self._channels.pop(0).close()
        self._stub = training_pb2_grpc.TrainingServiceStub(self._channels[-1])

    def close(self) -> None:
        """Close the connection."""
        for channel in self._channels:
            channel.close()

    def claim(self) -> Claim:
        """See Control. Raises ValueError for a spec that this trainer cannot read."""
        request = training_pb2.ClaimRunRequest(job=self._job, attempt=self._attempt, nonce=self._nonce, trainer_version=code_version())
        reply = self._call(lambda: self._stub.ClaimRun, request)
        self._fence, self._claimed = reply.fence, reply
        return Claim(
            job=self._job,
            attempt=self._attempt,
            fence=reply.fence,
            project_uid=reply.project_uid,
            model=reply.model,
            base_model=reply.spec.base_model,
            base_digest=reply.base_digest,
            spec=spec_from_proto(reply.spec),
            spec_digest=reply.spec_digest,
            train=_grant(reply.train),
            validation=_grant(reply.validation) if reply.HasField("validation") else None,
            resume=tuple(ResumePoint(point.step, point.prefix, point.manifest_digest) for point in reply.resume),
            prefix=reply.prefix,
            target_step=reply.target_step,
            epsilon_left=reply.epsilon_left if reply.HasField("epsilon_left") else None,
        )

    def report(self, report: Report) -> Action:
        """See Control."""
        self._sequence += 1
        request = training_pb2.ReportProgressRequest(
            job=self._job,
            fence=self._fence,
            sequence=self._sequence,
            phase=finetune_pb2.JobPhase.Value(f"JOB_PHASE_{report.phase.upper()}"),
            step=report.step,
            epoch=report.epoch,
            tokens=report.tokens,
            device_seconds=report.device_seconds,
            metrics=[training_pb2.RunMetric(name=name, value=_bounded(value), step=step) for name, value, step in report.metrics],
            evaluation={name: _bounded(value) for name, value in report.evaluation.items()},
            warnings=[training_pb2.RunWarning(rule=each.rule, line=each.line, count=each.count) for each in report.warnings],
        )
        if report.target_step and report.target_step != self._targeted:
            request.target_step = report.target_step
            if report.early_stopped:
                request.target_reason = training_pb2.TARGET_REASON_EARLY_STOPPED
        if report.epsilon_charged is not None:
            request.epsilon_charged = report.epsilon_charged
        reply = self._call(lambda: self._stub.ReportProgress, request)
        self._targeted = report.target_step or self._targeted
        return _action(reply.action)

    def commit(self, manifest: bytes) -> Action:
        """See Control."""
        request = training_pb2.CommitCheckpointRequest(
            job=self._job,
            fence=self._fence,
            manifest=json_format.Parse(manifest, training_pb2.CheckpointManifest()),
            manifest_digest=hashlib.sha256(manifest).hexdigest(),
        )
        return _action(self._call(lambda: self._stub.CommitCheckpoint, request).action)

    def succeed(self, outcome: Outcome) -> None:
        """See Control."""
        claimed = self._claimed
        assert claimed is not None
        spec = spec_from_proto(claimed.spec)
        grants = [("train", claimed.train)] + ([("validation", claimed.validation)] if claimed.HasField("validation") else [])
        manifest = training_pb2.AdapterManifest(
            project_uid=claimed.project_uid,
            model=claimed.model,
            base_model=claimed.spec.base_model,
            base_digest=outcome.base_digest,
            method=claimed.spec.method,
            targets=outcome.targets,
            parts=[training_pb2.Part(name=part.name, sha256=part.sha256, total_bytes=part.total_bytes) for part in outcome.parts],
            labels=outcome.labels,
            temperature=outcome.temperature,
            pooling=training_pb2.POOLING_LAST,
            max_tokens=outcome.max_tokens,
            template_hash=outcome.template_hash,
            datasets=[
                training_pb2.ManifestDataset(
                    dataset_version=grant.dataset_version, sha256=grant.sha256, use=use, rows=outcome.rows.get(use, 0)
                )
                for use, grant in grants
            ],
            seed=spec.seed,
            hyperparameters=_hyperparameters(spec)
            | {"precision": outcome.precision}
            | ({nearest.KEY: outcome.nearest} if outcome.nearest else {}),
            metrics={name: _bounded(value) for name, value in outcome.metrics.items()},
            job=self._job,
            attempt=self._attempt,
            code_version=code_version(),
            train_seconds=outcome.seconds,
            step=outcome.step,
        )
        if spec.lora is not None:
            manifest.rank, manifest.alpha, manifest.dropout = spec.lora.rank, spec.lora.alpha, spec.lora.dropout
            manifest.rslora, manifest.dora = spec.lora.rslora, spec.lora.dora
        if spec.privacy is not None and outcome.epsilon is not None:
            manifest.privacy.epsilon, manifest.privacy.delta = outcome.epsilon, spec.privacy.delta
            manifest.privacy.accountant = outcome.accountant
            manifest.privacy.unit = claimed.spec.privacy.unit or finetune_pb2.PRIVACY_UNIT_EXAMPLE
        manifest.create_time.GetCurrentTime()
        self._complete(training_pb2.CompleteRunRequest(result=manifest))

    def fail(self, failure: Failure) -> None:
        """See Control."""
        reason = finetune_pb2.JobReason.Value(f"JOB_REASON_{failure.reason}")
        self._complete(
            training_pb2.CompleteRunRequest(
                failure=training_pb2.RunFailure(reason=reason, rule=failure.rule, line=failure.line, field=failure.field[:128])
            )
        )

    def stopped(self, step: int) -> None:
        """See Control."""
        self._complete(training_pb2.CompleteRunRequest(stopped=training_pb2.RunStopped(step=step)))

    def _shown(self) -> str:
        return token_from(self._token) if isinstance(self._token, Path) else self._token

    def _complete(self, request: training_pb2.CompleteRunRequest) -> None:
        request.job, request.fence = self._job, self._fence
        self._call(lambda: self._stub.CompleteRun, request)

    def _renewed(self) -> None:
        """Use the certificate that is there now."""
        if self._certificates is None:
            return
        with self._lock:
            if self._certificates.look() != self._version:
                self._connect()

    def _call(self, method: Callable[[], Callable[..., R]], request: Message) -> R:
        """Repeat until answered. Raises Fenced where the run is another's, Refused, Unanswered when patience ends, and RpcError else."""
        began, pause_s = time.monotonic(), 0.1
        while True:
            try:
                self._renewed()
                return method()(request, timeout=CALL_S, metadata=(("authorization", f"Bearer {self._shown()}"),))
            except grpc.RpcError as error:
                code = error.code()
                if code in _LOST or (code is grpc.StatusCode.ABORTED and _reason(error) == "WORKER_FENCED"):
                    raise Fenced from error
                if _reason(error) == "PRIVACY_BUDGET_EXCEEDED":
                    raise Refused from error
                if code not in _AGAIN:
                    log.error("refused", extra={"code": code.name, "reason": _reason(error), "method": type(request).__name__})
                    raise
                if time.monotonic() - began > self._patience_s:
                    raise Unanswered from error
                log.warning("no answer yet", extra={"code": code.name, "method": type(request).__name__})
            time.sleep(pause_s * random.SystemRandom().uniform(0.5, 1.0))  # not the training's generator: a retry must not move it
            pause_s = min(5.0, pause_s * 2)


def spec_from_proto(spec: finetune_pb2.FineTuneSpec) -> Spec:
    """A resolved spec as a value; what is unset gets this trainer's default. Raises ValueError for an unknown method."""
    methods = {
        finetune_pb2.TUNE_METHOD_CHAT: Method.CHAT,
        finetune_pb2.TUNE_METHOD_CLASSIFY: Method.CLASSIFY,
        finetune_pb2.TUNE_METHOD_PREFERENCE: Method.PREFERENCE,
    }
    if spec.method not in methods:
        raise ValueError("a method newer than this trainer")
    private = None
    if spec.HasField("privacy"):
        own = spec.privacy
        unit = "user" if own.unit == finetune_pb2.PRIVACY_UNIT_USER else "example"
        private = Privacy(own.epsilon, own.delta, unit, own.clip_norm if own.HasField("clip_norm") else 1.0)
    lora = None
    if spec.WhichOneof("adapter") != "full":
        given = spec.lora
        rank = given.rank or (8 if private else 16)
        targets = tuple(given.targets) or (("q_proj", "v_proj") if private else ())
        lora = Lora(rank, given.alpha or 2.0 * rank, given.dropout, targets, given.rslora, given.dora)
    chosen = spec.hyperparameters
    defaults = Hyperparameters()
    hyperparameters = Hyperparameters(
        learning_rate=chosen.learning_rate or defaults.learning_rate,
        epochs=chosen.epochs or defaults.epochs,
        batch_size=chosen.batch_size or defaults.batch_size,
        weight_decay=chosen.weight_decay,
        warmup_ratio=chosen.warmup_ratio if chosen.HasField("warmup_ratio") else defaults.warmup_ratio,
        max_steps=chosen.max_steps or None,
        clip_norm=chosen.max_grad_norm or defaults.clip_norm,
        preference_beta=chosen.preference_beta or defaults.preference_beta,
    )
    early = None
    if spec.HasField("early_stopping"):
        early = EarlyStopping(spec.early_stopping.patience or 3, spec.early_stopping.min_delta)
    fraction = spec.validation_fraction if spec.HasField("validation_fraction") else 0.1
    return Spec(
        method=methods[spec.method],
        lora=lora,
        hyperparameters=hyperparameters,
        seq_len=spec.seq_len or SEQ_LEN,
        packing=(spec.packing if spec.HasField("packing") else True) and private is None,
        seed=spec.seed,
        early_stopping=early,
        evaluation_interval_steps=spec.early_stopping.interval_steps or None,
        checkpoint_interval_steps=spec.checkpoint_interval_steps or CHECKPOINT_INTERVAL_STEPS,
        validation_fraction=0.0 if spec.validation_version else fraction,
        privacy=private,
        precision="auto",
    )


def token_from(path: Path) -> str:
    """The attempt's token from its file."""
    return path.read_text(encoding="ascii").strip()


def _grant(grant: training_pb2.DataGrant) -> Grant:
    formats: dict[int, Any] = {
        dataset_pb2.DATASET_FORMAT_CHAT: "chat",
        dataset_pb2.DATASET_FORMAT_CLASSIFY: "classify",
        dataset_pb2.DATASET_FORMAT_PREFERENCE: "preference",
    }
    written = grant.layout
    layout = Layout(
        format=formats[grant.format],
        encoding="csv" if written.encoding == dataset_pb2.DATASET_ENCODING_CSV else "jsonl",
        text_columns=tuple(written.text_columns),
        label_column=written.label_column,
        delimiter=written.delimiter or ",",
        header=written.header if written.HasField("header") else True,
    )
    return Grant(grant.dataset_version, grant.object, grant.sha256, grant.total_bytes, layout)


def _hyperparameters(spec: Spec) -> dict[str, str]:
    own = spec.hyperparameters
    return {
        "learning_rate": f"{own.learning_rate:.9g}",
        "epochs": f"{own.epochs:.9g}",
        "batch_size": str(own.batch_size),
        "weight_decay": f"{own.weight_decay:.9g}",
        "warmup_ratio": f"{own.warmup_ratio:.9g}",
        "max_steps": str(own.max_steps or 0),
        "max_grad_norm": f"{own.clip_norm:.9g}",
        "seq_len": str(spec.seq_len),
        "packing": str(spec.packing).lower(),
    }


def _action(action: int) -> Action:
    known: dict[int, Action] = {training_pb2.RUN_ACTION_PAUSE: Action.PAUSE, training_pb2.RUN_ACTION_CANCEL: Action.CANCEL}
    return known.get(action, Action.CONTINUE)


def _bounded(value: float) -> float:
    """What the service takes: finite, at most 1e9 either way."""
    return min(1e9, max(-1e9, value)) if math.isfinite(value) else 1e9


def _reason(error: Any) -> str:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""
