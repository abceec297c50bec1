//! Whoever prints a row of a row type looks its columns up, and Postgres locks the type for that. Somebody who alters the type holds
//! that lock, perhaps for long, and perhaps while he waits for the mirror.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::thread;

use postgres::Client;
use walmirror_tests::{DEADLINE, Mirror, Sink, wait_for};

/// A table with a value of a row type and one of an array of rows, and a table without.
const TABLES: &str = "CREATE TYPE inner_row AS (x int); CREATE TYPE comp AS (x int, i inner_row[]); \
     CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, big text, c comp); ALTER TABLE t ALTER big SET STORAGE EXTERNAL; \
     SELECT walmirror.mirror('t', value => 'json'); \
     INSERT INTO t SELECT i, 0, repeat('b', 10000), ROW(i, ARRAY[ROW(i)::inner_row])::comp FROM generate_series(1, 3) i; \
     CREATE TABLE u (id int PRIMARY KEY); SELECT walmirror.mirror('u')";

fn mirror() -> Mirror {
    let m = Mirror::alone("");
    m.sql(TABLES);
    m.start();
    m.settle();
    m
}

/// Somebody who has altered both types, and whose transaction is open.
fn altering(m: &Mirror) -> Client {
    let mut client = m.db.connect();
    client
        .batch_execute("BEGIN; ALTER TYPE inner_row ADD ATTRIBUTE y int; ALTER TYPE comp ADD ATTRIBUTE y int")
        .unwrap();
    client
}

/// The story: the walsender waited for the lock of a COMMIT that waited for the walsender, and no lock monitor sees such a circle.
#[test]
fn a_commit_that_waits_for_the_mirror_may_have_altered_a_type() {
    let m = mirror();
    m.db.pg.configure("synchronous_standby_names = 'walmirror'");
    m.db.pg.reload();
    wait_for(DEADLINE, "the sink to be a synchronous standby", || {
        (m.db.value("SELECT sync_state FROM pg_stat_replication") == "sync").then_some(())
    });
    for statements in [
        "CREATE TYPE made AS (x int); CREATE TABLE new (id int PRIMARY KEY, c made); SELECT walmirror.mirror('new'); \
         INSERT INTO new VALUES (1, ROW(1))",
        "ALTER TYPE inner_row ADD ATTRIBUTE z int; ALTER TYPE comp ADD ATTRIBUTE z int; \
         INSERT INTO t VALUES (4, 0, 'b', ROW(4, ARRAY[ROW(4, 5)::inner_row], 6))",
    ] {
        let mut client = m.db.connect();
        let statements = format!("SET synchronous_commit = remote_write; BEGIN; {statements}; COMMIT");
        let commit = thread::spawn(move || client.batch_execute(&statements));
        wait_for(DEADLINE, "the COMMIT to return", || {
            m.sink(Sink::assert_running);
            commit.is_finished().then_some(())
        });
        commit.join().unwrap().unwrap();
    }
    m.sql("SET synchronous_commit = local");
    m.settle();
}

/// The story: a transaction in progress is decoded before it ends, and the walsender waited for its end: everything stood still.
#[test]
fn a_transaction_in_progress_that_altered_a_type_holds_up_nobody() {
    let m = mirror();
    for end in ["ROLLBACK", "COMMIT"] {
        let mut client = altering(&m);
        client
            .batch_execute(
                "INSERT INTO t SELECT i, 0, 'b', ROW(i, ARRAY[ROW(i, 1)::inner_row], 2)::comp FROM generate_series(10, 3000) i",
            )
            .unwrap();
        wait_for(DEADLINE, "it to come in progress", || {
            let streamed =
                "SELECT stream_count FROM pg_stat_replication_slots WHERE slot_name = current_database()";
            (m.db.value(streamed) != "0").then_some(())
        });
        m.sql("INSERT INTO u SELECT 1 + count(*) FROM u");
        m.sync();
        assert!(m.redis.keys().contains(&"u:1".to_owned()));
        client.batch_execute(end).unwrap();
        m.settle();
    }
}

/// A walsender that has printed no row of the type yet.
#[test]
fn a_type_that_somebody_alters_does_not_hold_up_a_new_session() {
    let m = mirror();
    let mut client = altering(&m);
    m.sink(|sink| {
        sink.kill();
        sink.restart();
    });
    m.sql("UPDATE t SET n = 1 WHERE id = 1");
    m.sync();
    let value: serde_json::Value = serde_json::from_str(&m.redis.get("t:1").unwrap()).unwrap();
    assert_eq!((&value["n"], &value["c"]["i"][0]["x"]), (&1.into(), &1.into()));
    client.batch_execute("ROLLBACK").unwrap();
    m.check();
}

/// The story: who read a row again waited for the type, gave up, and took the row for one that cannot be encoded: its key went, and nobody
/// came back to it.
#[test]
fn a_row_is_not_bad_because_somebody_alters_its_type() {
    let m = mirror();
    m.sql("UPDATE t SET n = 1");
    m.sync();
    let mut client = altering(&m);
    // A change of a key that is gone does not tell all of the row, so that it is read again.
    let _: u64 = m.redis.command("DEL t:1");
    m.sql("UPDATE t SET n = 2 WHERE id = 1");
    wait_for(DEADLINE, "somebody to wait for the type", || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation IN ('comp'::regclass, 'inner_row'::regclass)";
        (m.db.value(waiting) != "0").then_some(())
    });
    wait_for(DEADLINE, "the sink to say who is in the way", || {
        let log = m.sink(|sink| sink.output());
        log.lines()
            .any(|line| line.contains("locked") && line.contains("public.t") && line.contains("pid "))
            .then_some(())
    });
    client.batch_execute("ROLLBACK").unwrap();
    m.settle();
    let rejected: u64 = m
        .redis
        .command(&format!("XLEN walmirror:{{{}}}:rejected", m.db.name));
    assert_eq!(rejected, 0, "{}", m.sink(|sink| sink.output()));
}

/// Waits until what was captured so far is in Redis. Nobody flushes it before the next COMMIT.
fn written(m: &Mirror) {
    m.sql("INSERT INTO u SELECT 1 + count(*) FROM u");
    m.sync();
}

/// Capture waits for no lock that the query does not wait for, and takes the row another time.
#[test]
fn a_select_does_not_wait_for_a_type_that_somebody_alters() {
    let m = mirror();
    m.sql(
        "CREATE TABLE s (id int PRIMARY KEY, n int, c comp); INSERT INTO s VALUES (1, 1, ROW(1, '{}')); \
         SELECT walmirror.cache('s')",
    );
    m.settle();
    m.outlast_announced();
    let mut client = altering(&m);
    let mut reader = m.db.connect();
    let read = "SELECT n FROM s WHERE id = 1";
    reader
        .batch_execute(&format!(
            "SET walmirror.capture_interval = 0; SET statement_timeout = '2s'; {read}"
        ))
        .unwrap();
    written(&m);
    assert!(!m.redis.keys().contains(&"s:1".to_owned()));
    client.batch_execute("ROLLBACK").unwrap();
    reader.batch_execute(read).unwrap();
    written(&m);
    assert!(m.redis.keys().contains(&"s:1".to_owned()));
    m.check();
}

/// A view has a row type too, and is not altered but replaced.
#[test]
fn a_column_of_a_views_row_type_follows_the_view() {
    let m = mirror();
    m.sql(
        "CREATE VIEW v AS SELECT 1 AS a; CREATE TABLE of_view (id int PRIMARY KEY, c v); \
         INSERT INTO of_view VALUES (1, ROW(1)); SELECT walmirror.mirror('of_view')",
    );
    m.settle();
    m.sql("CREATE OR REPLACE VIEW v AS SELECT 1 AS a, 2 AS b");
    m.settle();
    assert_eq!(m.redis.hash("of_view:1")[0], ("c".into(), "(1,)".into()));
}
