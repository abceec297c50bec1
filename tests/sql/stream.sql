-- The stream as people see it: format=json, without what differs from run to run.
\set SHOW_CONTEXT never
CREATE TABLE t (id int PRIMARY KEY, name text, n numeric, doc text);
ALTER TABLE t ALTER doc SET STORAGE EXTERNAL;
CREATE TABLE other (id int PRIMARY KEY);
SELECT walmirror.mirror('t');
SELECT 'created' FROM pg_create_logical_replication_slot(:'slot', 'walmirror');
CREATE FUNCTION changes() RETURNS SETOF jsonb LANGUAGE sql AS
$$ SELECT data::jsonb - '{xid,commit_lsn,end_lsn,commit_time,lsn,oid}'::text[]
   FROM pg_logical_slot_get_changes(current_database(), NULL, NULL, 'format', 'json') $$;

-- A table without a label sends nothing.
INSERT INTO other VALUES (1);
SELECT * FROM changes();

INSERT INTO t VALUES (1, 'one', 1.10, NULL), (2, NULL, 'NaN', 'd');
SELECT * FROM changes();
UPDATE t SET name = 'uno' WHERE id = 1;
UPDATE t SET id = 3 WHERE id = 2;
DELETE FROM t WHERE id = 3;
SELECT * FROM changes();

-- TOAST.
INSERT INTO t VALUES (4, 'big', 0, repeat('x', 3000));
UPDATE t SET name = 'still big' WHERE id = 4;
UPDATE t SET id = 5 WHERE id = 4;
SELECT left(c::text, 200) FROM changes() c;

-- Subtransactions.
BEGIN;
INSERT INTO t VALUES (10, 'kept');
SAVEPOINT a;
INSERT INTO t VALUES (11, 'lost');
ROLLBACK TO a;
INSERT INTO t VALUES (12, 'kept too');
COMMIT;
BEGIN;
INSERT INTO t VALUES (13, 'lost');
ROLLBACK;
SELECT * FROM changes();

-- DDL and the label.
BEGIN;
UPDATE t SET name = 'before' WHERE id = 10;
ALTER TABLE t ADD late int DEFAULT 7;
UPDATE t SET name = 'after' WHERE id = 10;
COMMIT;
SELECT * FROM changes();
TRUNCATE t;
SELECT * FROM changes();
INSERT INTO t (id) VALUES (20);
SELECT walmirror.unmirror('t');
INSERT INTO t (id) VALUES (21);
SELECT * FROM changes();
SELECT walmirror.mirror('t', value => 'json', key => 'k:{id}');
INSERT INTO t (id) VALUES (22);
SELECT * FROM changes();
DROP TABLE t;
SELECT * FROM changes();

-- Markers. They are not flushed by themselves: the commit after them does it.
SELECT 'x' FROM pg_logical_emit_message(false, 'walmirror.marker', 'hello');
SELECT 'x' FROM pg_logical_emit_message(false, 'somebody else', 'hello');
INSERT INTO other VALUES (2);
SELECT * FROM changes();

SELECT * FROM pg_logical_slot_peek_changes(:'slot', NULL, NULL, 'colour', 'red');
SELECT pg_drop_replication_slot(:'slot');
