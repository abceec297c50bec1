//! What is confirmed when: nothing that Redis could still lose by the rule of `--durability`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::VecDeque;
use std::fs;
use std::time::{Duration, Instant};

use rand::Rng;
use walmirror_tests::{DEADLINE, Lsn, Mirror, REDIS_AWAY, Redis, Scenario, Setup, Signal, Sink, wait_for};

/// Stops a replica for longer than any window of time. Everything goes on but the slot, which follows when the replica is back.
#[track_caller]
fn away_for_a_while(s: &Scenario, replica: &mut Redis) {
    replica.signal(Signal::STOP);
    let stopped = s.m.db.lsn();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        s.flow();
        let confirmed = s.m.db.confirmed();
        assert!(
            confirmed <= stopped,
            "{confirmed} is confirmed, and the replica stopped before {stopped}"
        );
    }
    replica.signal(Signal::CONT);
    let target = s.m.db.lsn();
    wait_for(DEADLINE, "the slot to follow the replica again", || {
        (s.m.db.confirmed() >= target).then_some(())
    });
}

/// `replicas=1`: while the replica is away everything goes on but the slot, and a failover to it loses nothing, however long
/// it was away.
#[test]
fn only_what_a_replica_has_is_confirmed() {
    let redis = Redis::start();
    let mut replica = redis.replica();
    let setup = Setup {
        redis,
        ..Setup::default()
    };
    let mut s = Scenario::start(
        "only_what_a_replica_has_is_confirmed",
        setup.args(&["--durability", "replicas=1"]),
    );
    let target = s.m.db.lsn();
    wait_for(DEADLINE, "the slot to follow the replica", || {
        (s.m.db.confirmed() >= target).then_some(())
    });
    away_for_a_while(&s, &mut replica);
    // Replication ends before the master does.
    let _: String = replica.command("REPLICAOF NO ONE");
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        s.flow();
    }
    let (before, after) = (s.progress(), s.progress_in(&replica));
    assert!(
        after.is_some() && after < before,
        "nothing is lost: {before:?}, {after:?}"
    );
    s.watch.may_lose(true);
    s.redis_link.point_to_port(replica.port());
    s.watch.look_at(replica.port());
    // The new master has a replica of its own, without which nothing would be confirmed.
    let next = replica.replica();
    let mut old = std::mem::replace(&mut s.m.redis, replica);
    old.stop(Signal::KILL);
    s.redis_link.cut();
    s.flow();
    s.watch.may_lose(false);
    assert!(!s.log().contains("do not fit"), "{}", s.log());
    s.finish(&REDIS_AWAY);
    drop(next);
}

/// `replicas=2`: what only one of them has would be lost where the other takes over, so it is not confirmed.
#[test]
fn two_replicas_are_asked_for_and_one_is_away() {
    let redis = Redis::start();
    let (mut one, mut two) = (redis.replica(), redis.replica());
    let setup = Setup {
        redis,
        ..Setup::default()
    };
    let s = Scenario::start(
        "two_replicas_are_asked_for_and_one_is_away",
        setup.args(&["--durability", "replicas=2"]),
    );
    let target = s.m.db.lsn();
    wait_for(DEADLINE, "the slot to follow both", || {
        (s.m.db.confirmed() >= target).then_some(())
    });
    away_for_a_while(&s, &mut two);
    away_for_a_while(&s, &mut one);
    s.finish(&[]);
}

/// `memory=3s`: what is confirmed has been in Redis for three seconds.
#[test]
fn memory_is_confirmed_behind_its_window() {
    let window = Duration::from_secs(3);
    let s = Scenario::start(
        "memory_is_confirmed_behind_its_window",
        Setup::default().args(&["--durability", "memory=3s"]),
    );
    let mut history: VecDeque<(Instant, Lsn)> = VecDeque::new();
    let (start, mut checked) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(9) {
        let before = Instant::now();
        if let Some(progress) = s.progress() {
            history.push_back((before, progress));
        }
        let confirmed = s.m.db.confirmed();
        let read = Instant::now();
        // The first look at Redis that is not older than the window: what is confirmed was there then.
        while history
            .get(1)
            .is_some_and(|(at, _)| read.duration_since(*at) > window)
        {
            history.pop_front();
        }
        if let [Some((at, _)), Some((_, then))] = [history.front(), history.get(1)]
            && read.duration_since(*at) > window
        {
            assert!(
                confirmed <= *then,
                "{confirmed} is confirmed, Redis was at {then} {window:?} ago"
            );
            checked += 1;
        }
    }
    println!("{checked} times");
    assert!(checked > 100);
    // It does follow.
    let target = s.m.db.lsn();
    wait_for(DEADLINE, "the slot to follow", || {
        (s.m.db.confirmed() >= target).then_some(())
    });
    s.finish(&[]);
}

/// `replicas=1` where there is none: the slot stood still, and nothing said why.
#[test]
fn what_no_replica_acknowledges_is_told() {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    m.start_with(&["--durability", "replicas=1"]);
    wait_for(2 * DEADLINE, "a warning", || {
        m.sink(|sink| sink.output().contains("WAIT answers that 0 replicas have it"))
            .then_some(())
    });
    let log = m.sink(|sink| sink.output());
    assert!(log.contains("INFO replication"), "{log}");
    let replica = m.redis.replica();
    m.sql("INSERT INTO t VALUES (1)");
    m.check();
    let target = m.db.lsn();
    wait_for(DEADLINE, "the slot to follow", || {
        (m.db.confirmed() >= target).then_some(())
    });
    drop(replica);
}

/// A failover under an idle sink that keeps its connection: the old master is made a replica of one that never got the last row. Until
/// the new master's data arrives it holds the row and answers whatever reads, and yet the row is lost: it was confirmed, and that was a
/// gap.
#[test]
fn what_a_demoted_master_holds_is_not_confirmed() {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    m.start_with(&["--durability", "memory=5s"]);
    m.settle();
    let next = m.redis.replica();
    m.sql("INSERT INTO t VALUES (1)");
    m.check();
    wait_for(DEADLINE, "the replica to have the row", || {
        next.keys().contains(&"t:1".to_owned()).then_some(())
    });
    let _: String = next.command("REPLICAOF NO ONE");
    m.sql("INSERT INTO t VALUES (2)");
    let lost = m.db.lsn();
    m.sync();
    let _: String = m.redis.command(&format!("REPLICAOF 127.0.0.1 {}", next.port()));
    // Longer than the window, and until the row is gone.
    let start = Instant::now();
    wait_for(DEADLINE, "the old master to hold what the new one does", || {
        let info: String = m.redis.command("INFO replication");
        (info.contains("master_link_status:up") && start.elapsed() > Duration::from_secs(7)).then_some(())
    });
    let confirmed = m.db.confirmed();
    assert!(
        confirmed < lost,
        "{confirmed} is confirmed, and Redis lost {lost}"
    );
    let _: String = m.redis.command("REPLICAOF NO ONE");
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert!(log.contains("READONLY") && !log.contains("do not fit"), "{log}");
}

/// A Redis with an append-only file. None where it has no WAITAOF: tested is then that the sink says so.
fn with_waitaof(fsync: &str) -> Option<Setup> {
    let redis = Redis::start_with(&["--appendonly", "yes", "--appendfsync", fsync]);
    if redis.knows("WAITAOF") {
        return Some(Setup {
            redis,
            ..Setup::default()
        });
    }
    println!("this Redis has no WAITAOF: tested is that the sink says so");
    refuses_aof(&redis, "unknown command");
    None
}

/// `aof`: what is confirmed survives a power failure, whenever the disk was last told to keep what was appended.
#[test]
fn only_what_the_append_only_file_holds_is_confirmed() {
    let Some(setup) = with_waitaof("everysec") else {
        return;
    };
    let mut s = Scenario::start(
        "only_what_the_append_only_file_holds_is_confirmed",
        setup.args(&["--durability", "aof"]),
    );
    for _ in 0..3 {
        let target = s.m.db.lsn();
        wait_for(DEADLINE, "the slot to follow the append-only file", || {
            (s.m.db.confirmed() >= target).then_some(())
        });
        // From here on nothing is forced to the disk; what was, is in the file already.
        let _: String = s.m.redis.command("CONFIG SET appendfsync no");
        let length = fs::metadata(s.m.redis.append_only_file()).unwrap().len();
        let held = s.progress().unwrap();
        let pause = Duration::from_millis(s.rng.random_range(1200..2500));
        let start = Instant::now();
        while start.elapsed() < pause {
            s.flow();
            let confirmed = s.m.db.confirmed();
            assert!(
                confirmed <= held,
                "{confirmed} is confirmed, and the disk has nothing after {held}"
            );
        }
        let before = s.progress();
        s.lose_the_tail(length);
        let after = s.progress();
        assert!(after < before, "nothing was lost: {before:?}, {after:?}");
        s.flow();
        s.watch.may_lose(false);
    }
    // Nothing is lost when only the process ends.
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..300)));
        s.m.redis.stop(Signal::KILL);
        s.m.redis.resume();
        s.flow();
    }
    assert!(!s.log().contains("do not fit"), "{}", s.log());
    s.finish(&REDIS_AWAY);
}

/// Where the disk is never told to keep anything, the slot would wait for ever: the sink says so.
#[test]
fn aof_without_fsync_is_said_at_the_start() {
    let Some(setup) = with_waitaof("no") else { return };
    let s = Scenario::start(
        "aof_without_fsync_is_said_at_the_start",
        setup.args(&["--durability", "aof"]),
    );
    s.said("appendfsync is no", 0);
    let _: String = s.m.redis.command("CONFIG SET appendfsync everysec");
    let target = s.m.db.lsn();
    wait_for(DEADLINE, "the slot to follow", || {
        (s.m.db.confirmed() >= target).then_some(())
    });
    s.finish(&["appendfsync is no"]);
}

/// `aof` needs an append-only file. Where there is none it is said at the start.
#[test]
fn aof_without_an_append_only_file_is_said_at_the_start() {
    refuses_aof(&Redis::start(), "append-only file");
}

/// The sink stops at once, says why, and what to type.
fn refuses_aof(redis: &Redis, why: &str) {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    let conninfo = m.db.pg.conninfo(&m.db.name);
    let url = redis.url();
    let run = [
        "run",
        "--postgres",
        &conninfo,
        "--redis",
        &url,
        "--slot",
        &m.db.name,
        "--durability",
        "aof",
    ];
    let (code, output) = Sink::run(&run, DEADLINE);
    assert_eq!(code, Some(4), "{output}");
    assert!(output.contains(why) && output.contains("next: "), "{output}");
    assert!(output.contains("--durability memory"), "{output}");
}
