"""What private jobs have promised of which rows; what they spent of it is in their own rows."""

from sqlalchemy import Column, Float, Table, Text

from services.finetune.schema.columns import METADATA, TIME, UUID

privacy_ledger = Table(
    "privacy_ledger",
    METADATA,
    Column("project_uid", UUID, primary_key=True),
    Column("job_uid", UUID, primary_key=True),
    Column("dataset_uid", UUID, nullable=False),
    Column("digest", Text, nullable=False),
    Column("epsilon", Float, nullable=False),
    Column("delta", Float, nullable=False),
    Column("create_time", TIME, nullable=False),
)
