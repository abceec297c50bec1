//! The sink is killed, stopped, frozen and doubled while it works.
//!
//! More of it in crash.rs (kills in a backfill and inside of a large transaction, with the order of every write watched)
//! and start.rs (a second sink that waits).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::Duration;

use rand::Rng;
use walmirror_tests::{Lsn, Scenario, Setup, Signal, Sink, wait_for};

/// How often the sink is killed; `KILLS=200` by hand.
fn kills() -> u32 {
    std::env::var("KILLS").map_or(60, |text| text.parse().expect("KILLS is a number"))
}

#[test]
fn killed_at_many_random_moments() {
    let mut s = Scenario::start("killed_at_many_random_moments", Setup::default());
    for kill in 0..kills() {
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..120)));
        s.kill_sink();
        if kill % 8 == 0 {
            s.flow();
        }
    }
    s.finish(&[]);
}

/// SIGTERM and SIGINT under full load: exit 0, at once, everything acknowledged, and the next start skips nothing and
/// repeats nothing.
#[test]
fn stopped_under_load() {
    let s = Scenario::start("stopped_under_load", Setup::default());
    for round in 0..10 {
        let signal = if round % 2 == 0 { Signal::TERM } else { Signal::INT };
        let status = s.m.sink(|sink| {
            sink.signal(signal);
            sink.wait(Duration::from_secs(10))
        });
        assert_eq!(status.code(), Some(0), "{}", s.log());
        let confirmed: Lsn = s
            .m
            .db
            .value(
                "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = current_database()",
            )
            .parse()
            .unwrap();
        assert_eq!(
            Some(confirmed),
            s.progress(),
            "everything applied is acknowledged"
        );
        s.m.sink(Sink::restart);
        s.flow();
    }
    s.finish(&[]);
}

/// A sink that is frozen for longer than the server waits for it goes on when it wakes up.
#[test]
fn frozen_beyond_the_timeout() {
    let s = Scenario::start("frozen_beyond_the_timeout", Setup::default());
    s.silence("2s");
    for _ in 0..2 {
        let pid = s.walsender();
        s.m.sink(|sink| sink.signal(Signal::STOP));
        wait_for(Duration::from_secs(30), "the walsender to give up", || {
            let gone = format!("SELECT FROM pg_stat_activity WHERE pid = {pid}");
            s.m.db.rows(&gone).is_empty().then_some(())
        });
        s.m.sink(|sink| sink.signal(Signal::CONT));
        s.flow();
    }
    s.finish(&["broke", "the server is silent", "ended"]);
}

/// A sink is frozen, another takes over, and the first wakes up: it has lost the right to write, notices, and stops.
#[test]
fn the_frozen_one_wakes_up_after_another_took_over() {
    let s = Scenario::start(
        "the_frozen_one_wakes_up_after_another_took_over",
        Setup::default(),
    );
    s.silence("2s");
    for round in 0..3 {
        s.m.sink(|sink| sink.signal(Signal::STOP));
        let (conninfo, url) = (s.m.db.pg.conninfo(&s.m.db.name), s.m.redis.url());
        let mut second = Sink::start(&[
            "run",
            "--postgres",
            &conninfo,
            "--redis",
            &url,
            "--slot",
            &s.m.db.name,
        ]);
        let from = s.progress();
        let before = s.m.db.lsn();
        wait_for(Duration::from_secs(30), "the second to take over", || {
            second.assert_running();
            s.progress().filter(|&lsn| lsn > before && Some(lsn) > from)
        });
        // What the first one still has in its hands is older than what is in Redis now.
        s.m.sink(|sink| sink.signal(Signal::CONT));
        let deadline = Duration::from_secs(30);
        if round == 0 {
            // Its connection to Redis was ended by the second; it tries again and waits for the slot, like any second sink.
            s.said("next_attempt_in", 0);
        }
        wait_for(deadline, "the second to go on", || {
            s.watch.assert_holds();
            s.progress().filter(|&lsn| lsn >= s.m.db.lsn())
        });
        second.kill();
        s.flow();
    }
    s.finish(&[
        "broke",
        "the connection to Redis at",
        "is active for PID",
        "the server is silent",
        "took over",
        "ended",
    ]);
}

/// A process with hardly any file descriptors says so, waits, and goes on when it has some again.
#[test]
fn no_file_descriptors_left() {
    let s = Scenario::start("no_file_descriptors_left", Setup::default());
    let seen = s.log().len();
    let limit = |count: u64| {
        s.m.sink(|sink| {
            let pid = rustix::process::Pid::from_raw(sink.pid() as i32);
            let limit = rustix::process::Rlimit {
                current: Some(count),
                maximum: Some(4096),
            };
            rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
        });
    };
    limit(8);
    // Its connections are gone, and there is no descriptor for new ones.
    s.redis_link.cut();
    s.said("next_attempt_in", seen);
    limit(1024);
    s.flow();
    s.finish(&[
        "the connection to Redis",
        "cannot connect",
        "cannot make a waker",
        "Too many open files",
        "cannot open a replication connection",
    ]);
}
