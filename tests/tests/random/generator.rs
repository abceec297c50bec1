//! Random SQL: whole transactions, each a list of statements that is known before the first of them is executed, so that a seed
//! always gives the same ones, whatever becomes of them. Many fail, because another one took the column or the table away:
//! that is part of it.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// The tables, and what their columns are of. `a` and `c` inherit from `base`, `p` is partitioned, two levels deep.
pub const TABLES: &str = "CREATE SCHEMA other; CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy'); CREATE DOMAIN dom AS int; \
    CREATE TYPE pair AS (x int, y text); CREATE TABLE base (n int NOT NULL DEFAULT 0); \
    CREATE TABLE a (id int PRIMARY KEY, v text, doc text, mood mood, d dom, r pair) INHERITS (base); \
    CREATE TABLE b (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, v text, doc text, mood mood, d dom, r pair); \
    CREATE TABLE c (id int PRIMARY KEY, v text, doc text, mood mood, d dom, r pair) INHERITS (base); \
    CREATE TABLE p (part int, id int, n int NOT NULL DEFAULT 0, v text, doc text, mood mood, PRIMARY KEY (part, id)) PARTITION BY LIST (part); \
    CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2); \
    CREATE TABLE p3 PARTITION OF p FOR VALUES IN (3) PARTITION BY RANGE (id); \
    CREATE TABLE p31 PARTITION OF p3 FOR VALUES FROM (0) TO (150); CREATE TABLE p32 PARTITION OF p3 FOR VALUES FROM (150) TO (9999); \
    CREATE TABLE w (area text, name text, n int NOT NULL DEFAULT 0, v text, doc text, PRIMARY KEY (area, name)); \
    ALTER TABLE a ALTER doc SET STORAGE EXTERNAL; ALTER TABLE b ALTER doc SET STORAGE EXTERNAL; ALTER TABLE c ALTER doc SET STORAGE EXTERNAL; \
    ALTER TABLE p ALTER doc SET STORAGE EXTERNAL; ALTER TABLE w ALTER doc SET STORAGE EXTERNAL; \
    INSERT INTO a (id, n, v, doc, mood, d, r) SELECT i, i, 'v' || i, CASE WHEN i % 3 = 0 THEN repeat(md5(i::text), 100) END, 'ok', i, ROW(i, 'y')::pair \
        FROM generate_series(1, 200) i; \
    INSERT INTO b (id, n, v, doc, mood, d, r) SELECT id, n, v, doc, mood, d, r FROM a; INSERT INTO c (id, n, v, doc, mood, d, r) SELECT id, n, v, doc, mood, d, r FROM a; \
    INSERT INTO p SELECT 1 + i % 3, i, i, 'v' || i, CASE WHEN i % 3 = 0 THEN repeat(md5(i::text), 100) END, 'ok' FROM generate_series(1, 300) i; \
    INSERT INTO w SELECT (ARRAY['x', 'x:y', '%', ''])[1 + i % 4], 'n' || i, i, 'v' || i FROM generate_series(1, 200) i; \
    SELECT walmirror.mirror('a'), walmirror.mirror('b', value => 'json'), walmirror.cache('c'), walmirror.mirror('p'), walmirror.mirror('w')";

/// What keeps whoever waits from waiting for long, and has each SELECT of a cached table captured.
pub const SETTINGS: &str = "SET search_path = public, other, another; SET lock_timeout = '700ms'; SET statement_timeout = '20s'; \
    SET walmirror.capture_interval = 0";

/// Those with a key of one column of their own.
const PLAIN: [&str; 3] = ["a", "b", "c"];
const ALL: [&str; 5] = ["a", "b", "c", "p", "w"];

/// Rows. `{t}` is one of the plain tables, `{i}` and `{j}` are ids, `{n}` is a number below 1000, `{x}` is 1, 2 or 3.
const ROWS: [&str; 31] = [
    "UPDATE {t} SET n = {n} WHERE id = {i}",
    "UPDATE {t} SET n = {n} WHERE id = {i}",
    "UPDATE {t} SET v = 'multi {n}', n = n + 1 WHERE id % 7 = {x}",
    "INSERT INTO {t} (id, n, v, doc) VALUES ({i}, {n}, 'new', repeat('{n}', {n} * 5)) ON CONFLICT (id) DO UPDATE SET n = excluded.n",
    "INSERT INTO {t} (id, n) SELECT i, {n} FROM generate_series({i}, {i} + 30) i ON CONFLICT DO NOTHING",
    "DELETE FROM {t} WHERE id BETWEEN {i} AND {i} + 5",
    "UPDATE {t} SET id = {j} WHERE id = {i}",
    "UPDATE {t} SET id = id + 1000 WHERE id BETWEEN {i} AND {i} + 5",
    "UPDATE {t} SET id = id - 1000 WHERE id > 1000 AND id % 5 = {x}",
    "UPDATE {t} SET doc = repeat(md5('{n}'), 90) WHERE id BETWEEN {i} AND {i} + 10",
    "UPDATE {t} SET doc = NULL WHERE id = {i}",
    "UPDATE {t} SET mood = (SELECT e FROM unnest(enum_range(NULL::mood)) e ORDER BY e DESC LIMIT 1), d = {n} WHERE id BETWEEN {i} AND {i} + 3",
    "UPDATE {t} SET r = ROW({n}, 'r') WHERE id = {i}",
    "UPDATE base SET n = n + 1 WHERE n % 50 = {x}",
    "DELETE FROM {t} WHERE id = {i}; INSERT INTO {t} (id, n, v) VALUES ({i}, {n}, 'again')",
    "INSERT INTO p (part, id, n, v) VALUES ({x}, {i}, {n}, 'new') ON CONFLICT (part, id) DO UPDATE SET n = excluded.n, v = 'upserted'",
    "INSERT INTO p (part, id, n, v) SELECT {x}, i, {n}, 'many' FROM generate_series({i}, {i} + 20) i ON CONFLICT DO NOTHING",
    "UPDATE p SET n = {n}, v = v || '+' WHERE id = {i}",
    "UPDATE p SET part = {x} WHERE id = {i} AND NOT EXISTS (SELECT FROM p q WHERE q.id = {i} AND q.part = {x})",
    "UPDATE p SET id = id + 100 WHERE part = {x} AND id = {i}",
    "UPDATE p SET doc = repeat(md5('{n}'), 90) WHERE id BETWEEN {i} AND {i} + 10",
    "DELETE FROM p WHERE id BETWEEN {i} AND {i} + 5",
    "UPDATE p{x} SET v = 'direct {n}' WHERE id % 9 = {x}",
    "INSERT INTO w (area, name, n) VALUES ('x:y', 'n{i}', {n}) ON CONFLICT (area, name) DO UPDATE SET n = excluded.n",
    "UPDATE w SET area = (ARRAY['x', 'x:y', '%'])[{x}], n = {n} WHERE name = 'n{i}'",
    "UPDATE w SET area = '%:' || area WHERE name = 'n{i}' AND length(area) < 9",
    "UPDATE w SET name = 'n{j}', doc = repeat('{n}', 900) WHERE area = 'x' AND name = 'n{i}'",
    "UPDATE w SET name = 'n{j}' WHERE area = 'x' AND name = 'n{i}'",
    "DELETE FROM w WHERE name = 'n{i}'",
    "UPDATE w SET v = 'w {n}' WHERE name LIKE '%{x}'",
    "UPDATE {t} SET n = n WHERE id BETWEEN {i} AND {i} + 60",
];

/// What brings rows of caches into Redis.
const LOOKS: [&str; 6] = [
    "SELECT * FROM {t} WHERE id = {i}",
    "SELECT * FROM c WHERE id BETWEEN {i} AND {i} + 40",
    "SELECT v FROM c WHERE n >= 0",
    "SELECT * FROM p WHERE id BETWEEN {i} AND {i} + 40",
    "SELECT * FROM w WHERE n >= {n} LIMIT 40",
    "SELECT x.n, y.v FROM a x JOIN c y ON x.id = y.id WHERE x.id < {i}",
];

/// Schema changes. `{l}` is any of the tables that have a label, `{k}` its key. What begins with `!` wants no transaction around it.
const CHANGES: &[&str] = &[
    "ALTER TABLE {t} ADD IF NOT EXISTS e{x} int DEFAULT {n}",
    "ALTER TABLE {t} ADD IF NOT EXISTS e{x} text; UPDATE {t} SET e{x} = 'e{n}' WHERE id % 3 = 0",
    "ALTER TABLE {t} ADD IF NOT EXISTS e{x} float8 DEFAULT random()",
    "ALTER TABLE {t} DROP COLUMN IF EXISTS e{x}",
    "ALTER TABLE {t} DROP COLUMN IF EXISTS e{x}, ADD COLUMN e{x} text DEFAULT '{n}'",
    "ALTER TABLE {t} ADD IF NOT EXISTS g int GENERATED ALWAYS AS (id * {x}) STORED",
    "ALTER TABLE {t} DROP COLUMN IF EXISTS g",
    "ALTER TABLE {t} ALTER g DROP EXPRESSION",
    "ALTER TABLE {t} RENAME v TO v2",
    "ALTER TABLE {t} RENAME v2 TO v",
    "ALTER TABLE {t} RENAME v2 TO v",
    "SELECT walmirror.unmirror('{t}'); ALTER TABLE {t} RENAME id TO key; SELECT walmirror.mirror('{t}', key => '{t}:{key}'); \
     UPDATE {t} SET n = n + 1 WHERE key < 20; SELECT walmirror.unmirror('{t}'); ALTER TABLE {t} RENAME key TO id; SELECT walmirror.mirror('{t}')",
    "ALTER TABLE b ALTER n TYPE bigint; UPDATE b SET n = n + 1 WHERE id < 50",
    "ALTER TABLE b ALTER n TYPE numeric",
    "ALTER TABLE b ALTER n TYPE int",
    "ALTER TABLE base ALTER n TYPE bigint",
    "ALTER TABLE base ALTER n TYPE int",
    "ALTER TABLE {t} ALTER v TYPE varchar(900)",
    "ALTER TABLE {t} ALTER v TYPE text USING left(v, 50) || '.'",
    "ALTER TABLE {t} ALTER id TYPE bigint",
    "ALTER TABLE {t} ALTER id TYPE int",
    "ALTER TABLE {t} ALTER mood TYPE text",
    "ALTER TABLE {t} ALTER mood TYPE mood USING NULL",
    "ALTER TABLE {t} ALTER d TYPE numeric(9, {x})",
    "ALTER TABLE {t} ALTER d TYPE dom",
    "ALTER TABLE {t} REPLICA IDENTITY FULL",
    "ALTER TABLE {t} REPLICA IDENTITY DEFAULT",
    "ALTER TABLE {t} REPLICA IDENTITY NOTHING",
    "CREATE UNIQUE INDEX IF NOT EXISTS {t}_again ON {t} (id)",
    "ALTER TABLE {t} REPLICA IDENTITY USING INDEX {t}_again",
    "DROP INDEX IF EXISTS {t}_again",
    "!CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS {t}_again ON {t} (id)",
    "!DROP INDEX CONCURRENTLY IF EXISTS {t}_again",
    "!REINDEX INDEX CONCURRENTLY {t}_again",
    "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey",
    "ALTER TABLE {t} ADD CONSTRAINT {t}_pkey PRIMARY KEY (id)",
    "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey; UPDATE {t} SET id = id + 500 WHERE id = {i}; ALTER TABLE {t} ADD CONSTRAINT {t}_pkey PRIMARY KEY (id)",
    "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey, ADD CONSTRAINT {t}_pkey PRIMARY KEY USING INDEX {t}_again",
    "ALTER TABLE {t} RENAME TO {t}_away; UPDATE {t}_away SET n = {n} WHERE id = {i}; ALTER TABLE {t}_away RENAME TO {t}",
    "ALTER TABLE {t} RENAME TO {t}_away",
    "ALTER TABLE {t}_away RENAME TO {t}",
    "ALTER TABLE {t}_away RENAME TO {t}",
    "ALTER TABLE {t}_away RENAME TO {t}",
    "ALTER TABLE {t}_away RENAME TO {t}",
    "ALTER TABLE a RENAME TO away; ALTER TABLE b RENAME TO a; ALTER TABLE away RENAME TO b",
    "ALTER TABLE {t} SET SCHEMA other",
    "ALTER TABLE other.{t} SET SCHEMA public",
    "ALTER SCHEMA other RENAME TO another",
    "ALTER SCHEMA another RENAME TO other",
    "TRUNCATE {t}; INSERT INTO {t} (id, n, v) SELECT i, -i, 'after' FROM generate_series(1, 80) i",
    "TRUNCATE a, b; INSERT INTO a (id) VALUES ({i})",
    "TRUNCATE base",
    "!VACUUM FULL {t}",
    "CLUSTER {t} USING {t}_pkey",
    "REINDEX TABLE {t}",
    "SELECT walmirror.unmirror('{t}'); ALTER TABLE {t} SET UNLOGGED; UPDATE {t} SET n = {n} WHERE id < 50; ALTER TABLE {t} SET LOGGED; SELECT walmirror.mirror('{t}')",
    "ALTER TABLE {t} SET UNLOGGED",
    "ALTER TABLE {t} SET LOGGED",
    "!ALTER TYPE mood ADD VALUE IF NOT EXISTS 'm{n}'",
    "ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'",
    "ALTER TYPE mood RENAME VALUE 'fine' TO 'ok'",
    "ALTER DOMAIN dom ADD CONSTRAINT positive CHECK (VALUE >= 0)",
    "ALTER DOMAIN dom DROP CONSTRAINT IF EXISTS positive",
    "ALTER DOMAIN dom RENAME TO domain",
    "ALTER DOMAIN domain RENAME TO dom",
    "ALTER TYPE pair ADD ATTRIBUTE z int",
    "ALTER TYPE pair DROP ATTRIBUTE IF EXISTS z",
    "ALTER TYPE pair RENAME ATTRIBUTE x TO xx",
    "ALTER TYPE pair RENAME ATTRIBUTE xx TO x",
    "ALTER TABLE base ADD IF NOT EXISTS inherited int DEFAULT {n}",
    "ALTER TABLE base DROP COLUMN IF EXISTS inherited",
    "ALTER TABLE c NO INHERIT base",
    "ALTER TABLE c INHERIT base",
    "DROP TABLE IF EXISTS {t}; CREATE TABLE {t} (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, v text, doc text, mood mood, d dom, r pair); \
     INSERT INTO {t} (id, v) VALUES (1, 'new'), (2, 'new'); SELECT walmirror.mirror('{t}')",
    "DROP TABLE IF EXISTS gone; CREATE TABLE gone (id int PRIMARY KEY); SELECT walmirror.mirror('gone'); INSERT INTO gone VALUES (1), ({i} + 1)",
    "DROP TABLE IF EXISTS gone",
    "ALTER TABLE p DETACH PARTITION p{x}",
    "ALTER TABLE p ATTACH PARTITION p{x} FOR VALUES IN ({x})",
    "ALTER TABLE p ATTACH PARTITION p{x} FOR VALUES IN ({x})",
    "ALTER TABLE p DETACH PARTITION p{x}; UPDATE p{x} SET v = 'apart {n}'; ALTER TABLE p ATTACH PARTITION p{x} FOR VALUES IN ({x})",
    "!ALTER TABLE p DETACH PARTITION p{x} CONCURRENTLY",
    "DROP TABLE p{x}",
    "CREATE TABLE IF NOT EXISTS p{x} PARTITION OF p FOR VALUES IN ({x}); INSERT INTO p (part, id, v) VALUES ({x}, {i}, 'created') ON CONFLICT DO NOTHING",
    // Its columns have other numbers than the table's.
    "DROP TABLE IF EXISTS p{x}; CREATE TABLE p{x} (junk int, LIKE p INCLUDING ALL); ALTER TABLE p{x} DROP junk; \
     INSERT INTO p{x} (part, id, n, v) SELECT {x}, i, {n}, 'junk' FROM generate_series(1, 40) i; ALTER TABLE p ATTACH PARTITION p{x} FOR VALUES IN ({x})",
    "CREATE TABLE IF NOT EXISTS p_rest PARTITION OF p DEFAULT; INSERT INTO p (part, id, v) VALUES (7, {i}, 'rest') ON CONFLICT DO NOTHING",
    "DROP TABLE IF EXISTS p_rest",
    "TRUNCATE p{x}; INSERT INTO p (part, id, v) VALUES ({x}, {i}, 'after')",
    "TRUNCATE p",
    "ALTER TABLE p3 DETACH PARTITION p31; UPDATE p31 SET n = {n}; ALTER TABLE p3 ATTACH PARTITION p31 FOR VALUES FROM (0) TO (150)",
    "ALTER TABLE p3 DETACH PARTITION p31",
    "ALTER TABLE p3 ATTACH PARTITION p31 FOR VALUES FROM (0) TO (150)",
    "TRUNCATE p32",
    "ALTER TABLE p ADD IF NOT EXISTS e{x} int DEFAULT {n}",
    "ALTER TABLE p DROP COLUMN IF EXISTS e{x}",
    "ALTER TABLE p ALTER v TYPE text USING left(v, 50) || '.'",
    "ALTER TABLE p{x} REPLICA IDENTITY FULL",
    "ALTER TABLE p{x} REPLICA IDENTITY DEFAULT",
    "ALTER TABLE w ADD IF NOT EXISTS e{x} int DEFAULT {n}",
    "ALTER TABLE w DROP COLUMN IF EXISTS e{x}",
    "ALTER TABLE w ALTER name TYPE varchar(90)",
];

/// Labels, each for one of the tables.
const LABELS: [&str; 20] = [
    "SELECT walmirror.mirror('{l}')",
    "SELECT walmirror.mirror('{l}')",
    "SELECT walmirror.mirror('{l}', value => 'json')",
    "SELECT walmirror.mirror('{l}', key => '{l}/{k}', columns => '{n,doc}')",
    "SELECT walmirror.mirror('{l}', key => '{l}{x}:{k}', value => 'json', columns => '{n,v}')",
    "SELECT walmirror.mirror('{l}', value => 'string', columns => '{doc}', ttl => '1 day')",
    "SELECT walmirror.mirror('{l}', key => '{l}{x}:{k}', ttl => '1 day')",
    "SELECT walmirror.mirror('{l}', capture => true)",
    "SELECT walmirror.cache('{l}')",
    "SELECT walmirror.cache('{l}', key => '{l}/{k}', on_write => 'populate', value => 'json')",
    "SELECT walmirror.cache('{l}', key => '{l}{x}:{k}', on_write => 'invalidate', ttl => '1 day')",
    "SELECT walmirror.cache('{l}', value => 'string', columns => '{doc}')",
    "SELECT walmirror.unmirror('{l}')",
    "SELECT walmirror.unmirror('{l}'); SELECT walmirror.mirror('{l}', value => 'json', ttl => '1 day')",
    "SELECT walmirror.unmirror('{l}'); UPDATE {l} SET n = {n}; SELECT walmirror.cache('{l}', value => 'json')",
    // What is kept is known again by the same template.
    "SELECT walmirror.unmirror('{l}'); SELECT walmirror.mirror('{l}', key => '{l}:{k}'); SELECT walmirror.unmirror('{l}', keep_keys => true); UPDATE {l} SET n = {n} WHERE n % 3 = 0; \
     SELECT walmirror.mirror('{l}', key => '{l}:{k}')",
    "SECURITY LABEL FOR walmirror ON TABLE {l} IS '{\"mode\":\"cache\"}'",
    "SECURITY LABEL FOR walmirror ON TABLE {l} IS '{\"mode\":\"mirror\",\"value\":\"json\"}'",
    "SECURITY LABEL FOR walmirror ON TABLE {l} IS NULL",
    "SELECT walmirror.mirror('{l}', key => 'x{x}:{k}')",
];

/// What a round begins with, so that none has only failures: tables are where they were again, with partitions, rows and labels. Each
/// of them may fail.
pub const MENDS: [&str; 13] = [
    "ALTER SCHEMA another RENAME TO other",
    "ALTER TABLE other.{t} SET SCHEMA public",
    "ALTER TABLE {t}_away RENAME TO {t}",
    "ALTER TABLE {t} RENAME v2 TO v",
    "ALTER TABLE {t} DROP COLUMN g",
    "ALTER TABLE {t} ALTER d TYPE dom",
    "ALTER TABLE {t} ADD CONSTRAINT {t}_pkey PRIMARY KEY (id)",
    "ALTER TABLE p ATTACH PARTITION p{x} FOR VALUES IN ({x})",
    "CREATE TABLE p{x} PARTITION OF p FOR VALUES IN ({x})",
    "INSERT INTO {t} (id, n, v) SELECT i, i, 'round' FROM generate_series(1, 99) i ON CONFLICT DO NOTHING",
    "INSERT INTO p (part, id, n, v) SELECT {x}, i, i, 'round' FROM generate_series(1, 99) i ON CONFLICT DO NOTHING",
    "INSERT INTO w (area, name, n) SELECT 'x', 'n' || i, i FROM generate_series(1, 99) i ON CONFLICT DO NOTHING",
    "DO $$ BEGIN PERFORM walmirror.mirror(r) FROM unnest(ARRAY['{t}', 'p', 'w']::regclass[]) r WHERE r NOT IN (SELECT relation FROM walmirror.mirrors); END $$",
];

/// One of them for a table and a partition.
pub fn mend(template: &str, number: usize) -> String {
    template
        .replace("{t}", PLAIN[number])
        .replace("{x}", &(number + 1).to_string())
}

/// One step of a session. The name counts how often such a thing worked.
pub struct Step {
    pub name: String,
    pub sql: String,
}

/// What a session does next: steps, and what ends the prepared transaction that the last of them leaves behind.
pub struct Transaction {
    pub steps: Vec<Step>,
    pub prepared: Option<String>,
}

/// The name of every change that there is.
pub fn changes() -> impl Iterator<Item = &'static str> {
    CHANGES.iter().chain(&LABELS).copied()
}

/// The next transaction of a session, of which one statement in so many is a schema change.
pub fn transaction(rng: &mut StdRng, session: usize, schema: f64) -> Transaction {
    let mut all = Transaction {
        steps: Vec::new(),
        prepared: None,
    };
    if rng.random_bool(0.5) {
        all.steps.push(statement(rng, schema, true));
        return all;
    }
    let isolation = [
        "",
        "",
        "",
        " ISOLATION LEVEL REPEATABLE READ",
        " ISOLATION LEVEL SERIALIZABLE",
    ];
    all.steps
        .push(plain(format!("BEGIN{}", isolation.choose(rng).unwrap())));
    let mut savepoints = 0;
    for _ in 0..rng.random_range(1..7) {
        match rng.random_range(0..12) {
            0 | 1 => {
                savepoints += 1;
                all.steps.push(plain(format!("SAVEPOINT s{savepoints}")));
            }
            2 if savepoints > 0 => all.steps.push(plain(format!("ROLLBACK TO s{savepoints}"))),
            3 if savepoints > 0 => {
                all.steps.push(plain(format!("RELEASE s{savepoints}")));
                savepoints -= 1;
            }
            _ => all.steps.push(statement(rng, schema, false)),
        }
    }
    let end = match rng.random_range(0..10) {
        0 => "ROLLBACK".to_owned(),
        1 | 2 => {
            let end = ["COMMIT", "COMMIT", "ROLLBACK"][rng.random_range(0..3)];
            all.prepared = Some(format!("{end} PREPARED 'session {session}'"));
            format!("PREPARE TRANSACTION 'session {session}'")
        }
        _ => "COMMIT".to_owned(),
    };
    all.steps.push(plain(end));
    all
}

fn plain(sql: String) -> Step {
    Step {
        name: String::new(),
        sql,
    }
}

fn statement(rng: &mut StdRng, schema: f64, alone: bool) -> Step {
    let template = if rng.random_bool(schema) {
        loop {
            let list = if rng.random_bool(0.3) {
                &LABELS[..]
            } else {
                CHANGES
            };
            let template = *list.choose(rng).unwrap();
            if alone || !template.starts_with('!') {
                break template;
            }
        }
    } else if rng.random_bool(0.2) {
        LOOKS.choose(rng).unwrap()
    } else {
        ROWS.choose(rng).unwrap()
    };
    let labelled = *ALL.choose(rng).unwrap();
    let key = match labelled {
        "p" => "{part}:{id}",
        "w" => "{area}:{name}",
        _ => "{id}",
    };
    let sql = template
        .trim_start_matches('!')
        .replace("{t}", PLAIN.choose(rng).unwrap())
        .replace("{l}", labelled)
        .replace("{k}", key)
        .replace("{i}", &rng.random_range(1..300).to_string())
        .replace("{j}", &rng.random_range(1..300).to_string())
        .replace("{n}", &rng.random_range(0..1000).to_string())
        .replace("{x}", &rng.random_range(1..4).to_string());
    Step {
        name: template.to_owned(),
        sql,
    }
}
