"""Projects, keys, quotas, the ledger and the two statements of the hot path."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    # Every table that holds a project's rows has project_uid first in its key: no query can forget it and still use the index.
    """
    CREATE TABLE projects (
        uid uuid PRIMARY KEY,
        name text NOT NULL CHECK (name ~ '^[a-z0-9-]{1,63}$'),
        display_name text NOT NULL DEFAULT '',
        labels jsonb NOT NULL DEFAULT '{}'
            CHECK (jsonb_typeof(labels) = 'object' AND NOT jsonb_path_exists(labels, '$.* ? (@.type() <> "string")')),
        state text NOT NULL DEFAULT 'ACTIVE' CHECK (state IN ('ACTIVE', 'SUSPENDED', 'DELETED')),
        revision bigint NOT NULL DEFAULT 1,
        kv_secret bytea NOT NULL CHECK (length(kv_secret) = 32),
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        delete_time timestamptz
    )
    """,
    # A deleted project gives its name free; its uid, which storage and books use, is never used again.
    "CREATE UNIQUE INDEX projects_name ON projects (name) WHERE state <> 'DELETED'",
    # What is written past our code is refused here if our code could not read it: a NULL in a list, a time outside protobuf's years.
    """
    CREATE TABLE api_keys (
        project_uid uuid NOT NULL REFERENCES projects (uid),
        uid uuid NOT NULL UNIQUE,
        display_name text NOT NULL DEFAULT '',
        labels jsonb NOT NULL DEFAULT '{}'
            CHECK (jsonb_typeof(labels) = 'object' AND NOT jsonb_path_exists(labels, '$.* ? (@.type() <> "string")')),
        state text NOT NULL DEFAULT 'ACTIVE' CHECK (state IN ('ACTIVE', 'DISABLED', 'DELETED')),
        revision bigint NOT NULL DEFAULT 1,
        mac bytea NOT NULL CHECK (length(mac) = 32),
        previous_mac bytea CHECK (length(previous_mac) = 32),
        previous_expire_time timestamptz CHECK (previous_expire_time >= '0001-01-01Z' AND previous_expire_time < '10000-01-01Z'),
        scopes text[] NOT NULL CHECK (array_position(scopes, NULL) IS NULL),
        models text[] NOT NULL DEFAULT '{}' CHECK (array_position(models, NULL) IS NULL),
        requests_per_minute bigint CHECK (requests_per_minute >= 0),
        tokens_per_minute bigint CHECK (tokens_per_minute >= 0),
        concurrent_requests bigint CHECK (concurrent_requests >= 0),
        output_token_ceiling bigint CHECK (output_token_ceiling BETWEEN 1 AND 262144),
        nanos_per_day bigint CHECK (nanos_per_day >= 0),
        minter_uid uuid,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        expire_time timestamptz CHECK (expire_time >= '0001-01-01Z' AND expire_time < '10000-01-01Z'),
        delete_time timestamptz,
        last_use_time timestamptz,
        PRIMARY KEY (project_uid, uid)
    )
    """,
    # NULL: no limit of this kind.
    """
    CREATE TABLE quota_policies (
        project_uid uuid PRIMARY KEY REFERENCES projects (uid),
        revision bigint NOT NULL DEFAULT 1,
        requests_per_minute bigint CHECK (requests_per_minute >= 0),
        requests_per_day bigint CHECK (requests_per_day >= 0),
        tokens_per_minute bigint CHECK (tokens_per_minute >= 0),
        tokens_per_day bigint CHECK (tokens_per_day >= 0),
        concurrent_streams bigint CHECK (concurrent_streams >= 0),
        output_token_ceiling bigint CHECK (output_token_ceiling BETWEEN 1 AND 262144),
        concurrent_jobs bigint CHECK (concurrent_jobs >= 0),
        gpu_seconds_per_day bigint CHECK (gpu_seconds_per_day >= 0),
        stored_bytes bigint CHECK (stored_bytes >= 0),
        nanos_per_day bigint CHECK (nanos_per_day >= 0),
        update_time timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    # One row a project (key_uid all zero) and one a key, changed in place: windows are reset, never added, so the table does not grow.
    # The project's row is locked first by whoever changes a project's books: that order is what makes a race impossible.
    """
    CREATE TABLE quota_counters (
        project_uid uuid NOT NULL REFERENCES projects (uid),
        key_uid uuid NOT NULL,
        minute timestamptz NOT NULL DEFAULT '-infinity',
        minute_requests bigint NOT NULL DEFAULT 0 CHECK (minute_requests >= 0),
        minute_tokens bigint NOT NULL DEFAULT 0 CHECK (minute_tokens >= 0),
        day timestamptz NOT NULL DEFAULT '-infinity',
        day_requests bigint NOT NULL DEFAULT 0 CHECK (day_requests >= 0),
        day_tokens bigint NOT NULL DEFAULT 0 CHECK (day_tokens >= 0),
        day_nanos bigint NOT NULL DEFAULT 0 CHECK (day_nanos >= 0),
        running bigint NOT NULL DEFAULT 0 CHECK (running >= 0),
        entries bigint NOT NULL DEFAULT 0,
        PRIMARY KEY (project_uid, key_uid)
    ) WITH (fillfactor = 50)
    """,
    # Open reservations only: a settlement deletes its row, so the table holds what runs now.
    """
    CREATE TABLE reservations (
        project_uid uuid NOT NULL,
        generation_id uuid NOT NULL,
        request_id uuid,
        key_uid uuid NOT NULL,
        method text NOT NULL,
        model text NOT NULL,
        version text NOT NULL,
        body_digest bytea NOT NULL,
        tokens bigint NOT NULL CHECK (tokens >= 0),
        nanos bigint NOT NULL CHECK (nanos >= 0),
        minute timestamptz NOT NULL,
        day timestamptz NOT NULL,
        owner uuid NOT NULL,
        create_time timestamptz NOT NULL,
        PRIMARY KEY (project_uid, generation_id)
    ) WITH (fillfactor = 50)
    """,
    "CREATE UNIQUE INDEX reservations_request ON reservations (project_uid, request_id, method) WHERE request_id IS NOT NULL",
    "CREATE INDEX reservations_owner ON reservations (owner)",
    # The books. RESERVE holds what was set aside, SETTLE what it cost; AMEND corrects the SETTLE that a sweeper wrote as LOST, when the
    # gateway thought dead comes back with the engine's counts in its journal. `entry` counts a project's rows under the lock of its
    # counters, so rows appear in its order: a sequence would let a reader's cursor pass a row that commits late.
    """
    CREATE TABLE ledger (
        project_uid uuid NOT NULL,
        generation_id uuid NOT NULL,
        kind text NOT NULL CHECK (kind IN ('RESERVE', 'SETTLE', 'AMEND')),
        entry bigint NOT NULL,
        request_id uuid,
        key_uid uuid NOT NULL,
        method text NOT NULL,
        model text NOT NULL,
        version text NOT NULL,
        body_digest bytea NOT NULL,
        outcome text CHECK (outcome IN ('DONE', 'CANCELLED', 'DEADLINE', 'LOST', 'SHED', 'FAILED')),
        input_tokens bigint NOT NULL CHECK (input_tokens >= 0),
        cached_input_tokens bigint NOT NULL DEFAULT 0 CHECK (cached_input_tokens BETWEEN 0 AND input_tokens),
        output_tokens bigint NOT NULL CHECK (output_tokens >= 0),
        passes bigint NOT NULL DEFAULT 0 CHECK (passes >= 0),
        nanos bigint NOT NULL CHECK (nanos >= 0),
        served_by text NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (project_uid, generation_id, kind),
        CHECK ((kind = 'RESERVE') = (outcome IS NULL))
    )
    """,
    # A request id completes at most once, whatever any code above believes.
    "CREATE UNIQUE INDEX ledger_done ON ledger (project_uid, request_id, method) WHERE outcome = 'DONE' AND request_id IS NOT NULL",
    "CREATE INDEX ledger_request ON ledger (project_uid, request_id, method) WHERE request_id IS NOT NULL",
    "CREATE INDEX ledger_time ON ledger (project_uid, create_time)",
    "CREATE UNIQUE INDEX ledger_entry ON ledger (project_uid, entry)",
    # A gateway that stops beating for its lease is dead, and its open reservations are swept.
    """
    CREATE TABLE gateways (
        uid uuid PRIMARY KEY,
        beat_time timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    # Replies to admin writes, written in the change's transaction.
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
        actor_project_uid uuid NOT NULL,
        actor_key_uid uuid NOT NULL,
        method text NOT NULL,
        resource text NOT NULL,
        request_id uuid,
        create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (project_uid, uid)
    )
    """,
    "CREATE INDEX audit_events_time ON audit_events (project_uid, create_time)",
)

APPEND_ONLY = (
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END $$
    """,
    "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE ON ledger FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER ledger_no_truncate BEFORE TRUNCATE ON ledger FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit_events FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit_events FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
)

REVOCATION = (
    # Hastens what each gateway would see on its next look within 2 s (A9). The payload is an id, no secret.
    """
    CREATE FUNCTION tell_key_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_notify('argosy_keys', NEW.uid::text);
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER api_keys_changed
    AFTER UPDATE OF state, mac, previous_mac, previous_expire_time, expire_time, scopes, models, output_token_ceiling ON api_keys
    FOR EACH ROW EXECUTE FUNCTION tell_key_change()
    """,
    "CREATE TRIGGER projects_changed AFTER UPDATE OF state ON projects FOR EACH ROW EXECUTE FUNCTION tell_key_change()",
)

RESERVE = """
CREATE FUNCTION reserve(
    a_project uuid, a_generation uuid, a_request uuid, a_key uuid, a_method text, a_model text, a_version text,
    a_input bigint, a_output bigint, a_nanos bigint, a_digest bytea, a_owner uuid, a_spooled boolean,
    OUT verdict text, OUT subject text, OUT retry_after_s float8
) LANGUAGE plpgsql AS $$
DECLARE
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
    instant timestamptz;
    this_minute timestamptz;
    this_day timestamptz;
    asked CONSTANT bigint := a_input + a_output;
    c quota_counters;
    k quota_counters;
    policy quota_policies;
    key_limits api_keys;
    seen record;
BEGIN
    -- A reservation lost with the server is written again by its settlement, so it need not wait for the disk.
    PERFORM set_config('synchronous_commit', 'off', true);
    subject := '';
    retry_after_s := 0;

    SELECT * INTO c FROM quota_counters WHERE project_uid = a_project AND key_uid = nobody FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO quota_counters (project_uid, key_uid) VALUES (a_project, nobody) ON CONFLICT DO NOTHING;
        SELECT * INTO c FROM quota_counters WHERE project_uid = a_project AND key_uid = nobody FOR UPDATE;
    END IF;

    IF EXISTS (SELECT FROM ledger WHERE project_uid = a_project AND generation_id = a_generation AND kind = 'RESERVE') THEN
        verdict := 'OK';  -- the same attempt again: an answer was lost, or a journal is replayed
        RETURN;
    END IF;
    IF a_spooled THEN
        -- Already running, begun while the store was away: written down, not judged.
        IF EXISTS (SELECT FROM reservations WHERE project_uid = a_project AND request_id = a_request AND method = a_method) THEN
            a_request := NULL;
        END IF;
    ELSIF a_request IS NOT NULL THEN
        SELECT body_digest INTO seen FROM reservations
        WHERE project_uid = a_project AND request_id = a_request AND method = a_method;
        IF FOUND THEN
            verdict := CASE WHEN seen.body_digest = a_digest THEN 'IN_FLIGHT' ELSE 'REUSED' END;
            RETURN;
        END IF;
        SELECT bool_or(outcome = 'DONE') AS done, bool_or(body_digest <> a_digest) AS other INTO seen FROM ledger
        WHERE project_uid = a_project AND request_id = a_request AND method = a_method;
        IF seen.other OR seen.done THEN
            verdict := CASE WHEN seen.other THEN 'REUSED' ELSE 'SETTLED' END;
            RETURN;
        END IF;
    END IF;

    SELECT * INTO policy FROM quota_policies WHERE project_uid = a_project;
    SELECT * INTO key_limits FROM api_keys WHERE project_uid = a_project AND uid = a_key;
    SELECT * INTO k FROM quota_counters WHERE project_uid = a_project AND key_uid = a_key;
    IF NOT FOUND THEN
        INSERT INTO quota_counters (project_uid, key_uid) VALUES (a_project, a_key) ON CONFLICT DO NOTHING;
        SELECT * INTO k FROM quota_counters WHERE project_uid = a_project AND key_uid = a_key;
    END IF;

    instant := clock_timestamp();  -- after the lock: a wait for it must not charge a window that has passed
    this_minute := date_trunc('minute', instant, 'UTC');
    this_day := date_trunc('day', instant, 'UTC');
    IF c.minute < this_minute THEN c.minute := this_minute; c.minute_requests := 0; c.minute_tokens := 0; END IF;
    IF c.day < this_day THEN c.day := this_day; c.day_requests := 0; c.day_tokens := 0; c.day_nanos := 0; END IF;
    IF k.minute < this_minute THEN k.minute := this_minute; k.minute_requests := 0; k.minute_tokens := 0; END IF;
    IF k.day < this_day THEN k.day := this_day; k.day_requests := 0; k.day_tokens := 0; k.day_nanos := 0; END IF;

    IF a_spooled THEN
        policy := NULL;
        key_limits := NULL;
    END IF;
    -- Hard bounds first: waiting a minute does not help. An unset limit is NULL, and nothing is over it.
    verdict := 'QUOTA';
    subject := CASE
        WHEN c.day_requests >= policy.requests_per_day THEN 'requests_per_day'
        WHEN c.day_tokens + asked > policy.tokens_per_day THEN 'tokens_per_day'
        WHEN c.day_nanos + a_nanos > policy.nanos_per_day THEN 'cost_per_day'
        WHEN k.day_nanos + a_nanos > key_limits.nanos_per_day THEN 'key_cost_per_day'
        WHEN asked > least(policy.tokens_per_minute, key_limits.tokens_per_minute) THEN 'tokens_per_minute'
        WHEN least(policy.requests_per_minute, key_limits.requests_per_minute) = 0 THEN 'requests_per_minute'
        WHEN least(policy.concurrent_streams, key_limits.concurrent_requests) = 0 THEN 'concurrent_streams'
        ELSE '' END;
    IF subject <> '' THEN RETURN; END IF;
    verdict := 'RATE';
    subject := CASE
        WHEN c.minute_requests >= policy.requests_per_minute THEN 'requests_per_minute'
        WHEN k.minute_requests >= key_limits.requests_per_minute THEN 'key_requests_per_minute'
        WHEN c.minute_tokens + asked > policy.tokens_per_minute THEN 'tokens_per_minute'
        WHEN k.minute_tokens + asked > key_limits.tokens_per_minute THEN 'key_tokens_per_minute'
        WHEN c.running >= policy.concurrent_streams THEN 'concurrent_streams'
        WHEN k.running >= key_limits.concurrent_requests THEN 'key_concurrent_requests'
        ELSE '' END;
    IF subject <> '' THEN
        retry_after_s := CASE WHEN subject LIKE '%concurrent%' THEN 1
            ELSE greatest(0.1, extract(epoch FROM this_minute + interval '1 minute' - instant)) END;
        RETURN;
    END IF;

    UPDATE quota_counters SET
        minute = c.minute, minute_requests = c.minute_requests + 1, minute_tokens = c.minute_tokens + asked,
        day = c.day, day_requests = c.day_requests + 1, day_tokens = c.day_tokens + asked,
        day_nanos = c.day_nanos + a_nanos, running = c.running + 1, entries = c.entries + 1
    WHERE project_uid = a_project AND key_uid = nobody;
    UPDATE quota_counters SET
        minute = k.minute, minute_requests = k.minute_requests + 1, minute_tokens = k.minute_tokens + asked,
        day = k.day, day_requests = k.day_requests + 1, day_tokens = k.day_tokens + asked,
        day_nanos = k.day_nanos + a_nanos, running = k.running + 1
    WHERE project_uid = a_project AND key_uid = a_key;
    INSERT INTO reservations (project_uid, generation_id, request_id, key_uid, method, model, version, body_digest, tokens, nanos,
        minute, day, owner, create_time)
    VALUES (a_project, a_generation, a_request, a_key, a_method, a_model, a_version, a_digest, asked, a_nanos,
        this_minute, this_day, a_owner, instant);
    INSERT INTO ledger (project_uid, generation_id, kind, entry, request_id, key_uid, method, model, version, body_digest,
        input_tokens, output_tokens, nanos, create_time)
    VALUES (a_project, a_generation, 'RESERVE', c.entries + 1, a_request, a_key, a_method, a_model, a_version, a_digest,
        a_input, a_output, a_nanos, instant);
    verdict := 'OK';
END $$
"""

# One row of quota_counters after a settlement: windows that have passed since the reservation keep what they were charged.
_COUNT = """
    UPDATE quota_counters SET
        minute_tokens = minute_tokens + CASE WHEN minute = was.minute THEN used - was.tokens ELSE 0 END,
        day_tokens = day_tokens + CASE WHEN day = was.day THEN used - was.tokens ELSE 0 END,
        day_nanos = day_nanos + CASE WHEN day = was.day THEN s.nanos - was.nanos ELSE 0 END,
        running = running - CASE WHEN was.open THEN 1 ELSE 0 END
    WHERE project_uid = s.project_uid AND key_uid = {key}
"""

SETTLE = f"""
CREATE FUNCTION settle(a_items jsonb) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
    s record;
    was record;
    earlier ledger;
    used bigint;
    final_outcome text;
    number bigint;
    written bigint := 0;
BEGIN
    -- In the order of the locks that `reserve` takes: two batches cannot wait for each other.
    FOR s IN
        SELECT * FROM jsonb_to_recordset(a_items) AS item(
            project_uid uuid, generation_id uuid, request_id uuid, key_uid uuid, method text, model text, version text,
            body_digest text, reserved_input bigint, reserved_output bigint, reserved_nanos bigint, outcome text, swept boolean,
            input_tokens bigint, cached_input_tokens bigint, output_tokens bigint, passes bigint, nanos bigint, served_by text)
        ORDER BY project_uid, key_uid, generation_id
    LOOP
        INSERT INTO quota_counters (project_uid, key_uid) VALUES (s.project_uid, nobody), (s.project_uid, s.key_uid)
        ON CONFLICT DO NOTHING;
        SELECT entries INTO number FROM quota_counters WHERE project_uid = s.project_uid AND key_uid = nobody FOR UPDATE;
        used := s.input_tokens + s.output_tokens;
        DELETE FROM reservations WHERE project_uid = s.project_uid AND generation_id = s.generation_id
        RETURNING tokens, nanos, minute, day, true AS open INTO was;
        IF NOT FOUND THEN
            CONTINUE WHEN s.swept;
            SELECT * INTO earlier FROM ledger
            WHERE project_uid = s.project_uid AND generation_id = s.generation_id AND kind = 'SETTLE';
            IF FOUND AND (earlier.outcome <> 'LOST' OR earlier.served_by <> 'sweeper') THEN
                CONTINUE;  -- settled before
            END IF;
            IF FOUND THEN
                INSERT INTO ledger (project_uid, generation_id, kind, entry, request_id, key_uid, method, model, version, body_digest,
                    outcome, input_tokens, cached_input_tokens, output_tokens, passes, nanos, served_by)
                VALUES (s.project_uid, s.generation_id, 'AMEND', number + 1, earlier.request_id, earlier.key_uid, earlier.method,
                    earlier.model, earlier.version, earlier.body_digest,
                    CASE WHEN s.outcome = 'DONE' AND EXISTS (SELECT FROM ledger WHERE project_uid = s.project_uid
                        AND request_id = earlier.request_id AND method = earlier.method AND outcome = 'DONE')
                        THEN 'LOST' ELSE s.outcome END,
                    s.input_tokens, s.cached_input_tokens, s.output_tokens, s.passes, s.nanos, s.served_by)
                ON CONFLICT (project_uid, generation_id, kind) DO NOTHING;
                CONTINUE WHEN NOT FOUND;
            ELSE
                -- The reservation was spooled while the store was away, or lost with the server: it is written now.
                INSERT INTO ledger (project_uid, generation_id, kind, entry, request_id, key_uid, method, model, version, body_digest,
                    input_tokens, output_tokens, nanos)
                VALUES (s.project_uid, s.generation_id, 'RESERVE', number + 1, s.request_id, s.key_uid, s.method, s.model, s.version,
                    decode(s.body_digest, 'hex'), s.reserved_input, s.reserved_output, s.reserved_nanos)
                ON CONFLICT (project_uid, generation_id, kind) DO NOTHING;
                number := number + 1;
            END IF;
            SELECT 0::bigint AS tokens, 0::bigint AS nanos, date_trunc('minute', clock_timestamp(), 'UTC') AS minute,
                date_trunc('day', clock_timestamp(), 'UTC') AS day, false AS open INTO was;
            UPDATE quota_counters SET
                minute_requests = CASE WHEN minute < was.minute THEN 0 ELSE minute_requests END,
                minute_tokens = CASE WHEN minute < was.minute THEN 0 ELSE minute_tokens END,
                day_requests = CASE WHEN day < was.day THEN 0 ELSE day_requests END + 1,
                day_tokens = CASE WHEN day < was.day THEN 0 ELSE day_tokens END,
                day_nanos = CASE WHEN day < was.day THEN 0 ELSE day_nanos END,
                minute = greatest(minute, was.minute), day = greatest(day, was.day)
            WHERE project_uid = s.project_uid AND key_uid IN (nobody, s.key_uid);
        END IF;
        {_COUNT.format(key="nobody")};
        {_COUNT.format(key="s.key_uid")};
        written := written + 1;
        number := number + 1;
        UPDATE quota_counters SET entries = number WHERE project_uid = s.project_uid AND key_uid = nobody;
        CONTINUE WHEN earlier.generation_id IS NOT DISTINCT FROM s.generation_id;  -- amended above
        final_outcome := s.outcome;
        IF s.outcome = 'DONE' AND s.request_id IS NOT NULL AND EXISTS (SELECT FROM ledger WHERE project_uid = s.project_uid
            AND request_id = s.request_id AND method = s.method AND outcome = 'DONE') THEN
            final_outcome := 'LOST';  -- ran twice while the store was away: billed as served, but an id completes once
        END IF;
        INSERT INTO ledger (project_uid, generation_id, kind, entry, request_id, key_uid, method, model, version, body_digest, outcome,
            input_tokens, cached_input_tokens, output_tokens, passes, nanos, served_by)
        VALUES (s.project_uid, s.generation_id, 'SETTLE', number, s.request_id, s.key_uid, s.method, s.model, s.version,
            decode(s.body_digest, 'hex'), final_outcome,
            s.input_tokens, s.cached_input_tokens, s.output_tokens, s.passes, s.nanos, s.served_by);
    END LOOP;
    RETURN written;
END $$
"""


def upgrade() -> None:
    """Make everything; one statement a call, since the driver prepares each."""
    for statement in (*TABLES, *APPEND_ONLY, *REVOCATION, RESERVE, SETTLE):
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    """The first version has none before it."""
    raise NotImplementedError("restore a backup instead")
