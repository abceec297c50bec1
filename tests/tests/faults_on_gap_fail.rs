//! `--on-gap fail`: whatever does not fit, the sink stops with exit code 6 and says what to type. Redis and the slot are as they were, also
//! when it is started again, and what it said to type mends it.
//!
//! More of it in faults_redis.rs (a Redis that is emptied under way), faults_postgres.rs (another cluster), faults_put_back.rs (what only
//! the stream shows) and start.rs (a slot whose WAL was removed).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::fs::{self, File};

use walmirror_tests::{DEADLINE, Db, Lsn, Mirror, Pg, Redis, Signal, Sink, wait_for};

const SLOT: &str = "SELECT plugin, restart_lsn, confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = current_database()";

/// What a refusal leaves alone.
#[derive(PartialEq, Eq, Debug)]
struct Held {
    redis: BTreeMap<Vec<u8>, Vec<u8>>,
    slot: Vec<Vec<Option<String>>>,
}

fn held(m: &Mirror) -> Held {
    Held {
        redis: m.redis.dump(),
        slot: m.db.rows(SLOT),
    }
}

/// A sink that has stopped in good order, with everything confirmed.
fn stopped(m: Mirror) -> Mirror {
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM generate_series(1, 500) i; \
         SELECT walmirror.mirror('t')",
    );
    m.start_with(&["--on-gap", "fail"]);
    m.settle();
    assert!(m.sink(Sink::terminate).success());
    m
}

/// What nobody sees while the sink is down.
fn change(m: &Mirror) {
    m.sql("UPDATE t SET v = 'unseen' WHERE id < 100; DELETE FROM t WHERE id > 400");
}

/// Refused twice, with nothing touched, and then healed by the command that it said to type. Who waits for what is in Postgres waits until then.
///
/// The story: `walmirror wait` returned at once where Redis was ahead of a server of whose history it had nothing.
fn refused(m: &Mirror, why: &str) {
    let before = held(m);
    for _ in 0..2 {
        let seen = m.sink(|sink| sink.output().len());
        m.sink(Sink::restart);
        let status = m.sink(|sink| sink.wait(DEADLINE));
        let log = m.sink(|sink| sink.output());
        assert_eq!(status.code(), Some(6), "{log}");
        let command = format!("walmirror run --slot {} --on-gap resync", m.db.name);
        for wanted in ["do not fit together", why, &command] {
            assert!(log[seen..].contains(wanted), "no {wanted:?} in {}", &log[seen..]);
        }
        let (code, output) = m.run(&["wait", "--timeout", "300ms"]);
        assert_eq!(code, Some(7), "{output}");
        assert_eq!(held(m), before, "something was touched");
    }
    let mut waits = Sink::start(&m.arguments(&["wait", "--timeout", "0"]));
    m.start_with(&["--on-gap", "resync"]);
    m.settle();
    assert!(waits.wait(DEADLINE).success(), "{}", waits.output());
}

#[test]
fn redis_was_emptied() {
    let m = stopped(Mirror::new());
    change(&m);
    let _: String = m.redis.command("FLUSHALL");
    refused(&m, "Redis has no progress of it");
}

/// Redis comes back with less than the slot is confirmed to.
#[test]
fn redis_was_rolled_back() {
    let appends = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut m = stopped(Mirror::between(
        Db::create(Pg::shared()),
        Redis::start_with(&appends),
    ));
    let length = fs::metadata(m.redis.append_only_file()).unwrap().len();
    m.sink(Sink::restart);
    change(&m);
    m.sync();
    // It confirms what it has applied.
    assert!(m.sink(Sink::terminate).success());
    m.redis.stop(Signal::KILL);
    let file = File::options().write(true).open(m.redis.append_only_file());
    file.unwrap().set_len(length).unwrap();
    m.redis.resume();
    assert!(m.progress() < Some(m.db.confirmed()), "nothing was lost");
    refused(&m, "it lost what is between");
}

#[test]
fn the_slot_was_dropped() {
    let m = stopped(Mirror::new());
    m.sql("SELECT pg_drop_replication_slot(current_database())");
    change(&m);
    refused(&m, "the slot is gone");
}

#[test]
fn the_slot_was_dropped_and_made_again() {
    let m = stopped(Mirror::new());
    m.sql("SELECT pg_drop_replication_slot(current_database())");
    change(&m);
    m.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    refused(&m, "it lost what is between");
}

#[test]
fn the_slot_was_invalidated() {
    let settings =
        "max_slot_wal_keep_size = 16MB\nmax_wal_size = 32MB\nmin_wal_size = 32MB\nwal_keep_size = 0";
    let m = stopped(Mirror::alone(settings));
    change(&m);
    m.sql("CREATE TABLE waste (v text)");
    wait_for(DEADLINE, "the slot to be lost", || {
        m.sql("INSERT INTO waste SELECT repeat('w', 1000) FROM generate_series(1, 10000); SELECT pg_switch_wal(); CHECKPOINT");
        (m.db.value("SELECT wal_status FROM pg_replication_slots") == "lost").then_some(())
    });
    refused(&m, "the slot has lost the WAL");
}

/// A standby without the slot was promoted, and has other rows than the primary had.
#[test]
fn another_timeline_took_over() {
    let m = stopped(Mirror::alone("hot_standby = on"));
    let backup = m.db.pg.base_backup();
    m.sink(Sink::restart);
    m.sql("UPDATE t SET v = 'of the old primary'");
    m.sync();
    assert!(m.sink(Sink::terminate).success());
    m.db.pg.stop(Signal::INT);
    m.db.pg.replace_data(&backup);
    m.db.pg.resume();
    m.db.reconnect();
    m.sql("SELECT pg_promote()");
    change(&m);
    refused(&m, "there was a failover or a restore");
}

/// The files of the server were put back, and its WAL ends before what Redis has.
#[test]
fn postgres_was_put_back() {
    let m = stopped(Mirror::alone(""));
    m.db.pg.stop(Signal::INT);
    let copy = m.db.pg.copy_data();
    m.db.pg.resume();
    m.db.reconnect();
    m.sink(Sink::restart);
    m.sql("INSERT INTO t SELECT i, repeat('of a future that never was', 100) FROM generate_series(1000, 3000) i");
    m.sync();
    assert!(m.sink(Sink::terminate).success());
    let had = m.progress();
    m.db.pg.stop(Signal::INT);
    m.db.pg.replace_data(&copy);
    m.db.pg.resume();
    m.db.reconnect();
    let end: Option<Lsn> = Some(m.db.lsn());
    assert!(end < had, "{end:?} {had:?}");
    refused(&m, "the server was put back to an earlier state");
}
