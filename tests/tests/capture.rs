//! Cache mode: what SELECTs bring into Redis, what they do not, and what writes then do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use postgres::Client;
use walmirror_tests::{DEADLINE, Mirror, wait_for};

/// Captures at once again, so that every query of a test counts.
const ALWAYS: &str = "SET walmirror.capture_interval = 0";

/// `c`, cached, 60 rows of which every tenth has grp 0; `p`, partitioned, cached; `o`, not cached.
fn setup(m: &Mirror) {
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, grp int, name text, v text); \
         INSERT INTO c SELECT i, i % 10, 'name ' || i, repeat('v', 100) FROM generate_series(1, 60) i; \
         CREATE INDEX ON c (grp); \
         CREATE TABLE o (id int PRIMARY KEY, c_id int); INSERT INTO o SELECT i, i FROM generate_series(1, 60) i; \
         CREATE TABLE p (id int, r int, v text, PRIMARY KEY (id, r)) PARTITION BY RANGE (r); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20); \
         INSERT INTO p SELECT i, i % 20, 'v' || i FROM generate_series(1, 40) i; \
         CREATE VIEW c_view AS SELECT name, v FROM c WHERE grp = 3; \
         CREATE FUNCTION by_sql(int) RETURNS text LANGUAGE sql STABLE AS 'SELECT v FROM c WHERE id = $1'; \
         CREATE FUNCTION by_plpgsql(int) RETURNS text LANGUAGE plpgsql AS \
           $$ DECLARE r text; BEGIN SELECT v INTO r FROM c WHERE id = $1; RETURN r; END $$",
    );
    m.sql("SELECT walmirror.cache('c'), walmirror.cache('p')");
    m.sql("ANALYZE c, o, p");
}

/// Starts the sink and waits until it knows the labelled tables: what is captured before that is left out.
fn start(m: &Mirror) {
    m.start();
    let labelled: i64 =
        m.db.value("SELECT count(*) FROM walmirror.mirrors")
            .parse()
            .unwrap();
    wait_for(DEADLINE, "the sink to know its tables", || {
        let known: i64 = m
            .redis
            .command(&format!("HLEN walmirror:{{{}}}:relations", m.db.name));
        (known == labelled).then_some(())
    });
}

/// Everything that was captured so far is in Redis afterwards: the commit of something written flushes what stands before.
fn sync(m: &Mirror) {
    m.sql("SELECT pg_logical_emit_message(true, 'test', '')");
    m.sync();
}

fn keys(m: &Mirror) -> BTreeSet<String> {
    m.redis.keys().into_iter().collect()
}

fn empty(m: &Mirror) {
    for key in m.redis.keys() {
        let _: i64 = redis::cmd("DEL").arg(key).query(&mut m.redis.connect()).unwrap();
    }
}

fn session(m: &Mirror) -> Client {
    let mut session = m.db.connect();
    session.batch_execute(ALWAYS).unwrap();
    session
}

fn c_keys(ids: impl IntoIterator<Item = i32>) -> BTreeSet<String> {
    ids.into_iter().map(|id| format!("c:{id}")).collect()
}

/// Every cached row is whole: all of its columns, as Postgres prints them.
fn assert_whole_rows(m: &Mirror) {
    for key in m.redis.keys() {
        let Some(id) = key.strip_prefix("c:") else {
            continue;
        };
        let row =
            m.db.rows(&format!("SELECT id, grp, name, v FROM c WHERE id = {id}"));
        let columns = ["id", "grp", "name", "v"];
        let mut expected: Vec<(String, String)> = columns
            .iter()
            .zip(&row[0])
            .map(|(name, value)| ((*name).to_owned(), value.clone().unwrap()))
            .collect();
        expected.sort();
        assert_eq!(m.redis.hash(&key), expected, "{key}");
    }
}

#[test]
fn every_shape_of_select_captures_whole_rows() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut s = session(&m);
    s.batch_execute("SET enable_indexonlyscan = off; PREPARE by_id(int) AS SELECT name FROM c WHERE id = $1")
        .unwrap();
    let grp = |grp: i32| c_keys((1..=60).filter(move |id| id % 10 == grp));
    let cases: Vec<(&str, &str, BTreeSet<String>)> = vec![
        ("equality", "SELECT * FROM c WHERE id = 1", c_keys([1])),
        ("one column only", "SELECT name FROM c WHERE id = 2", c_keys([2])),
        (
            "no column at all",
            "SELECT 1 FROM c WHERE id = 3 AND v <> ''",
            c_keys([3]),
        ),
        ("range", "SELECT v FROM c WHERE id BETWEEN 5 AND 8", c_keys(5..=8)),
        (
            "LIKE",
            "SELECT v FROM c WHERE name LIKE 'name 4_'",
            c_keys(40..=49),
        ),
        ("IN", "SELECT v FROM c WHERE id IN (1, 9, 17)", c_keys([1, 9, 17])),
        (
            "OR",
            "SELECT v FROM c WHERE id = 4 OR name = 'name 50'",
            c_keys([4, 50]),
        ),
        (
            "function in WHERE",
            "SELECT v FROM c WHERE length(name) = 6",
            c_keys(1..=9),
        ),
        ("no WHERE", "SELECT v FROM c", c_keys(1..=60)),
        (
            "bitmap scan",
            "SET enable_seqscan = off; SET enable_indexscan = off; SELECT v FROM c WHERE grp = 7; \
            RESET enable_seqscan; RESET enable_indexscan",
            grp(7),
        ),
        (
            "inner join",
            "SELECT o.id FROM o JOIN c ON c.id = o.c_id WHERE o.id IN (11, 12)",
            c_keys([11, 12]),
        ),
        (
            "nested loop",
            "SET enable_hashjoin = off; SET enable_mergejoin = off; \
            SELECT c.v FROM o JOIN c ON c.id = o.c_id WHERE o.id = 13; RESET enable_hashjoin; RESET enable_mergejoin",
            c_keys([13]),
        ),
        (
            "outer join",
            "SELECT o.id, c.v FROM o LEFT JOIN c ON c.id = o.c_id AND c.id = 14 WHERE o.id = 14",
            c_keys([14]),
        ),
        (
            "self-join",
            "SELECT a.v FROM c a JOIN c b ON b.id = a.id + 1 WHERE a.id = 15",
            c_keys([15, 16]),
        ),
        (
            "lateral",
            "SELECT x.v FROM o, LATERAL (SELECT v FROM c WHERE c.id = o.c_id OFFSET 0) x WHERE o.id = 18",
            c_keys([18]),
        ),
        (
            "correlated subquery",
            "SELECT (SELECT v FROM c WHERE c.id = o.c_id) FROM o WHERE o.id = 19",
            c_keys([19]),
        ),
        (
            "EXISTS",
            "SELECT 1 FROM o WHERE o.id = 20 AND EXISTS (SELECT 1 FROM c WHERE c.id = o.c_id AND c.v <> '')",
            c_keys([20]),
        ),
        (
            "scalar subquery",
            "SELECT (SELECT max(v) FROM c WHERE id = 21)",
            c_keys([21]),
        ),
        (
            "CTE",
            "WITH x AS MATERIALIZED (SELECT * FROM c WHERE id = 22) SELECT name FROM x",
            c_keys([22]),
        ),
        ("view", "SELECT name FROM c_view", grp(3)),
        (
            "UNION",
            "SELECT v FROM c WHERE id = 23 UNION SELECT v FROM c WHERE id = 24",
            c_keys([23, 24]),
        ),
        (
            "window function",
            "SELECT row_number() OVER (ORDER BY v) FROM c WHERE grp = 5",
            grp(5),
        ),
        ("aggregate", "SELECT count(v) FROM c WHERE grp = 6", grp(6)),
        (
            "ORDER BY, LIMIT",
            "SET enable_seqscan = off; SELECT v FROM c ORDER BY id DESC LIMIT 2; RESET enable_seqscan",
            c_keys([59, 60]),
        ),
        ("custom plan", "EXECUTE by_id(25)", c_keys([25])),
        (
            "generic plan",
            "SET plan_cache_mode = force_generic_plan; EXECUTE by_id(26); RESET plan_cache_mode",
            c_keys([26]),
        ),
        ("SQL function", "SELECT by_sql(27)", c_keys([27])),
        ("PL/pgSQL function", "SELECT by_plpgsql(28)", c_keys([28])),
        (
            "DO block",
            "DO $$ BEGIN PERFORM v FROM c WHERE id = 29; END $$",
            c_keys([29]),
        ),
        (
            "cursor",
            "BEGIN; DECLARE cur CURSOR FOR SELECT v FROM c WHERE id BETWEEN 30 AND 33 ORDER BY id; \
            FETCH 1 FROM cur; FETCH 1 FROM cur; CLOSE cur; COMMIT",
            c_keys([]),
        ),
        (
            "TABLESAMPLE",
            "SELECT v FROM c TABLESAMPLE bernoulli (100) WHERE id = 34",
            c_keys([34]),
        ),
        (
            "tid scan",
            "SELECT v FROM c WHERE ctid = (SELECT ctid FROM c WHERE id = 35 AND v <> '')",
            c_keys([35]),
        ),
        (
            "partitions",
            "SELECT v FROM p WHERE id = 5",
            BTreeSet::from(["p:5:5".to_owned()]),
        ),
        (
            "runtime pruning",
            "SELECT v FROM p WHERE r = (SELECT 16) AND id = 16",
            BTreeSet::from(["p:16:16".to_owned()]),
        ),
        (
            "serializable",
            "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT v FROM c WHERE id = 36; COMMIT",
            c_keys([36]),
        ),
        (
            "read only",
            "BEGIN READ ONLY; SELECT v FROM c WHERE id = 37; COMMIT",
            c_keys([37]),
        ),
    ];
    for (shape, query, expected) in cases {
        empty(&m);
        s.batch_execute(query)
            .unwrap_or_else(|error| panic!("{shape}: {error}"));
        sync(&m);
        let found = keys(&m);
        // A sort below a cursor reads all rows; an index walk only those that were fetched.
        if shape == "cursor" {
            assert!(
                found.contains("c:30") && found.contains("c:31"),
                "{shape}: {found:?}"
            );
        } else {
            assert!(
                found.is_superset(&expected),
                "{shape}: {found:?} lacks some of {expected:?}"
            );
            let extra: Vec<_> = found
                .difference(&expected)
                .filter(|key| !expected.is_empty() && expected.len() > 5 && key.starts_with("p:"))
                .collect();
            assert!(extra.is_empty(), "{shape}: {extra:?}");
        }
        assert_whole_rows(&m);
    }
}

#[test]
fn a_row_that_a_filter_keeps_back_is_not_captured() {
    let m = Mirror::new();
    setup(&m);
    m.sql(
        "CREATE ROLE reader_of_some LOGIN; GRANT SELECT ON c TO reader_of_some; ALTER TABLE c ENABLE ROW LEVEL SECURITY; \
         CREATE POLICY few ON c FOR SELECT TO reader_of_some USING (grp = 1)",
    );
    start(&m);
    let mut s = session(&m);
    s.batch_execute("SET ROLE reader_of_some; SELECT v FROM c; RESET ROLE")
        .unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1, 11, 21, 31, 41, 51]));
    m.sql("DROP OWNED BY reader_of_some; DROP ROLE reader_of_some");
}

#[test]
fn what_must_not_be_captured_is_not() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut s = session(&m);
    for (why, query) in [
        (
            "the transaction wrote",
            "BEGIN; UPDATE o SET c_id = 1 WHERE id = 1; SELECT * FROM c WHERE id = 1; COMMIT",
        ),
        (
            "it saw its own write",
            "BEGIN; UPDATE c SET v = 'uncommitted' WHERE id = 1; SELECT * FROM c WHERE id = 1; ROLLBACK",
        ),
        (
            "a subtransaction wrote",
            "BEGIN; SAVEPOINT a; INSERT INTO o VALUES (900, 1); ROLLBACK TO a; SELECT * FROM c WHERE id = 1; COMMIT",
        ),
        ("FOR UPDATE", "SELECT * FROM c WHERE id = 2 FOR UPDATE"),
        ("FOR SHARE", "SELECT * FROM c WHERE id = 2 FOR SHARE"),
        ("EXPLAIN ANALYZE", "EXPLAIN ANALYZE SELECT * FROM c WHERE id = 3"),
        ("EXPLAIN", "EXPLAIN SELECT * FROM c WHERE id = 3"),
        (
            "INSERT … SELECT",
            "INSERT INTO o SELECT 901, id FROM c WHERE id = 4 AND v <> ''",
        ),
        (
            "CREATE TABLE AS",
            "CREATE TABLE made AS SELECT * FROM c WHERE id = 5",
        ),
        (
            "a CTE writes",
            "WITH w AS (INSERT INTO o VALUES (902, 1) RETURNING 1) SELECT * FROM c, w WHERE c.id = 6",
        ),
        (
            "the session opted out",
            "SET walmirror.capture = off; SELECT * FROM c WHERE id = 7; RESET walmirror.capture",
        ),
        (
            "too large a row",
            "SET walmirror.capture_max_bytes = 64; SELECT * FROM c WHERE id = 8; RESET walmirror.capture_max_bytes",
        ),
        (
            "no rows wanted",
            "SET walmirror.capture_max_rows = 0; SELECT * FROM c WHERE id = 9; RESET walmirror.capture_max_rows",
        ),
        ("not configured", "SELECT * FROM o WHERE id = 1"),
    ] {
        s.batch_execute(query)
            .unwrap_or_else(|error| panic!("{why}: {error}"));
        sync(&m);
        assert_eq!(keys(&m), BTreeSet::new(), "{why}");
    }
    s.batch_execute("SET walmirror.capture_max_rows = 10; SET enable_seqscan = on; SELECT v FROM c")
        .unwrap();
    sync(&m);
    assert_eq!(keys(&m).len(), 10, "capture_max_rows");
}

#[test]
fn parallel_plans_capture_right_rows_or_none() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, grp int, name text, v text); \
         INSERT INTO c SELECT i, i % 10, 'name ' || i, repeat('v', 100) FROM generate_series(1, 20000) i; \
         SELECT walmirror.cache('c')",
    );
    m.sql("ANALYZE c");
    start(&m);
    let mut s = session(&m);
    s.batch_execute(
        "SET max_parallel_workers_per_gather = 2; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; \
         SET min_parallel_table_scan_size = 0; SET walmirror.capture_max_rows = 100000",
    )
    .unwrap();
    let plan: Vec<String> = s
        .query("EXPLAIN (COSTS OFF) SELECT count(v) FROM c WHERE grp = 1", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(
        plan.iter().any(|line| line.contains("Parallel Seq Scan")),
        "{plan:?}"
    );
    let count: i64 = s
        .query_one("SELECT count(v) FROM c WHERE grp = 1", &[])
        .unwrap()
        .get(0);
    assert_eq!(count, 2000);
    sync(&m);
    let found = keys(&m);
    assert!(
        found.is_subset(&c_keys((1..=20000).filter(|id| id % 10 == 1))),
        "{} keys",
        found.len()
    );
}

#[test]
fn a_row_is_not_captured_again_within_the_interval() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut s = m.db.connect();
    s.batch_execute("SET walmirror.capture_interval = '1h'; SELECT * FROM c WHERE id = 1")
        .unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1]));
    empty(&m);
    s.batch_execute("SELECT * FROM c WHERE id = 1").unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::new());
    // A new version of the row is another row to the table of what was seen.
    s.batch_execute("UPDATE c SET v = 'new' WHERE id = 1").unwrap();
    s.batch_execute("SELECT * FROM c WHERE id = 1").unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1]));
    assert!(m.db.value("SELECT value FROM walmirror.capture_stats WHERE counter = 'skipped_recent'") != "0");
}

#[test]
fn writes_refresh_populate_or_invalidate() {
    let m = Mirror::new();
    for mode in ["refresh", "populate", "invalidate"] {
        m.sql(&format!(
            "CREATE TABLE {mode} (id int PRIMARY KEY, v text); INSERT INTO {mode} SELECT i, 'old' FROM generate_series(1, 9) i; \
             SELECT walmirror.cache('{mode}', on_write => '{mode}')"
        ));
    }
    start(&m);
    let mut s = session(&m);
    for mode in ["refresh", "populate", "invalidate"] {
        s.batch_execute(&format!("SELECT * FROM {mode} WHERE id = 1"))
            .unwrap();
        s.batch_execute(&format!(
            "UPDATE {mode} SET v = 'new' WHERE id <= 2; INSERT INTO {mode} VALUES (20, 'in')"
        ))
        .unwrap();
        s.batch_execute(&format!("SELECT * FROM {mode} WHERE id = 3"))
            .unwrap();
        s.batch_execute(&format!("DELETE FROM {mode} WHERE id = 3"))
            .unwrap();
    }
    sync(&m);
    let value = |key: &str| {
        m.redis
            .hash(key)
            .into_iter()
            .find(|(field, _)| field == "v")
            .map(|(_, value)| value)
    };
    assert_eq!(
        keys(&m),
        ["refresh:1", "populate:1", "populate:2", "populate:20"]
            .map(str::to_owned)
            .into_iter()
            .collect::<BTreeSet<_>>()
    );
    assert_eq!(value("refresh:1").as_deref(), Some("new"));
    assert_eq!(value("populate:1").as_deref(), Some("new"));
    assert_eq!(value("populate:20").as_deref(), Some("in"));
}

#[test]
fn a_changed_key_and_an_unchanged_large_column_follow_in_a_cache_too() {
    let m = Mirror::new();
    for value in ["hash", "json"] {
        m.sql(&format!(
            "CREATE TABLE t_{value} (id int PRIMARY KEY, n int, doc text); ALTER TABLE t_{value} ALTER doc SET STORAGE EXTERNAL; \
             INSERT INTO t_{value} SELECT i, 0, repeat(md5(i::text), 200) FROM generate_series(1, 4) i; \
             SELECT walmirror.cache('t_{value}', value => '{value}')"
        ));
    }
    start(&m);
    let mut s = session(&m);
    for value in ["hash", "json"] {
        s.batch_execute(&format!("SELECT n FROM t_{value} WHERE id IN (1, 2)"))
            .unwrap();
        s.batch_execute(&format!("UPDATE t_{value} SET n = 5")).unwrap();
        s.batch_execute(&format!("UPDATE t_{value} SET id = 10 + id WHERE id = 2"))
            .unwrap();
    }
    sync(&m);
    let found = keys(&m);
    assert!(
        found.contains("t_hash:1") && found.contains("t_json:1"),
        "{found:?}"
    );
    assert!(
        !found.contains("t_hash:2") && !found.contains("t_json:2"),
        "{found:?}"
    );
    assert!(
        !found.iter().any(|key| key.ends_with(":3") || key.ends_with(":4")),
        "{found:?}"
    );
    for key in found {
        let (table, id) = key.split_once(':').unwrap();
        if table == "t_json" {
            let expected =
                m.db.value(&format!("SELECT to_jsonb(t)::text FROM t_json t WHERE id = {id}"));
            assert_eq!(m.redis.get(&key).unwrap(), expected, "{key}");
        } else {
            let doc = m.db.value(&format!("SELECT doc FROM t_hash WHERE id = {id}"));
            let hash = m.redis.hash(&key);
            assert!(
                hash.contains(&("doc".to_owned(), doc)) && hash.contains(&("n".to_owned(), "5".to_owned())),
                "{key}"
            );
        }
    }
}

#[test]
fn an_expired_key_comes_back_when_it_is_read() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, v text); INSERT INTO c VALUES (1, 'x'), (2, 'y'); \
         SELECT walmirror.cache('c', ttl => '500 ms'); \
         CREATE TABLE w (id int PRIMARY KEY, v text); INSERT INTO w VALUES (1, 'x'); \
         SELECT walmirror.mirror('w', ttl => '500 ms', capture => true)",
    );
    start(&m);
    let mut s = m.db.connect();
    for (table, key) in [("c", "c:1"), ("w", "w:1")] {
        for round in 0..3 {
            let start = Instant::now();
            wait_for(DEADLINE, format!("{key} in round {round}"), || {
                s.batch_execute(&format!("SELECT v FROM {table} WHERE id = 1 AND v <> ''"))
                    .unwrap();
                m.redis.keys().contains(&key.to_owned()).then_some(())
            });
            assert!(
                start.elapsed() < Duration::from_millis(2500),
                "{key} took {:?}",
                start.elapsed()
            );
            let left: i64 = m.redis.command(&format!("PTTL {key}"));
            assert!((1..=500).contains(&left), "{key}: {left} ms");
            wait_for(DEADLINE, format!("{key} to expire"), || {
                (!m.redis.keys().contains(&key.to_owned())).then_some(())
            });
        }
    }
}

#[test]
fn ddl_on_a_cached_table_removes_its_keys_and_old_captures_do_not_return() {
    let m = Mirror::new();
    setup(&m);
    m.sql("DROP VIEW c_view");
    start(&m);
    let mut s = session(&m);
    for (ddl, fields) in [
        ("ALTER TABLE c ADD COLUMN extra int DEFAULT 7", 5),
        ("ALTER TABLE c DROP COLUMN extra", 4),
        ("ALTER TABLE c ALTER COLUMN v TYPE varchar USING v || '!'", 4),
        ("SELECT walmirror.cache('c', columns => '{id,v}')", 2),
    ] {
        s.batch_execute("SELECT v FROM c WHERE grp = 1").unwrap();
        sync(&m);
        assert_eq!(keys(&m).len(), 6, "before {ddl}");
        s.batch_execute(ddl).unwrap();
        sync(&m);
        assert_eq!(keys(&m), BTreeSet::new(), "{ddl}");
        s.batch_execute("SELECT v FROM c WHERE id = 1").unwrap();
        sync(&m);
        assert_eq!(m.redis.hash("c:1").len(), fields, "{ddl}");
    }
    s.batch_execute("TRUNCATE c").unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::new());
    s.batch_execute("INSERT INTO c (id, v) VALUES (1, 'x')").unwrap();
    s.batch_execute("SELECT * FROM c WHERE id = 1").unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1]));
    s.batch_execute("SELECT walmirror.unmirror('c')").unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::new());
}

#[test]
fn a_failure_of_capture_leaves_the_query_alone() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut s = session(&m);
    // An error and a panic in the encoder, and where the message is written; see `Failpoint` in the extension.
    for failpoint in [1, 2, 4096, 8192] {
        s.batch_execute(&format!("SET walmirror.failpoint = {failpoint}"))
            .unwrap();
        let failed = || {
            m.db.value("SELECT value FROM walmirror.capture_stats WHERE counter = 'skipped_failed'")
        };
        let before = failed();
        let rows = s
            .query("SELECT name FROM c WHERE grp = 4 ORDER BY id", &[])
            .unwrap();
        let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(
            names,
            ["name 4", "name 14", "name 24", "name 34", "name 44", "name 54"]
        );
        assert_ne!(failed(), before, "the failpoint was not reached");
        s.batch_execute("SET walmirror.failpoint = 0").unwrap();
        sync(&m);
        assert_eq!(keys(&m), BTreeSet::new());
    }
    // The session, and capture, go on.
    s.batch_execute("SELECT v FROM c WHERE id = 1").unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1]));
    // A row of 20 MB makes a message of 20 MB.
    s.batch_execute("INSERT INTO c VALUES (1000, 1, 'large', repeat('x', 20000000))")
        .unwrap();
    s.batch_execute("SET walmirror.capture_max_bytes = '64MB'")
        .unwrap();
    let length: i32 = s
        .query_one("SELECT length(v) FROM c WHERE id = 1000", &[])
        .unwrap()
        .get(0);
    assert_eq!(length, 20_000_000);
    sync(&m);
    assert_eq!(
        m.redis.hash("c:1000").iter().map(|(_, value)| value.len()).max(),
        Some(20_000_000)
    );
    // A cancel arrives as it would without capture.
    let cancel = s.cancel_token();
    let canceller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        cancel.cancel_query(postgres::NoTls).unwrap();
    });
    let error = s.batch_execute("SELECT v, pg_sleep(1) FROM c").unwrap_err();
    assert_eq!(error.code(), Some(&postgres::error::SqlState::QUERY_CANCELED));
    canceller.join().unwrap();
    // A timeout is the query's own and arrives as it would without capture.
    let error = s
        .batch_execute("SET statement_timeout = 200; SELECT v, pg_sleep(0.02) FROM c")
        .unwrap_err();
    assert_eq!(error.code(), Some(&postgres::error::SqlState::QUERY_CANCELED));
    s.batch_execute("SET statement_timeout = 0; SELECT v FROM c WHERE id = 2")
        .unwrap();
    sync(&m);
    assert!(keys(&m).contains("c:2"));
}

#[test]
fn errors_of_queries_keep_all_of_their_fields() {
    let m = Mirror::new();
    setup(&m);
    let mut s = session(&m);
    let error = s.batch_execute("INSERT INTO c VALUES (1)").unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(
        (error.table(), error.constraint(), error.detail()),
        (Some("c"), Some("c_pkey"), Some("Key (id)=(1) already exists."))
    );
    let error = s.batch_execute("SELECT 1 / (grp - grp) FROM c").unwrap_err();
    assert_eq!(error.code(), Some(&postgres::error::SqlState::DIVISION_BY_ZERO));
}

#[test]
fn a_select_on_an_idle_server_is_in_redis_soon() {
    let m = Mirror::alone("");
    setup(&m);
    start(&m);
    let mut s = session(&m);
    let mut redis = m.redis.connect();
    let mut taken = Vec::new();
    for id in 1..=21 {
        // Idle for longer than wal_writer_delay.
        std::thread::sleep(Duration::from_millis(250));
        let start = Instant::now();
        s.batch_execute(&format!("SELECT v FROM c WHERE id = {id}"))
            .unwrap();
        wait_for(DEADLINE, format!("c:{id} without any commit"), || {
            let there: bool = redis::cmd("EXISTS")
                .arg(format!("c:{id}"))
                .query(&mut redis)
                .unwrap();
            there.then_some(())
        });
        taken.push(start.elapsed());
    }
    taken.sort();
    // The figure of docs/benchmarks.md; wait_for looks every few milliseconds, so this is an upper bound.
    println!("SELECT to key: median {:?}, slowest {:?}", taken[10], taken[20]);
}
