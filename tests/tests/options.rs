//! What can be chosen for a table, and shapes of tables that break simple mirrors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::Duration;

use walmirror_tests::{Mirror, wait_for};

#[track_caller]
fn run(m: &Mirror, statements: &[&str]) {
    for statement in statements {
        m.sql(statement);
        m.check();
    }
}

#[test]
fn columns_and_key() {
    let m = Mirror::with(
        "CREATE TABLE users (id int PRIMARY KEY, email text, password text, age int, note text); \
         INSERT INTO users SELECT i, 'u' || i || '@x', 'secret', i, NULL FROM generate_series(1, 20) i; \
         CREATE TABLE j (LIKE users INCLUDING ALL); CREATE TABLE s (LIKE users INCLUDING ALL); CREATE TABLE n (LIKE users INCLUDING ALL); \
         INSERT INTO j SELECT * FROM users; INSERT INTO s SELECT * FROM users; INSERT INTO n SELECT * FROM users; \
         SELECT walmirror.mirror('users', key => 'user:{id}', columns => '{email,age}'), \
                walmirror.mirror('j', key => 'json/{id}', value => 'json', columns => '{note,id,email}'), \
                walmirror.mirror('s', value => 'string', columns => '{email}'), \
                walmirror.mirror('n', columns => '{note}')",
    );
    assert_eq!(
        m.redis.hash("user:1"),
        [("age".into(), "1".into()), ("email".into(), "u1@x".into())]
    );
    assert_eq!(
        m.redis.get("json/1").unwrap(),
        r#"{"id": 1, "note": null, "email": "u1@x"}"#
    );
    assert_eq!(m.redis.get("s:1").unwrap(), "u1@x");
    for table in ["users", "j", "s", "n"] {
        let sql = |s: &str| s.replace("{t}", table);
        run(
            &m,
            &[
                // None of the columns that Redis has.
                &sql("UPDATE {t} SET password = 'changed'"),
                &sql("UPDATE {t} SET age = age + 1, email = NULL WHERE id = 2"),
                &sql("UPDATE {t} SET email = 'back' WHERE id = 2"),
                // A hash of one column exists only while that is not NULL.
                &sql("UPDATE {t} SET note = 'noted' WHERE id < 6"),
                &sql("UPDATE {t} SET note = NULL WHERE id = 3"),
                &sql("UPDATE {t} SET id = 300 WHERE id = 4"),
                &sql("INSERT INTO {t} (id, age) VALUES (50, 1)"),
                &sql("DELETE FROM {t} WHERE id = 5"),
            ],
        );
    }
}

#[test]
fn ttl() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b'); \
         CREATE TABLE j (LIKE t INCLUDING ALL); INSERT INTO j SELECT * FROM t; \
         CREATE TABLE s (LIKE t INCLUDING ALL); INSERT INTO s SELECT * FROM t; \
         SELECT walmirror.mirror('t', ttl => '1 day'), walmirror.mirror('j', value => 'json', ttl => '1 day'), \
                walmirror.mirror('s', value => 'string', columns => '{v}', ttl => '1 day')",
    );
    for table in ["t", "j", "s"] {
        let ttl = |id: i32| m.redis.command::<i64>(&format!("PTTL {table}:{id}"));
        assert!(ttl(1) > 86_000_000 && ttl(1) <= 86_400_000, "{table}: {}", ttl(1));
        let _: i64 = m.redis.command(&format!("PEXPIRE {table}:1 100000"));
        m.sql(&format!(
            "UPDATE {table} SET v = 'again' WHERE id = 1; INSERT INTO {table} VALUES (3, 'c')"
        ));
        m.check();
        // A write starts the time anew.
        assert!(ttl(1) > 86_000_000, "{table}: {}", ttl(1));
        assert!(ttl(3) > 86_000_000, "{table}: {}", ttl(3));
    }
}

#[test]
fn short_ttl_runs_out() {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t', ttl => '1 s')");
    m.start();
    m.sync();
    m.sql("INSERT INTO t VALUES (1)");
    wait_for(Duration::from_secs(20), "the key", || {
        (!m.redis.keys().is_empty()).then_some(())
    });
    wait_for(Duration::from_secs(20), "its expiry", || {
        m.redis.keys().is_empty().then_some(())
    });
}

#[test]
fn names_of_every_kind() {
    let long = "l".repeat(63);
    let m = Mirror::with(&format!(
        "CREATE SCHEMA one; CREATE SCHEMA \"Two.dots\"; \
         CREATE TABLE one.t (id int PRIMARY KEY, v text); CREATE TABLE \"Two.dots\".t (id int PRIMARY KEY, v text); \
         CREATE TABLE \"MiXed Case\" (\"ID\" int PRIMARY KEY, \"The \"\"Value\"\"\" text, \"colon:{{}}\" int, \"select\" int); \
         CREATE TABLE \"{long}\" (\"{long}\" int PRIMARY KEY); CREATE TABLE \"ünï\" (\"кол\" int PRIMARY KEY, \"é\" text); \
         SELECT walmirror.mirror('one.t', key => 'one:{{id}}'), walmirror.mirror('\"Two.dots\".t', key => 'two:{{id}}'), \
                walmirror.mirror('\"MiXed Case\"'), walmirror.mirror('{long}'), walmirror.mirror('ünï', value => 'json')"
    ));
    for table in ["one.t", "\"Two.dots\".t", "\"MiXed Case\"", "ünï", &long] {
        m.sql(&format!("INSERT INTO {table} SELECT generate_series(1, 20)"));
        m.check();
        m.sql(&format!(
            "DELETE FROM {table} WHERE ctid IN (SELECT ctid FROM {table} LIMIT 5)"
        ));
        m.check();
    }
    m.sql("UPDATE \"MiXed Case\" SET \"The \"\"Value\"\"\" = 'x', \"colon:{}\" = 3, \"select\" = 4; UPDATE one.t SET v = 'one'; TRUNCATE \"Two.dots\".t");
    m.check();
    assert_eq!(m.redis.hash("MiXed Case:20")[0], ("ID".into(), "20".into()));
}

/// Column names that a careless query would take for its own aliases.
#[test]
fn columns_named_like_anything() {
    let m = Mirror::with(
        "CREATE TABLE t (t int PRIMARY KEY, x text, r text, walmirror int, pack int, record bytea, relation int, oid oid, doc text); \
         ALTER TABLE t ALTER doc SET STORAGE EXTERNAL; INSERT INTO t SELECT i, 'x', 'r', i FROM generate_series(1, 20) i; \
         UPDATE t SET doc = repeat(md5(t::text), 100); SELECT walmirror.mirror('t')",
    );
    run(
        &m,
        &[
            "UPDATE t SET x = 'y', record = '\\x00', oid = 7",
            "DELETE FROM t WHERE t.t = 3",
        ],
    );
    let _: i64 = m.redis.command("DEL t:4");
    m.sql("UPDATE t SET pack = 1 WHERE t.t = 4");
    m.settle();
}

/// The default key of two tables of one name would be the same.
#[test]
fn the_same_name_in_two_schemas_needs_a_key() {
    let m = Mirror::new();
    m.sql("CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE a.t (id int PRIMARY KEY); CREATE TABLE b.t (id int PRIMARY KEY); SELECT walmirror.mirror('a.t')");
    let error = m.db.error("SELECT walmirror.mirror('b.t')");
    assert!(error.hint().is_some(), "{error:?}");
    m.sql("SELECT walmirror.mirror('b.t', key => 'b.t:{id}'); INSERT INTO a.t VALUES (1); INSERT INTO b.t VALUES (1)");
    m.start();
    m.settle();
}

#[test]
fn a_thousand_columns() {
    let columns: Vec<String> = (1..1000).map(|i| format!("c{i} int")).collect();
    let values: Vec<String> = (1..1000)
        .map(|i| format!("CASE WHEN {i} % 7 = i % 7 THEN NULL ELSE {i} END"))
        .collect();
    let m = Mirror::with(&format!(
        "CREATE TABLE h (id int PRIMARY KEY, {0}); CREATE TABLE j (id int PRIMARY KEY, {0}); \
         SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json'); \
         INSERT INTO h SELECT i, {1} FROM generate_series(1, 10) i; INSERT INTO j SELECT * FROM h",
        columns.join(", "),
        values.join(", ")
    ));
    run(
        &m,
        &[
            "INSERT INTO h SELECT * FROM (SELECT (h).* FROM h) x WHERE false",
            "UPDATE h SET c1 = 5, c999 = NULL, c500 = -1; UPDATE j SET c1 = 5, c999 = NULL, c500 = -1",
            "UPDATE h SET id = id + 100; DELETE FROM j WHERE id < 5",
        ],
    );
}

/// Dropped columns leave holes in the row; a mirror that counts columns trips over them.
#[test]
fn dropped_and_generated_columns() {
    let m = Mirror::with(
        "CREATE TABLE t (a int, gone1 text, id int PRIMARY KEY, gone2 int, price numeric, qty int, gone3 text, \
           total numeric GENERATED ALWAYS AS (price * qty) STORED, seq int GENERATED ALWAYS AS IDENTITY, d text DEFAULT 'dflt'); \
         ALTER TABLE t DROP gone1, DROP gone2, DROP gone3; ALTER TABLE t ADD late text DEFAULT 'fast default'; \
         INSERT INTO t (id, price, qty) SELECT i, i * 1.5, i FROM generate_series(1, 20) i; \
         ALTER TABLE t ADD later int DEFAULT 42; \
         CREATE TABLE j (LIKE t INCLUDING ALL); ALTER TABLE j DROP d; \
         INSERT INTO j (id, price, qty) SELECT id, price, qty FROM t; \
         SELECT walmirror.mirror('t'), walmirror.mirror('j', value => 'json')",
    );
    run(
        &m,
        &[
            "UPDATE t SET qty = qty + 1; UPDATE j SET qty = NULL WHERE id = 3",
            "INSERT INTO t (id, price, qty) VALUES (100, 1, 1); INSERT INTO j (id) VALUES (100)",
            "UPDATE t SET id = 200 WHERE id = 100; DELETE FROM j WHERE id = 100",
        ],
    );
}

const PARTITIONED: &str = "CREATE TABLE ev (id int, day date, v text, doc text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day); \
     CREATE TABLE ev_a PARTITION OF ev FOR VALUES FROM ('2026-01-01') TO ('2026-02-01'); \
     CREATE TABLE ev_b (doc text, extra int, v text, day date NOT NULL, id int NOT NULL); ALTER TABLE ev_b DROP extra; \
     ALTER TABLE ev ATTACH PARTITION ev_b FOR VALUES FROM ('2026-02-01') TO ('2026-03-01'); \
     CREATE TABLE ev_c PARTITION OF ev FOR VALUES FROM ('2026-03-01') TO ('2026-04-01') PARTITION BY LIST (id); \
     CREATE TABLE ev_c1 PARTITION OF ev_c FOR VALUES IN (1, 2, 3); CREATE TABLE ev_cd PARTITION OF ev_c DEFAULT; \
     INSERT INTO ev SELECT i, '2026-01-01'::date + i % 85, 'v' || i, repeat('d', 10) FROM generate_series(1, 300) i";

#[test]
fn partitions_appear_under_their_parent() {
    let m = Mirror::with(&format!("{PARTITIONED}; SELECT walmirror.mirror('ev')"));
    run(
        &m,
        &[
            "INSERT INTO ev SELECT i, '2026-01-01'::date + i % 85, 'w' FROM generate_series(1001, 1100) i",
            "INSERT INTO ev_b (id, day, v) VALUES (5000, '2026-02-10', 'direct')",
            "UPDATE ev SET v = upper(v)",
            "UPDATE ev SET v = NULL, doc = repeat('x', 5000) WHERE id % 10 = 0",
            // Rows move between partitions: the key changes, as the day is part of it.
            "UPDATE ev SET day = day + 30 WHERE day < '2026-02-01'",
            "DELETE FROM ev WHERE id % 7 = 0",
            "DELETE FROM ev_c1",
        ],
    );
    // Truncating one partition leaves the others' keys.
    m.sql("TRUNCATE ev_a");
    m.settle();
    m.sql(
        "BEGIN; INSERT INTO ev_b (id, day) VALUES (6000, '2026-02-11'); TRUNCATE ev_b; \
         INSERT INTO ev_b (id, day) VALUES (6001, '2026-02-12'); COMMIT",
    );
    m.settle();
    m.sql("TRUNCATE ev");
    m.check();
}

#[test]
fn row_movement_with_full_replica_identity() {
    let m = Mirror::with(
        "CREATE TABLE p (id int, region text, v text, PRIMARY KEY (id, region)) PARTITION BY LIST (region); \
         CREATE TABLE p_eu PARTITION OF p FOR VALUES IN ('eu'); CREATE TABLE p_us PARTITION OF p FOR VALUES IN ('us'); \
         CREATE TABLE p_rest PARTITION OF p DEFAULT; \
         ALTER TABLE p REPLICA IDENTITY FULL; ALTER TABLE p_eu REPLICA IDENTITY FULL; ALTER TABLE p_us REPLICA IDENTITY FULL; \
         ALTER TABLE p_rest REPLICA IDENTITY FULL; \
         INSERT INTO p SELECT i, (ARRAY['eu','us','asia'])[i % 3 + 1], 'v' || i FROM generate_series(1, 60) i; \
         SELECT walmirror.mirror('p')",
    );
    run(
        &m,
        &[
            "UPDATE p SET region = 'us' WHERE region = 'eu'",
            "UPDATE p SET region = 'mars', v = 'moved' WHERE id < 20",
            "BEGIN; UPDATE p SET region = 'eu' WHERE id = 30; UPDATE p SET region = 'us' WHERE id = 30; COMMIT",
        ],
    );
}

#[test]
fn attach_and_detach() {
    let m = Mirror::with(&format!("{PARTITIONED}; SELECT walmirror.mirror('ev')"));
    m.sql("ALTER TABLE ev DETACH PARTITION ev_a");
    m.settle();
    m.sql("INSERT INTO ev_a (id, day) VALUES (7000, '2026-01-05'); DELETE FROM ev_b WHERE id < 50");
    m.check();
    m.sql("ALTER TABLE ev ATTACH PARTITION ev_a FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')");
    m.settle();
    m.sql("CREATE TABLE ev_d PARTITION OF ev FOR VALUES FROM ('2026-04-01') TO ('2026-05-01'); INSERT INTO ev VALUES (1, '2026-04-02', 'new')");
    m.check();
    m.sql("DROP TABLE ev_c1");
    m.settle();
    m.sql("ALTER TABLE ev_c DETACH PARTITION ev_cd");
    m.settle();
}

#[test]
fn inheritance_children_are_tables_of_their_own() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE base (id int PRIMARY KEY, v text); CREATE TABLE heir (extra int) INHERITS (base); \
         INSERT INTO base VALUES (1, 'a'); INSERT INTO heir VALUES (2, 'b', 3); SELECT walmirror.mirror('base')",
    );
    m.start();
    m.sync();
    wait_for(Duration::from_secs(20), "the key", || {
        (m.redis.keys() == ["base:1"]).then_some(())
    });
    m.sql("INSERT INTO heir VALUES (4, 'c', 5); UPDATE base SET v = 'all'; DELETE FROM base WHERE id = 4");
    m.sync();
    assert_eq!(m.redis.keys(), ["base:1"]);
}
