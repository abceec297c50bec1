//! The files of Postgres are copied while it is down and put back later, slot included, and it writes on beyond what was lost
//! before a sink looks. Timeline, system identifier and slot fit then, and so does every position: only what was committed where does
//! not. A server that is put back and has not got that far is in faults_postgres.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::path::{Path, PathBuf};

use rand::Rng;
use walmirror_tests::{DEADLINE, Lsn, Mirror, POSTGRES_AWAY, Scenario, Setup, Signal, Sink, Trap, wait_for};

/// What the sink may say while Postgres is away.
/// A table that is not mirrored, to have something to write.
const WASTE: &str = "INSERT INTO waste SELECT repeat('w', 1000) FROM generate_series(1, 300)";

fn start(name: &str, args: &[&str]) -> Scenario {
    let s = Scenario::start(name, Setup::alone("").args(args));
    s.m.sql("CREATE TABLE waste (v text)");
    s
}

/// The load rests, and the server is copied.
fn copy(s: &Scenario) -> PathBuf {
    s.load.rest();
    s.m.db.pg.stop(Signal::INT);
    let copy = s.m.db.pg.copy_data();
    s.m.db.pg.resume();
    s.m.db.reconnect();
    copy
}

/// The copy takes the place of the server. Returns how far that was.
fn put_back(s: &Scenario, copy: &Path) -> Lsn {
    let lost = s.m.db.lsn();
    s.m.db.pg.stop(Signal::INT);
    s.m.db.pg.replace_data(copy);
    s.m.db.pg.resume();
    s.m.db.reconnect();
    assert!(s.m.db.lsn() < lost, "the copy has everything");
    lost
}

fn write_beyond(s: &Scenario, lost: Lsn) {
    while s.m.db.lsn() <= lost {
        s.m.sql(WASTE);
    }
}

/// What Redis has applied behind the copy never was.
fn a_future_is_lost(s: &mut Scenario, is_killed: bool) {
    let copy = copy(s);
    s.load.resume();
    s.flow();
    s.m.sql("INSERT INTO item SELECT i, i, 'of a future that never was' FROM generate_series(2000, 2100) i");
    s.reach();
    if is_killed {
        // At any moment: perhaps of some of the last transactions Redis has nothing, or the slot is behind.
        s.m.sink(Sink::kill);
        s.load.rest();
    } else {
        s.load.rest();
        s.m.sink(Sink::terminate);
    }
    s.resyncs();
    let lost = put_back(s, &copy);
    s.m.sql("UPDATE item SET n = n + 7 WHERE id % 2 = 0; DELETE FROM doc WHERE part = 1");
    write_beyond(s, lost);
}

#[test]
fn put_back_and_written_on_is_a_gap() {
    let mut s = start("put_back_and_written_on_is_a_gap", &[]);
    for _ in 0..3 {
        let is_killed = s.rng.random();
        a_future_is_lost(&mut s, is_killed);
        let seen = s.log().len();
        s.m.sink(Sink::restart);
        s.said(
            "its files were put back to an earlier state, and it has written other WAL since; every table",
            seen,
        );
        s.converge();
    }
    s.finish(
        &[
            &POSTGRES_AWAY[..],
            &["its files were put back to an earlier state"],
        ]
        .concat(),
    );
}

#[test]
fn put_back_and_not_allowed_to_resync() {
    let mut s = start("put_back_and_not_allowed_to_resync", &["--on-gap", "fail"]);
    a_future_is_lost(&mut s, true);
    // The session has begun when the stream shows it, so the epoch may rise. Rows and slot are left alone.
    let held = |s: &Scenario| {
        let mut rows = s.m.redis.dump();
        // What expires may go by itself.
        rows.retain(|key, _| !key.starts_with(b"walmirror:{") && !key.starts_with(b"hot:"));
        (rows, s.m.db.confirmed())
    };
    let before = held(&s);
    // Whoever starts it again gets the same answer.
    for _ in 0..2 {
        s.m.sink(Sink::restart);
        let status = s.m.sink(|sink| sink.wait(DEADLINE));
        let log = s.log();
        assert_eq!(status.code(), Some(6), "{log}");
        assert!(
            log.contains("its files were put back to an earlier state") && log.contains("--on-gap resync"),
            "{log}"
        );
        assert!(held(&s) == before, "something was touched");
    }
    s.check_logs(
        &[
            &POSTGRES_AWAY[..],
            &["its files were put back to an earlier state"],
        ]
        .concat(),
    );
}

/// Redis has applied nothing that is lost, but its position is behind it. What is committed before that position from now on would be
/// left out; where nothing is, nothing is missing, and a gap would be a false alarm.
#[test]
fn put_back_where_nothing_mirrored_was_lost() {
    let mut s = start("put_back_where_nothing_mirrored_was_lost", &[]);
    for is_missed in [false, true] {
        let copy = copy(&s);
        s.m.sql(WASTE);
        s.reach();
        s.m.sink(Sink::kill);
        s.resyncs();
        let lost = put_back(&s, &copy);
        if is_missed {
            s.m.sql("UPDATE item SET n = n + 7 WHERE id % 2 = 0");
            assert!(s.m.db.lsn() < lost, "more was written than was lost");
        }
        write_beyond(&s, lost);
        s.m.sink(Sink::restart);
        if is_missed {
            s.said("which Redis has never seen: its files were put back", 0);
        }
        s.converge();
        assert_eq!(s.log().contains("do not fit"), is_missed, "{}", s.log());
    }
    s.finish(&[&POSTGRES_AWAY[..], &["which Redis has never seen"]].concat());
}

/// Everything was made anew behind what the copy has, and nothing mirrored was committed since: what Redis has was read by SQL.
#[test]
fn put_back_to_before_everything_was_made_anew() {
    let mut s = start("put_back_to_before_everything_was_made_anew", &[]);
    let copy = copy(&s);
    s.m.sql("UPDATE item SET n = n + 7 WHERE id % 2 = 0");
    let updated = s.m.db.lsn();
    // Then it does not come in the stream again.
    wait_for(DEADLINE, "the slot to follow", || {
        (s.m.db.confirmed() >= updated).then_some(())
    });
    s.resyncs();
    let seen = s.log().len();
    let _: String = s.m.redis.command("FLUSHALL");
    s.m.sql(WASTE);
    s.said("every table is backfilled anew", seen);
    s.is_ready(true);
    s.m.sink(Sink::kill);
    let lost = put_back(&s, &copy);
    write_beyond(&s, lost);
    let seen = s.log().len();
    s.m.sink(Sink::restart);
    s.said("and it has written other WAL since; every table", seen);
    s.converge();
    let gaps = [
        "Redis lost the progress key",
        "Redis and the slot do not fit together",
    ];
    s.finish(&[&POSTGRES_AWAY[..], &gaps].concat());
}

/// More keys than go in one step are removed ahead of the TRUNCATE. Whoever stops there goes on with it, unless Postgres has lost it.
#[test]
fn put_back_while_keys_are_removed() {
    let mut s = start("put_back_while_keys_are_removed", &[]);
    s.m.sql("CREATE TABLE many (id int PRIMARY KEY); SELECT walmirror.mirror('many')");
    let fill = "INSERT INTO many SELECT generate_series(1, 25000)";
    s.m.sql(fill);
    s.converge();
    for is_lost in [false, true] {
        let copy = is_lost.then(|| copy(&s));
        s.load.rest();
        s.reach();
        let keys: usize = s.m.redis.command("DBSIZE");
        let sprung = s.redis_link.sprung();
        s.redis_link.arm(Trap::HoldBefore, "UNLINK");
        s.m.sql("TRUNCATE many");
        wait_for(DEADLINE, "most keys to be gone", || {
            (s.redis_link.sprung() > sprung).then_some(())
        });
        s.m.sink(Sink::kill);
        s.redis_link.heal();
        let left: usize = s.m.redis.command("DBSIZE");
        assert!(
            left + 10_000 < keys && left > 1000,
            "{left} of {keys} keys are left"
        );
        if let Some(copy) = copy {
            s.resyncs();
            let lost = put_back(&s, &copy);
            s.m.sql("UPDATE item SET n = n + 7 WHERE id % 2 = 0");
            write_beyond(&s, lost);
        }
        let seen = s.log().len();
        s.m.sink(Sink::restart);
        if is_lost {
            s.said("Redis has lost keys to transaction", seen);
        }
        s.converge();
        assert_eq!(s.log()[seen..].contains("do not fit"), is_lost, "{}", s.log());
        if !is_lost {
            s.m.sql(fill);
        }
    }
    s.finish(&[&POSTGRES_AWAY[..], &["Redis has lost keys to transaction"]].concat());
}

/// The last transaction that was applied may be one of which everything was rolled back but its commit. Whether such a one comes at all
/// depends on how it is sent: it is neither one that Postgres lost nor one that Redis has never seen.
#[test]
fn one_of_which_nothing_is_left_may_come_again_or_not() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t'); \
         CREATE TABLE u (id int PRIMARY KEY, v text); SELECT walmirror.mirror('u')",
    );
    m.start();
    m.settle();
    for (number, streaming) in ["off", "on", "off"].into_iter().enumerate() {
        m.sql(&format!("INSERT INTO t VALUES ({number})"));
        let mut a = m.db.connect();
        a.batch_execute(
            "BEGIN; SAVEPOINT s1; INSERT INTO u SELECT i, repeat('x', 50) FROM generate_series(1, 3000) i",
        )
        .unwrap();
        // What there is of it comes, because it is more than the 64 kB of `logical_decoding_work_mem`.
        m.sync();
        a.batch_execute("ROLLBACK TO s1; COMMIT").unwrap();
        m.sync();
        m.sink(Sink::kill);
        m.start_with(&["--streaming", streaming]);
        m.settle();
        let log = m.sink(|sink| sink.output());
        assert!(!log.contains("do not fit"), "{log}");
    }
}

/// The copy is of before there was a slot. The new one begins behind what Redis had, so that a Redis that comes back with that, and
/// without the claim, is told to be behind.
#[test]
fn put_back_to_before_there_was_a_slot() {
    let m = Mirror::alone("");
    m.sql("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM generate_series(1, 50) i; SELECT walmirror.mirror('t')");
    m.db.pg.stop(Signal::INT);
    let copy = m.db.pg.copy_data();
    m.db.pg.resume();
    m.db.reconnect();
    m.start();
    m.settle();
    m.sql("UPDATE t SET v = 'of a future that never was'");
    m.sync();
    m.sink(Sink::terminate);
    let had = m.progress().unwrap();
    m.db.pg.stop(Signal::INT);
    m.db.pg.replace_data(&copy);
    m.db.pg.resume();
    m.db.reconnect();
    let end = m.db.lsn();
    assert!(end < had && had.0 - end.0 < 1 << 20, "{end} {had}");
    m.sink(Sink::restart);
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert!(log.contains("but the slot is gone"), "{log}");
    let began = log.rsplit("INFO streaming slot=").next().unwrap();
    let began: Lsn = began
        .split("lsn=")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(began > had, "the slot begins at {began}, and Redis had {had}");
}
