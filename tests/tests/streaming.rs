//! Transactions that come while they are in progress: they count when they commit, in the order of commits, without what was
//! rolled back. The servers of these tests have 64 kB of `logical_decoding_work_mem`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use postgres::Client;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use walmirror_tests::{Db, Dir, Mirror, Raise, Sink, Tmpfs, gap, rng, skipped, wait_for};

const TABLES: &str = "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, v text); SELECT walmirror.mirror('t'); \
     CREATE TABLE u (id int PRIMARY KEY, n int NOT NULL, v text); SELECT walmirror.mirror('u', value => 'json'); \
     CREATE TABLE c (id int PRIMARY KEY, n int NOT NULL, v text); SELECT walmirror.mirror('c', value => 'string', columns => '{v}'); \
     CREATE TABLE big (id int PRIMARY KEY, n int NOT NULL, v text); ALTER TABLE big ALTER v SET STORAGE EXTERNAL; \
     SELECT walmirror.mirror('big'); CREATE TABLE other (id int PRIMARY KEY, n int, v text)";

/// On a server of its own: making a slot waits for every transaction of the server that is open.
fn alone() -> Mirror {
    let m = Mirror::alone("");
    m.sql(TABLES);
    m.start();
    m.settle();
    m
}

/// How many transactions the server has sent while they were in progress, and how many it has spilled.
fn counted(db: &Db) -> (u64, u64) {
    let row = &db.rows(
        "SELECT stream_txns::text, spill_txns::text FROM pg_stat_replication_slots WHERE slot_name = current_database()",
    )[0];
    let number = |column: usize| row[column].as_ref().unwrap().parse().unwrap();
    (number(0), number(1))
}

fn is_streamed(m: &Mirror) {
    wait_for(
        Duration::from_secs(20),
        "a transaction to come in progress",
        || (counted(&m.db).0 > 0).then_some(()),
    );
    assert_eq!(counted(&m.db).1, 0, "and none to be spilled");
}

fn rows(client: &mut Client, table: &str, from: u32, to: u32) {
    client
        .batch_execute(&format!(
            "INSERT INTO {table} SELECT i, 0, repeat('x', 50) || i FROM generate_series({from}, {to}) i"
        ))
        .unwrap();
}

/// Sees that nothing of an open transaction is in Redis, though all of it has come.
fn not_there(m: &Mirror, keys: &[&str]) {
    // A commit takes to disk what open transactions have left in memory, and only from there is it sent.
    m.sql("SELECT pg_logical_emit_message(true, 'flush', '')");
    m.sync();
    for key in keys {
        let there: bool = redis::cmd("EXISTS")
            .arg(key)
            .query(&mut m.redis.connect())
            .unwrap();
        assert!(!there, "{key} is of a transaction in progress");
    }
}

#[test]
fn it_counts_when_it_commits_without_what_was_rolled_back() {
    let m = alone();
    let mut a = m.db.connect();
    a.batch_execute("BEGIN").unwrap();
    rows(&mut a, "t", 1, 3000);
    a.batch_execute("SAVEPOINT s1").unwrap();
    rows(&mut a, "u", 1, 3000);
    a.batch_execute("SAVEPOINT s2; UPDATE t SET n = 1 WHERE id > 1000; DELETE FROM u WHERE id % 3 = 0")
        .unwrap();
    // Meanwhile others commit, before and after what comes of it.
    m.sql("INSERT INTO t VALUES (9001, 1, 'b'); INSERT INTO u VALUES (9001, 1, 'b')");
    not_there(&m, &["t:1", "u:1", "t:3000"]);
    is_streamed(&m);
    a.batch_execute("ROLLBACK TO s1").unwrap();
    // Told by messages, of which the decoder is not told whose they are.
    a.batch_execute("SAVEPOINT gone; SELECT walmirror.unmirror('t')")
        .unwrap();
    rows(&mut a, "u", 1, 3000);
    not_there(&m, &["t:1"]);
    a.batch_execute("ROLLBACK TO gone").unwrap();
    rows(&mut a, "big", 1, 500);
    a.batch_execute("SAVEPOINT s3; UPDATE big SET n = 2; RELEASE s3; TRUNCATE u; SAVEPOINT s4; TRUNCATE t")
        .unwrap();
    rows(&mut a, "t", 1, 2000);
    a.batch_execute("ROLLBACK TO s4; INSERT INTO u VALUES (7, 7, 'after truncate')")
        .unwrap();
    not_there(&m, &["t:1", "big:1", "u:7"]);
    a.batch_execute("COMMIT").unwrap();
    let report = m.settle();
    assert_eq!(report.rows, 3000 + 1 + 500 + 1);
    let log = m.sink(|sink| sink.output());
    assert!(!log.contains("no longer mirrored"), "{log}");
    is_streamed(&m);
}

/// The story: of a subtransaction that it has spilled and then sent, Postgres does not say that it was rolled back, where more than 4096
/// changes of it were spilled (that is what it reads back at once). What it had changed was mirrored.
#[test]
fn what_was_spilled_and_sent_and_rolled_back_leaves_nothing() {
    let m = alone();
    m.sql("INSERT INTO t VALUES (1, 1, 'kept'), (2, 1, 'kept')");
    let mut a = m.db.connect();
    // Five thousand pieces of one value: in the middle of them nothing can be sent, and at the last one everything is.
    let value = |table: &str, id: u32| format!("INSERT INTO {table} VALUES ({id}, 0, repeat('x', 10000000))");
    a.batch_execute(&format!(
        "BEGIN; INSERT INTO u VALUES (1, 1, 'kept'); SAVEPOINT s; UPDATE t SET v = 'never'; DELETE FROM t WHERE id = 2; \
         SAVEPOINT nested; {}; RELEASE nested; {}",
        value("big", 1),
        value("big", 2),
    ))
    .unwrap();
    not_there(&m, &["big:1", "big:2"]);
    let (sent, spilled) = counted(&m.db);
    assert!(sent > 0 && spilled > 0, "{sent} {spilled}");
    a.batch_execute(&format!(
        "ROLLBACK TO s; SAVEPOINT good; {}; RELEASE good; INSERT INTO t VALUES (3, 1, 'kept')",
        value("big", 3)
    ))
    .unwrap();
    not_there(&m, &["big:3", "t:3"]);
    a.batch_execute("COMMIT").unwrap();
    m.check();
}

#[test]
fn what_is_rolled_back_whole_leaves_nothing() {
    let m = alone();
    let mut a = m.db.connect();
    let mut b = m.db.connect();
    for client in [&mut a, &mut b] {
        client.batch_execute("BEGIN").unwrap();
    }
    rows(&mut a, "t", 1, 3000);
    rows(&mut b, "u", 1, 3000);
    not_there(&m, &["t:1", "u:1"]);
    a.batch_execute("ROLLBACK").unwrap();
    // This one has no record of its end; the server finds out by the next one.
    m.sql("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()");
    m.sql("INSERT INTO t VALUES (1, 1, 'another')");
    assert_eq!(m.settle().rows, 1);
    is_streamed(&m);
}

/// Rows of a version of the table that was never to be, and of one that others made meanwhile.
#[test]
fn schema_and_labels_change_inside_and_beside_it() {
    let m = alone();
    let mut a = m.db.connect();
    a.batch_execute("BEGIN").unwrap();
    rows(&mut a, "u", 1, 1500);
    not_there(&m, &["u:1"]);
    // A label needs no lock that rows of others would hold back.
    m.sql("SELECT walmirror.mirror('u', key => 'u2:{id}', value => 'hash')");
    rows(&mut a, "u", 2001, 3500);
    m.sql("INSERT INTO u VALUES (9001, 1, 'after')");
    not_there(&m, &["u:1", "u2:1", "u2:2001"]);
    rows(&mut a, "c", 1, 2000);
    not_there(&m, &["c:1"]);
    m.sql("SELECT walmirror.mirror('c', key => 'c2:{id}'); INSERT INTO c VALUES (9001, 1, 'after')");
    rows(&mut a, "t", 1, 1500);
    a.batch_execute("SAVEPOINT s; ALTER TABLE t ADD never text DEFAULT 'never'; UPDATE t SET never = id")
        .unwrap();
    rows(&mut a, "t (id, n, v)", 2001, 3500);
    not_there(&m, &["t:1", "t:2001"]);
    a.batch_execute(
        "ROLLBACK TO s; ALTER TABLE t ADD kept text DEFAULT 'kept'; UPDATE t SET kept = id WHERE id < 1000",
    )
    .unwrap();
    not_there(&m, &["t:1"]);
    a.batch_execute(
        "CREATE TABLE made (id int PRIMARY KEY, n int NOT NULL, v text); SELECT walmirror.mirror('made')",
    )
    .unwrap();
    rows(&mut a, "made", 1, 2000);
    a.batch_execute("COMMIT").unwrap();
    // Rows of versions that the stream has defined before it.
    m.sql("UPDATE c SET n = 5 WHERE id = 9001; UPDATE u SET n = 5 WHERE id = 9001; UPDATE t SET kept = 'end' WHERE id = 7");
    assert_eq!(m.settle().rows, 1500 + 3000 + 1 + 2001 + 2000);
    is_streamed(&m);
}

/// The next session gets it otherwise cut, or spilled, and still applies each change once.
#[test]
fn killed_while_it_is_applied() {
    let mut rng = rng("killed_while_it_is_applied");
    let m = Mirror::new();
    m.sql(TABLES);
    let args = |streaming| {
        [
            "--streaming",
            streaming,
            "--batch-bytes",
            "8KiB",
            "--transaction-bytes",
            "16KiB",
        ]
    };
    m.start_with(&args("on"));
    m.settle();
    for round in 0..12_u32 {
        let from = round * 10_000;
        m.sql(&format!(
            "BEGIN; INSERT INTO t SELECT i, 0, repeat('x', 60) FROM generate_series({from}, {from} + 4000) i; \
             SAVEPOINT s; UPDATE t SET n = -1 WHERE id > {from} + 100; ROLLBACK TO s; \
             UPDATE t SET n = n + 1 WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0; COMMIT"
        ));
        let end = m.db.lsn();
        let parts = wait_for(Duration::from_secs(20), "a part, or the end", || {
            let key = format!("walmirror:{{{}}}:progress", m.db.name);
            let part: Option<String> = redis::cmd("HGET")
                .arg(key)
                .arg("part_records")
                .query(&mut m.redis.connect())
                .unwrap();
            (part.is_some() || m.progress() >= Some(end)).then_some(part)
        });
        println!("round {round}: {parts:?}");
        m.sink(Sink::kill);
        m.start_with(&args(if rng.random_bool(0.5) { "on" } else { "off" }));
        if round % 4 == 3 {
            m.settle();
        }
    }
    m.settle();
    assert!(counted(&m.db).0 > 0);
}

/// Without room the sink says so, and from then on Postgres keeps the transactions.
#[test]
fn no_space_for_the_spool() {
    let dir = Dir::new("spool");
    let Some(full) = Tmpfs::mount(dir.path(), "1m") else {
        skipped("this user may not mount a tmpfs");
        return;
    };
    let m = Mirror::new();
    m.sql(TABLES);
    m.start_with(&["--spool-dir", dir.path().to_str().unwrap()]);
    m.settle();
    let fill = |table: &str, from: u32| {
        m.sql(&format!(
            "INSERT INTO {table} SELECT i, 0, repeat('canary', 17) FROM generate_series({from}, {from} + 29999) i"
        ));
        m.settle()
    };
    let no_room = "there is no room for transactions in progress";
    let told = || m.sink(|sink| sink.output()).matches(no_room).count();
    fill("t", 1);
    let log = m.sink(|sink| sink.output());
    assert!(log.contains(no_room) && log.contains("No space left"), "{log}");
    assert!(counted(&m.db).1 > 0, "the next session gets it spilled");
    assert_eq!(fill("u", 1).rows, 60_000);
    assert_eq!(told(), 1);
    // Once there is room, the next start tries again.
    full.resize("64m");
    m.sink(Sink::terminate);
    m.sink(Sink::restart);
    let before = counted(&m.db).0;
    assert_eq!(fill("t", 30_001).rows, 90_000);
    assert!(counted(&m.db).0 > before, "it comes in progress again");
    assert_eq!(told(), 1);
    let log = m.sink(|sink| sink.output());
    assert_eq!(gap(&log), None);
    m.check_logs(&[no_room, "a transaction in progress cannot be kept"], "canary");
}

/// One transaction of random statements, savepoints and what becomes of them. Writers have rows of their own, so that they
/// seldom wait for each other.
fn transaction(client: &mut Client, rng: &mut StdRng, writer: u32) -> Result<(), postgres::Error> {
    let mut depth = 0;
    client.batch_execute("BEGIN")?;
    for _ in 0..rng.random_range(1..12) {
        let own = format!("w{writer}");
        let table = ["t", "u", "c", "big", "other", &own][rng.random_range(0..6)];
        let from = writer * 10_000 + rng.random_range(0..2000);
        let to = from + rng.random_range(1..400);
        let statement = match rng.random_range(0..16) {
            0..4 => format!(
                "INSERT INTO {table} (id, n, v) SELECT i, 0, repeat(md5(i::text), {}) FROM generate_series({from}, {to}) i \
                 ON CONFLICT (id) DO UPDATE SET n = {table}.n + 1",
                if table == "big" { 80 } else { 2 }
            ),
            4..6 => format!("UPDATE {table} SET n = n + 1 WHERE id BETWEEN {from} AND {to}"),
            6 => format!("UPDATE {table} SET v = v || 'y' WHERE id BETWEEN {from} AND {to}"),
            7 => format!("DELETE FROM {table} WHERE id BETWEEN {from} AND {to}"),
            8 => format!(
                "UPDATE {table} SET id = id + 5000 WHERE id BETWEEN {from} AND {to} AND id % 10000 < 5000 \
                 AND NOT EXISTS (SELECT FROM {table} o WHERE o.id = {table}.id + 5000)"
            ),
            9..11 => {
                depth += 1;
                format!("SAVEPOINT s{depth}")
            }
            11 if depth > 0 => {
                let to = rng.random_range(1..=depth);
                depth = to;
                format!("ROLLBACK TO s{to}")
            }
            12 if depth > 0 => {
                let to = rng.random_range(1..=depth);
                depth = to - 1;
                format!("RELEASE s{to}")
            }
            // What is rolled back of this, the decoder may be looking up just then.
            13 => format!(
                "ALTER TABLE {own} ADD IF NOT EXISTS extra text DEFAULT 'e'; UPDATE {own} SET extra = n"
            ),
            14 => format!("ALTER TABLE {own} DROP COLUMN IF EXISTS extra"),
            15 => format!("TRUNCATE {own}"),
            _ => "SELECT pg_sleep(0.005)".to_owned(),
        };
        client.batch_execute(&statement)?;
    }
    client.batch_execute(if rng.random_bool(0.25) {
        "ROLLBACK"
    } else {
        "COMMIT"
    })
}

/// Many writers at once, a sink that is killed and gets the stream one way or the other, and DDL beside it all.
#[test]
fn random_transactions_in_progress() {
    let mut rng = rng("random_transactions_in_progress");
    let m = alone();
    for writer in 0..4 {
        m.sql(&format!(
            "CREATE TABLE w{writer} (id int PRIMARY KEY, n int NOT NULL, v text); SELECT walmirror.mirror('w{writer}')"
        ));
    }
    let done = AtomicBool::new(false);
    for round in 0..4 {
        done.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| {
            let _end = Raise(&done);
            for writer in 0..4 {
                let (db, done) = (&m.db, &done);
                let mut rng = StdRng::seed_from_u64(rng.random());
                scope.spawn(move || {
                    let mut client = db.connect();
                    while !done.load(Ordering::Relaxed) {
                        if transaction(&mut client, &mut rng, writer).is_err() {
                            // A deadlock with DDL, a key that is taken.
                            client.batch_execute("ROLLBACK").unwrap();
                        }
                    }
                });
            }
            for _ in 0..rng.random_range(2..6) {
                std::thread::sleep(Duration::from_millis(rng.random_range(50..400)));
                if rng.random_bool(0.5) {
                    m.sink(Sink::kill);
                    m.start_with(&["--streaming", if rng.random_bool(0.7) { "on" } else { "off" }]);
                }
                if rng.random_bool(0.3) {
                    let table = ["t", "u", "c", "big"][rng.random_range(0..4)];
                    let ddl = [
                        format!("ALTER TABLE {table} ADD IF NOT EXISTS extra int DEFAULT {round}"),
                        format!("ALTER TABLE {table} DROP COLUMN IF EXISTS extra"),
                        format!("SELECT walmirror.mirror('{table}', key => '{table}{round}:{{id}}')"),
                        format!("TRUNCATE {table}"),
                    ];
                    let mut client = m.db.connect();
                    client.batch_execute("SET lock_timeout = '500ms'").unwrap();
                    let ddl = &ddl[rng.random_range(0..4)];
                    println!(
                        "{ddl}: {:?}",
                        client.batch_execute(ddl).map_err(|error| error.to_string())
                    );
                }
            }
        });
        m.sink(Sink::kill);
        m.start();
        let report = m.settle();
        println!("round {round}: {} rows equal, {:?}", report.rows, counted(&m.db));
    }
    assert!(counted(&m.db).0 > 10, "{:?}", counted(&m.db));
}
