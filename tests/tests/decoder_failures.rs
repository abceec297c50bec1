//! The output plugin fails on purpose, in each of its callbacks: the failure stays in one session, the server does not suffer, and the
//! sink goes on when it is mended.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Db, Mirror, POSTGRES_AWAY, Pg, gap, wait_for};

/// The bits of `walmirror.failpoint`: an error, and a panic at the bit after it.
const CALLBACKS: [(&str, u32); 6] = [
    ("startup", 1 << 20),
    ("begin", 4),
    ("change", 16),
    ("commit", 64),
    ("truncate", 256),
    ("message", 1024),
];

const PEEK: &str =
    "SELECT count(*) FROM pg_logical_slot_peek_changes(current_database(), NULL, NULL, 'format', 'json')";

/// A slot of a database with a table `t` and what these statements do to it.
fn with_slot(statements: &[&str]) -> Db {
    let db = Db::create(Pg::shared());
    db.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    db.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    statements.iter().for_each(|statement| db.sql(statement));
    // Flushes what does not flush itself.
    db.sql("INSERT INTO t VALUES (-1)");
    db
}

/// Each failure is an ERROR of the session that meets it, which goes on.
fn fails(db: &Db, peek: &str, callbacks: &[(&str, u32)]) {
    let postmaster = db.value("SELECT pg_postmaster_start_time()");
    let whole = db.value(peek);
    for &(callback, bit) in callbacks {
        for (kind, failpoint) in [("error", bit), ("panic", bit << 1)] {
            let mut session = db.connect();
            session
                .batch_execute(&format!("SET walmirror.failpoint = {failpoint}"))
                .unwrap();
            let error = session
                .batch_execute(peek)
                .expect_err(&format!("{kind} in {callback}"));
            let error = error
                .as_db_error()
                .unwrap_or_else(|| panic!("{kind} in {callback} ended the session: {error}"));
            assert!(
                error.message().contains("walmirror.failpoint"),
                "{kind} in {callback}: {}",
                error.message()
            );
            // The session goes on, and reads everything when nothing fails.
            session.batch_execute("SET walmirror.failpoint = 0").unwrap();
            assert_eq!(
                session.query_one(peek, &[]).unwrap().get::<_, i64>(0).to_string(),
                whole,
                "after {kind} in {callback}"
            );
        }
    }
    assert_eq!(
        db.value("SELECT pg_postmaster_start_time()"),
        postmaster,
        "the server was restarted"
    );
    db.sql("SELECT pg_drop_replication_slot(current_database())");
}

#[test]
fn a_failure_in_a_callback_is_an_error_of_one_session() {
    let db = with_slot(&[
        "INSERT INTO t SELECT generate_series(1, 10)",
        "TRUNCATE t",
        "SELECT pg_logical_emit_message(false, 'walmirror.marker', 'x')",
    ]);
    fails(&db, PEEK, &CALLBACKS);
}

/// The callback that is asked only where changes of other origins are not wanted.
#[test]
fn a_failure_where_origins_are_filtered() {
    let db = with_slot(&["INSERT INTO t SELECT generate_series(1, 10)"]);
    let peek = PEEK.replace("'format'", "'origin', 'none', 'format'");
    fails(&db, &peek, &[("filter_by_origin", 1 << 24)]);
}

/// The same in the callbacks for transactions in progress.
#[test]
fn a_failure_while_a_transaction_in_progress_comes() {
    let db = with_slot(&["BEGIN; INSERT INTO t SELECT generate_series(1, 3000); \
         SAVEPOINT s; INSERT INTO t SELECT generate_series(4001, 7000); ROLLBACK TO s; \
         TRUNCATE t; ALTER TABLE t ADD v text; INSERT INTO t SELECT generate_series(1, 3000); COMMIT"]);
    let binary = "SELECT count(*) FROM pg_logical_slot_peek_binary_changes(current_database(), NULL, NULL";
    let (peek, whole) = (format!("{binary}, 'streaming', 'on')"), format!("{binary})"));
    assert_ne!(db.value(&peek), db.value(&whole), "it came in parts");
    let others = [("stream_abort", 16384), ("stream_stop", 1 << 22)];
    fails(&db, &peek, &[&CALLBACKS[..], &others].concat());
}

/// Where the decoder is freed there is nobody to take an error, perhaps because another one is under way: a warning, and all goes on.
#[test]
fn a_failure_where_the_decoder_is_freed_is_a_warning() {
    let db = with_slot(&["INSERT INTO t SELECT generate_series(1, 10)"]);
    let postmaster = db.value("SELECT pg_postmaster_start_time()");
    let whole = db.value(PEEK);
    let warnings = || {
        db.pg
            .log()
            .matches("the memory of the decoder could not be freed")
            .count()
    };
    for free in [1 << 26, 1 << 27] {
        for other in [0, 16, 32] {
            let before = warnings();
            let mut session = db.connect();
            session
                .batch_execute(&format!("SET walmirror.failpoint = {}", free | other))
                .unwrap();
            match session.query_one(PEEK, &[]) {
                Ok(row) => assert_eq!((other, row.get::<_, i64>(0).to_string()), (0, whole.clone())),
                Err(error) => {
                    let message = error
                        .as_db_error()
                        .expect("the session goes on")
                        .message()
                        .to_owned();
                    assert_eq!(message, format!("walmirror.failpoint {other}"));
                }
            }
            session.batch_execute("SET walmirror.failpoint = 0").unwrap();
            // What an ERROR leaves is freed once the client has been told.
            assert_eq!(warnings(), before + 1, "{free} and {other}");
            assert_eq!(
                session.query_one(PEEK, &[]).unwrap().get::<_, i64>(0).to_string(),
                whole
            );
        }
    }
    assert_eq!(
        db.value("SELECT pg_postmaster_start_time()"),
        postmaster,
        "the server was restarted"
    );
    db.sql("SELECT pg_drop_replication_slot(current_database())");
}

/// In a backlog of small transactions the walsender decodes several WAL records a turn, so that is where the failures strike.
#[test]
fn a_failure_in_a_backlog_ends_one_walsender_and_nothing_is_lost() {
    let db = Db::create(Pg::shared());
    db.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    db.sql("SELECT pg_create_logical_replication_slot('backlog', 'walmirror')");
    db.sql(
        "DO $$ BEGIN FOR i IN 1..3000 LOOP \
           INSERT INTO t VALUES (i, repeat('v', 50)); \
           IF i % 3 = 0 THEN ROLLBACK; ELSE COMMIT; END IF; \
           IF i % 500 = 0 THEN PERFORM pg_logical_emit_message(false, 'walmirror.marker', 'x'); END IF; \
         END LOOP; END $$",
    );
    let end = db.value("SELECT pg_current_wal_insert_lsn()");
    db.sql("SELECT pg_logical_emit_message(true, 'the end', '')");
    let read = |failpoint: u32| {
        db.sql("SELECT pg_copy_logical_replication_slot('backlog', 'backlog_copy')");
        let output = db
            .pg
            .program("pg_recvlogical", &db.name)
            .env("PGOPTIONS", format!("-c walmirror.failpoint={failpoint}"))
            .args([
                "-d",
                &db.name,
                "--slot",
                "backlog_copy",
                "--start",
                "--no-loop",
                "--endpos",
                &end,
            ])
            .args(["--fsync-interval", "0", "-o", "tables=public.*", "-f", "-"])
            .output()
            .unwrap();
        wait_for(DEADLINE, "the walsender to be gone", || {
            db.connect()
                .batch_execute("SELECT pg_drop_replication_slot('backlog_copy')")
                .ok()
        });
        output
    };
    let whole = read(0);
    assert!(
        whole.status.success(),
        "{}",
        String::from_utf8_lossy(&whole.stderr)
    );
    assert!(whole.stdout.len() > 2000 * 50, "{} bytes", whole.stdout.len());
    for (callback, bit) in CALLBACKS
        .into_iter()
        .filter(|(callback, _)| *callback != "truncate")
    {
        for (kind, failpoint) in [("error", bit), ("panic", bit << 1)] {
            let output = read(failpoint);
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{kind} in {callback}");
            assert_eq!(
                told.matches("walmirror.failpoint").count(),
                1,
                "{kind} in {callback}: {told}"
            );
        }
    }
    assert!(
        read(0).stdout == whole.stdout,
        "another output after the failures"
    );
    db.sql("SELECT pg_drop_replication_slot('backlog')");
}

#[test]
fn the_sink_survives_a_failing_decoder_and_goes_on_when_it_is_mended() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t'); INSERT INTO t VALUES (1, 'canary')",
    );
    m.start();
    m.settle();
    let arm = |failpoint: u32| {
        m.sql(&format!("ALTER SYSTEM SET walmirror.failpoint = {failpoint}"));
        m.db.pg.reload();
        m.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'walsender'");
    };
    let postmaster = m.db.value("SELECT pg_postmaster_start_time()");
    let mut id = 1;
    for (callback, bit) in CALLBACKS {
        for (kind, failpoint) in [("error", bit), ("panic", bit << 1)] {
            // What was logged of the failures before this one proves nothing of it.
            let seen = m.sink(|sink| sink.output().len());
            arm(failpoint);
            id += 1;
            m.sql(&format!(
                "INSERT INTO t VALUES ({id}, 'canary'); TRUNCATE t; INSERT INTO t VALUES ({id}, 'canary'); \
                 SELECT pg_logical_emit_message(false, 'walmirror.marker', 'x')"
            ));
            let word = format!("walmirror.failpoint {failpoint}");
            wait_for(
                DEADLINE,
                format!("the sink to hear of the {kind} in {callback}"),
                || {
                    m.sink(|sink| {
                        sink.assert_running();
                        sink.output()[seen..].contains(&word).then_some(())
                    })
                },
            );
            arm(0);
            m.check();
            // The pauses of another process begin small again.
            m.sink(|sink| {
                sink.kill();
                sink.restart();
            });
        }
    }
    assert_eq!(
        m.db.value("SELECT pg_postmaster_start_time()"),
        postmaster,
        "the server was restarted"
    );
    let log = m.sink(|sink| sink.output());
    assert_eq!(gap(&log), None);
    m.check_logs(&[&POSTGRES_AWAY[..], &["walmirror.failpoint"]].concat(), "canary");
}
