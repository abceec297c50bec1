-- walmirror 0.1.0. Everything here is a thin face on security labels: the label of a table is its configuration.

\echo Use "CREATE EXTENSION walmirror" to load this file. \quit

-- CREATE EXTENSION looks for names in the schema first: an operator there that fits better than those of pg_catalog would come to stand
-- in what is made here, and run as whoever uses it. So nothing is found by its name alone but what Postgres brought along.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Whoever can put functions beside those of the extension has superusers call them. The schema is made by CREATE EXTENSION, unless there
-- is one, as in a restore: then it has to be of the role that runs this, or of a superuser, with nothing in it. That it is theirs now does
-- not tell who filled it.
DO $$
DECLARE
    extension record;
    found text;
    reason text;
    hint text := 'See what is in it, then DROP SCHEMA walmirror CASCADE; and try again.';
BEGIN
    SELECT e.oid, e.extnamespace AS schema, e.extowner AS owner, n.nspowner::regrole AS found, n.nspacl AS acl,
        n.nspowner = e.extowner OR o.rolsuper AS trusted INTO STRICT extension
    FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace JOIN pg_authid o ON o.oid = n.nspowner
    WHERE e.extname = 'walmirror';
    IF NOT extension.trusted THEN
        reason := format('schema walmirror belongs to %s, who could change what the extension does', extension.found);
    END IF;
    -- All that stands in a schema depends on it, and so does the extension.
    SELECT pg_describe_object(d.classid, d.objid, d.objsubid) INTO found FROM pg_depend d
    WHERE reason IS NULL AND d.refclassid = 'pg_namespace'::regclass::oid AND d.refobjid = extension.schema AND d.deptype = 'n'
      AND NOT (d.classid = 'pg_extension'::regclass::oid AND d.objid = extension.oid)
    ORDER BY 1 LIMIT 1;
    IF found IS NOT NULL THEN
        reason := format('schema walmirror is not empty: it holds %s', found);
    END IF;
    SELECT string_agg(DISTINCT CASE a.grantee WHEN 0::oid THEN 'PUBLIC' ELSE a.grantee::regrole::text END, ', ') INTO found
    FROM aclexplode(extension.acl) a LEFT JOIN pg_authid g ON g.oid = a.grantee
    WHERE reason IS NULL AND a.privilege_type = 'CREATE' AND a.grantee <> extension.owner AND g.rolsuper IS NOT TRUE;
    IF found IS NOT NULL THEN
        reason := format('others may create something in schema walmirror: %s', found);
        -- Where ALTER DEFAULT PRIVILEGES grants it, the schema is gone again with this error.
        hint := format('CREATE SCHEMA IF NOT EXISTS walmirror; REVOKE CREATE ON SCHEMA walmirror FROM %s CASCADE; and try again.', found);
    END IF;
    IF reason IS NOT NULL THEN
        RAISE EXCEPTION '%', reason USING ERRCODE = 'insufficient_privilege', HINT = hint;
    END IF;
END
$$;

GRANT USAGE ON SCHEMA walmirror TO PUBLIC;

-- What is written in Rust -------------------------------------------------------------------------------------------

CREATE FUNCTION walmirror.pack(record) RETURNS bytea
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'walmirror_pack';
COMMENT ON FUNCTION walmirror.pack(record) IS
    'a row of a mirrored table as the stream carries it: 8 bytes of fingerprint, then a Tuple message';

CREATE FUNCTION walmirror.relation(tbl oid) RETURNS bytea
    LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'relation_wrapper';
COMMENT ON FUNCTION walmirror.relation(oid) IS
    'the definition of a mirrored table as the stream carries it: a Relation message; NULL if it is not mirrored';

CREATE FUNCTION walmirror.check_label(tbl oid, added boolean) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'check_label_wrapper';
COMMENT ON FUNCTION walmirror.check_label(oid, boolean) IS
    'raises an error if the label of a table no longer fits it; a table whose key is not unique passes, as it may be being restored; added: so does one that lacks the replica identity';

CREATE FUNCTION walmirror.check_at_commit(tbl oid) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'check_at_commit_wrapper';
COMMENT ON FUNCTION walmirror.check_at_commit(oid) IS
    'has the transaction fail at its end if the label of a table no longer fits it then; it needs its index again';

CREATE FUNCTION walmirror.set_label(tbl oid, label bytea) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'set_label_wrapper';
COMMENT ON FUNCTION walmirror.set_label(oid, bytea) IS
    'SECURITY LABEL FOR walmirror, with all checks made first; the label in UTF-8';

CREATE FUNCTION walmirror.invalidate(tbl oid) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'invalidate_wrapper';
COMMENT ON FUNCTION walmirror.invalidate(oid) IS
    'has sessions and decoders look at a table and its partitions anew';

-- Looking at labels -------------------------------------------------------------------------------------------------

CREATE VIEW walmirror.mirrors AS
SELECT l.objoid::regclass AS relation,
       l.objoid AS oid,
       j.label ->> 'mode' AS mode,
       j.label ->> 'key' AS key,
       coalesce(j.label ->> 'value', 'hash') AS value,
       CASE WHEN jsonb_typeof(j.label -> 'columns') = 'array' THEN ARRAY(SELECT jsonb_array_elements_text(j.label -> 'columns')) END AS columns,
       CASE WHEN (j.label ->> 'ttl_ms')::numeric <= 315360000000000 THEN make_interval(secs => (j.label ->> 'ttl_ms')::float8 / 1000) END AS ttl,
       CASE WHEN j.label ->> 'mode' = 'cache' THEN coalesce(j.label ->> 'on_write', 'refresh') END AS on_write,
       coalesce((j.label ->> 'capture')::boolean, j.label ->> 'mode' = 'cache') AS capture
FROM pg_catalog.pg_seclabel l
JOIN pg_catalog.pg_class c ON c.oid = l.objoid
CROSS JOIN LATERAL (SELECT l.label::jsonb AS label) j
WHERE l.provider = 'walmirror' AND l.classoid = 'pg_catalog.pg_class'::regclass AND l.objsubid = 0;
COMMENT ON VIEW walmirror.mirrors IS 'the tables that are mirrored or cached, and how';
GRANT SELECT ON walmirror.mirrors TO PUBLIC;

CREATE FUNCTION walmirror.relations(OUT oid oid, OUT relation bytea, OUT problem text) RETURNS SETOF record
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS
$$
DECLARE
    mirrored oid;
    is_locked boolean;
BEGIN
    FOR mirrored IN SELECT m.oid FROM walmirror.mirrors m ORDER BY m.oid
    LOOP
        oid := mirrored;
        problem := NULL;
        is_locked := false;
        BEGIN
            relation := walmirror.relation(mirrored);
        -- It is of the class that the name behind it stands for.
        EXCEPTION WHEN lock_not_available THEN
            relation := NULL;
            is_locked := true;
        WHEN invalid_parameter_value OR object_not_in_prerequisite_state OR undefined_column THEN
            relation := NULL;
            problem := SQLERRM;
        END;
        IF relation IS NOT NULL OR problem IS NOT NULL OR is_locked THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION walmirror.relations() IS
    'the definitions of all labelled tables, or why a label does not fit its table any more; neither where a table is locked for longer than lock_timeout';

CREATE FUNCTION walmirror.leaves(tbl oid) RETURNS SETOF oid
    LANGUAGE sql STABLE STRICT SET search_path = pg_catalog, pg_temp AS
$$
    SELECT tbl WHERE EXISTS (SELECT 1 FROM pg_class c WHERE c.oid = tbl AND c.relkind = 'r')
    UNION
    SELECT t.relid::oid FROM pg_partition_tree(tbl::regclass) t WHERE t.isleaf
        AND EXISTS (SELECT 1 FROM pg_class c WHERE c.oid = t.relid AND c.relkind = 'r')
    ORDER BY 1
$$;
COMMENT ON FUNCTION walmirror.leaves(oid) IS 'the tables that hold the rows of a table: itself, or its leaf partitions';

CREATE FUNCTION walmirror.root(tbl oid) RETURNS oid
    LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'root_wrapper';
COMMENT ON FUNCTION walmirror.root(oid) IS
    'the labelled table that the rows of a table appear under: itself, or one that it is a partition of; NULL if there is none';

-- Setting labels ----------------------------------------------------------------------------------------------------
-- Here and below, functions of this schema are called with all of their arguments, of exactly their types: none is a better match.

-- `<table>:{pk1}:{pk2}`; NULL without a primary key.
CREATE FUNCTION walmirror.default_key(tbl oid) RETURNS text
    LANGUAGE sql STABLE STRICT SET search_path = pg_catalog, pg_temp AS
$$
    SELECT replace(replace(c.relname, '{', '{{'), '}', '}}') || string_agg(':{' || a.attname || '}', '' ORDER BY k.ord)
    FROM pg_class c
    JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
    CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
    WHERE c.oid = tbl AND k.ord <= i.indnkeyatts
    GROUP BY c.relname
$$;

CREATE FUNCTION walmirror.mirror(rel regclass, key text DEFAULT NULL, value text DEFAULT 'hash', columns text[] DEFAULT NULL,
                                 ttl interval DEFAULT NULL, capture boolean DEFAULT NULL) RETURNS void
    LANGUAGE sql SET search_path = pg_catalog, pg_temp AS
$$
    SELECT walmirror.set_label(rel::oid, convert_to(jsonb_strip_nulls(jsonb_build_object(
        'mode', 'mirror', 'key', coalesce(mirror.key, walmirror.default_key(rel::oid)), 'value', mirror.value, 'columns', mirror.columns,
        'ttl_ms', round(extract(epoch FROM mirror.ttl) * 1000)::bigint, 'capture', mirror.capture))::text, 'UTF8'))
$$;
COMMENT ON FUNCTION walmirror.mirror(regclass, text, text, text[], interval, boolean) IS
    'keeps every row of a table in Redis';

CREATE FUNCTION walmirror.cache(rel regclass, key text DEFAULT NULL, value text DEFAULT 'hash', columns text[] DEFAULT NULL,
                                ttl interval DEFAULT NULL, on_write text DEFAULT 'refresh') RETURNS void
    LANGUAGE sql SET search_path = pg_catalog, pg_temp AS
$$
    SELECT walmirror.set_label(rel::oid, convert_to(jsonb_strip_nulls(jsonb_build_object(
        'mode', 'cache', 'key', coalesce(cache.key, walmirror.default_key(rel::oid)), 'value', cache.value, 'columns', cache.columns,
        'ttl_ms', round(extract(epoch FROM cache.ttl) * 1000)::bigint, 'on_write', cache.on_write))::text, 'UTF8'))
$$;
COMMENT ON FUNCTION walmirror.cache(regclass, text, text, text[], interval, text) IS
    'keeps those rows of a table in Redis that SELECTs read';

CREATE FUNCTION walmirror.unmirror(rel regclass, keep_keys boolean DEFAULT false) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS
$$
BEGIN
    IF NOT EXISTS (SELECT 1 FROM walmirror.mirrors m WHERE m.oid = rel) THEN
        RAISE EXCEPTION 'table "%" is not mirrored', rel
            USING ERRCODE = 'undefined_object', HINT = 'TABLE walmirror.mirrors; shows what is.';
    END IF;
    -- Told before the label goes: the event trigger tells of that too, but by then the table is unknown to the sink.
    IF keep_keys THEN
        PERFORM walmirror.announce(rel::oid, refresh => false, keep_keys => true);
    END IF;
    EXECUTE format('SECURITY LABEL FOR walmirror ON TABLE %s IS NULL', rel);
END
$$;
COMMENT ON FUNCTION walmirror.unmirror(regclass, boolean) IS
    'takes a table out of Redis; its keys go too, unless keep_keys (which a sink that loses its slot before it has read of this does not know)';

-- What SELECT capture does ------------------------------------------------------------------------------------------

CREATE FUNCTION walmirror.capture_counters(OUT counter text, OUT value bigint, OUT meaning text) RETURNS SETOF record
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'capture_counters_wrapper';

CREATE VIEW walmirror.capture_stats AS SELECT c.counter, c.value, c.meaning FROM walmirror.capture_counters() c;
COMMENT ON VIEW walmirror.capture_stats IS 'rows that SELECT capture saw, wrote to the WAL, and left out, by reason';
GRANT SELECT ON walmirror.capture_stats TO PUBLIC;

-- Telling the stream of DDL -----------------------------------------------------------------------------------------

-- The decoder reads this message where the transaction did its DDL, and then looks the table up in the catalogs.
CREATE FUNCTION walmirror.announce(tbl oid, refresh boolean DEFAULT false, keep_keys boolean DEFAULT false) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'announce_wrapper';
COMMENT ON FUNCTION walmirror.announce(oid, boolean, boolean) IS
    'tells the stream that the caller, who has to own the table, changed it';

CREATE FUNCTION walmirror.announce_ddl(tbl oid, refresh boolean) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'announce_ddl_wrapper';
COMMENT ON FUNCTION walmirror.announce_ddl(oid, boolean) IS
    'the same for event triggers, whoever owns the table';

-- These see what other sessions have done since the snapshot of the transaction was taken, as DDL does.
CREATE FUNCTION walmirror.tables_of_type(typ oid) RETURNS SETOF oid
    LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'tables_of_type_wrapper';
COMMENT ON FUNCTION walmirror.tables_of_type(oid) IS
    'the labelled tables with a column of a type, or of an array, domain, range or row type made of it, and those that are OF it';

CREATE FUNCTION walmirror.heirs(tbl oid) RETURNS SETOF oid
    LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'heirs_wrapper';
COMMENT ON FUNCTION walmirror.heirs(oid) IS
    'a table, those that inherit its columns and are no partitions, and partitions of it that have a label of their own, as none may';

CREATE FUNCTION walmirror.row_type(tbl oid) RETURNS oid
    LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'row_type_wrapper';
COMMENT ON FUNCTION walmirror.row_type(oid) IS 'the type of the rows of a table';

CREATE FUNCTION walmirror.is_partitioned(tbl oid) RETURNS boolean
    LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'is_partitioned_wrapper';
COMMENT ON FUNCTION walmirror.is_partitioned(oid) IS 'whether a table has partitions; false if there is no such table';

CREATE FUNCTION walmirror.adds_value(command pg_ddl_command) RETURNS boolean
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'walmirror_adds_value';
COMMENT ON FUNCTION walmirror.adds_value(pg_ddl_command) IS
    'whether a command is ALTER TYPE … ADD VALUE, with which no value that is stored changes';

CREATE FUNCTION walmirror.only_adds(command pg_ddl_command) RETURNS boolean
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'walmirror_only_adds';
COMMENT ON FUNCTION walmirror.only_adds(pg_ddl_command) IS
    'whether a command is an ALTER TABLE that takes nothing away from its table, as one that adds a constraint';

CREATE FUNCTION walmirror.defers_index(command pg_ddl_command) RETURNS boolean
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'walmirror_defers_index';
COMMENT ON FUNCTION walmirror.defers_index(pg_ddl_command) IS
    'whether a command is an ALTER TABLE that makes a deferrable constraint of an index that was there';

-- The functions of event triggers run as the extension's owner: DDL may change the mirror of a table that whoever does it does not
-- own (its partition, a type of its columns), and what they call is for that owner alone, who need not own the table either. Only event
-- triggers can call them.
CREATE FUNCTION walmirror.on_ddl_command_end() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
$$
DECLARE
    command record;
    root oid;
BEGIN
    FOR command IN SELECT DISTINCT c.classid, c.objid, c.command_tag, c.object_type, walmirror.adds_value(c.command) AS adds_value,
                       walmirror.only_adds(c.command) AS only_adds, walmirror.defers_index(c.command) AS defers_index
                   FROM pg_event_trigger_ddl_commands() c
                   WHERE c.classid IN ('pg_class'::regclass, 'pg_type'::regclass, 'pg_namespace'::regclass)
    LOOP
        IF command.classid = 'pg_class'::regclass
            AND command.object_type IN ('table', 'table column', 'foreign table', 'foreign table column')
        THEN
            -- The table that the command names comes first, so that what is refused is told of that one.
            FOR root IN SELECT r FROM (SELECT DISTINCT walmirror.root(h) AS r FROM walmirror.heirs(command.objid) h) roots
                        ORDER BY r IS DISTINCT FROM walmirror.root(command.objid)
            LOOP
                IF root IS NOT NULL THEN
                    -- What on_sql_drop does for an index that is dropped: the key may not rest on this one any more.
                    IF command.defers_index THEN
                        PERFORM walmirror.check_at_commit(root);
                    END IF;
                    -- pg_restore alters tables before it has created their indexes, and has a replica identity come behind its index;
                    -- on_sql_drop sees to those that are dropped.
                    PERFORM walmirror.check_label(root, added => command.only_adds);
                    -- An ALTER of a partitioned table may attach or detach a partition with its rows.
                    PERFORM walmirror.announce_ddl(root, refresh => command.command_tag = 'ALTER TABLE' AND
                        walmirror.is_partitioned(root));
                ELSIF command.command_tag = 'SECURITY LABEL' THEN
                    PERFORM walmirror.announce_ddl(command.objid, refresh => false);
                END IF;
            END LOOP;
        END IF;
        -- Values of a type that others have columns of; also the row types of tables.
        FOR root IN SELECT DISTINCT t FROM (
                SELECT command.objid AS typ WHERE command.command_tag = 'ALTER TYPE' AND command.classid = 'pg_type'::regclass AND NOT command.adds_value
                UNION ALL
                SELECT walmirror.row_type(h) FROM walmirror.heirs(command.objid) h
                -- A view that is replaced may get further columns.
                WHERE (command.command_tag LIKE 'ALTER %' OR command.command_tag = 'CREATE VIEW') AND command.classid = 'pg_class'::regclass
            ) changed, walmirror.tables_of_type(changed.typ) t
        LOOP
            PERFORM walmirror.check_label(root, added => false);
            PERFORM walmirror.announce_ddl(root, refresh => true);
        END LOOP;
        -- The primary key of a partitioned table becomes valid with the last of its partitions', and no relation cache is told. And what
        -- makes a key unique may come after its label.
        IF command.command_tag IN ('ALTER INDEX', 'CREATE INDEX') AND command.object_type = 'index' THEN
            SELECT walmirror.root(i.indrelid) INTO root FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
            WHERE i.indexrelid = command.objid AND i.indisunique AND (c.relkind = 'p' OR command.command_tag = 'CREATE INDEX');
            IF root IS NOT NULL THEN
                PERFORM walmirror.invalidate(root);
                PERFORM walmirror.announce_ddl(root, refresh => false);
            END IF;
        END IF;
        IF command.classid = 'pg_namespace'::regclass AND command.command_tag = 'ALTER SCHEMA' THEN
            FOR root IN SELECT m.oid FROM walmirror.mirrors m JOIN pg_class c ON c.oid = m.oid WHERE c.relnamespace = command.objid
            LOOP
                PERFORM walmirror.check_label(root, added => false);
                PERFORM walmirror.announce_ddl(root, refresh => false);
            END LOOP;
        END IF;
    END LOOP;
END
$$;

-- ALTER TABLE is about to rewrite a table: every row may change, without a change in the stream.
CREATE FUNCTION walmirror.on_table_rewrite() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
$$
DECLARE
    root oid := walmirror.root(pg_event_trigger_table_rewrite_oid());
BEGIN
    IF root IS NOT NULL THEN
        PERFORM walmirror.announce_ddl(root, refresh => true);
    END IF;
END
$$;

-- A dropped index, constraint or column may be what a label rests on.
CREATE FUNCTION walmirror.on_sql_drop() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
$$
DECLARE
    mirrored oid;
    anew boolean;
    locked oid[];
BEGIN
    IF EXISTS (SELECT 1 FROM pg_event_trigger_dropped_objects() d
               WHERE NOT d.is_temporary AND d.object_type IN ('index', 'table column', 'table constraint'))
    THEN
        -- An index does not tell any more whose it was. The tables that lost something are locked by this session, also by
        -- DROP INDEX CONCURRENTLY; others need not be looked at, which would wait for DDL of other sessions on them.
        locked := ARRAY(SELECT DISTINCT walmirror.root(l.relation) FROM pg_locks l
                        WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.granted
                          AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                          AND l.mode IN ('AccessExclusiveLock', 'ExclusiveLock', 'ShareRowExclusiveLock', 'ShareUpdateExclusiveLock'));
        FOR mirrored IN SELECT l FROM unnest(locked) l WHERE l IS NOT NULL
        LOOP
            PERFORM walmirror.check_at_commit(mirrored);
        END LOOP;
    END IF;
    -- Columns can also go with their type, which is no ALTER TABLE of their table. And one that is made anew in the command that drops
    -- it leaves the table's definition as it was, but not its rows.
    FOR mirrored, anew IN SELECT c.root, bool_or(c.anew) FROM (
            SELECT walmirror.root(d.objid) AS root, NOT d.original AS gone, EXISTS (
                SELECT 1 FROM pg_attribute a WHERE a.attrelid = d.objid AND NOT a.attisdropped
                AND a.attname = d.address_names[cardinality(d.address_names)]) AS anew
            FROM pg_event_trigger_dropped_objects() d
            WHERE NOT d.is_temporary AND d.object_type = 'table column' AND EXISTS (SELECT 1 FROM pg_class c WHERE c.oid = d.objid)
        ) c WHERE c.root IS NOT NULL AND (c.gone OR c.anew) GROUP BY c.root
    LOOP
        PERFORM walmirror.announce_ddl(mirrored, refresh => anew);
    END LOOP;
    -- And from within the values of other tables, whose columns are of that row type.
    FOR mirrored IN SELECT DISTINCT t FROM pg_event_trigger_dropped_objects() d, walmirror.tables_of_type(walmirror.row_type(d.objid)) t
            WHERE d.classid = 'pg_class'::regclass AND NOT d.is_temporary AND NOT d.original
              AND d.object_type IN ('composite type column', 'table column', 'foreign table column')
    LOOP
        PERFORM walmirror.announce_ddl(mirrored, refresh => true);
    END LOOP;
END
$$;

CREATE EVENT TRIGGER walmirror_ddl_command_end ON ddl_command_end EXECUTE FUNCTION walmirror.on_ddl_command_end();
CREATE EVENT TRIGGER walmirror_table_rewrite ON table_rewrite EXECUTE FUNCTION walmirror.on_table_rewrite();
CREATE EVENT TRIGGER walmirror_sql_drop ON sql_drop EXECUTE FUNCTION walmirror.on_sql_drop();
-- Also in sessions with session_replication_role = replica: the mirror follows whoever does the DDL.
ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS;
ALTER EVENT TRIGGER walmirror_table_rewrite ENABLE ALWAYS;
ALTER EVENT TRIGGER walmirror_sql_drop ENABLE ALWAYS;

-- Whatever ALTER DEFAULT PRIVILEGES says. Who may do what is a question of the tables that they are called for.
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA walmirror TO PUBLIC;
-- What the event triggers call does not ask whose a table is. It is for the owner alone, and ALTER DEFAULT PRIVILEGES may name others.
DO $$
DECLARE
    own text;
    others text;
BEGIN
    FOREACH own IN ARRAY ARRAY['check_label(oid, boolean)', 'check_at_commit(oid)', 'invalidate(oid)', 'announce_ddl(oid, boolean)']
    LOOP
        SELECT string_agg(DISTINCT CASE a.grantee WHEN 0::oid THEN 'PUBLIC' ELSE a.grantee::regrole::text END, ', ') INTO others
        FROM pg_proc p CROSS JOIN aclexplode(p.proacl) a
        WHERE p.oid = format('walmirror.%s', own)::regprocedure::oid AND a.grantee <> p.proowner;
        EXECUTE format('REVOKE EXECUTE ON FUNCTION walmirror.%s FROM %s CASCADE', own, others);
    END LOOP;
END
$$;
