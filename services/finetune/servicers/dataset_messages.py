"""Datasets, versions, uploads and erasures as their messages."""

from collections.abc import Mapping
from typing import Any, get_args

from argosy.v1 import dataset_pb2 as pb
from argosy.v1 import deletion_pb2, error_pb2
from services.chassis import lists
from services.chassis.errors import REASONS, FieldInvalid, UnsupportedFormat
from services.finetune.dataset_store import layout_of
from services.finetune.datasets import check_layout
from services.finetune.queries import Record
from services.finetune.rows import Format, Layout
from services.finetune.servicers.resources import timestamp
from services.finetune.uploads import Breach

FORMATS: Mapping[pb.DatasetFormat.ValueType, Format] = {
    pb.DatasetFormat.Value(f"DATASET_FORMAT_{name.upper()}"): name for name in get_args(Format)
}
SEVERITIES: Mapping[pb.RowSeverity.ValueType, str] = {pb.ROW_SEVERITY_ERROR: "error", pb.ROW_SEVERITY_WARNING: "warning"}
_FORMAT_OF = {name: number for number, name in FORMATS.items()}
_SEVERITY_OF = {name: number for number, name in SEVERITIES.items()}
NAMES = 1_000  # of what was erased, and of labels, that one message tells


def layout_from(asked: pb.Dataset, known: Format | None = None) -> Layout:
    """The layout of a dataset as asked; `known`: its format, which cannot change.

    Raises:
        FieldInvalid: no format, another one, or a layout that no row could follow.
    """
    if asked.format not in FORMATS and (asked.format or known is None):
        raise FieldInvalid("dataset.format", "missing")
    form = FORMATS[asked.format] if asked.format else known
    assert form is not None
    if known is not None and form != known:
        raise FieldInvalid("dataset.format", "immutable")
    given = asked.layout
    layout = Layout(
        form,
        "csv" if given.encoding == pb.DATASET_ENCODING_CSV else "jsonl",
        tuple(given.text_columns),
        given.label_column,
        given.delimiter or ",",
        given.header if given.HasField("header") else True,
    )
    check_layout(layout)
    return layout


def row_layout(layout: Layout) -> pb.RowLayout:
    """A layout as its message."""
    csv = layout.encoding == "csv"
    return pb.RowLayout(
        encoding=pb.DATASET_ENCODING_CSV if csv else pb.DATASET_ENCODING_JSONL,
        text_columns=layout.text_columns,
        label_column=layout.label_column,
        delimiter=layout.delimiter if csv else "",
        header=layout.header if csv else None,
    )


def dataset(row: Record, project: str, latest: int | None = None) -> pb.Dataset:
    """A dataset; `latest` is the number of its newest READY version."""
    name = f"projects/{project}/datasets/{row['name']}"
    layout = layout_of(row)
    shown = pb.Dataset(
        name=name,
        uid=row["uid"],
        display_name=row["display_name"],
        labels=row["labels"],
        etag=lists.etag(row["uid"], row["revision"]),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
        format=_FORMAT_OF[layout.format],
        layout=row_layout(layout),
        latest_version="" if latest is None else f"{name}/versions/{latest}",
    )
    if row["retention_seconds"] is not None:
        shown.retention.seconds = row["retention_seconds"]
    return shown


def failure(kept: Mapping[str, Any] | None) -> error_pb2.Failure | None:
    """A stored failure with its reason's sentence."""
    if kept is None:
        return None
    reason = kept["reason"]
    return error_pb2.Failure(
        reason=error_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}"), message=REASONS[reason].sentence, metadata=kept["metadata"]
    )


def refused(breach: Breach) -> UnsupportedFormat:
    """A breach as the caller sees it."""
    return UnsupportedFormat(breach.rule, breach.line, breach.byte_offset)


def upload(row: Record, above: str, version_name: str = "") -> pb.Upload:
    """An upload of the dataset `above`."""
    late = row["state"] == "OPEN" and row.get("late")
    shown = pb.Upload(
        name=f"{above}/uploads/{row['uid']}",
        uid=row["uid"],
        state=pb.Upload.State.Value("STATE_EXPIRED" if late else f"STATE_{row['state']}"),
        error=failure(row["failure"]),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
        expire_time=timestamp(row["expire_time"]),
        sha256=row["sha256"],
        persisted_bytes=row["persisted_bytes"],
        writer_epoch=row["writer_epoch"],
        dataset_version=version_name,
    )
    if row["total_bytes"] is not None:
        shown.total_bytes = row["total_bytes"]
    return shown


def version(row: Record, above: str, names: Mapping[str, str]) -> pb.DatasetVersion:
    """A version of the dataset `above`; `names` are of the versions it came from or led to."""
    layout = layout_of(row)
    return pb.DatasetVersion(
        name=f"{above}/versions/{row['number']}",
        uid=row["uid"],
        etag=lists.etag(row["uid"], row["revision"]),
        state=pb.DatasetVersion.State.Value(f"STATE_{row['state']}"),
        error=failure(row["failure"]),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
        end_time=timestamp(row["end_time"]),
        expire_time=timestamp(row["expire_time"]),
        sha256=row["sha256"],
        total_bytes=row["total_bytes"],
        validated_bytes=min(row["validated_bytes"], row["total_bytes"]),
        format=_FORMAT_OF[layout.format],
        layout=row_layout(layout),
        report=_report(row["report"]) if row["report"] else None,
        source_version=names.get(row["source_uid"], ""),
        derived_version=names.get(row["derived_uid"], ""),
        skipped_lines=row["skipped_lines"],
        skipped_rows=row["skipped_rows"],
    )


def _report(kept: Mapping[str, Any]) -> pb.ValidationReport:
    summary = kept["summary"]
    labels = sorted(summary["labels"].items(), key=lambda each: (-each[1], each[0]))
    return pb.ValidationReport(
        rows=kept["rows"],
        valid_rows=kept["valid_rows"],
        errors=kept["errors"],
        warnings=kept["warnings"],
        rules=[
            pb.RuleCount(rule=rule["rule"], severity=_SEVERITY_OF[rule["severity"]], count=rule["count"], first_line=rule["first_line"])
            for rule in kept["rules"]
        ],
        labels=[pb.LabelCount(label=label, rows=rows) for label, rows in labels],
        tokens=[pb.TokenCount(**each) for each in summary["tokens"]],
        pii=[pb.PiiCount(kind=kind, count=count, rows=rows) for kind, (count, rows) in summary["pii"].items()],
        duplicate_rows=summary["duplicate_rows"],
        near_duplicate_rows=summary["near_duplicate_rows"],
        contradictions=summary["contradictions"],
        complete=kept["errors"] + kept["warnings"] <= NAMES,
    )


def row_error(row: Record) -> pb.RowError:
    """One finding."""
    return pb.RowError(
        line=row["line"], byte_offset=row["byte_offset"], field=row["field"], rule=row["rule"], severity=_SEVERITY_OF[row["severity"]]
    )


def deletion(row: Record, project: str) -> deletion_pb2.Deletion:
    """One erasure."""
    return deletion_pb2.Deletion(
        name=f"projects/{project}/deletions/{row['uid']}",
        uid=row["uid"],
        state=deletion_pb2.Deletion.State.Value(f"STATE_{row['state']}"),
        create_time=timestamp(row["create_time"]),
        end_time=timestamp(row["end_time"]),
        target=row["target"],
        certificate=row["certificate"],
        erased=row["erased"][:NAMES],
    )
