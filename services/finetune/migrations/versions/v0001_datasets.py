"""Datasets, their versions and uploads; erasures; replays and the audit."""

from alembic import op

revision = "f0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES: tuple[str, ...] = (
    # Every table has project_uid first in its key: no query can forget it and still use the index. A deleted row stays as a tombstone,
    # emptied: its uid is never used again.
    """
    CREATE TABLE datasets (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL UNIQUE,
        project text NOT NULL,
        name text NOT NULL CHECK (name ~ '^[a-z0-9-]{1,63}$'),
        display_name text NOT NULL DEFAULT '',
        labels jsonb NOT NULL DEFAULT '{}',
        layout jsonb NOT NULL,
        retention_seconds bigint CHECK (retention_seconds > 0),
        state text NOT NULL DEFAULT 'ACTIVE' CHECK (state IN ('ACTIVE', 'DELETED')),
        revision bigint NOT NULL DEFAULT 1,
        next_version bigint NOT NULL DEFAULT 1 CHECK (next_version > 0),
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        delete_time timestamptz,
        PRIMARY KEY (project_uid, uid)
    )
    """,
    "CREATE UNIQUE INDEX datasets_name ON datasets (project_uid, name) WHERE state <> 'DELETED'",
    # Versions of one name count on across a deletion of the dataset: a resource name never means two things.
    "CREATE INDEX datasets_names ON datasets (project_uid, name)",
    """
    CREATE TABLE dataset_versions (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL UNIQUE,
        dataset_uid uuid NOT NULL,
        number bigint NOT NULL CHECK (number > 0),
        state text NOT NULL DEFAULT 'VALIDATING' CHECK (state IN ('VALIDATING', 'READY', 'REJECTED', 'DELETED')),
        revision bigint NOT NULL DEFAULT 1,
        layout jsonb NOT NULL,
        sha256 text NOT NULL,
        total_bytes bigint NOT NULL CHECK (total_bytes >= 0),
        validated_bytes bigint NOT NULL DEFAULT 0 CHECK (validated_bytes >= 0),
        rows bigint NOT NULL DEFAULT 0,
        report jsonb NOT NULL DEFAULT '{}',
        failure jsonb,
        skip_errors boolean NOT NULL DEFAULT false,
        upload_uid uuid,
        source_uid uuid,
        derived_uid uuid,
        redacted text[] NOT NULL DEFAULT '{}',
        skipped_lines bigint[] NOT NULL DEFAULT '{}',
        skipped_rows bigint NOT NULL DEFAULT 0,
        claim_uid uuid,
        claim_time timestamptz,
        attempts integer NOT NULL DEFAULT 0,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        end_time timestamptz,
        expire_time timestamptz,
        delete_time timestamptz,
        PRIMARY KEY (project_uid, uid),
        FOREIGN KEY (project_uid, dataset_uid) REFERENCES datasets (project_uid, uid),
        UNIQUE (project_uid, dataset_uid, number)
    )
    """,
    # The same bytes read the same way are one live version of a dataset, never of two.
    """
    CREATE UNIQUE INDEX dataset_versions_bytes ON dataset_versions (project_uid, dataset_uid, sha256, layout)
    WHERE state IN ('VALIDATING', 'READY') AND source_uid IS NULL
    """,
    "CREATE INDEX dataset_versions_work ON dataset_versions (create_time) WHERE state = 'VALIDATING'",
    "CREATE INDEX dataset_versions_expiry ON dataset_versions (expire_time) WHERE expire_time IS NOT NULL AND state <> 'DELETED'",
    """
    CREATE TABLE row_errors (
        project_uid uuid NOT NULL,
        version_uid uuid NOT NULL,
        ordinal integer NOT NULL,
        line bigint NOT NULL,
        byte_offset bigint NOT NULL,
        field text NOT NULL,
        rule text NOT NULL,
        severity text NOT NULL CHECK (severity IN ('error', 'warning')),
        PRIMARY KEY (project_uid, version_uid, ordinal)
    )
    """,
    """
    CREATE TABLE uploads (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL UNIQUE,
        dataset_uid uuid NOT NULL,
        state text NOT NULL DEFAULT 'OPEN' CHECK (state IN ('OPEN', 'FINALIZED', 'REJECTED', 'EXPIRED', 'DELETED')),
        total_bytes bigint CHECK (total_bytes >= 0),
        sha256 text NOT NULL DEFAULT '',
        persisted_bytes bigint NOT NULL DEFAULT 0 CHECK (persisted_bytes >= 0),
        writer_epoch bigint NOT NULL DEFAULT 1,
        scan jsonb NOT NULL DEFAULT '{}',
        failure jsonb,
        version_uid uuid,
        cleared boolean NOT NULL DEFAULT false,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        expire_time timestamptz NOT NULL,
        PRIMARY KEY (project_uid, uid),
        FOREIGN KEY (project_uid, dataset_uid) REFERENCES datasets (project_uid, uid)
    )
    """,
    "CREATE INDEX uploads_open ON uploads (expire_time) WHERE state = 'OPEN'",
    # `cleared`: its objects are gone, and its parts forgotten.
    "CREATE INDEX uploads_full ON uploads (update_time) WHERE NOT cleared AND state <> 'OPEN'",
    # What of an upload is stored for good: a part whose row was never committed is not a part, whatever lies in the object store.
    """
    CREATE TABLE upload_parts (
        project_uid uuid NOT NULL,
        upload_uid uuid NOT NULL,
        start bigint NOT NULL CHECK (start >= 0),
        size bigint NOT NULL CHECK (size > 0),
        path text NOT NULL,
        PRIMARY KEY (project_uid, upload_uid, start)
    )
    """,
    """
    CREATE TABLE deletions (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL UNIQUE,
        target text NOT NULL,
        state text NOT NULL DEFAULT 'RUNNING' CHECK (state IN ('RUNNING', 'DONE')),
        erased text[] NOT NULL DEFAULT '{}',
        prefixes text[] NOT NULL DEFAULT '{}',
        digests jsonb NOT NULL DEFAULT '{}',
        certificate text NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        end_time timestamptz,
        PRIMARY KEY (project_uid, uid)
    )
    """,
    "CREATE INDEX deletions_running ON deletions (create_time) WHERE state = 'RUNNING'",
    # Replies to writes, written in the change's transaction.
    """
    CREATE TABLE request_replays (
        project_uid uuid NOT NULL,
        method text NOT NULL,
        request_id uuid NOT NULL,
        body_digest bytea NOT NULL,
        reply bytea NOT NULL,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (project_uid, method, request_id)
    )
    """,
    "CREATE INDEX request_replays_time ON request_replays (create_time)",
    """
    CREATE TABLE audit_events (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL,
        actor_key text NOT NULL,
        method text NOT NULL,
        resource text NOT NULL,
        request_id text NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (project_uid, uid)
    )
    """,
    "CREATE INDEX audit_events_time ON audit_events (project_uid, create_time)",
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END $$
    """,
    "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit_events FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit_events FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
)


def upgrade() -> None:
    """One statement a call, since the driver prepares each."""
    for statement in TABLES:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """A version is not taken back."""
    raise NotImplementedError("restore a backup instead")
