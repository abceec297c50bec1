-- A role for the sink that can do what it needs and no more. Run as a superuser in the mirrored database:
--
--     psql -d shop -f sql/role.sql
--
-- and give it a password, or a line of its own in pg_hba.conf (logical streaming uses the line of the database).

CREATE ROLE walmirror LOGIN REPLICATION;

-- Reads the rows for backfills, in whatever schema they are.
GRANT USAGE ON SCHEMA public TO walmirror;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO walmirror;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO walmirror;

-- If a column of a key has a type of another schema (citext, or an enum, say), rows are looked for with it:
-- GRANT USAGE ON SCHEMA … TO walmirror;

-- Sees all rows of mirrored tables with row-level security. Leave it out if there are none.
ALTER ROLE walmirror BYPASSRLS;

-- Lets `walmirror doctor` read shared_preload_libraries, a waiting backfill say whom it waits for,
-- and `walmirror verify` see that an open transaction has not committed.
GRANT pg_read_all_settings, pg_read_all_stats TO walmirror;
