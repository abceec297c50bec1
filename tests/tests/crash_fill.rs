//! Whatever ends while a table is filled: the backfill goes on where it was, and what is written meanwhile stays.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use postgres::NoTls;
use rand::Rng;
use rand::rngs::StdRng;
use walmirror_tests::{
    DEADLINE, Db, Mirror, POSTGRES_AWAY, REDIS_AWAY, Raise, Redis, Signal, Sink, gap, rng, unexpected,
    wait_for,
};

const ROWS: u64 = 400_000;
/// Who is killed, one after the other.
const VICTIMS: [&str; 3] = ["sink", "Postgres", "Redis"];
const KILLS: usize = 10;

/// How many rows the backfill of the only table has read, while it is strictly inside of the table; None before and after.
fn inside(m: &Mirror) -> Option<u64> {
    let (_, output) = m.run(&["status", "--json", "--log-level", "error"]);
    let status: serde_json::Value = serde_json::from_str(&output).ok()?;
    let cursor = &status["tables"][0]["backfill"];
    (cursor["stage"] == "fill")
        .then(|| cursor["rows"].as_u64())?
        .filter(|&rows| rows > 0)
}

/// Writes to the table until `done`, also while it is filled: every other time just in front of the backfill, which has read `read` rows.
/// How many rows were inserted, updated, deleted, and given another key.
fn write(db: &Db, rng: &mut StdRng, read: &AtomicU64, done: &AtomicBool) -> [u64; 4] {
    let mut client = db.connect();
    let mut written = [0; 4];
    while !done.load(Ordering::Acquire) {
        let id = if rng.random() {
            read.load(Ordering::Acquire) + rng.random_range(0..20_000)
        } else {
            rng.random_range(0..ROWS)
        };
        let kind = rng.random_range(0..4);
        // No statement spells a value: Postgres logs the one that a crash ends.
        let sql = match kind {
            // Rows that were deleted, and new ones.
            0 => {
                let id = id + 2 * ROWS * rng.random_range(0..2);
                format!(
                    "INSERT INTO t SELECT i, 0, word FROM secret, generate_series({id}, {id} + 20) i ON CONFLICT DO NOTHING"
                )
            }
            1 => format!(
                "UPDATE t SET n = n + 1, note = word || n FROM secret WHERE id BETWEEN {id} AND {id} + 20"
            ),
            2 => format!("DELETE FROM t WHERE id BETWEEN {id} AND {id} + 5"),
            _ => format!(
                "UPDATE t SET id = id + {ROWS} WHERE id BETWEEN {id} AND {id} + 5 AND NOT EXISTS (SELECT FROM t o WHERE o.id = t.id + {ROWS})"
            ),
        };
        match client.execute(&sql, &[]) {
            Ok(rows) => written[kind] += rows,
            Err(error) => {
                let is_away = error.code().is_none_or(|code| code.code().starts_with("57P"));
                assert!(is_away, "{sql}: {error:?}");
                wait_for(DEADLINE, "Postgres to be back", || {
                    client = db.pg.config(&db.name).connect(NoTls).ok()?;
                    Some(())
                });
            }
        }
        // Leaves the sink something like a pause.
        std::thread::sleep(Duration::from_millis(2));
    }
    written
}

/// Each of the three dies in turn while the backfill is in the middle of the table and somebody writes to it, and it goes on where it was.
/// When it is at its end nothing is read again: nobody may.
#[test]
fn killed_during_the_backfill() {
    let mut rng = rng("killed_during_the_backfill");
    let mut m = Mirror::alone("");
    m.redis = Redis::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    m.sql(&format!(
        "CREATE TABLE secret (word text); INSERT INTO secret VALUES ('canary'); \
         CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, note text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, 0, word || i FROM secret, generate_series(1, {ROWS}) i; \
         CREATE ROLE mirror LOGIN REPLICATION; GRANT SELECT ON t TO mirror"
    ));
    let conninfo =
        m.db.pg
            .conninfo(&m.db.name)
            .replace("user=postgres", "user=mirror");
    m.start_at(&conninfo, &m.redis.url(), &[], &[]);
    let (read, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&m.db, &mut rng, &read, &done));
        let end = Raise(&done);
        for victim in VICTIMS.into_iter().cycle().take(KILLS) {
            let last = read.load(Ordering::Acquire);
            let now = wait_for(
                DEADLINE,
                format!("the backfill to go on after {last} rows"),
                || {
                    m.sink(Sink::assert_running);
                    inside(&m).filter(|&rows| rows > last)
                },
            );
            read.store(now, Ordering::Release);
            println!("{victim} dies after {now} rows");
            let seen = m.sink(|sink| sink.output().len());
            match victim {
                "sink" => m.sink(|sink| {
                    sink.kill();
                    sink.restart();
                }),
                "Postgres" => m.db.pg.restart(Signal::KILL),
                _ => {
                    m.redis.stop(Signal::KILL);
                    m.redis.resume();
                }
            }
            wait_for(
                DEADLINE,
                format!("the backfill to be resumed after {victim} died"),
                || {
                    m.sink(Sink::assert_running);
                    m.sink(|sink| sink.output()[seen..].contains("resumed=true").then_some(()))
                },
            );
        }
        drop(end);
        writer.join().unwrap()
    });
    println!("inserted, updated, deleted, given another key: {written:?}");
    assert!(written.iter().all(|&rows| rows > 100), "{written:?}");
    m.db.reconnect();
    wait_for(Duration::from_secs(120), "the end of the backfill", || {
        m.sink(Sink::assert_running);
        let (_, status) = m.run(&["status", "--log-level", "error"]);
        status.contains("   complete").then_some(())
    });
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert_eq!(gap(&log), None);
    m.check_logs(
        &[&REDIS_AWAY[..], &POSTGRES_AWAY, &[": LOADING "]].concat(),
        "canary",
    );
    m.sql("REVOKE SELECT ON t FROM mirror");
    m.sink(|sink| {
        sink.kill();
        sink.restart();
    });
    m.sql("UPDATE t SET n = n + 1 WHERE id % 100 = 0");
    m.check();
    let log = m.sink(|sink| sink.output()[log.len()..].to_owned());
    let read = ["backfill begins", "permission denied"];
    assert!(!read.iter().any(|sign| log.contains(sign)), "{log}");
    // The walsender of the one that was killed may not have noticed.
    let more = unexpected(&log, &["replication slot * is active for PID"]);
    assert!(more.is_empty(), "{more:?}");
}
