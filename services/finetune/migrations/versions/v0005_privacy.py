"""What private jobs have promised of a dataset's rows, over all of them."""

from alembic import op

revision = "f0005"
down_revision = "f0004"
branch_labels = None
depends_on = None

STATEMENTS: tuple[str, ...] = (
    # No foreign key to datasets or versions: what was spent stays spent when they are erased.
    """
    CREATE TABLE privacy_ledger (
        project_uid uuid NOT NULL,
        job_uid uuid NOT NULL,
        dataset_uid uuid NOT NULL,
        digest text NOT NULL,
        epsilon double precision NOT NULL CHECK (epsilon > 0),
        delta double precision NOT NULL CHECK (delta >= 0 AND delta < 1),
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (project_uid, job_uid)
    )
    """,
    "CREATE INDEX privacy_ledger_dataset ON privacy_ledger (project_uid, dataset_uid)",
    "CREATE INDEX privacy_ledger_digest ON privacy_ledger (project_uid, digest)",
    # Jobs from before: what they were charged; their deltas stand in their specs alone.
    """
    INSERT INTO privacy_ledger (project_uid, job_uid, dataset_uid, digest, epsilon, delta)
    SELECT j.project_uid, j.uid, v.dataset_uid, v.sha256, j.epsilon, 0
    FROM jobs j JOIN dataset_versions v ON v.project_uid = j.project_uid AND v.uid = j.train_uid
    WHERE j.epsilon > 0
    """,
)


def upgrade() -> None:
    """One statement a call, since the driver prepares each."""
    for statement in STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """A version is not taken back."""
    raise NotImplementedError("restore a backup instead")
