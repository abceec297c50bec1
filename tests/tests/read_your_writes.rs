//! A COMMIT that returns when Redis has the row, and `walmirror wait`: whoever reads after them never reads what was before.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use walmirror_tests::{DEADLINE, Lsn, Mirror, Mode, Proxy, Raise, Signal, Sink, Way, wait_for};

const SETUP: &str = "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL); INSERT INTO t SELECT i, 0 FROM generate_series(0, 99) i; \
    SELECT walmirror.mirror('t')";
const WRITERS: i32 = 4;

/// Commits and reads so often, and does something in between; how many reads were stale, and how long a commit took with that.
fn commit_and_read(
    m: &Mirror,
    how: &str,
    rounds: i32,
    committed: &AtomicU64,
    between: impl Fn() + Sync,
) -> (u64, Duration) {
    let stale = AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (stale, between) = (&stale, &between);
            scope.spawn(move || {
                let (mut client, mut redis) = (m.db.connect(), m.redis.connect());
                client
                    .batch_execute(&format!("SET synchronous_commit = {how}"))
                    .unwrap();
                let update = client
                    .prepare("UPDATE t SET n = n + 1 WHERE id = $1 RETURNING n")
                    .unwrap();
                for round in 0..rounds / WRITERS {
                    let id = writer + WRITERS * (round % 25);
                    let n: i32 = client.query_one(&update, &[&id]).unwrap().get(0);
                    between();
                    let read: i32 = redis::cmd("HGET")
                        .arg(format!("t:{id}"))
                        .arg("n")
                        .query(&mut redis)
                        .unwrap();
                    assert!(read <= n);
                    stale.fetch_add(u64::from(read < n), Ordering::Relaxed);
                    committed.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let took = start.elapsed() / u32::try_from(rounds / WRITERS).unwrap();
    (stale.load(Ordering::Relaxed), took)
}

/// 10,000 times, while the sink is killed now and then: COMMIT waits for it.
#[test]
fn commit_returns_when_redis_has_the_row() {
    let m = Mirror::alone("");
    m.sql(SETUP);
    m.start();
    m.settle();
    m.db.pg.configure("synchronous_standby_names = 'walmirror'");
    m.db.pg.reload();
    wait_for(DEADLINE, "the sink to be a synchronous standby", || {
        (m.db.value("SELECT sync_state FROM pg_stat_replication") == "sync").then_some(())
    });
    // That it can fail: a COMMIT that does not wait is faster than Redis.
    let committed = AtomicU64::new(0);
    let (stale, took) = commit_and_read(&m, "local", 1_000, &committed, || ());
    println!("local: {stale} of 1000 were stale, {took:?} each");
    assert!(stale > 0, "the test proves nothing");

    let (committed, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let (stale, took) = std::thread::scope(|scope| {
        let (m, committed, done) = (&m, &committed, &done);
        let _end = Raise(done);
        scope.spawn(move || {
            for kill in 1..=5 {
                wait_for(Duration::from_secs(120), "commits", || {
                    (committed.load(Ordering::Relaxed) > kill * 1_600 || done.load(Ordering::Relaxed))
                        .then_some(())
                });
                m.sink(|sink| {
                    sink.kill();
                    sink.restart();
                });
            }
        });
        commit_and_read(m, "remote_write", 10_000, committed, || ())
    });
    println!("remote_write: {stale} of 10000 were stale, {took:?} each");
    assert_eq!(stale, 0);
    // 1 to 3 ms; what is applied is told at once, and not with the next look around, 100 ms later.
    assert!(took < Duration::from_millis(50), "a COMMIT takes {took:?}");
    m.sql("SET synchronous_commit = local");
    m.settle();
}

/// A COMMIT that waits for the sink is a transaction that runs, and the sink's slot cannot be made before it has ended.
#[test]
fn a_slot_and_a_commit_that_wait_for_each_other_are_told_of() {
    let m = Mirror::alone("");
    m.sql(SETUP);
    m.db.pg.configure("synchronous_standby_names = 'walmirror'");
    m.db.pg.reload();
    m.db.commits_wait();
    std::thread::scope(|scope| {
        let mut client = m.db.connect();
        scope.spawn(move || {
            client
                .batch_execute("SET synchronous_commit = remote_write; CREATE TABLE waits ()")
                .unwrap()
        });
        wait_for(DEADLINE, "a COMMIT to wait", || {
            let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            (m.db.value(waiting) == "1").then_some(())
        });
        m.start();
        wait_for(DEADLINE, "the sink to say what it waits for", || {
            m.sink(Sink::assert_running);
            let log = m.sink(|sink| sink.output());
            let signs = [
                "waits for a synchronous standby",
                "next=\"ALTER SYSTEM RESET synchronous_standby_names",
            ];
            log.lines()
                .any(|line| line.contains(" ERROR ") && signs.iter().all(|sign| line.contains(sign)))
                .then_some(())
        });
        m.db.pg.configure("synchronous_standby_names = ''");
        m.db.pg.reload();
    });
    m.settle();
}

/// The same from outside, for each commit. A batch is on its way to Redis for longer than a process takes to start, so that whoever does not
/// wait for it comes too early.
#[test]
fn wait_returns_when_redis_has_the_row() {
    let m = Mirror::new();
    m.sql(SETUP);
    let link = Proxy::to_port(m.redis.port());
    let slow = format!("redis://127.0.0.1:{}/0", link.port());
    m.start_at(&m.db.pg.conninfo(&m.db.name), &slow, &[], &[]);
    m.settle();
    link.set(Way::ToServer, Mode::Delay(40, 20));
    let url = m.redis.url();
    // Without --postgres: only Redis is asked.
    let wait = |lsn: Lsn, timeout: &str| {
        let lsn = lsn.to_string();
        let servers = ["--redis", &url, "--slot", &m.db.name];
        let until = ["--lsn", &lsn, "--timeout", timeout];
        Sink::run(&[&["wait"][..], &servers, &until].concat(), DEADLINE)
    };
    let returns = |lsn: Lsn| {
        let (code, output) = wait(lsn, "30s");
        assert_eq!(code, Some(0), "{output}");
    };
    let committed = AtomicU64::new(0);
    // That it can fail: with a position that Redis has passed already it waits for nothing.
    let passed = m.progress().unwrap();
    let (stale, took) = commit_and_read(&m, "local", 200, &committed, || returns(passed));
    println!("wait for nothing: {stale} of 200 were stale, {took:?} each");
    assert!(stale > 0, "the test proves nothing");

    let (stale, took) = commit_and_read(&m, "local", 400, &committed, || returns(m.db.lsn()));
    println!("wait: {stale} of 400 were stale, {took:?} each");
    assert_eq!(stale, 0);
    // Nobody applies anything: it says so after its time.
    m.sink(Sink::kill);
    m.sql("UPDATE t SET n = 0");
    let (code, output) = wait(m.db.lsn(), "300ms");
    assert_eq!(code, Some(7), "{output}");
}

/// Without --lsn it is what Postgres has written by now, also by a transaction that was rolled back.
#[test]
fn wait_without_a_position_waits_for_all_that_is_committed() {
    let m = Mirror::with(SETUP);
    let url = m.redis.url();
    let conninfo = m.db.pg.conninfo(&m.db.name);
    let wait = |conninfo: &str, timeout: &str| {
        let servers = ["--postgres", conninfo, "--redis", &url, "--slot", &m.db.name];
        let arguments = [&["wait"][..], &servers, &["--timeout", timeout]].concat();
        Sink::run(&arguments, DEADLINE)
    };
    for round in 1..=5 {
        m.sink(|sink| sink.signal(Signal::STOP));
        m.sql(&format!("UPDATE t SET n = {round} WHERE id = 1"));
        m.sql("BEGIN; UPDATE t SET n = -1 WHERE id = 2; ROLLBACK");
        let (code, output) = wait(&conninfo, "200ms");
        assert_eq!(code, Some(7), "{output}");
        let output = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| wait(&conninfo, "30s"));
            m.sink(|sink| sink.signal(Signal::CONT));
            waiter.join().unwrap()
        });
        assert_eq!(output.0, Some(0), "{}", output.1);
        let read: i32 = m.redis.command("HGET t:1 n");
        assert_eq!(read, round);
    } // A role that may not ask which cluster it is learns what it may.
    let role = format!("plain_{}", m.db.name);
    m.sql(&format!(
        "CREATE ROLE {role} LOGIN; REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC"
    ));
    let (code, output) = wait(&format!("{conninfo} user={role}"), "30s");
    assert_eq!((code, output.as_str()), (Some(0), ""));
    m.sql(&format!("DROP ROLE {role}"));
}
