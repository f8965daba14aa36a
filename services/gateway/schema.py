"""The tables as SQLAlchemy sees them; `migrations/` makes them, and a test holds the two together.

Hot-path tables (`quota_counters`, `reservations`, `job_counters`, and writes to `ledger`) are touched by the database's own functions
`reserve`, `settle` and `charge` alone.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    ForeignKey,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

METADATA = MetaData()

_uuid = Uuid(as_uuid=False)
_time = DateTime(timezone=True)

projects = Table(
    "projects",
    METADATA,
    Column("uid", _uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("state", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("kv_secret", LargeBinary, nullable=False),
    Column("create_time", _time, nullable=False),
    Column("update_time", _time, nullable=False),
    Column("delete_time", _time),
)

api_keys = Table(
    "api_keys",
    METADATA,
    Column("project_uid", _uuid, ForeignKey("projects.uid"), primary_key=True),
    Column("uid", _uuid, primary_key=True, unique=True),
    Column("display_name", Text, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("state", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("mac", LargeBinary, nullable=False),
    Column("previous_mac", LargeBinary),
    Column("previous_expire_time", _time),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("models", ARRAY(Text), nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent_requests", BigInteger),
    Column("output_token_ceiling", BigInteger),
    Column("nanos_per_day", BigInteger),
    Column("minter_uid", _uuid),
    Column("create_time", _time, nullable=False),
    Column("update_time", _time, nullable=False),
    Column("expire_time", _time),
    Column("delete_time", _time),
    Column("last_use_time", _time),
)

quota_policies = Table(
    "quota_policies",
    METADATA,
    Column("project_uid", _uuid, ForeignKey("projects.uid"), primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("requests_per_day", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("tokens_per_day", BigInteger),
    Column("concurrent_streams", BigInteger),
    Column("output_token_ceiling", BigInteger),
    Column("concurrent_jobs", BigInteger),
    Column("gpu_seconds_per_day", BigInteger),
    Column("stored_bytes", BigInteger),
    Column("nanos_per_day", BigInteger),
    Column("update_time", _time, nullable=False),
)

quota_counters = Table(
    "quota_counters",
    METADATA,
    Column("project_uid", _uuid, ForeignKey("projects.uid"), primary_key=True),
    Column("key_uid", _uuid, primary_key=True),  # all zero: the project's own row
    Column("minute", _time, nullable=False),
    Column("minute_requests", BigInteger, nullable=False),
    Column("minute_tokens", BigInteger, nullable=False),
    Column("day", _time, nullable=False),
    Column("day_requests", BigInteger, nullable=False),
    Column("day_tokens", BigInteger, nullable=False),
    Column("day_nanos", BigInteger, nullable=False),
    Column("running", BigInteger, nullable=False),
    Column("entries", BigInteger, nullable=False),
)

reservations = Table(
    "reservations",
    METADATA,
    Column("project_uid", _uuid, primary_key=True),
    Column("generation_id", _uuid, primary_key=True),
    Column("request_id", _uuid),
    Column("key_uid", _uuid, nullable=False),
    Column("method", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("body_digest", LargeBinary, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("nanos", BigInteger, nullable=False),
    Column("minute", _time, nullable=False),
    Column("day", _time, nullable=False),
    Column("owner", _uuid, nullable=False),
    Column("create_time", _time, nullable=False),
)

ledger = Table(
    "ledger",
    METADATA,
    Column("project_uid", _uuid, primary_key=True),
    Column("generation_id", _uuid, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("entry", BigInteger, nullable=False),
    Column("request_id", _uuid),
    Column("key_uid", _uuid, nullable=False),
    Column("method", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("body_digest", LargeBinary, nullable=False),
    Column("outcome", Text),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("passes", BigInteger, nullable=False),
    Column("nanos", BigInteger, nullable=False),
    Column("served_by", Text, nullable=False),
    Column("create_time", _time, nullable=False),
    Column("device_millis", BigInteger, nullable=False),  # of jobs and evaluations
)

feed_cursors = Table(
    "feed_cursors",
    METADATA,
    Column("feed", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
)

job_counters = Table(
    "job_counters",
    METADATA,
    Column("project_uid", _uuid, ForeignKey("projects.uid"), primary_key=True),
    Column("day", _time, nullable=False),
    Column("device_millis", BigInteger, nullable=False),
)

gateways = Table(
    "gateways",
    METADATA,
    Column("uid", _uuid, primary_key=True),
    Column("beat_time", _time, nullable=False),
)

model_demands = Table(
    "model_demands",
    METADATA,
    Column("gateway_uid", _uuid, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("queued", BigInteger, nullable=False),
    Column("running", BigInteger, nullable=False),
    Column("kv_percent", BigInteger, nullable=False),
    Column("beat_time", _time, nullable=False),
)

model_loads = Table(
    "model_loads",
    METADATA,
    Column("model", Text, primary_key=True),
    Column("load_millis", BigInteger, nullable=False),
    Column("update_time", _time, nullable=False),
)

request_replays = Table(
    "request_replays",
    METADATA,
    Column("project_uid", _uuid, primary_key=True),
    Column("method", Text, primary_key=True),
    Column("request_id", _uuid, primary_key=True),
    Column("body_digest", LargeBinary, nullable=False),
    Column("reply", LargeBinary, nullable=False),
    Column("create_time", _time, nullable=False),
)

audit_events = Table(
    "audit_events",
    METADATA,
    Column("project_uid", _uuid, primary_key=True),
    Column("uid", _uuid, primary_key=True),
    Column("actor_project_uid", _uuid, nullable=False),
    Column("actor_key_uid", _uuid, nullable=False),
    Column("method", Text, nullable=False),
    Column("resource", Text, nullable=False),
    Column("request_id", _uuid),
    Column("create_time", _time, nullable=False),
)
