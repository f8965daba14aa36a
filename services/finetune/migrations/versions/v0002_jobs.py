"""Jobs, their events and checkpoints, and what training was measured to take."""

from alembic import op

revision = "f0002"
down_revision = "f0001"
branch_labels = None
depends_on = None

TABLES: tuple[str, ...] = (
    """
    CREATE TABLE jobs (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL UNIQUE,
        project text NOT NULL,
        key_id text NOT NULL,
        display_name text NOT NULL DEFAULT '',
        labels jsonb NOT NULL DEFAULT '{}',
        revision bigint NOT NULL DEFAULT 1,
        state text NOT NULL DEFAULT 'QUEUED' CHECK (state IN ('QUEUED', 'PREPARING', 'RUNNING', 'PAUSING', 'PAUSED', 'CANCELLING',
            'CANCELLED', 'SUCCEEDED', 'FAILED')),
        reason text NOT NULL DEFAULT '',
        failure jsonb,
        spec bytea NOT NULL,
        resolved_spec bytea NOT NULL,
        spec_digest text NOT NULL,
        quote bytea NOT NULL,
        model text NOT NULL,
        base_model text NOT NULL,
        train_uid uuid NOT NULL,
        validation_uid uuid,
        train_tokens bigint NOT NULL DEFAULT 0,
        priority smallint NOT NULL DEFAULT 2 CHECK (priority BETWEEN 1 AND 3),
        currency text NOT NULL,
        nanos_per_second bigint NOT NULL,
        max_nanos bigint CHECK (max_nanos >= 0),
        deadline timestamptz,
        expire_time timestamptz,
        -- The attempt. Its token is derived from the salt, so a lost reply of the launcher finds the same token again.
        attempt integer NOT NULL DEFAULT 0,
        salt bytea NOT NULL DEFAULT '',
        fence bigint NOT NULL DEFAULT 0,
        nonce text NOT NULL DEFAULT '',
        report bigint NOT NULL DEFAULT 0,
        lease_time timestamptz,
        launch_time timestamptz,
        reaped boolean NOT NULL DEFAULT true,
        barren integer NOT NULL DEFAULT 0,
        attempt_step bigint NOT NULL DEFAULT 0,
        attempt_seconds double precision NOT NULL DEFAULT 0,
        -- The work.
        phase text NOT NULL DEFAULT '',
        step bigint NOT NULL DEFAULT 0,
        target_step bigint NOT NULL DEFAULT 0,
        epoch double precision NOT NULL DEFAULT 0,
        tokens bigint NOT NULL DEFAULT 0,
        tokens_per_second double precision NOT NULL DEFAULT 0,
        estimated_end_time timestamptz,
        device_seconds double precision NOT NULL DEFAULT 0,
        epsilon double precision NOT NULL DEFAULT 0,
        best double precision,
        last_sequence bigint NOT NULL DEFAULT 0,
        kept_events bigint NOT NULL DEFAULT 0,
        progress_time timestamptz,
        model_version text NOT NULL DEFAULT '',
        servable_time timestamptz,
        -- The reconciler that owns it. Every write of its compares the epoch.
        owner text NOT NULL DEFAULT '',
        owner_epoch bigint NOT NULL DEFAULT 0,
        owner_time timestamptz,
        due_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        start_time timestamptz,
        end_time timestamptz,
        delete_time timestamptz,
        PRIMARY KEY (project_uid, uid)
    )
    """,
    # What the reconciler looks for: everything not at rest, and what rests but still has an attempt to clear away.
    """
    CREATE INDEX jobs_due ON jobs (due_time)
    WHERE delete_time IS NULL AND (state NOT IN ('CANCELLED', 'SUCCEEDED', 'FAILED') OR NOT reaped)
    """,
    "CREATE INDEX jobs_of_project ON jobs (project_uid, create_time)",
    "CREATE INDEX jobs_of_train ON jobs (project_uid, train_uid)",
    "CREATE INDEX jobs_of_model ON jobs (project_uid, model)",
    """
    CREATE TABLE job_events (
        project_uid uuid NOT NULL,
        job_uid uuid NOT NULL,
        sequence bigint NOT NULL,
        kind text NOT NULL,
        body bytea NOT NULL,
        PRIMARY KEY (job_uid, sequence)
    )
    """,
    """
    CREATE TABLE checkpoints (
        project_uid uuid NOT NULL,
        job_uid uuid NOT NULL,
        step bigint NOT NULL,
        fence bigint NOT NULL,
        uid uuid NOT NULL,
        prefix text NOT NULL,
        manifest_digest text NOT NULL,
        total_bytes bigint NOT NULL,
        metrics jsonb NOT NULL DEFAULT '{}',
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        expire_time timestamptz,
        PRIMARY KEY (job_uid, step)
    )
    """,
    # Tokens a second and bytes at the peak, by base, method and device: what the next quote is made of.
    """
    CREATE TABLE training_rates (
        base_model text NOT NULL,
        method text NOT NULL,
        device text NOT NULL,
        tokens_per_second double precision NOT NULL,
        seconds double precision NOT NULL,
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (base_model, method, device)
    )
    """,
)


def upgrade() -> None:
    """One statement a call, since the driver prepares each."""
    for statement in TABLES:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """A version is not taken back."""
    raise NotImplementedError("restore a backup instead")
