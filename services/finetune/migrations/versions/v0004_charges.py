"""What jobs and evaluations owe, told to the gateways' books; and jobs that are erased while an attempt lives."""

from alembic import op

revision = "f0004"
down_revision = "f0003"
branch_labels = None
depends_on = None

STATEMENTS: tuple[str, ...] = (
    # One row: whoever raises it holds its lock to the end, so commit order is sequence order and a cursor misses nothing. `settled` is the
    # highest cursor that a gateway has come back with: what it has passed is in the books.
    """
    CREATE TABLE charge_counter (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        last bigint NOT NULL,
        settled bigint NOT NULL DEFAULT 0
    )
    """,
    """
    CREATE TABLE charges (
        sequence bigint PRIMARY KEY,
        project_uid uuid NOT NULL,
        project text NOT NULL,
        key_id text NOT NULL,
        work_uid uuid NOT NULL,
        number integer NOT NULL CHECK (number >= 1),
        kind text NOT NULL CHECK (kind IN ('TRAINING', 'EVALUATION')),
        model text NOT NULL,
        version text NOT NULL,
        currency text NOT NULL,
        nanos bigint NOT NULL CHECK (nanos >= 0),
        device_seconds double precision NOT NULL CHECK (device_seconds >= 0),
        outcome text NOT NULL CHECK (outcome IN ('', 'DONE', 'CANCELLED', 'DEADLINE', 'FAILED')),
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        UNIQUE (work_uid, number)
    )
    """,
    # A work ends once, whatever any code above believes.
    "CREATE UNIQUE INDEX charges_end ON charges (work_uid) WHERE outcome <> ''",
    """
    CREATE FUNCTION notify_charges() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_notify('argosy_charges', NEW.sequence::text);
        RETURN NULL;
    END $$
    """,
    "CREATE TRIGGER charges_notify AFTER INSERT ON charges FOR EACH ROW EXECUTE FUNCTION notify_charges()",
    "ALTER TABLE jobs ADD COLUMN charges integer NOT NULL DEFAULT 0",
    "ALTER TABLE jobs ADD COLUMN charged_seconds double precision NOT NULL DEFAULT 0",
    "ALTER TABLE jobs ADD COLUMN charged_nanos bigint NOT NULL DEFAULT 0",
    # A process of ours verifies or copies this job's result until then, or has died.
    "ALTER TABLE jobs ADD COLUMN ending_time timestamptz",
    "ALTER TABLE model_evaluations ADD COLUMN key_id text NOT NULL DEFAULT ''",
    # An erased job is looked at, too, until nothing of its attempt is left.
    "DROP INDEX jobs_due",
    """
    CREATE INDEX jobs_due ON jobs (due_time)
    WHERE (delete_time IS NULL AND state NOT IN ('CANCELLED', 'SUCCEEDED', 'FAILED')) OR NOT reaped
    """,
)


def upgrade() -> None:
    """One statement a call, since the driver prepares each."""
    for statement in STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """A version is not taken back."""
    raise NotImplementedError("restore a backup instead")
