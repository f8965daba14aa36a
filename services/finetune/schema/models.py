"""Models, versions, aliases, evaluations, and what gateways are told of them."""

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKeyConstraint, Integer, LargeBinary, Table, Text
from sqlalchemy.dialects.postgresql import JSONB

from services.finetune.schema.columns import METADATA, TIME, UUID

models = Table(
    "models",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("uid", UUID, primary_key=True),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("next_version", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("update_time", TIME, nullable=False),
    Column("delete_time", TIME),
)

model_versions = Table(
    "model_versions",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("model_uid", UUID, primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("uid", UUID, nullable=False),
    Column("state", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("base_digest", Text, nullable=False),
    Column("adapter_digest", Text, nullable=False),
    Column("manifest", JSONB, nullable=False),
    Column("envelope", LargeBinary),
    Column("size_bytes", BigInteger, nullable=False),
    Column("job_uid", UUID),
    Column("step", BigInteger),
    Column("failure", JSONB(none_as_null=True)),
    Column("revision", BigInteger, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("update_time", TIME, nullable=False),
    Column("ready_time", TIME),
    Column("servable_time", TIME),
    Column("servable_seconds", Float),
    Column("delete_time", TIME),
    ForeignKeyConstraint(["project_uid", "model_uid"], ["models.project_uid", "models.uid"]),
)


def _version(column: str) -> ForeignKeyConstraint:
    whole = [f"model_versions.{name}" for name in ("project_uid", "model_uid", "number")]
    return ForeignKeyConstraint(["project_uid", "model_uid", column], whole)


model_aliases = Table(
    "model_aliases",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("model_uid", UUID, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("uid", UUID, nullable=False),
    Column("target", BigInteger, nullable=False),
    Column("split", BigInteger),
    Column("split_percent", Integer),
    Column("moves", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("update_time", TIME, nullable=False),
    _version("target"),
    _version("split"),
)

alias_moves = Table(
    "alias_moves",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("model_uid", UUID, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("target", BigInteger, nullable=False),
    Column("split", BigInteger),
    Column("split_percent", Integer),
    Column("evaluation_uid", UUID),
    Column("actor_key_id", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("create_time", TIME, nullable=False),
    ForeignKeyConstraint(["project_uid", "model_uid"], ["models.project_uid", "models.uid"]),
)

model_evaluations = Table(
    "model_evaluations",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("uid", UUID, primary_key=True),
    Column("model_uid", UUID, nullable=False),
    Column("candidate", BigInteger, nullable=False),
    Column("current", BigInteger),
    Column("alias", Text, nullable=False),
    Column("dataset_version", Text, nullable=False),
    Column("dataset_version_uid", UUID, nullable=False),
    Column("dataset_digest", Text, nullable=False),
    Column("metric", Text, nullable=False),
    Column("max_rows", BigInteger),
    Column("measured_rows", BigInteger, nullable=False),
    Column("margin", Float, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("lease_time", TIME),
    Column("verdict", JSONB(none_as_null=True)),
    Column("envelope", LargeBinary),
    Column("failure", JSONB(none_as_null=True)),
    Column("revision", BigInteger, nullable=False),
    Column("create_time", TIME, nullable=False),
    Column("update_time", TIME, nullable=False),
    Column("start_time", TIME),
    Column("end_time", TIME),
    Column("key_id", Text, nullable=False),
    _version("candidate"),
    _version("current"),
)

registry_counter = Table(
    "registry_counter",
    METADATA,
    Column("one", Boolean, primary_key=True),
    Column("last", BigInteger, nullable=False),
)

registry_events = Table(
    "registry_events",
    METADATA,
    Column("sequence", BigInteger, primary_key=True),
    Column("project_uid", UUID, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body", JSONB, nullable=False),
    Column("create_time", TIME, nullable=False),
)

servable_reports = Table(
    "servable_reports",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("model_uid", UUID, primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("gateway", Text, primary_key=True),
    Column("replicas", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("create_time", TIME, nullable=False),
    _version("number"),
)
