"""Rows of the registry as messages."""

from collections.abc import Iterable
from typing import Any

from argosy.v1 import finetune_pb2
from argosy.v1 import model_pb2 as pb
from argosy_internal.training.v1.training_pb2 import AdapterManifest
from services.chassis.lists import etag
from services.finetune import lineage
from services.finetune.bases import Base
from services.finetune.queries import Record
from services.finetune.servicers.dataset_messages import failure
from services.finetune.servicers.resources import timestamp

_TUNED = (pb.MODEL_CAPABILITY_CLASSIFY_TUNED, pb.MODEL_CAPABILITY_EXPLAIN)
_WRITES = (
    pb.MODEL_CAPABILITY_GENERATE, pb.MODEL_CAPABILITY_CHAT_TEMPLATE, pb.MODEL_CAPABILITY_CLASSIFY_ZERO_SHOT,
    pb.MODEL_CAPABILITY_EXPLAIN, pb.MODEL_CAPABILITY_LOGPROBS, pb.MODEL_CAPABILITY_PROMPT_LOGPROBS, pb.MODEL_CAPABILITY_LOGIT_BIAS,
    pb.MODEL_CAPABILITY_SEED,
)  # fmt: skip
_ERROR_BEFORE, _ERROR_AFTER = "calibration_error_before", "calibration_error"  # names of the trainer's metrics
_UNITS = {"ACCURACY": "accuracy", "LOSS": "loss"}
FORCED, ROLLED_BACK = "FORCED", "ROLLED_BACK"


def capabilities(manifest: AdapterManifest) -> Iterable[Any]:
    """What a version is for. What its base cannot do here, the gateway takes away."""
    return _TUNED if manifest.labels else _WRITES


def model_name(row: Record) -> str:
    """A model's resource name."""
    return f"projects/{row['project']}/models/{row['name']}"


def model(row: Record, default: Record | None, base: Base | None = None) -> pb.Model:
    """An own model; `default` is the version that its plain name means, `base` what it builds on, if it has been read."""
    shown = pb.Model(
        name=model_name(row),
        uid=row["uid"],
        display_name=row["display_name"],
        labels=row["labels"],
        etag=etag(row["uid"], row["revision"]),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
        base_model=row["base_model"],
    )
    if base is not None:
        shown.base_digest, shown.context_tokens = base.digest, base.context
    if default is not None:
        manifest = lineage.from_json(default["manifest"])
        shown.base_digest = default["base_digest"]
        shown.capabilities.extend(capabilities(manifest))
        shown.tuned_labels.extend(manifest.labels)
        shown.default_version = f"{shown.name}/versions/{default['number']}"
    return shown


def version(row: Record, of: Record, *, whole: bool = False) -> pb.ModelVersion:
    """A version of the model `of`; `whole`: with its signed manifest."""
    manifest = lineage.from_json(row["manifest"])
    shown = pb.ModelVersion(
        name=f"{model_name(of)}/versions/{row['number']}",
        uid=row["uid"],
        etag=etag(row["uid"], row["revision"]),
        state=pb.ModelVersion.State.Value(f"STATE_{row['state']}"),
        error=failure(row["failure"]),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
        base_model=of["base_model"],
        base_digest=row["base_digest"],
        adapter_digest=row["adapter_digest"],
        total_bytes=row["size_bytes"],
        servable_time=timestamp(row["servable_time"]),
        lineage=_lineage(row, of, manifest),
    )
    if row["state"] == "READY":
        shown.rendering_digest = manifest.template_hash
        shown.method = manifest.method
        shown.capabilities.extend(capabilities(manifest))
        shown.tuned_labels.extend(manifest.labels)
        shown.metrics.update(manifest.metrics)
        if _ERROR_AFTER in manifest.metrics:
            shown.calibration.CopyFrom(
                pb.CalibrationReport(
                    temperature=manifest.temperature,
                    error_before=manifest.metrics[_ERROR_BEFORE],
                    error_after=manifest.metrics[_ERROR_AFTER],
                )
            )
        if manifest.HasField("privacy"):
            said = manifest.privacy
            shown.privacy.CopyFrom(
                pb.PrivacyStatement(
                    epsilon=said.epsilon,
                    delta=said.delta,
                    unit=said.unit or finetune_pb2.PRIVACY_UNIT_EXAMPLE,
                    accountant=said.accountant,
                )
            )
    if whole and row["envelope"] is not None:
        shown.signed_manifest = bytes(row["envelope"]).decode()
    return shown


def _lineage(row: Record, of: Record, manifest: AdapterManifest) -> pb.Lineage:
    job = f"projects/{of['project']}/fineTuneJobs/{row['job_uid']}" if row["job_uid"] is not None else ""
    return pb.Lineage(
        fine_tune_job=job,
        checkpoint=f"{job}/checkpoints/{row['step']}" if row["source"] == "CHECKPOINT" else "",
        train_versions=[each.dataset_version for each in manifest.datasets if each.use == "train"],
        validation_versions=[each.dataset_version for each in manifest.datasets if each.use != "train"],
        imported=row["source"] == "IMPORT",
        seed=manifest.seed,
        step=manifest.step,
        hyperparameters=manifest.hyperparameters,
    )


def targets(row: Record, of: Record) -> list[pb.AliasTarget]:
    """What an alias or one of its moves points to, the stable version first."""
    name = f"{model_name(of)}/versions/"
    if row["split"] is None:
        return [pb.AliasTarget(version=f"{name}{row['target']}", percent=100)]
    return [
        pb.AliasTarget(version=f"{name}{row['target']}", percent=100 - row["split_percent"]),
        pb.AliasTarget(version=f"{name}{row['split']}", percent=row["split_percent"]),
    ]


def alias(row: Record, of: Record, moves: Iterable[Record]) -> pb.ModelAlias:
    """An alias of the model `of`, with its history."""
    name = model_name(of)
    return pb.ModelAlias(
        name=f"{name}/aliases/{row['name']}",
        uid=row["uid"],
        etag=etag(row["uid"], row["revision"]),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
        targets=targets(row, of),
        history=[
            pb.AliasMove(
                time=timestamp(move["create_time"]),
                targets=targets(move, of),
                evaluation=f"{name}/evaluations/{move['evaluation_uid']}" if move["evaluation_uid"] is not None else "",
                forced=move["kind"] == FORCED,
                rolled_back=move["kind"] == ROLLED_BACK,
                api_key=f"projects/{of['project']}/apiKeys/{move['actor_key_id']}" if move["actor_key_id"] else "",
            )
            for move in moves
        ],
    )


def evaluation(row: Record, of: Record) -> pb.Evaluation:
    """An evaluation of the model `of`."""
    name = model_name(of)
    opponents = {"base": of["base_model"]}
    if row["current"] is not None:
        opponents["current"] = f"{name}/versions/{row['current']}"
    shown = pb.Evaluation(
        name=f"{name}/evaluations/{row['uid']}",
        uid=row["uid"],
        etag=etag(row["uid"], row["revision"]),
        state=pb.Evaluation.State.Value(f"STATE_{row['state']}"),
        error=failure(row["failure"]),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
        start_time=timestamp(row["start_time"]),
        end_time=timestamp(row["end_time"]),
        candidate=f"{name}/versions/{row['candidate']}",
        dataset_version=row["dataset_version"],
        alias=row["alias"],
        margin=row["margin"],
        max_rows=row["max_rows"],
        target=opponents.get("current", ""),
        measured_rows=row["measured_rows"],
        signed_verdict=bytes(row["envelope"]).decode() if row["envelope"] is not None else "",
        near_rows=(row["verdict"] or {}).get("near_rows", 0),
    )
    comparisons = (row["verdict"] or {}).get("comparisons", [])
    metric = _UNITS[row["metric"]]
    for each in comparisons[:1]:
        shown.scores.append(pb.EvaluationScore(model=shown.candidate, metric=metric, value=each["candidate"], rows=each["rows"]))
    for each in comparisons:
        against = opponents[each["opponent"]]
        shown.scores.append(pb.EvaluationScore(model=against, metric=metric, value=each["other"], rows=each["rows"]))
        shown.comparisons.append(
            pb.EvaluationComparison(
                against=against, metric=metric, gain=each["difference"], gain_low=each["lower_bound"],
                p_value=each["p_value"], test=each["test"].lower(), passed=each["beats"],
            )
        )  # fmt: skip
    return shown
