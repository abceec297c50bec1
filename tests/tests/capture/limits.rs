//! What is not captured, and how capture stays out of the way of queries: failures, limits, latency.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use walmirror_tests::{DEADLINE, Mirror, Signal, skipped, wait_for};

use crate::{c_keys, empty, keys, session, setup, start, sync};

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
    if m.db.pg.version() >= 17 {
        s.batch_execute("EXPLAIN (ANALYZE, SERIALIZE) SELECT * FROM c WHERE id = 3")
            .unwrap();
        sync(&m);
        assert_eq!(keys(&m), BTreeSet::new(), "SERIALIZE");
    }
    s.batch_execute("SET walmirror.capture_max_rows = 10; SET enable_seqscan = on; SELECT v FROM c")
        .unwrap();
    sync(&m);
    assert_eq!(keys(&m).len(), 10, "capture_max_rows");
}

/// It measures all queries, as EXPLAIN ANALYZE does one; their rows go to the client all the same.
#[test]
fn what_auto_explain_measures_is_captured() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut s = session(&m);
    match s.batch_execute("LOAD 'auto_explain'") {
        // The servers that are downloaded come without the modules of contrib.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_FILE) => {
            skipped("this Postgres has no auto_explain");
            return;
        }
        loaded => loaded.unwrap(),
    }
    s.batch_execute(
        "SET auto_explain.log_min_duration = 0; SET auto_explain.log_analyze = on; \
         SELECT * FROM c WHERE id = 1; BEGIN; DECLARE d CURSOR FOR SELECT * FROM c WHERE id = 2; FETCH d; COMMIT",
    )
    .unwrap();
    s.query("SELECT * FROM c WHERE id = $1", &[&3]).unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1, 2, 3]));
    empty(&m);
    s.batch_execute("EXPLAIN ANALYZE SELECT * FROM c WHERE id = 4")
        .unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::new());
    let explained = "SELECT value FROM walmirror.capture_stats WHERE counter = 'skipped_explain'";
    assert_eq!(m.db.value(explained), "1");
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

/// What a backfill or verify reads is on its way to Redis, or was just compared with it.
#[test]
fn a_backfill_and_verify_capture_nothing() {
    let m = Mirror::alone("");
    setup(&m);
    m.sql("SELECT walmirror.unmirror('p'), walmirror.mirror('c', ttl => '1 h', capture => true)");
    start(&m);
    wait_for(DEADLINE, "the backfill", || {
        (keys(&m) == c_keys(1..=60)).then_some(())
    });
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(0), "{output}");
    let seen =
        m.db.value("SELECT value FROM walmirror.capture_stats WHERE counter = 'rows_seen'");
    assert_eq!(seen, "0");
}

/// However long the interval is, a key that has expired comes back when its row is read.
#[test]
fn a_row_is_captured_again_when_its_key_has_expired() {
    let m = Mirror::new();
    setup(&m);
    m.sql("SELECT walmirror.cache('c', ttl => '1 s')");
    start(&m);
    let mut s = m.db.connect();
    s.batch_execute("SET walmirror.capture_interval = '1h'").unwrap();
    for _ in 0..2 {
        // Who looks too late finds that it has expired again.
        wait_for(DEADLINE, "the key", || {
            s.batch_execute("SELECT * FROM c WHERE id = 1").unwrap();
            (keys(&m) == c_keys([1])).then_some(())
        });
        wait_for(DEADLINE, "the key to expire", || {
            keys(&m).is_empty().then_some(())
        });
    }
}

/// A row counted as captured from when it was read, also if its query then failed and nothing of it was written.
#[test]
fn what_a_query_that_failed_has_read_is_captured_by_the_next() {
    let m = Mirror::new();
    setup(&m);
    m.sql(
        "CREATE FUNCTION fails(int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$; \
         CREATE FUNCTION writes(int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN INSERT INTO o VALUES (903, $1); RETURN 1; END $$",
    );
    start(&m);
    let mut s = m.db.connect();
    s.batch_execute("SET walmirror.capture_interval = '1h'").unwrap();
    let read = "SELECT count(v) FROM c WHERE grp = 4";
    for missed in [
        "SELECT fails(count(v)::int) FROM c WHERE grp = 4",
        "SELECT writes(count(v)::int) FROM c WHERE grp = 4",
        "SET walmirror.failpoint = 4096; SELECT count(v) FROM c WHERE grp = 4; RESET walmirror.failpoint",
        "SET walmirror.failpoint = 1; SELECT count(v) FROM c WHERE grp = 4; RESET walmirror.failpoint",
    ] {
        let _ = s.batch_execute(missed);
        sync(&m);
        assert_eq!(keys(&m), BTreeSet::new(), "{missed}");
    }
    s.batch_execute(read).unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([4, 14, 24, 34, 44, 54]));
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

/// Capture looks tables up in a subtransaction of its own. One that was left by half once went unnoticed, and the session never
/// committed again.
#[test]
fn a_subtransaction_of_capture_that_fails_is_not_left_open() {
    let m = Mirror::new();
    setup(&m);
    let commits = |s: &mut postgres::Client, id: i32| {
        s.batch_execute(&format!("INSERT INTO o VALUES ({id}, 1)"))
            .unwrap();
        m.db.value(&format!("SELECT count(*) FROM o WHERE id = {id}")) == "1"
    };
    // When it is released: all that it did is undone. An error, and a panic.
    for failpoint in [262_144, 524_288] {
        let mut s = session(&m);
        s.batch_execute(&format!("SET walmirror.failpoint = {failpoint}"))
            .unwrap();
        assert_eq!(s.query("SELECT v FROM c WHERE grp = 4", &[]).unwrap().len(), 6);
        s.batch_execute("SET walmirror.failpoint = 0").unwrap();
        assert!(commits(&mut s, failpoint), "{failpoint}");
    }
    // When it begins: only the end of the transaction mends that.
    for failpoint in [65_536, 131_072] {
        let mut s = session(&m);
        s.batch_execute(&format!("SET walmirror.failpoint = {failpoint}"))
            .unwrap();
        let error = s
            .batch_execute("BEGIN; SELECT v FROM c WHERE grp = 4")
            .unwrap_err();
        let message = error.as_db_error().unwrap().message();
        assert!(message.contains("walmirror.failpoint"), "{message}");
        s.batch_execute("ROLLBACK; SET walmirror.failpoint = 0").unwrap();
        assert!(commits(&mut s, failpoint), "{failpoint}");
    }
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
    // The flusher takes 10 ms at most; without it a row waits for wal_writer_delay, which is 200 ms.
    assert!(
        taken[10] < Duration::from_millis(150),
        "the median is {:?}",
        taken[10]
    );
}

#[test]
fn without_a_slot_for_its_worker_captures_arrive_all_the_same() {
    let m = Mirror::alone("max_worker_processes = 0");
    setup(&m);
    start(&m);
    session(&m).batch_execute("SELECT v FROM c WHERE id = 1").unwrap();
    wait_for(DEADLINE, "c:1 without any commit", || {
        (keys(&m) == c_keys([1])).then_some(())
    });
}

#[test]
fn on_a_standby_queries_run_and_nothing_is_captured() {
    let m = Mirror::alone("hot_standby = on");
    setup(&m);
    let backup = m.db.pg.base_backup();
    m.db.pg.stop(Signal::INT);
    m.db.pg.replace_data(&backup);
    m.db.pg.resume();
    m.db.reconnect();
    assert_eq!(m.db.value("SELECT pg_is_in_recovery()"), "t");
    let counted = |name: &str| {
        m.db.value(&format!(
            "SELECT value FROM walmirror.capture_stats WHERE counter = '{name}'"
        ))
    };
    let mut s = session(&m);
    let rows = s.query("SELECT v FROM c WHERE grp = 4", &[]).unwrap();
    assert_eq!(rows.len(), 6);
    assert_eq!(
        (counted("rows_seen"), counted("rows_emitted")),
        ("0".into(), "0".into())
    );
    let mut before = session(&m);
    before
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM o")
        .unwrap();
    m.sql("SELECT pg_promote()");
    wait_for(DEADLINE, "the promotion", || {
        (m.db.value("SELECT pg_is_in_recovery()") == "f").then_some(())
    });
    // The snapshot of a standby does not tell apart what was in progress: it would let through what is older than the stream.
    let rows = before.query("SELECT v FROM c WHERE grp = 4", &[]).unwrap();
    assert_eq!((rows.len(), counted("rows_emitted")), (6, "0".into()));
    // Promoted, it captures.
    s.query("SELECT v FROM c WHERE grp = 4", &[]).unwrap();
    assert_eq!(counted("rows_emitted"), "6");
}

/// The label of a partition stands on another table, which a query of the partition does not lock: so capture waits for none.
#[test]
fn a_select_of_a_partition_waits_for_no_lock_of_its_parent() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut other = m.db.connect();
    other
        .batch_execute("BEGIN; ALTER TABLE p DETACH PARTITION p1")
        .unwrap();
    let mut s = session(&m);
    s.batch_execute("SET statement_timeout = '5s'; SELECT v FROM p2 WHERE id = 12")
        .unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::new());
    other.batch_execute("ROLLBACK").unwrap();
    s.batch_execute("SELECT v FROM p2 WHERE id = 12").unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::from(["p:12:12".to_owned()]));
}

/// A block that cannot be read is an error with its buffer in mid-air. Capture reads values that the query did not ask for, so
/// the error is its own, and has to be cleaned up as the end of a transaction would: else others wait for that buffer for ever.
#[test]
fn a_broken_block_that_only_capture_reads_harms_nobody() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE d (id int PRIMARY KEY, n int, doc text); ALTER TABLE d ALTER doc SET STORAGE EXTERNAL; \
         INSERT INTO d VALUES (1, 7, repeat('x', 10000)); SELECT walmirror.cache('d')",
    );
    m.sql("CHECKPOINT");
    let file =
        m.db.value("SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE oid = 'd'::regclass");
    m.db.pg.stop(Signal::INT);
    let file = m.db.pg.data().join(file);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[..24].fill(0xFF);
    std::fs::write(&file, bytes).unwrap();
    m.db.pg.resume();
    m.db.reconnect();
    let mut s = session(&m);
    s.batch_execute("SET enable_indexonlyscan = off; BEGIN").unwrap();
    for _ in 0..3 {
        let n: i32 = s.query_one("SELECT n FROM d WHERE id = 1", &[]).unwrap().get(0);
        assert_eq!(n, 7);
    }
    s.batch_execute("COMMIT").unwrap();
    let failed =
        m.db.value("SELECT value FROM walmirror.capture_stats WHERE counter = 'skipped_failed'");
    assert_eq!(failed, "3");
    // Somebody who asks for the value is told what is wrong with it, at once.
    let mut other = m.db.connect();
    let error = other
        .batch_execute("SET statement_timeout = '5s'; SELECT md5(doc) FROM d")
        .unwrap_err();
    assert_eq!(
        error.code(),
        Some(&postgres::error::SqlState::DATA_CORRUPTED),
        "{error}"
    );
    s.batch_execute("INSERT INTO d VALUES (2, 8, 'y'); SELECT n FROM d WHERE id = 2")
        .unwrap();
}

/// Somebody took the library out of shared_preload_libraries: the application's queries and settings go on.
#[test]
fn without_preloading_nothing_is_captured_and_that_is_said_once() {
    let m = Mirror::alone("");
    setup(&m);
    m.db.pg.stop(Signal::INT);
    let conf = m.db.pg.data().join("postgresql.conf");
    let mut text = std::fs::read_to_string(&conf).unwrap();
    text.push_str("\nshared_preload_libraries = ''\n");
    std::fs::write(&conf, text).unwrap();
    m.db.pg.resume();
    m.db.reconnect();
    m.sql("SELECT pg_create_logical_replication_slot('seen', 'walmirror')");
    let mut s = session(&m);
    // The first function of the library loads it.
    s.batch_execute(
        "SELECT * FROM walmirror.capture_stats; SET walmirror.capture = on; SET walmirror.capture_max_rows = 10; \
         SELECT v FROM c WHERE id = 1; SELECT v FROM c WHERE id = 2",
    )
    .unwrap();
    let pid: i32 = s.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let log = m.db.pg.log();
    let said = log
        .lines()
        .filter(|line| line.contains("SELECT capture is off") && line.contains(&format!("[{pid}]")))
        .count();
    assert_eq!(said, 1, "{log}");
    m.sql("SELECT pg_logical_emit_message(false, 'walmirror.marker', 'the end')");
    m.sql("CREATE TABLE flushed ()");
    let read = m.db.value(
        "SELECT string_agg(data, ' ') FROM pg_logical_slot_peek_changes('seen', NULL, NULL, 'format', 'json')",
    );
    assert!(read.contains("the end") && !read.contains("apture"), "{read}");
    let error = s.batch_execute("SELECT walmirror.cache('o')").unwrap_err();
    assert_eq!(
        error.as_db_error().map(|e| e.message()),
        Some("walmirror is not in shared_preload_libraries")
    );
}
