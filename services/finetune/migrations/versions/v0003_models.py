"""Models, versions, aliases, evaluations, and what gateways are told of them."""

from alembic import op

revision = "f0003"
down_revision = "f0002"
branch_labels = None
depends_on = None

TABLES: tuple[str, ...] = (
    # Every table that holds a project's rows has project_uid first in its key: no query can forget it and still use the index.
    """
    CREATE TABLE models (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL UNIQUE,
        project text NOT NULL CHECK (project ~ '^[a-z0-9-]{1,63}$'),
        name text NOT NULL CHECK (name ~ '^[a-z0-9-]{1,63}$'),
        display_name text NOT NULL DEFAULT '',
        labels jsonb NOT NULL DEFAULT '{}'
            CHECK (jsonb_typeof(labels) = 'object' AND NOT jsonb_path_exists(labels, '$.* ? (@.type() <> "string")')),
        base_model text NOT NULL CHECK (base_model ~ '^models/[a-z0-9-]{1,63}$'),
        next_version bigint NOT NULL DEFAULT 1 CHECK (next_version >= 1),
        revision bigint NOT NULL DEFAULT 1,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        delete_time timestamptz,
        PRIMARY KEY (project_uid, uid)
    )
    """,
    # A deleted model gives its name free; its numbers go on, so that a version's name never means another adapter.
    "CREATE UNIQUE INDEX models_name ON models (project_uid, name) WHERE delete_time IS NULL",
    """
    CREATE TABLE model_versions (
        project_uid uuid NOT NULL,
        model_uid uuid NOT NULL,
        number bigint NOT NULL CHECK (number >= 1),
        uid uuid NOT NULL UNIQUE,
        state text NOT NULL CHECK (state IN ('CHECKING', 'READY', 'REJECTED')),
        source text NOT NULL CHECK (source IN ('JOB', 'CHECKPOINT', 'IMPORT')),
        method text NOT NULL DEFAULT '',
        base_digest text NOT NULL DEFAULT '',
        adapter_digest text NOT NULL DEFAULT '' CHECK (adapter_digest ~ '^([0-9a-f]{64})?$'),
        manifest jsonb NOT NULL DEFAULT '{}',
        envelope bytea,
        size_bytes bigint NOT NULL DEFAULT 0 CHECK (size_bytes >= 0),
        job_uid uuid,
        step bigint,
        failure jsonb,
        revision bigint NOT NULL DEFAULT 1,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        ready_time timestamptz,
        servable_time timestamptz,
        servable_seconds double precision CHECK (servable_seconds >= 0),
        delete_time timestamptz,
        CHECK (state <> 'READY' OR (adapter_digest <> '' AND envelope IS NOT NULL AND ready_time IS NOT NULL)),
        PRIMARY KEY (project_uid, model_uid, number),
        FOREIGN KEY (project_uid, model_uid) REFERENCES models (project_uid, uid)
    )
    """,
    # CompleteRun may be repeated: one job makes one version, one checkpoint makes another.
    "CREATE UNIQUE INDEX model_versions_job ON model_versions (job_uid) WHERE source = 'JOB' AND delete_time IS NULL",
    "CREATE INDEX model_versions_digest ON model_versions (project_uid, adapter_digest) WHERE delete_time IS NULL",
    # Imports that a crash left half checked are found by it.
    "CREATE INDEX model_versions_checking ON model_versions (create_time) WHERE state = 'CHECKING'",
    """
    CREATE TABLE model_aliases (
        project_uid uuid NOT NULL,
        model_uid uuid NOT NULL,
        name text NOT NULL CHECK (name ~ '^[a-z0-9-]{1,63}$'),
        uid uuid NOT NULL UNIQUE,
        target bigint NOT NULL,
        split bigint,
        split_percent integer CHECK (split_percent BETWEEN 1 AND 99),
        moves bigint NOT NULL DEFAULT 0,
        revision bigint NOT NULL DEFAULT 1,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        CHECK ((split IS NULL) = (split_percent IS NULL) AND split IS DISTINCT FROM target),
        PRIMARY KEY (project_uid, model_uid, name),
        FOREIGN KEY (project_uid, model_uid, target) REFERENCES model_versions (project_uid, model_uid, number),
        FOREIGN KEY (project_uid, model_uid, split) REFERENCES model_versions (project_uid, model_uid, number)
    )
    """,
    # Append-only: who moved what, on which evidence. It stays when the alias goes.
    """
    CREATE TABLE alias_moves (
        project_uid uuid NOT NULL,
        model_uid uuid NOT NULL,
        alias text NOT NULL,
        sequence bigint NOT NULL,
        kind text NOT NULL CHECK (kind IN ('CREATED', 'MOVED', 'FORCED', 'ROLLED_BACK', 'DROPPED')),
        target bigint NOT NULL,
        split bigint,
        split_percent integer,
        evaluation_uid uuid,
        actor_key_id text NOT NULL,
        request_id text NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (project_uid, model_uid, alias, sequence),
        FOREIGN KEY (project_uid, model_uid) REFERENCES models (project_uid, uid)
    )
    """,
    """
    CREATE TABLE model_evaluations (
        project_uid uuid NOT NULL,
        uid uuid NOT NULL UNIQUE,
        model_uid uuid NOT NULL,
        candidate bigint NOT NULL,
        current bigint,
        alias text NOT NULL,
        dataset_version text NOT NULL,
        dataset_version_uid uuid NOT NULL,
        dataset_digest text NOT NULL,
        metric text NOT NULL CHECK (metric IN ('ACCURACY', 'LOSS')),
        max_rows bigint CHECK (max_rows >= 1),
        measured_rows bigint NOT NULL DEFAULT 0,
        margin double precision NOT NULL CHECK (margin >= 0),
        seed bigint NOT NULL,
        state text NOT NULL DEFAULT 'QUEUED' CHECK (state IN ('QUEUED', 'RUNNING', 'PASSED', 'NOT_PASSED', 'FAILED')),
        attempts integer NOT NULL DEFAULT 0,
        lease_time timestamptz,
        verdict jsonb,
        envelope bytea,
        failure jsonb,
        revision bigint NOT NULL DEFAULT 1,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        start_time timestamptz,
        end_time timestamptz,
        PRIMARY KEY (project_uid, uid),
        FOREIGN KEY (project_uid, model_uid, candidate) REFERENCES model_versions (project_uid, model_uid, number),
        FOREIGN KEY (project_uid, model_uid, current) REFERENCES model_versions (project_uid, model_uid, number)
    )
    """,
    "CREATE INDEX model_evaluations_due ON model_evaluations (create_time) WHERE state IN ('QUEUED', 'RUNNING')",
    # One row: whoever raises it holds its lock to the end, so commit order is sequence order and a cursor misses nothing.
    "CREATE TABLE registry_counter (one boolean PRIMARY KEY DEFAULT true CHECK (one), last bigint NOT NULL)",
    """
    CREATE TABLE registry_events (
        sequence bigint PRIMARY KEY,
        project_uid uuid NOT NULL,
        kind text NOT NULL CHECK (kind IN ('ready', 'moved', 'erased')),
        body jsonb NOT NULL,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    """
    CREATE FUNCTION notify_registry() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_notify('argosy_registry', NEW.sequence::text);
        RETURN NULL;
    END $$
    """,
    "CREATE TRIGGER registry_events_notify AFTER INSERT ON registry_events FOR EACH ROW EXECUTE FUNCTION notify_registry()",
    """
    CREATE TABLE servable_reports (
        project_uid uuid NOT NULL,
        model_uid uuid NOT NULL,
        number bigint NOT NULL,
        gateway text NOT NULL,
        replicas integer NOT NULL CHECK (replicas >= 0),
        seconds double precision NOT NULL CHECK (seconds >= 0),
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (project_uid, model_uid, number, gateway),
        FOREIGN KEY (project_uid, model_uid, number) REFERENCES model_versions (project_uid, model_uid, number)
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
