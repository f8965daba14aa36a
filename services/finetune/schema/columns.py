"""What every table here shares. The schema is PostgreSQL's `finetune`, by the connection's search path."""

from sqlalchemy import DateTime, MetaData, Uuid

METADATA = MetaData()
UUID = Uuid(as_uuid=False)  # as text, lower case
TIME = DateTime(timezone=True)
