"""Jobs and evaluations in the books: what finetune says they owe, settled as it is told, and device time against its quota."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = (
    # How far a feed of another service has been read, raised in the transaction of what was read.
    """
    CREATE TABLE feed_cursors (
        feed text PRIMARY KEY,
        sequence bigint NOT NULL CHECK (sequence >= 0)
    )
    """,
    # A row a project, changed in place under the lock of its counters.
    """
    CREATE TABLE job_counters (
        project_uid uuid PRIMARY KEY REFERENCES projects (uid),
        day timestamptz NOT NULL,
        device_millis bigint NOT NULL CHECK (device_millis >= 0)
    )
    """,
    "ALTER TABLE ledger ADD COLUMN device_millis bigint NOT NULL DEFAULT 0 CHECK (device_millis >= 0)",
    "ALTER TABLE ledger DROP CONSTRAINT ledger_outcome_check",
    """
    ALTER TABLE ledger ADD CONSTRAINT ledger_outcome_check
    CHECK (outcome IN ('DONE', 'CANCELLED', 'DEADLINE', 'LOST', 'SHED', 'FAILED', 'PART')) NOT VALID
    """,
)

# A charge has no reservation: what it is for has been used. Its own time says which day pays; the row is dated when it is written.
CHARGE = """
CREATE FUNCTION charge(
    a_sequence bigint, a_project uuid, a_generation uuid, a_work uuid, a_key uuid, a_method text, a_model text, a_version text,
    a_outcome text, a_nanos bigint, a_millis bigint, a_time timestamptz
) RETURNS TABLE (exhausted_key uuid) LANGUAGE plpgsql AS $$
DECLARE
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
    this_day timestamptz;
    today boolean;
    number bigint;
BEGIN
    INSERT INTO feed_cursors (feed, sequence) VALUES ('charges', a_sequence)
    ON CONFLICT (feed) DO UPDATE SET sequence = greatest(feed_cursors.sequence, excluded.sequence);
    IF NOT EXISTS (SELECT FROM projects WHERE uid = a_project) THEN
        RAISE WARNING 'a charge of a project that is none of ours';
        RETURN;
    END IF;
    INSERT INTO quota_counters (project_uid, key_uid) VALUES (a_project, nobody), (a_project, a_key) ON CONFLICT DO NOTHING;
    SELECT entries INTO number FROM quota_counters WHERE project_uid = a_project AND key_uid = nobody FOR UPDATE;
    this_day := date_trunc('day', clock_timestamp(), 'UTC');
    today := date_trunc('day', a_time, 'UTC') >= this_day;
    IF NOT EXISTS (SELECT FROM ledger WHERE project_uid = a_project AND generation_id = a_generation AND kind = 'SETTLE') THEN
        INSERT INTO ledger (project_uid, generation_id, kind, entry, request_id, key_uid, method, model, version, body_digest, outcome,
            input_tokens, output_tokens, nanos, served_by, device_millis)
        VALUES (a_project, a_generation, 'SETTLE', number + 1, a_work, a_key, a_method, a_model, a_version, '', a_outcome,
            0, 0, a_nanos, 'finetune', a_millis);
        UPDATE quota_counters SET entries = number + 1 WHERE project_uid = a_project AND key_uid = nobody;
        UPDATE quota_counters SET
            day_requests = CASE WHEN day < this_day THEN 0 ELSE day_requests END,
            day_tokens = CASE WHEN day < this_day THEN 0 ELSE day_tokens END,
            day_nanos = CASE WHEN day < this_day THEN 0 ELSE day_nanos END + CASE WHEN today THEN a_nanos ELSE 0 END,
            day = greatest(day, this_day)
        WHERE project_uid = a_project AND key_uid IN (nobody, a_key);
        INSERT INTO job_counters (project_uid, day, device_millis) VALUES (a_project, this_day, CASE WHEN today THEN a_millis ELSE 0 END)
        ON CONFLICT (project_uid) DO UPDATE SET
            device_millis = CASE WHEN job_counters.day < excluded.day THEN 0 ELSE job_counters.device_millis END + excluded.device_millis,
            day = greatest(job_counters.day, excluded.day);
    END IF;
    -- All zero: the project has used up its day; else only the key has.
    RETURN QUERY
        SELECT nobody FROM quota_policies p JOIN quota_counters c ON c.project_uid = p.project_uid AND c.key_uid = nobody
            LEFT JOIN job_counters j ON j.project_uid = p.project_uid AND j.day = this_day
        WHERE p.project_uid = a_project
            AND (c.day_nanos >= p.nanos_per_day OR coalesce(j.device_millis, 0) >= p.gpu_seconds_per_day * 1000)
        UNION ALL
        SELECT k.uid FROM api_keys k JOIN quota_counters c ON c.project_uid = k.project_uid AND c.key_uid = k.uid
        WHERE k.project_uid = a_project AND k.uid = a_key AND c.day_nanos >= k.nanos_per_day;
END $$
"""


def upgrade() -> None:
    """One statement a call, since the driver prepares each."""
    for statement in (*TABLES, CHARGE):
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """Rows of jobs have no place in the version before."""
    raise NotImplementedError("restore a backup instead")
