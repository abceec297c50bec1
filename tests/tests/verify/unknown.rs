//! What cannot be told is not called equal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use walmirror_tests::{DEADLINE, Mirror, Raise, Signal, Sink, wait_for};

use crate::{assert_equal, many_kinds, walmirror};

/// Somebody writes to a key all the time, so that it is never proved to differ, and never seen to be equal.
#[test]
fn what_cannot_be_compared_is_not_called_equal() {
    let m = many_kinds();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = Raise(&done);
        let write = || {
            let mut redis = m.redis.connect();
            for n in 0_u64.. {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                let key = redis::cmd("HSET").arg("h:1").arg("nobodys").arg(n).clone();
                key.exec(&mut redis).unwrap();
            }
        };
        // A proof waits for all transactions that run. So it takes longer than all of the writers may have no processor.
        let rest = || {
            let mut session = m.db.connect();
            while !done.load(Ordering::Relaxed) {
                let transaction = "BEGIN; SELECT pg_current_xact_id(); SELECT pg_sleep(0.3); COMMIT";
                session.batch_execute(transaction).unwrap();
            }
        };
        for _ in 0..4 {
            scope.spawn(write);
            scope.spawn(rest);
        }
        let (code, output) = walmirror(&m, &["verify", "--timeout", "3s"]);
        assert_eq!(code, 2, "{output}");
        assert!(
            output.contains("1 unknown") && output.contains("unknown    h:1\n"),
            "{output}"
        );
        assert!(
            output.contains("1 keys could not be compared within 3s"),
            "{output}"
        );
    });
}

#[test]
fn what_cannot_be_told_is_exit_code_2() {
    let mut m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, 'v' FROM generate_series(1, 100) i",
    );
    // This waits for the end of the backfill.
    assert_equal(&m, &["verify"]);
    m.sink(|sink| sink.signal(Signal::STOP));
    let (code, output) = walmirror(&m, &["verify", "--timeout", "3s"]);
    assert_eq!(code, 2, "{output}");
    assert!(
        output.contains("does not get to") && output.contains("next: walmirror"),
        "{output}"
    );
    m.sink(|sink| sink.signal(Signal::CONT));
    assert_equal(&m, &["verify"]);
    m.sink(Sink::terminate);
    let (code, output) = walmirror(&m, &["verify", "--timeout", "3s"]);
    assert_eq!(code, 2, "{output}");
    assert!(
        output.contains("no sink runs") && output.contains("walmirror run"),
        "{output}"
    );
    let (code, output) = walmirror(&m, &["backfill"]);
    assert_eq!(code, 3, "{output}");
    assert!(
        output.contains("nobody streams") && output.contains("next: walmirror run"),
        "{output}"
    );
    m.sink(Sink::restart);
    m.settle();
    let (code, output) = walmirror(&m, &["verify", "--table", "unknown"]);
    assert_eq!(code, 2, "{output}");
    assert!(output.contains("not mirrored"), "{output}");
    m.redis.stop(Signal::TERM);
    let (code, output) = walmirror(&m, &["verify"]);
    assert_eq!(code, 2, "{output}");
}

/// A table that somebody holds for himself cannot be compared, which is said in time.
#[test]
fn a_locked_table_is_not_waited_for_without_end() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t'); INSERT INTO t VALUES (1)",
    );
    let mut client = m.db.connect();
    client
        .batch_execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let started = Instant::now();
    let (code, output) = walmirror(&m, &["verify", "--timeout", "2s"]);
    assert_eq!(code, 2, "{output}");
    assert!(started.elapsed() < Duration::from_secs(30), "{output}");
}

/// The story: a table that was made anew while it was compared lacked its keys, and `--repair` had them read one by one.
#[test]
fn a_table_that_is_made_anew_meanwhile_cannot_be_told() {
    let m = Mirror::with(
        "CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1); SELECT walmirror.mirror('a'); \
         CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1); SELECT walmirror.mirror('t')",
    );
    m.settle();
    assert_equal(&m, &["verify"]);
    let is_there = |what: &str, condition: &str| {
        wait_for(DEADLINE, what, || {
            let count = m.db.value(&format!(
                "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database() AND {condition}"
            ));
            (count != "0").then_some(())
        });
    };
    m.sink(|sink| sink.signal(Signal::STOP));
    m.sql("INSERT INTO a VALUES (2)");
    std::thread::scope(|scope| {
        let verify = scope.spawn(|| walmirror(&m, &["verify", "--repair", "--timeout", "10s"]));
        is_there(
            "verify to wait for the sink",
            "state = 'idle' AND query LIKE '%walmirror.marker%pg_current_xact_id%'",
        );
        let mut lock = m.db.connect();
        lock.batch_execute("BEGIN; LOCK TABLE a").unwrap();
        m.sink(|sink| sink.signal(Signal::CONT));
        is_there("verify to wait for the lock", "wait_event_type = 'Lock'");
        m.sql("SELECT walmirror.unmirror('t')");
        let mut writer = m.db.connect();
        writer
            .batch_execute("BEGIN; UPDATE t SET v = 2 WHERE id = 1")
            .unwrap();
        m.sql("SELECT walmirror.mirror('t')");
        m.know_announced();
        lock.batch_execute("COMMIT").unwrap();
        let (code, output) = verify.join().unwrap();
        assert_eq!(code, 2, "{output}");
        assert!(output.contains("public.t is still being backfilled"), "{output}");
        assert!(m.redis.hash("t:1").is_empty());
        writer.batch_execute("COMMIT").unwrap();
    });
    m.settle();
    assert_equal(&m, &["verify", "--repair"]);
}

/// The story: a table was altered while its backfill was waited for, and from then on what was waited for was a version that there was no
/// more: the whole `--timeout`, and then a word about a backfill.
#[test]
fn a_table_that_is_altered_meanwhile_is_said_to_be_so_at_once() {
    let m = Mirror::with("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1)");
    m.sync();
    let mut writer = m.db.connect();
    writer
        .batch_execute("BEGIN; SELECT pg_current_xact_id()")
        .unwrap();
    // Its backfill waits for who may have written to it.
    m.sql("SELECT walmirror.mirror('t')");
    m.know_announced();
    let started = Instant::now();
    std::thread::scope(|scope| {
        let verify = scope.spawn(|| walmirror(&m, &["verify", "--timeout", "60s"]));
        wait_for(DEADLINE, "verify to wait for the backfill", || {
            let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                         AND query LIKE '%walmirror.relation(%' AND pid <> pg_backend_pid()";
            (m.db.value(query) != "0" || verify.is_finished()).then_some(())
        });
        m.sql("ALTER TABLE t ADD w int");
        let (code, output) = verify.join().unwrap();
        assert_eq!(code, 2, "{output}");
        assert!(
            output.contains("public.t changed while it was compared")
                && output.contains("walmirror verify --table public.t"),
            "{output}"
        );
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "{:?}",
            started.elapsed()
        );
    });
    writer.batch_execute("COMMIT").unwrap();
    m.settle();
    assert_equal(&m, &["verify"]);
}
