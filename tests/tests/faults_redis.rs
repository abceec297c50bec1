//! Redis goes away, comes back with less than it had, or does not answer.
//!
//! More of it in faults_redis_refuses.rs (it answers, and refuses), start.rs (an emptied Redis at the start), crash.rs (restarts with
//! appendfsync always) and faults_durability.rs (what is confirmed when).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::time::{Duration, Instant};

use rand::Rng;
use walmirror_tests::{DEADLINE, REDIS_AWAY, Redis, Scenario, Setup, Signal, Sink, wait_for};

fn with(options: &[&str]) -> Setup {
    Setup {
        redis: Redis::start_with(options),
        ..Setup::default()
    }
}

/// Redis answers before it has written where an fsync takes long: a kill may be a loss.
const EVERYSEC: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "everysec"];
const ALWAYS: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

#[test]
fn restarted_in_good_order() {
    let mut s = Scenario::start("restarted_in_good_order", with(&["--save", "3600 1000000"]));
    for _ in 0..3 {
        s.m.redis.stop(Signal::TERM);
        s.m.redis.resume();
        s.recovers();
    }
    s.finish(&REDIS_AWAY);
}

/// Everything that was appended survives the end of the process.
#[test]
fn killed_with_an_append_only_file() {
    let mut s = Scenario::start("killed_with_an_append_only_file", with(&ALWAYS));
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..300)));
        s.m.redis.stop(Signal::KILL);
        s.m.redis.resume();
        s.recovers();
    }
    s.finish(&REDIS_AWAY);
}

/// The last second is lost, as appendfsync everysec may: the stream is replayed from what is left, and nothing is missing,
/// because the slot is confirmed later than that.
#[test]
fn the_last_second_is_lost() {
    let mut s = Scenario::start(
        "the_last_second_is_lost",
        with(&EVERYSEC).args(&["--durability", "memory=5s"]),
    );
    for _ in 0..3 {
        let length = fs::metadata(s.m.redis.append_only_file()).unwrap().len();
        std::thread::sleep(Duration::from_millis(1000));
        s.flow();
        let before = s.progress();
        // Nobody writes before the test has looked.
        s.redis_link.refuse();
        s.lose_the_tail(length);
        let after = s.progress();
        s.redis_link.heal();
        assert!(after < before, "nothing was lost: {before:?}, {after:?}");
        s.flow();
        s.watch.may_lose(false);
    }
    assert!(!s.log().contains("do not fit"), "{}", s.log());
    s.finish(&REDIS_AWAY);
}

/// More is lost than the policy allows for: a gap, noticed at once, and every table is made anew.
#[test]
fn more_is_lost_than_allowed_for() {
    let mut s = Scenario::start(
        "more_is_lost_than_allowed_for",
        with(&EVERYSEC).args(&["--durability", "memory=100ms"]),
    );
    let length = fs::metadata(s.m.redis.append_only_file()).unwrap().len();
    s.flow();
    std::thread::sleep(Duration::from_millis(1500));
    s.flow();
    s.lose_the_tail(length);
    s.resyncs();
    s.said("it lost what is between", 0);
    s.finish(&[&REDIS_AWAY[..], &["it lost what is between"]].concat());
}

/// Without persistence Redis comes back empty.
#[test]
fn killed_without_persistence() {
    let mut s = Scenario::start("killed_without_persistence", Setup::default());
    s.resyncs();
    s.m.redis.stop(Signal::KILL);
    s.m.redis.resume();
    s.said("do not fit", 0);
    s.finish(&[&REDIS_AWAY[..], &["Redis has no progress of it"]].concat());
}

/// Emptied while batches are under way: at once, or by somebody who only takes the progress.
#[test]
fn emptied_under_load() {
    let mut s = Scenario::start("emptied_under_load", Setup::default());
    let progress = format!("DEL walmirror:{{{}}}:progress", s.m.db.name);
    for command in ["FLUSHALL", &progress] {
        let seen = s.log().len();
        s.resyncs();
        redis::cmd(command.split(' ').next().unwrap())
            .arg(command.split(' ').skip(1).collect::<Vec<_>>())
            .exec(&mut s.m.redis.connect())
            .unwrap();
        s.said("do not fit", seen);
        s.converge();
    }
    // Patches bring the script that they need, so nobody notices that somebody took it away.
    let sessions = s.log().matches("streaming slot").count();
    for _ in 0..5 {
        let _: String = s.m.redis.command("SCRIPT FLUSH");
        // All rows at once wait for no writer, and no writer for them.
        s.load.rest();
        s.m.sql("UPDATE item SET n = n + 1");
        s.converge();
    }
    assert_eq!(s.log().matches("streaming slot").count(), sessions, "{}", s.log());
    s.flow();
    s.finish(
        &[
            &REDIS_AWAY[..],
            &[
                "Redis and the slot*do not fit together: ",
                "lost the progress key",
                "somebody changed the key",
            ],
        ]
        .concat(),
    );
}

/// `--on-gap fail`: it stops, says what to type, and touches nothing.
#[test]
fn emptied_and_not_allowed_to_resync() {
    let mut s = Scenario::start(
        "emptied_and_not_allowed_to_resync",
        Setup::default().args(&["--on-gap", "fail"]),
    );
    s.resyncs();
    let _: String = s.m.redis.command("FLUSHALL");
    let status = s.m.sink(|sink| sink.wait(DEADLINE));
    assert_eq!(status.code(), Some(6), "{}", s.log());
    assert!(s.log().contains("--on-gap resync"), "{}", s.log());
    assert!(s.m.redis.keys().is_empty());
    s.check_logs(&[
        "lost the progress key",
        "somebody changed the key",
        "Redis and the slot*do not fit together: ",
    ]);
}

/// A replica that is behind becomes the master. What it never got comes again.
#[test]
fn failover_to_a_replica_that_is_behind() {
    let mut s = Scenario::start(
        "failover_to_a_replica_that_is_behind",
        Setup::default().args(&["--durability", "memory=5s"]),
    );
    for _ in 0..2 {
        let replica = s.m.redis.replica();
        s.flow();
        let _: String = replica.command("REPLICAOF NO ONE");
        let after = s.progress_in(&replica);
        // The old master goes on for a while, and nobody will ever see that.
        std::thread::sleep(Duration::from_millis(700));
        wait_for(DEADLINE, "something to lose", || {
            (after.is_some() && s.progress() > after).then_some(())
        });
        s.watch.may_lose(true);
        s.redis_link.point_to_port(replica.port());
        s.watch.look_at(replica.port());
        let mut old = std::mem::replace(&mut s.m.redis, replica);
        old.stop(Signal::KILL);
        s.redis_link.cut();
        s.flow();
        s.watch.may_lose(false);
    }
    assert!(!s.log().contains("do not fit"), "{}", s.log());
    s.finish(&REDIS_AWAY);
}

/// It takes Redis seconds to read its file, and it says so to everybody.
#[test]
fn loading() {
    let mut s = Scenario::start("loading", with(&ALWAYS));
    let seen = s.log().len();
    // Redis looks at its clients after every thousand commands that it has read.
    let mut pipe = redis::pipe();
    for i in 0..20_000 {
        pipe.cmd("SET").arg("walmirror:{pad}").arg(i).ignore();
    }
    pipe.exec(&mut s.m.redis.connect()).unwrap();
    s.m.redis.stop(Signal::KILL);
    let slow = [
        "--key-load-delay",
        "100",
        "--loading-process-events-interval-bytes",
        "1024",
    ];
    s.m.redis.set_options(&[&ALWAYS[..], &slow].concat());
    s.m.redis.resume();
    s.said("LOADING", seen);
    s.recovers();
    s.finish(&[&REDIS_AWAY[..], &["LOADING"]].concat());
}

/// What a sink reads in a second at least. 22 MB were seen beside a build of everything.
const READ_PER_SECOND: u64 = 7 << 20;

/// Redis does not answer for a minute while everybody writes as fast as he can. The stream waits in Postgres, which hears from the sink
/// as long as there is a session, and memory stays bounded. Then the writers rest, because together they write more than the sink takes:
/// from here on what waits only gets less, and has to arrive.
#[test]
fn frozen_under_full_load() {
    const FROZEN: Duration = Duration::from_secs(60);
    // An answer may take Redis 15 seconds.
    const OUTLIVED: Duration = Duration::from_secs(14);
    let mut setup = Setup::alone("wal_sender_timeout = 4s");
    setup.writers = (3, Duration::ZERO);
    let mut s = Scenario::start("frozen_under_full_load", setup);
    let seen = s.log().len();
    s.m.sql("CREATE TABLE much (id int PRIMARY KEY, v text); SELECT walmirror.mirror('much')");
    s.said("the keys of the table are complete", seen);
    let (frozen, walsender) = (Instant::now(), s.walsender());
    let (committed, from) = (s.load.committed(), s.m.db.lsn());
    s.m.redis.signal(Signal::STOP);
    // More than all queues hold, in one transaction.
    s.m.sql("INSERT INTO much SELECT i, repeat('much ', 20) || i FROM generate_series(1, 150000) i");
    s.is_ready(false);
    let mut silence = Duration::ZERO;
    while frozen.elapsed() < FROZEN {
        let before = frozen.elapsed();
        let (pid, quiet) = heard(&s);
        silence = silence.max(quiet);
        if before < OUTLIVED {
            assert_eq!(
                pid,
                Some(walsender),
                "the session has not outlived {before:?}: {}",
                s.log()
            );
        }
        s.m.sink(Sink::assert_running);
        std::thread::sleep(Duration::from_millis(200));
    }
    let wrote = s.load.committed() - committed;
    s.load.rest();
    let (left, waiting) = (s.m.db.lsn(), s.m.db.lsn().0 - from.0);
    assert!(wrote > 1000, "{wrote} transactions in {FROZEN:?} are no load");
    let thawed = Instant::now();
    s.m.redis.signal(Signal::CONT);
    let time = Duration::from_secs(60 + waiting / READ_PER_SECOND);
    s.reach_lsn_within(left, time);
    println!(
        "{wrote} transactions and {} MB of WAL waited, and were there {:?} after Redis was back; Postgres heard nothing for {silence:?} at most",
        waiting >> 20,
        thawed.elapsed()
    );
    // A status each second was seen, and a process that gets no processor is late.
    assert!(
        silence < Duration::from_secs(4),
        "Postgres heard nothing for {silence:?}"
    );
    let log = s.m.db.pg.log();
    assert!(!log.contains("due to replication timeout"), "{log}");
    // More than 1 GiB is worth a warning.
    s.finish(&[&REDIS_AWAY[..], &["the slot keeps"]].concat());
}

/// The walsender that there is, and for how long it has heard nothing from the sink.
fn heard(s: &Scenario) -> (Option<i32>, Duration) {
    let query = "SELECT pid, coalesce(extract(epoch FROM clock_timestamp() - coalesce(reply_time, backend_start))::float8, 0) \
         FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid WHERE slot_name = current_database()";
    let row = s.m.db.connect().query_opt(query, &[]).unwrap();
    row.map_or((None, Duration::ZERO), |row| {
        let quiet: f64 = row.get(1);
        (Some(row.get(0)), Duration::from_secs_f64(quiet.max(0.0)))
    })
}
