//! The admin server of `run --admin`, and what doctor says of the WAL that a slot keeps, on real servers.

use std::time::Duration;

use walmirror_tests::{DEADLINE, Mirror, Signal, figure, free_address, get, wait_for};

#[track_caller]
fn wait_status(address: &str, path: &str, status: u16, within: Duration) {
    wait_for(within, format!("{path} to answer {status}"), || {
        get(address, path).filter(|(found, _)| *found == status)
    });
}

fn mirror(address: &str) -> Mirror {
    let mirror = Mirror::new();
    mirror.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    mirror.start_with(&["--admin", address]);
    mirror.settle();
    mirror
}

#[test]
fn ready_while_redis_is_there_and_not_while_it_is_away() {
    let address = free_address();
    let mut mirror = mirror(&address);
    wait_status(&address, "/readyz", 200, DEADLINE);
    assert_eq!(get(&address, "/healthz").map(|(status, _)| status), Some(200));
    assert_eq!(get(&address, "/else").map(|(status, _)| status), Some(404));
    mirror.redis.stop(Signal::TERM);
    wait_status(&address, "/readyz", 503, Duration::from_secs(10));
    assert_eq!(get(&address, "/healthz").map(|(status, _)| status), Some(200));
    mirror.redis.resume();
    wait_status(&address, "/readyz", 200, DEADLINE);
}

/// The story: the figures that should wake somebody stood still, or were 0, as long as Redis or Postgres was away.
#[test]
fn the_lag_grows_while_redis_or_postgres_is_away() {
    let address = free_address();
    let mut mirror = Mirror::alone("");
    mirror.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    mirror.start_with(&["--admin", &address]);
    mirror.settle();
    wait_status(&address, "/readyz", 200, DEADLINE);
    let grown = |than: f64| {
        wait_for(DEADLINE, "the seconds to grow", || {
            figure(&address, "walmirror_lag_seconds").filter(|now| *now > than)
        })
    };
    mirror.redis.stop(Signal::TERM);
    mirror.sql("INSERT INTO t VALUES (1, 'unseen')");
    grown(grown(0.0));
    let before = figure(&address, "walmirror_lag_bytes");
    mirror.sql("INSERT INTO t SELECT g, 'unseen' FROM generate_series(3, 3000) g");
    wait_for(DEADLINE, "the bytes to grow", || {
        (figure(&address, "walmirror_lag_bytes") > before).then_some(())
    });
    mirror.redis.resume();
    wait_status(&address, "/readyz", 200, DEADLINE);
    mirror.settle();
    wait_for(DEADLINE, "nothing to lag", || {
        figure(&address, "walmirror_lag_seconds").filter(|lag| *lag == 0.0)
    });
    mirror.db.pg.stop(Signal::INT);
    grown(grown(0.0));
    mirror.db.pg.resume();
    mirror.db.reconnect();
    wait_for(DEADLINE, "nothing to lag", || {
        figure(&address, "walmirror_lag_seconds").filter(|lag| *lag == 0.0)
    });
}

#[test]
fn not_ready_while_redis_says_nothing_and_while_a_gap_is_healed() {
    let address = free_address();
    let mut mirror = mirror(&address);
    wait_status(&address, "/readyz", 200, DEADLINE);
    mirror.redis.signal(Signal::STOP);
    wait_status(&address, "/readyz", 503, Duration::from_secs(12));
    mirror.redis.signal(Signal::CONT);
    wait_status(&address, "/readyz", 200, DEADLINE);
    // A transaction that runs keeps the backfill from its end.
    let mut blocker = mirror.db.connect();
    let mut running = blocker.transaction().unwrap();
    running.execute("SELECT pg_current_xact_id()", &[]).unwrap();
    redis::cmd("FLUSHALL").exec(&mut mirror.redis.connect()).unwrap();
    wait_for(DEADLINE, "the gap to be told of".to_owned(), || {
        get(&address, "/readyz").filter(|(status, why)| *status == 503 && why.contains("gap"))
    });
    assert_eq!(figure(&address, "walmirror_gaps_total"), Some(2.0));
    // The story: another process knew nothing of the gap, and said that all was well while keys were missing.
    mirror.sink(|sink| {
        assert!(sink.terminate().success());
        sink.restart();
    });
    wait_for(DEADLINE, "the gap to be told of again".to_owned(), || {
        get(&address, "/readyz").filter(|(status, why)| *status == 503 && why.contains("gap"))
    });
    assert_eq!(figure(&address, "walmirror_gaps_total"), Some(0.0));
    running.rollback().unwrap();
    wait_status(&address, "/readyz", 200, DEADLINE);
    let progress = format!("HEXISTS walmirror:{{{}}}:progress healing", mirror.db.name);
    wait_for(DEADLINE, "the note to be gone".to_owned(), || {
        (mirror.redis.command::<i64>(&progress) == 0).then_some(())
    });
}

#[test]
fn metrics_are_read_and_move() {
    let address = free_address();
    let mirror = mirror(&address);
    let rows = figure(&address, "walmirror_rows_total").unwrap();
    let applied = figure(&address, "walmirror_applied_lsn").unwrap();
    mirror.sql("INSERT INTO t SELECT g, 'canary' FROM generate_series(1, 100) g");
    mirror.sync();
    wait_for(DEADLINE, "the rows to be counted".to_owned(), || {
        figure(&address, "walmirror_rows_total").filter(|now| *now == rows + 100.0)
    });
    // Redis has them a moment before the sink has its answer.
    wait_for(DEADLINE, "the position to rise".to_owned(), || {
        figure(&address, "walmirror_applied_lsn").filter(|now| *now > applied)
    });
    assert!(figure(&address, "walmirror_resident_bytes").unwrap() > 1e6);
    // The session looks at its tables several times a second, not at each scrape.
    wait_for(DEADLINE, "the table to be counted".to_owned(), || {
        figure(&address, "walmirror_tables").filter(|tables| *tables == 1.0)
    });
    wait_for(DEADLINE, "the slot to be looked at".to_owned(), || {
        figure(&address, "walmirror_slot_retained_bytes")
    });
    let (_, text) = get(&address, "/metrics").unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert!(!text.contains("canary"));
}

#[test]
fn captured_rows_that_are_dropped_are_counted_by_reason() {
    let address = free_address();
    let mirror = Mirror::new();
    mirror.sql(
        "CREATE TABLE c (id int PRIMARY KEY, v text); INSERT INTO c VALUES (1, 'old'), (2, 'old'); \
         SELECT walmirror.cache('c')",
    );
    mirror.start_with(&["--admin", &address]);
    mirror.sync();
    mirror.outlast_announced();
    let admitted = figure(&address, "walmirror_read_admitted_total").unwrap();
    let mut reader = mirror.db.connect();
    reader
        .batch_execute("SET walmirror.capture_interval = 0")
        .unwrap();
    let mut reading = reader
        .build_transaction()
        .isolation_level(postgres::IsolationLevel::RepeatableRead)
        .start()
        .unwrap();
    reading.query("SELECT txid_current_snapshot()", &[]).unwrap();
    mirror.sql("UPDATE c SET v = 'new' WHERE id = 1");
    // An old row and one that is as it was.
    assert_eq!(reading.query("SELECT * FROM c", &[]).unwrap().len(), 2);
    reading.commit().unwrap();
    mirror.sql("SELECT pg_logical_emit_message(true, 'test', '')");
    mirror.sync();
    let dropped = |reason: &str| {
        let name = format!("walmirror_captures_dropped_total{{reason=\"{reason}\"}}");
        figure(&address, &name).unwrap()
    };
    assert_eq!(dropped("changed"), 1.0);
    assert_eq!(dropped("other_version") + dropped("unknown_table"), 0.0);
    assert_eq!(
        figure(&address, "walmirror_read_admitted_total"),
        Some(admitted + 1.0)
    );
}

/// The story: on a standby `status` failed, because that has no end of the WAL of its own.
#[test]
fn status_works_on_a_standby() {
    let mirror = Mirror::alone("");
    mirror.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    let pg = &mirror.db.pg;
    let backup = pg.base_backup();
    pg.stop(Signal::INT);
    pg.replace_data(&backup);
    pg.resume();
    let (code, output) = mirror.run(&["status"]);
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("table        public.t  mirror"), "{output}");
    let (code, output) = mirror.run(&["status", "--json"]);
    assert_eq!(code, Some(0), "{output}");
    assert!(
        output.contains("\"wal_lsn\":\"") || output.contains("\"wal_lsn\": \""),
        "{output}"
    );
}

#[test]
fn doctor_warns_when_a_slot_keeps_much() {
    let mirror = Mirror::alone("max_slot_wal_keep_size = '64MB'");
    let doctor = || {
        let (code, output) = mirror.run(&["doctor"]);
        assert_eq!(code, Some(0), "{output}");
        output
    };
    mirror.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    let told = doctor();
    assert!(!told.contains("WARN  retained WAL"), "{told}");
    mirror
        .sql("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000)) FROM generate_series(1, 45)");
    let told = doctor();
    assert!(
        told.contains("\nWARN  retained WAL             the slot keeps"),
        "{told}"
    );
    // Nobody streams, and Redis has no progress.
    assert!(told.contains("3 of the checks warn"), "{told}");
    assert!(
        told.contains("64 MiB") && told.contains("max_slot_wal_keep_size"),
        "{told}"
    );
}

/// The story: without --admin the log never warned, and the disk filled.
#[test]
fn the_log_warns_when_the_slot_keeps_much() {
    let mirror = Mirror::alone("max_slot_wal_keep_size = '64MB'");
    mirror.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    mirror.start();
    mirror.settle();
    // The server keeps what a transaction that runs needs.
    let mut client = mirror.db.connect();
    let mut running = client.transaction().unwrap();
    running.execute("INSERT INTO t VALUES (1)", &[]).unwrap();
    mirror
        .sql("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000)) FROM generate_series(1, 45)");
    let warned = || {
        wait_for(DEADLINE, "the warning", || {
            let log = mirror.sink(|sink| sink.output());
            let mut lines = log.lines();
            lines.find_map(|line| line.contains("the slot keeps").then(|| line.to_owned()))
        })
    };
    let line = warned();
    let signs = [" WARN ", "64 MiB", "max_slot_wal_keep_size", " next="];
    assert!(signs.iter().all(|sign| line.contains(sign)), "{line}");
    // With --admin the figures say so, too.
    let address = free_address();
    mirror.start_with(&["--admin", &address]);
    warned();
    let safe = || figure(&address, "walmirror_slot_safe_bytes");
    let some = wait_for(DEADLINE, "the slot to be looked at", safe);
    // A limit of 64 MB, whole segments of 16 MB.
    assert!((0.0..48e6).contains(&some), "{some}");
    let kept = wait_for(DEADLINE, "the slot to be looked at", || {
        figure(&address, "walmirror_slot_retained_bytes")
    });
    assert!(kept > 45e6, "{kept}");
    mirror.sql("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000)) FROM generate_series(1, 5)");
    wait_for(DEADLINE, "less to be safe", || {
        safe().filter(|less| *less < some - 4e6)
    });
    running.rollback().unwrap();
}
