"""What is asked of each model through each gateway, so that any gateway knows all of it; and how long models take to wake."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = (
    # Unlogged: written once a second, and worth nothing after a crash.
    """
    CREATE UNLOGGED TABLE model_demands (
        gateway_uid uuid NOT NULL,
        model text NOT NULL,
        queued bigint NOT NULL CHECK (queued >= 0),
        running bigint NOT NULL CHECK (running >= 0),
        kv_percent bigint NOT NULL CHECK (kv_percent >= 0),
        beat_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (gateway_uid, model)
    )
    """,
    """
    CREATE TABLE model_loads (
        model text PRIMARY KEY,
        load_millis bigint NOT NULL CHECK (load_millis >= 0),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
)


def upgrade() -> None:
    """One statement a call, since the driver prepares each."""
    for statement in TABLES:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """Nothing in them is missed."""
    for table in ("model_demands", "model_loads"):
        op.get_bind().exec_driver_sql(f"DROP TABLE {table}")
