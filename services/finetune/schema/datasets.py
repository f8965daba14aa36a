"""Datasets, their versions and uploads; erasures; and what every service of this process shares: replays and the audit."""

from sqlalchemy import BigInteger, Boolean, Column, Integer, LargeBinary, Table, Text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from services.finetune.schema.columns import METADATA, TIME, UUID

datasets = Table(
    "datasets",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("uid", UUID, primary_key=True),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("layout", JSONB, nullable=False),
    Column("retention_seconds", BigInteger),
    Column("state", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("next_version", BigInteger, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("update_time", TIME, nullable=False),
    Column("delete_time", TIME),
)

dataset_versions = Table(
    "dataset_versions",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("uid", UUID, primary_key=True),
    Column("dataset_uid", UUID, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("layout", JSONB, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("total_bytes", BigInteger, nullable=False),
    Column("validated_bytes", BigInteger, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("report", JSONB, nullable=False),
    Column("failure", JSONB),
    Column("skip_errors", Boolean, nullable=False),
    Column("upload_uid", UUID),
    Column("source_uid", UUID),
    Column("derived_uid", UUID),
    Column("redacted", ARRAY(Text), nullable=False),
    Column("skipped_lines", ARRAY(BigInteger), nullable=False),
    Column("skipped_rows", BigInteger, nullable=False),
    Column("claim_uid", UUID),
    Column("claim_time", TIME),
    Column("attempts", Integer, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("update_time", TIME, nullable=False),
    Column("end_time", TIME),
    Column("expire_time", TIME),
    Column("delete_time", TIME),
)

row_errors = Table(
    "row_errors",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("version_uid", UUID, primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("line", BigInteger, nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("field", Text, nullable=False),
    Column("rule", Text, nullable=False),
    Column("severity", Text, nullable=False),
)

uploads = Table(
    "uploads",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("uid", UUID, primary_key=True),
    Column("dataset_uid", UUID, nullable=False),
    Column("state", Text, nullable=False),
    Column("total_bytes", BigInteger),
    Column("sha256", Text, nullable=False),
    Column("persisted_bytes", BigInteger, nullable=False),
    Column("writer_epoch", BigInteger, nullable=False),
    Column("scan", JSONB, nullable=False),
    Column("failure", JSONB),
    Column("version_uid", UUID),
    Column("cleared", Boolean, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("update_time", TIME, nullable=False),
    Column("expire_time", TIME, nullable=False),
)

upload_parts = Table(
    "upload_parts",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("upload_uid", UUID, primary_key=True),
    Column("start", BigInteger, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
)

deletions = Table(
    "deletions",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("uid", UUID, primary_key=True),
    Column("target", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("erased", ARRAY(Text), nullable=False),
    Column("prefixes", ARRAY(Text), nullable=False),
    Column("digests", JSONB, nullable=False),
    Column("certificate", Text, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("end_time", TIME),
)

request_replays = Table(
    "request_replays",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("method", Text, primary_key=True),
    Column("request_id", UUID, primary_key=True),
    Column("body_digest", LargeBinary, nullable=False),
    Column("reply", LargeBinary, nullable=False),
    Column("create_time", TIME, nullable=False),
)

audit_events = Table(
    "audit_events",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("uid", UUID, primary_key=True),
    Column("actor_key", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("resource", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("create_time", TIME, nullable=False),
)
