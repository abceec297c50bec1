//! Keys: how they are made, what happens when they change, and which tables have none.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Db, Mirror, Pg, wait_for};

#[track_caller]
fn run(m: &Mirror, statements: &[&str]) {
    for statement in statements {
        m.sql(statement);
        m.check();
    }
}

/// The story: a key that could be of two tables went with the more specific one, or stayed as its row was, and the other table's row was
/// missing, or wrong, until it was written again.
#[test]
fn what_a_more_specific_table_leaves_is_the_other_tables_again() {
    let m = Mirror::with(
        "CREATE TABLE wide (id text PRIMARY KEY, v text); INSERT INTO wide VALUES ('b1', 'w'), ('c1', 'w'); \
         CREATE TABLE cache (id text PRIMARY KEY, v text); \
         SELECT walmirror.mirror('wide', key => 'x:{id}'), walmirror.cache('cache', key => 'y:{id}')",
    );
    m.settle();
    let left = [
        "SELECT walmirror.unmirror('narrow'), walmirror.unmirror('other')",
        "SELECT walmirror.mirror('narrow', key => 'n:{id}'), walmirror.mirror('other', key => 'o:{id}')",
        "DROP TABLE narrow, other",
    ];
    for leave in left {
        m.sql(
            "CREATE TABLE IF NOT EXISTS narrow (id int PRIMARY KEY, v text); CREATE TABLE IF NOT EXISTS other (LIKE narrow INCLUDING ALL); \
             INSERT INTO narrow VALUES (1, 'n'), (2, 'n') ON CONFLICT DO NOTHING; INSERT INTO other VALUES (1, 'o') ON CONFLICT DO NOTHING; \
             SELECT walmirror.mirror('narrow', key => 'x:b{id}'), walmirror.mirror('other', key => 'y:b{id}')",
        );
        wait_for(DEADLINE, "the more specific ones", || {
            let keys = m.redis.keys();
            ["x:b1", "x:b2", "y:b1"]
                .iter()
                .all(|key| keys.contains(&(*key).to_owned()))
                .then_some(())
        });
        m.sql(leave);
        m.settle();
    }
    assert_eq!(m.redis.keys(), ["x:b1", "x:c1"]);
}

/// A key that the other table had written goes when it is taken, whatever the table that takes it has, and whatever becomes of the row then.
#[test]
fn what_a_more_specific_table_takes_holds_no_row_of_the_other() {
    let m = Mirror::with(
        "CREATE TABLE wide (id text PRIMARY KEY, v text, doc text); ALTER TABLE wide ALTER doc SET STORAGE EXTERNAL; \
         INSERT INTO wide VALUES ('a:1', 'w', repeat('x', 9000)), ('b', 'w', repeat('x', 9000)); \
         CREATE TABLE narrow (id int PRIMARY KEY, v text); INSERT INTO narrow VALUES (2, 'n'); \
         SELECT walmirror.mirror('wide', key => 'x:{id}')",
    );
    m.settle();
    for (label, keys) in [
        ("mirror('narrow', key => 'x:a:{id}')", &["x:a:2", "x:b"][..]),
        ("cache('narrow', key => 'x:a:{id}')", &["x:b"]),
        (
            "mirror('narrow', key => 'x:a:{id}', value => 'json')",
            &["x:a:2", "x:b"],
        ),
    ] {
        assert_eq!(m.redis.keys(), ["x:a:1", "x:b"], "{label}");
        m.sql(&format!(
            "UPDATE wide SET v = 'before'; SELECT walmirror.{label}; UPDATE wide SET v = 'after'"
        ));
        wait_for(DEADLINE, "what was taken", || {
            (m.redis.keys() == keys).then_some(())
        });
        // The large column is left alone, and the row moves away and back.
        m.sql("UPDATE wide SET id = 'c' WHERE id = 'a:1'; UPDATE wide SET v = 'c' WHERE id = 'c'");
        m.settle();
        m.sql("UPDATE wide SET id = 'a:1' WHERE id = 'c'; UPDATE wide SET v = 'again'; UPDATE narrow SET v = v || 'n'");
        m.sync();
        assert_eq!(m.redis.keys(), keys, "{label}");
        m.sql("BEGIN; TRUNCATE wide; INSERT INTO wide VALUES ('a:1', 'w', repeat('y', 9000)), ('b', 'w', repeat('y', 9000)); COMMIT");
        m.sync();
        assert_eq!(m.redis.keys(), keys, "{label}");
        m.sql("SELECT walmirror.unmirror('narrow')");
        m.settle();
    }
}

/// The story: keys that a cache was told to leave behind were its own again when it got their template back, and as old as they were.
#[test]
fn kept_keys_are_not_taken_for_those_of_a_cache() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'); \
         SELECT walmirror.cache('t', key => 'x:{id}', on_write => 'populate')",
    );
    m.sync();
    m.outlast_announced();
    m.sql("UPDATE t SET v = 'kept'");
    m.sync();
    m.sql("SELECT walmirror.unmirror('t', keep_keys => true)");
    m.sync();
    assert_eq!(m.redis.keys(), ["x:1"]);
    m.sql("UPDATE t SET v = 'new'; SELECT walmirror.cache('t', key => 'y:{id}')");
    m.sync();
    assert_eq!(m.redis.keys(), ["x:1"]);
    m.sql("SELECT walmirror.cache('t', key => 'x:{id}')");
    m.sync();
    assert_eq!(m.redis.keys(), Vec::<String>::new());
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

/// A key of one table is never taken for one without a row of another, although its template could have made it.
#[test]
fn templates_that_begin_alike_leave_each_other_alone() {
    let m = Mirror::with(
        "CREATE TABLE users (id text PRIMARY KEY, n int); CREATE TABLE profiles (id text PRIMARY KEY, n int); \
         CREATE TABLE orders (id text, line int, n int, PRIMARY KEY (id, line)); \
         SELECT walmirror.mirror('users', key => 'user:{id}'), walmirror.mirror('profiles', key => 'user:{id}:profile'), \
           walmirror.mirror('orders', key => 'user:{id}:order:{line}', value => 'json')",
    );
    for statement in [
        "INSERT INTO users SELECT i, i FROM generate_series(1, 20) i; INSERT INTO profiles SELECT i, i FROM generate_series(1, 30) i; \
             INSERT INTO orders SELECT i, 5, i FROM generate_series(1, 30) i",
        "ALTER TABLE users ADD v int DEFAULT 4",
        "ALTER TABLE profiles ADD v int DEFAULT 4",
        "ALTER TABLE orders ADD v int DEFAULT 4",
        "TRUNCATE users",
        "INSERT INTO users SELECT i, i FROM generate_series(1, 20) i",
        "TRUNCATE profiles",
        "SELECT walmirror.unmirror('users')",
    ] {
        m.sql(statement);
        m.settle();
        m.check();
    }
}

/// What stands between the columns may stand in their values too: then a key can be read in several ways, and one of them is its row.
/// And a key column may have a type whose operators are somewhere else, or one that refuses what a foreign key holds.
/// Text of such a database is bytes, and its keys too.
#[test]
fn keys_of_any_bytes_are_left_alone_by_a_sweep() {
    let m = Mirror::of(Db::create_with(Pg::shared(), "ENCODING 'SQL_ASCII' LOCALE 'C'"));
    m.sql(
        "CREATE TABLE t (id text PRIMARY KEY, v text); INSERT INTO t SELECT 'k' || chr(i), 'v' FROM generate_series(100, 255) i; \
         SELECT walmirror.mirror('t')",
    );
    let size = || m.redis.command::<u64>("DBSIZE");
    let _: String = m.redis.command("SET something 1");
    m.start();
    let filled = || {
        let cursors: Vec<String> = m
            .redis
            .command(&format!("HVALS walmirror:{{{}}}:progress", m.db.name));
        cursors
            .iter()
            .any(|cursor| cursor.contains("\"stage\":\"done\""))
            .then_some(())
    };
    wait_for(DEADLINE, "the keys to be complete", filled);
    let before = size();
    assert!(before > 156, "{before}");
    m.sql("DELETE FROM t WHERE id = 'k' || chr(233)");
    m.sync();
    assert_eq!(size(), before - 1);
    // One that has to be read again, and one that has no row.
    m.sql("UPDATE t SET v = repeat('long', 10000) WHERE id = 'k' || chr(234)");
    m.sync();
    let change = |script: &str| {
        let done: i64 = redis::cmd("EVAL")
            .arg(script)
            .arg(0)
            .query(&mut m.redis.connect())
            .unwrap();
        assert_eq!(done, 1);
    };
    change("return redis.call('DEL', 't:k\\234')");
    change("redis.call('HSET', 't:k\\233', 'v', 'w') return 1");
    m.sql("ALTER TABLE t ALTER v SET STORAGE EXTERNAL; UPDATE t SET id = id WHERE id = 'k' || chr(234)");
    m.sync();
    let (code, output) = m.run(&["verify", "--repair"]);
    assert_eq!(code, Some(0), "{output}");
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(0), "{output}");
    assert_eq!(size(), before - 1);
}

#[test]
fn a_sweep_leaves_the_keys_of_rows_alone() {
    let m = Mirror::with(
        "CREATE TABLE stats (day date, id int, n int, PRIMARY KEY (day, id)); \
         CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE TABLE checked (id positive PRIMARY KEY, n int); \
         SELECT walmirror.mirror('stats', key => 'stats-{day}-{id}'), walmirror.mirror('checked')",
    );
    m.sql(
        "INSERT INTO stats SELECT '2024-01-01'::date + i, -i, i FROM generate_series(1, 40) i; \
         INSERT INTO checked SELECT i, i FROM generate_series(1, 40) i",
    );
    let has_ltree = m.db.connect().batch_execute("CREATE EXTENSION ltree").is_ok();
    if has_ltree {
        m.sql(
            "CREATE TABLE tree (path ltree PRIMARY KEY, n int); SELECT walmirror.mirror('tree'); \
             INSERT INTO tree SELECT ('top.n' || i)::ltree, i FROM generate_series(1, 40) i",
        );
    } else {
        println!("not on this server: ltree");
    }
    m.settle();
    m.check();
    let _: String = m.redis.command("SET checked:-5 foreign");
    let _: String = m.redis.command("SET stats-2024-01-02-7-8 foreign");
    m.sql("ALTER TABLE stats ADD v int DEFAULT 4; ALTER TABLE checked ADD v int DEFAULT 4");
    if has_ltree {
        m.sql("ALTER TABLE tree ADD v int DEFAULT 4");
    }
    m.settle();
    m.check();
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
