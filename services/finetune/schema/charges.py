"""What is owed, in the order in which the gateways' books are told."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Integer, Table, Text

from services.finetune.schema.columns import METADATA, TIME, UUID

charges = Table(
    "charges",
    METADATA,
    Column("sequence", BigInteger, primary_key=True),
    Column("project_uid", UUID, nullable=False),
    Column("project", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("work_uid", UUID, nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("nanos", BigInteger, nullable=False),
    Column("device_seconds", Float, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("create_time", TIME, nullable=False),
)

charge_counter = Table(
    "charge_counter",
    METADATA,
    Column("one", Boolean, primary_key=True),
    Column("last", BigInteger, nullable=False),
    Column("settled", BigInteger, nullable=False),
)
