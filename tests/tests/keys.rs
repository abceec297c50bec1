//! Keys: how they are made, what happens when they change, and which tables have none. Whose a key is that two templates could make:
//! key_spaces.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{Db, Mirror};

#[track_caller]
fn run(m: &Mirror, statements: &[&str]) {
    for statement in statements {
        m.sql(statement);
        m.check();
    }
}

/// Other tools leave the old key behind, or write a placeholder for the large column.
#[test]
fn a_changed_key_moves_the_row_with_its_large_unchanged_column() {
    let m = Mirror::with(
        "CREATE TABLE h (id int PRIMARY KEY, note text, doc text); ALTER TABLE h ALTER doc SET STORAGE EXTERNAL; \
         CREATE TABLE j (LIKE h INCLUDING ALL); CREATE TABLE s (LIKE h INCLUDING ALL); \
         INSERT INTO h SELECT i, 'n' || i, repeat(md5(i::text), 3000) FROM generate_series(1, 20) i; \
         INSERT INTO j SELECT * FROM h; INSERT INTO s SELECT * FROM h; \
         SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json'), \
                walmirror.mirror('s', value => 'string', columns => '{doc}')",
    );
    for table in ["h", "j", "s"] {
        let sql = |s: &str| s.replace("{t}", table);
        m.sql(&sql("UPDATE {t} SET id = 101 WHERE id = 1"));
        m.settle();
        m.sql(&sql(
            "UPDATE {t} SET id = id + 1000, note = 'moved' WHERE id BETWEEN 2 AND 5",
        ));
        m.settle();
        // Two rows swap their keys in one transaction.
        m.sql(&sql(
            "BEGIN; UPDATE {t} SET id = -1 WHERE id = 10; UPDATE {t} SET id = 10 WHERE id = 11; \
             UPDATE {t} SET id = 11 WHERE id = -1; COMMIT",
        ));
        m.settle();
        // There and back again.
        m.sql(&sql(
            "BEGIN; UPDATE {t} SET id = 500 WHERE id = 12; UPDATE {t} SET id = 12 WHERE id = 500; COMMIT",
        ));
        m.settle();
        // A key changes, and the key it had is taken by a new row.
        m.sql(&sql(
            "BEGIN; UPDATE {t} SET id = 600 WHERE id = 13; INSERT INTO {t} VALUES (13, 'new', 'small'); COMMIT",
        ));
        m.settle();
        m.sql(&sql(
            "BEGIN; UPDATE {t} SET id = 700 WHERE id = 14; DELETE FROM {t} WHERE id = 700; COMMIT",
        ));
        m.settle();
        // The large column changes together with the key.
        m.sql(&sql(
            "UPDATE {t} SET id = 800, doc = repeat('new ', 30000) WHERE id = 15",
        ));
        m.settle();
    }
}

#[test]
fn every_key_changes_at_once() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 5000) i",
    );
    run(
        &m,
        &[
            "UPDATE t SET id = id + 100000",
            "UPDATE t SET id = -id",
            "UPDATE t SET v = 'same key'",
        ],
    );
}

/// ("a-b", "c") and ("a", "b-c") must not meet, whatever the separator is.
#[test]
fn composite_keys_never_meet() {
    let m = Mirror::with(
        "CREATE TABLE t (a text, b text, n int, PRIMARY KEY (a, b)); \
         CREATE TABLE u (a text, b text, n int, PRIMARY KEY (b, a)); \
         SELECT walmirror.mirror('t'), walmirror.mirror('u', key => 'u-{a}-{b}', value => 'json')",
    );
    m.sql(
        "INSERT INTO t SELECT a, b, row_number() OVER () FROM \
           unnest(ARRAY['a', 'a-b', 'a:b', 'a%3Ab', '', ':', '%', '%25', 'a:', ' ', 'é:ü', E'\\n', '{x}', '}']) a, \
           unnest(ARRAY['c', 'b-c', ':b:c', 'b%3Ac', '', ':', '%', '%25', ':c', ' ', '☃', '*', '[a]']) b; \
         INSERT INTO u SELECT a, b, n FROM t WHERE a !~ '-' AND b !~ '-'",
    );
    m.check();
    assert_eq!(m.redis.hash("t:a%3Ab:%253Ac"), []);
    assert_eq!(m.redis.hash("t:a%3Ab:b%253Ac")[0], ("a".into(), "a:b".into()));
    run(
        &m,
        &[
            "UPDATE t SET b = b || ':x' WHERE a = 'a:b'",
            "UPDATE t SET a = b, b = a || ':swapped' WHERE a IN (':', '%')",
            "DELETE FROM t WHERE a = 'a-b' OR b = ''",
            "TRUNCATE u",
            "DELETE FROM t",
        ],
    );
}

#[test]
fn keys_of_many_types() {
    let types = [
        ("text", "'t' || i || E' \\t*?[\\\\x]'"),
        ("uuid", "md5(i::text)::uuid"),
        ("date", "'2026-01-01'::date + i"),
        (
            "timestamptz",
            "'2026-01-01 00:00:00.5+00'::timestamptz + i * interval '1 s'",
        ),
        ("timestamp", "'0044-03-15 BC'::timestamp + i * interval '1 s'"),
        ("bigint", "9223372036854775807 - i"),
        ("smallint", "i - 30"),
        ("numeric", "i / 8.0"),
        ("float8", "i / 7.0::float8"),
        ("bytea", "decode(md5(i::text), 'hex')"),
        ("char(5)", "i::text"),
        ("varchar(20)", "'V' || i"),
        ("inet", "('10.0.0.' || i)::inet"),
        ("mood", "(enum_range(NULL::mood))[i]"),
        ("int[]", "ARRAY[i, -i, NULL]"),
        ("interval", "i * interval '1 day'"),
    ];
    let m = Mirror::new();
    m.sql("CREATE TYPE mood AS ENUM ('sad', 'so so', 'happy: very', '%')");
    for (i, (kind, value)) in types.iter().enumerate() {
        m.sql(&format!(
            "CREATE TABLE t{i} (k {kind} PRIMARY KEY, n int); CREATE TABLE c{i} (k {kind}, n int, PRIMARY KEY (k, n)); \
             SELECT walmirror.mirror('t{i}'), walmirror.mirror('c{i}'); \
             INSERT INTO t{i} SELECT {value}, i FROM generate_series(1, 2) i; \
             INSERT INTO c{i} SELECT {value}, i FROM generate_series(1, 2) i"
        ));
    }
    m.start();
    m.settle();
    for (i, (_, value)) in types.iter().enumerate() {
        m.sql(&format!(
            "INSERT INTO t{i} SELECT {value}, i FROM generate_series(3, 4) i; \
             INSERT INTO c{i} SELECT {value}, i FROM generate_series(3, 4) i; \
             UPDATE c{i} SET n = n + 10 WHERE n <> 2; DELETE FROM t{i} WHERE n IN (1, 3); UPDATE t{i} SET n = -n; \
             DELETE FROM c{i} WHERE n = 2"
        ));
    }
    m.check();
}

#[test]
fn replica_identity_full_and_index() {
    let m = Mirror::with(
        "CREATE TABLE f (id int PRIMARY KEY, email text, doc text); ALTER TABLE f ALTER doc SET STORAGE EXTERNAL; \
         ALTER TABLE f REPLICA IDENTITY FULL; \
         CREATE TABLE x (id int PRIMARY KEY, email text NOT NULL UNIQUE, v text); \
         ALTER TABLE x REPLICA IDENTITY USING INDEX x_email_key; \
         CREATE TABLE nopk (a text, b int, v text, UNIQUE (b, a)); ALTER TABLE nopk REPLICA IDENTITY FULL; \
         SELECT walmirror.mirror('f', key => 'f:{email}:{id}'), walmirror.mirror('x', key => 'x:{email}'), \
                walmirror.mirror('nopk', key => 'nopk:{a}:{b}'); \
         INSERT INTO f SELECT i, 'e' || i || '@x', repeat(md5(i::text), 1000) FROM generate_series(1, 20) i; \
         INSERT INTO x SELECT i, 'e' || i || '@x', 'v' FROM generate_series(1, 20) i; \
         INSERT INTO nopk SELECT 'a' || i, i, 'v' FROM generate_series(1, 20) i",
    );
    for statement in [
        "UPDATE f SET email = 'new' || id WHERE id < 5; UPDATE f SET doc = 'small' WHERE id = 6; \
           UPDATE f SET id = id + 100 WHERE id > 15; DELETE FROM f WHERE id = 10",
        "UPDATE x SET v = 'w' WHERE id < 5; UPDATE x SET email = 'new' || id WHERE id IN (3, 4, 9); \
           UPDATE x SET id = id + 100 WHERE id < 9; DELETE FROM x WHERE id = 15",
        "UPDATE nopk SET v = 'w' WHERE b < 5; UPDATE nopk SET a = 'A' || a WHERE b IN (4, 5); DELETE FROM nopk WHERE b > 15",
    ] {
        m.sql(statement);
        m.settle();
    }
}

/// Without a value in every column of the key there is no key; it comes and goes with the value.
#[test]
fn a_null_in_the_key_means_no_key() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, nick text UNIQUE); ALTER TABLE t REPLICA IDENTITY FULL; \
         SELECT walmirror.mirror('t', key => 'nick:{nick}'); INSERT INTO t VALUES (1, 'a'), (2, NULL), (3, NULL)",
    );
    assert_eq!(m.redis.keys(), ["nick:a"]);
    run(
        &m,
        &[
            "INSERT INTO t VALUES (4, NULL)",
            "UPDATE t SET nick = 'b' WHERE id = 2",
            "UPDATE t SET nick = NULL WHERE id = 1",
            "DELETE FROM t WHERE id = 3",
            "UPDATE t SET id = 7 WHERE id = 4",
        ],
    );
    assert_eq!(m.redis.keys(), ["nick:b"]);
}

/// A partition takes its replica identity from nobody, so that it cannot be made in its place; the hint says how it can.
#[test]
fn a_new_partition_under_a_key_of_another_index() {
    let m = Mirror::with(
        "CREATE TABLE p (id int, tag int NOT NULL, PRIMARY KEY (id, tag), UNIQUE (tag)) PARTITION BY LIST (tag); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); ALTER TABLE p1 REPLICA IDENTITY USING INDEX p1_tag_key; \
         SELECT walmirror.mirror('p', key => 'p:{tag}')",
    );
    // The primary key would do as well.
    m.sql("CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2); ALTER TABLE p2 REPLICA IDENTITY USING INDEX p2_tag_key");
    m.sql("SELECT walmirror.unmirror('p'); ALTER TABLE p DROP CONSTRAINT p_pkey; SELECT walmirror.mirror('p', key => 'p:{tag}')");
    let error = m.db.error("CREATE TABLE p3 PARTITION OF p FOR VALUES IN (3)");
    assert!(error.hint().unwrap().contains("ATTACH PARTITION"), "{error:?}");
    m.sql(
        "CREATE TABLE p3 (id int NOT NULL, tag int NOT NULL UNIQUE); ALTER TABLE p3 REPLICA IDENTITY USING INDEX p3_tag_key; \
         ALTER TABLE p ATTACH PARTITION p3 FOR VALUES IN (3); INSERT INTO p VALUES (1, 1), (2, 2), (3, 3); DELETE FROM p WHERE tag = 2",
    );
    m.settle();
}

/// With the event triggers off the primary key may move to other columns. The WAL has an old row then, but not the key that it had.
#[test]
fn an_old_row_without_the_key_is_told() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, other int NOT NULL, v text); INSERT INTO t SELECT i, i, 'v' FROM generate_series(1, 20) i; \
         SELECT walmirror.mirror('t')",
    );
    m.settle();
    for trigger in ["walmirror_ddl_command_end", "walmirror_sql_drop"] {
        m.sql(&format!("ALTER EVENT TRIGGER {trigger} DISABLE"));
    }
    m.sql("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD UNIQUE (id), ADD PRIMARY KEY (other)");
    m.sql("DELETE FROM t WHERE id = 5");
    m.settle();
    m.sql("UPDATE t SET id = id + 100, other = -other WHERE id = 6");
    m.settle();
    assert!(
        m.sink(|sink| sink.output())
            .contains("the table is compared anew")
    );
}

#[test]
fn literal_braces_make_cluster_hash_tags() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, team int); ALTER TABLE t REPLICA IDENTITY FULL; \
         SELECT walmirror.mirror('t', key => '{{team:{team}}}:member:{id}'); \
         INSERT INTO t SELECT i, i % 3 FROM generate_series(1, 9) i",
    );
    assert_eq!(m.redis.keys()[0], "{team:0}:member:3");
    run(
        &m,
        &[
            "UPDATE t SET team = team + 1 WHERE id < 5",
            "DELETE FROM t WHERE team = 1",
        ],
    );
}

/// Each of these is refused, with a hint, and nothing is changed by the attempt.
#[test]
fn tables_without_a_usable_key_are_refused() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE nopk (a int); CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY); CREATE TEMP TABLE temporary (id int PRIMARY KEY); \
         CREATE TABLE ok (id int PRIMARY KEY, email text, v text); CREATE VIEW view AS SELECT * FROM ok; \
         CREATE MATERIALIZED VIEW matview AS SELECT * FROM ok; CREATE SEQUENCE seq; \
         CREATE TABLE nothing (id int PRIMARY KEY); ALTER TABLE nothing REPLICA IDENTITY NOTHING; \
         CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE); \
         CREATE TABLE included (id int, v int, PRIMARY KEY (id) INCLUDE (v)); \
         CREATE TABLE taken (id int PRIMARY KEY); SELECT walmirror.mirror('taken', key => 'k:{id}')",
    );
    let mut refused = vec![
        "SELECT walmirror.mirror('nopk')",
        "SELECT walmirror.mirror('unlogged')",
        "SELECT walmirror.mirror('temporary')",
        "SELECT walmirror.mirror('view')",
        "SELECT walmirror.mirror('matview')",
        "SELECT walmirror.mirror('seq')",
        "SELECT walmirror.mirror('ok_pkey')",
        "SELECT walmirror.mirror('nothing')",
        "SELECT walmirror.mirror('deferred')",
        "SELECT walmirror.mirror('pg_catalog.pg_class')",
        "SELECT walmirror.mirror('information_schema.sql_features')",
        // The key must be known from what the WAL has of an old row.
        "SELECT walmirror.mirror('included', key => 'x:{id}:{v}')",
        "SELECT walmirror.mirror('ok', key => 'x:{email}')",
        "SELECT walmirror.mirror('ok', key => 'x:{missing}')",
        "SELECT walmirror.mirror('ok', key => 'the same for all')",
        "SELECT walmirror.mirror('ok', key => 'x:{id')",
        "SELECT walmirror.mirror('ok', key => 'x:}')",
        "SELECT walmirror.mirror('ok', key => '')",
        "SELECT walmirror.mirror('ok', key => 'x:{}')",
        "SELECT walmirror.mirror('ok', key => 'k:{id}')",
        "SELECT walmirror.mirror('ok', key => 'walmirror:{id}')",
        "SELECT walmirror.mirror('ok', key => 'walmirror:{{x}}:{id}')",
        // Keys of anybody could be theirs, and would go.
        "SELECT walmirror.mirror('ok', key => '{id}')",
        "SELECT walmirror.cache('ok', key => '{id}')",
        "SELECT walmirror.mirror('ok', key => '{id}:{v}')",
        "SELECT walmirror.mirror('ok', value => 'xml')",
        "SELECT walmirror.mirror('ok', value => 'string')",
        "SELECT walmirror.mirror('ok', value => 'string', columns => '{email,v}')",
        "SELECT walmirror.mirror('ok', columns => '{email,missing}')",
        "SELECT walmirror.mirror('ok', columns => '{}')",
        "SELECT walmirror.mirror('ok', columns => '{v,v}')",
        "SELECT walmirror.mirror('ok', ttl => '-1 s')",
        "SELECT walmirror.mirror('ok', ttl => '0')",
        "SELECT walmirror.mirror('ok', ttl => '20000 years')",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '{\"mode\":\"mirror\",\"ttl_ms\":9223372036854775807}'",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS 'not json'",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '{\"mode\":\"mirror\",\"colour\":\"red\"}'",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '{\"mode\":\"both\"}'",
        // The extension's SQL reads labels as jsonb objects: jsonb has no such character, and columns are listed.
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '[\"mirror\",\"ok:{id}\",\"hash\",[\"v\"],5]'",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '{\"mode\":{\"mirror\":null}}'",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '{\"mode\":\"mirror\",\"value\":{\"json\":null}}'",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '{\"mode\":\"mirror\",\"key\":\"a\\u0000{id}\"}'",
        "SECURITY LABEL FOR walmirror ON TABLE ok IS '{\"mode\":\"mirror\",\"columns\":null}'",
        "SECURITY LABEL FOR walmirror ON COLUMN ok.v IS '{\"mode\":\"mirror\"}'",
        "SECURITY LABEL FOR walmirror ON SCHEMA public IS '{\"mode\":\"mirror\"}'",
    ];
    if m.db.pg.offers("file_fdw") {
        m.sql(
            "CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; \
             CREATE FOREIGN TABLE foreign_table (id int) SERVER files OPTIONS (filename '/dev/null')",
        );
        refused.push("SELECT walmirror.mirror('foreign_table')");
    }
    let mut problems = Vec::new();
    for statement in refused {
        let mut client = m.db.connect();
        if statement.contains("temporary") {
            client
                .batch_execute("CREATE TEMP TABLE temporary (id int PRIMARY KEY)")
                .unwrap();
        }
        problems.extend(Db::refuses(&mut client, statement));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert_eq!(
        m.db.value("SELECT string_agg(relation::text, ' ') FROM walmirror.mirrors"),
        "taken"
    );
}
