-- What walmirror.mirror and unmirror do to the label, and what the view shows.
\set SHOW_CONTEXT never
SET search_path = public;
CREATE TABLE users (id int PRIMARY KEY, name text, email text NOT NULL UNIQUE, born date);
CREATE TABLE pairs (a int, "B c" text, v text, PRIMARY KEY ("B c", a));
CREATE TABLE nokey (v text);

SELECT walmirror.mirror('users');
SELECT walmirror.mirror('pairs', value => 'json', columns => '{v,a}', ttl => '1 day 2 hours');
SELECT relation, mode, key, value, columns, ttl, on_write, capture FROM walmirror.mirrors ORDER BY 1;
SELECT label::jsonb FROM pg_seclabels WHERE provider = 'walmirror' ORDER BY objname;

-- Anew: what was not given is the default again.
SELECT walmirror.mirror('pairs', key => 'p/{a}/{B c}');
SELECT relation, mode, key, value, columns, ttl FROM walmirror.mirrors WHERE relation = 'pairs'::regclass;

-- Refused, with a hint.
SELECT walmirror.mirror('nokey');
SELECT walmirror.mirror('users', key => 'u:{missing}');
SELECT walmirror.mirror('users', key => 'u:{email}');
SELECT walmirror.mirror('users', value => 'xml');
SELECT walmirror.mirror('users', value => 'string');
SELECT walmirror.mirror('users', columns => '{nix}');
SELECT walmirror.mirror('users', ttl => '-1 s');
SELECT walmirror.mirror('users', key => 'p/{id}/{email}');
SELECT walmirror.unmirror('nokey');
ALTER TABLE pairs DROP COLUMN a;
ALTER TABLE pairs RENAME "B c" TO b;

-- Nothing of that changed anything.
SELECT relation, key FROM walmirror.mirrors ORDER BY 1;

-- A table owner may set the label, others may not.
CREATE ROLE :"slot" NOLOGIN;
GRANT SELECT ON users TO :"slot";
SET ROLE :"slot";
SELECT walmirror.mirror('users');
SELECT count(*) FROM walmirror.mirrors;
RESET ROLE;
ALTER TABLE users OWNER TO :"slot";
GRANT USAGE ON SCHEMA public TO :"slot";
SET ROLE :"slot";
SELECT walmirror.mirror('users', key => 'owned:{id}');
RESET ROLE;
SELECT relation, key FROM walmirror.mirrors ORDER BY 1;

SELECT walmirror.unmirror('users');
DROP TABLE pairs;
SELECT count(*) FROM walmirror.mirrors;
DROP TABLE users;
REVOKE USAGE ON SCHEMA public FROM :"slot";
DROP ROLE :"slot";
