//! Whatever ends at whatever moment: in the end Redis equals Postgres, and nothing went back on the way.
//!
//! What ends in the middle of a backfill is in crash_fill.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::Rng;
use walmirror_tests::{DEADLINE, Db, Lsn, Mirror, Mode, Proxy, Raise, Redis, Signal, Sink, rng, wait_for};

/// Small transactions, each of which counts `n` up in a few rows, until `done`.
fn count_up(db: &Db, worker: u32, workers: u32, rows: u32, done: &AtomicBool) {
    let mut client = db.connect();
    let mut i = 0;
    while !done.load(Ordering::Relaxed) {
        i += 1;
        let id = (i * 17 * workers + worker) % rows + 1;
        let sql = format!(
            "UPDATE t SET n = n + 1 WHERE id IN ({id}, {})",
            (id + 50 * workers - 1) % rows + 1
        );
        // Two workers may meet in a deadlock; a crash test may take the server away.
        if client.batch_execute(&sql).is_err() {
            while client.is_closed() && !done.load(Ordering::Relaxed) {
                match db.pg.config(&db.name).connect(postgres::NoTls) {
                    Ok(new) => client = new,
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        }
        if i % 20 == 0 {
            // Leaves the sink something like a pause now and then.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Reads `MONITOR` and fails on a value that was written before, and on progress that goes back.
fn watch_history(redis: &Redis, done: &AtomicBool) -> (u64, u64) {
    let mut stream = TcpStream::connect(("127.0.0.1", redis.port())).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    stream.write_all(b"MONITOR\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    let (mut writes, mut steps) = (0, 0);
    let mut counts: HashMap<String, i64> = HashMap::new();
    let mut progress = Lsn(0);
    let mut line = Vec::new();
    loop {
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return (writes, steps),
            Ok(_) => {}
            Err(_) if done.load(Ordering::Relaxed) => return (writes, steps),
            // Half a line stays in the buffer until the rest comes.
            Err(_) => continue,
        }
        let text = String::from_utf8_lossy(&line).into_owned();
        line.clear();
        let words: Vec<&str> = text.split('"').skip(1).step_by(2).collect();
        let after = |name: &str| {
            words
                .iter()
                .position(|w| *w == name)
                .and_then(|i| words.get(i + 1))
        };
        let Some(command) = words.first().map(|c| c.to_uppercase()) else {
            continue;
        };
        if command != "HSET" && command != "HMSET" {
            continue;
        }
        if words[1].ends_with(":progress") {
            let Some(lsn) = after("lsn") else { continue };
            let lsn: Lsn = lsn.parse().unwrap();
            assert!(lsn >= progress, "progress went from {progress} back to {lsn}");
            progress = lsn;
            steps += 1;
        } else if let (true, Some(n)) = (words[1].starts_with("t:"), after("n")) {
            let n: i64 = n.parse().unwrap();
            let last = counts.insert(words[1].to_owned(), n).unwrap_or(-1);
            assert!(n > last, "{} went from {last} to {n}: {text}", words[1]);
            writes += 1;
        }
    }
}

fn counters(m: &Mirror, rows: u32) {
    m.sql(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, note text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, 0, 'row ' || i FROM generate_series(1, {rows}) i"
    ));
}

#[test]
fn killed_at_any_moment_under_load() {
    let m = Mirror::new();
    counters(&m, 400);
    m.start();
    m.settle();
    let mut rng = rng("killed_at_any_moment_under_load");
    let done = AtomicBool::new(false);
    let watched = AtomicBool::new(false);
    let (writes, steps) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch_history(&m.redis, &watched));
        for worker in 0..2 {
            let (db, done) = (&m.db, &done);
            scope.spawn(move || count_up(db, worker, 2, 400, done));
        }
        let (end, watch) = (Raise(&done), Raise(&watched));
        for kill in 0..25 {
            // Half of the kills hit the start, half of them a sink that is at work.
            if kill % 2 == 0 {
                let before = m.progress();
                wait_for(Duration::from_secs(30), "progress after a kill", || {
                    (m.progress() > before).then_some(())
                });
            }
            std::thread::sleep(Duration::from_millis(rng.random_range(0..150)));
            m.sink(|sink| {
                sink.assert_running();
                sink.kill();
                sink.restart();
            });
        }
        drop(end);
        m.check();
        drop(watch);
        watcher.join().unwrap()
    });
    println!("{writes} writes in {steps} steps");
    assert!(writes > 100 && steps > 25);
}

/// A transaction so large that it is applied in several steps, interrupted in the middle of them.
#[test]
fn killed_inside_a_large_transaction() {
    let m = Mirror::alone("");
    counters(&m, 200_000);
    m.start();
    m.settle();
    let mut rng = rng("killed_inside_a_large_transaction");
    for round in 0..2 {
        m.sql("UPDATE t SET n = n + 1, note = repeat('large ', 20) || id");
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(rng.random_range(50..900)));
            m.sink(|sink| {
                sink.kill();
                sink.restart();
            });
        }
        m.sync_within(Duration::from_secs(120));
        let report = m.compare();
        assert!(report.equal(), "round {round}: {report}");
    }
}

/// One Postgres transaction always changes two accounts; a reader in Redis never sees one without the other.
#[test]
fn the_sum_of_all_accounts_is_constant() {
    let m = Mirror::with(
        "CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL); SELECT walmirror.mirror('account'); \
         INSERT INTO account SELECT i, 1000 FROM generate_series(0, 9) i",
    );
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut redis = m.redis.connect();
            let mut sums: u64 = 0;
            let mut different = HashMap::new();
            while !done.load(Ordering::Relaxed) {
                let mut pipe = redis::pipe();
                pipe.atomic();
                for id in 0..10 {
                    pipe.cmd("HGET").arg(format!("account:{id}")).arg("balance");
                }
                let balances: Vec<i64> = pipe.query(&mut redis).unwrap();
                assert_eq!(balances.iter().sum::<i64>(), 10_000, "{balances:?}");
                *different.entry(balances).or_insert(0) += 1;
                sums += 1;
            }
            (sums, different.len())
        });
        for worker in 0..3 {
            let (db, done) = (&m.db, &done);
            scope.spawn(move || {
                let mut client = db.connect();
                let mut i = worker;
                while !done.load(Ordering::Relaxed) {
                    i += 7;
                    let (from, to) = (i % 10, (i / 10 + i + 1) % 10);
                    let (first, second) = if from < to { (from, to) } else { (to, from) };
                    if first == second {
                        continue;
                    }
                    let amount = if first == from { i % 50 } else { -(i % 50) };
                    client
                        .batch_execute(&format!(
                            "BEGIN; UPDATE account SET balance = balance - {amount} WHERE id = {first}; \
                             UPDATE account SET balance = balance + {amount} WHERE id = {second}; COMMIT"
                        ))
                        .unwrap();
                }
            });
        }
        let start = Instant::now();
        let end = Raise(&done);
        while start.elapsed() < Duration::from_secs(6) {
            std::thread::sleep(Duration::from_millis(700));
            m.sink(|sink| {
                sink.assert_running();
                sink.kill();
                sink.restart();
            });
        }
        drop(end);
        reader.join().unwrap()
    });
    assert!(
        seen.1 > 50,
        "{} sums, but only {} different states",
        seen.0,
        seen.1
    );
    m.check();
}

/// SIGTERM, SIGINT and SIGHUP: exit 0, and the server was told of everything that Redis has.
#[test]
fn a_clean_stop_acknowledges_what_was_applied() {
    let m = Mirror::new();
    counters(&m, 100);
    m.start();
    m.settle();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        m.sql("UPDATE t SET n = n + 1");
        m.check();
        let status = m.sink(|sink| {
            sink.signal(signal);
            sink.wait(Duration::from_secs(20))
        });
        assert_eq!(status.code(), Some(0), "{}", m.sink(|sink| sink.output()));
        let confirmed = m.db.confirmed();
        assert!(
            confirmed >= m.progress().unwrap(),
            "confirmed {confirmed}, applied {:?}",
            m.progress()
        );
        m.sink(Sink::restart);
    }
    m.sql("UPDATE t SET n = n + 1");
    m.check();
}

/// SIGTERM while the session, and the thread that looks for the admin server, still connect. Found by random faults: a library of libpq
/// was cleaned up while a thread used it, and its assertion ended the sink with SIGABRT.
#[test]
fn a_signal_at_any_moment_of_the_start_is_an_orderly_end() {
    let m = Mirror::new();
    counters(&m, 10);
    let admin = format!("127.0.0.1:{}", walmirror_tests::free_port());
    m.start_with(&["--admin", &admin]);
    m.settle();
    let starts = |m: &Mirror| m.sink(|sink| sink.output().matches("walmirror starts").count());
    for round in 0..60 {
        let status = m.sink(Sink::terminate);
        assert_eq!(
            status.code(),
            Some(0),
            "round {round}: {}",
            m.sink(|sink| sink.output())
        );
        let before = starts(&m);
        m.sink(Sink::restart);
        wait_for(DEADLINE, "the sink to start", || {
            (starts(&m) > before).then_some(())
        });
        // The moment is the fault.
        std::thread::sleep(Duration::from_micros(200 * round));
    }
    m.sql("UPDATE t SET n = n + 1");
    m.check();
}

#[test]
fn until_lsn_ends_by_itself() {
    let m = Mirror::new();
    counters(&m, 1000);
    let lsn = m.db.lsn().to_string();
    m.start_with(&["--until-lsn", &lsn]);
    let status = m.sink(|sink| sink.wait(Duration::from_secs(60)));
    assert_eq!(status.code(), Some(0));
    let report = m.compare();
    assert!(report.equal(), "{report}");
}

/// Postgres goes away in every way it can, and comes back.
#[test]
fn postgres_restarts() {
    let m = Mirror::alone("");
    counters(&m, 400);
    m.start();
    m.settle();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| count_up(&m.db, 0, 1, 400, &done));
        let _end = Raise(&done);
        for signal in [Signal::INT, Signal::QUIT, Signal::KILL, Signal::QUIT] {
            let before = m.progress();
            wait_for(Duration::from_secs(30), "progress", || {
                (m.progress() > before).then_some(())
            });
            m.db.pg.restart(signal);
            m.sink(Sink::assert_running);
        }
    });
    m.db.reconnect();
    m.check();
    // A shutdown does not wait for a sink: the walsender lets it confirm, and ends.
    m.db.pg.restart(Signal::INT);
    m.db.reconnect();
    m.sql("UPDATE t SET n = n + 1");
    m.check();
}

#[test]
fn the_walsender_is_terminated() {
    let m = Mirror::new();
    counters(&m, 400);
    m.start();
    m.settle();
    for _ in 0..3 {
        m.sql(&format!(
            "UPDATE t SET n = n + 1; SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{}'",
            m.db.name
        ));
        m.check();
    }
}

/// Redis goes away and comes back with what it had.
#[test]
fn redis_restarts() {
    let mut m = Mirror::new();
    m.redis = Redis::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    counters(&m, 400);
    m.start();
    m.settle();
    for signal in [Signal::TERM, Signal::KILL, Signal::KILL] {
        m.redis.stop(signal);
        m.sql("UPDATE t SET n = n + 1");
        m.redis.resume();
        m.check();
    }
}

/// The story: each session began the walk over the keyspace anew, so where sessions were shorter than the walk, tables were never complete.
#[test]
fn a_sweep_goes_on_where_the_last_session_left_it() {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); SELECT walmirror.mirror('t')");
    let mut redis = m.redis.connect();
    let script = "for i = 1, 60000 do redis.call('SET', 'o:' .. i, 'x') redis.call('SET', 't:' .. (i % 10 + 5), 'x') end";
    redis::cmd("EVAL").arg(script).arg(0).exec(&mut redis).unwrap();
    // A page of the walk takes its time. With several templates it is over all keys.
    m.sql("CREATE TABLE u (id int PRIMARY KEY); SELECT walmirror.mirror('u')");
    let link = Proxy::to_port(m.redis.port());
    link.set_both(Mode::Delay(30, 1));
    let url = format!("redis://127.0.0.1:{}/0", link.port());
    m.start_at(&m.db.pg.conninfo(&m.db.name), &url, &[], &[]);
    let noted = || {
        let progress = m.redis.hash(&format!("walmirror:{{{}}}:progress", m.db.name));
        progress.iter().any(|(_, value)| value.contains("\"walk\""))
    };
    wait_for(DEADLINE, "the place of the walk", || {
        m.sink(Sink::assert_running);
        noted().then_some(())
    });
    m.sink(Sink::kill);
    assert!(noted());
    link.heal();
    m.sink(Sink::restart);
    wait_for(DEADLINE, "the tables to be complete", || {
        let log = m.sink(|sink| sink.output());
        (log.matches("the keys of the table are complete").count() == 2).then_some(())
    });
    assert!(
        m.sink(|sink| sink.output())
            .contains("where an earlier walk over them came to")
    );
    // It says so when the last of them is planned, and writes it with the next batch.
    wait_for(DEADLINE, "the place to be forgotten", || (!noted()).then_some(()));
    let mut keys = m.redis.keys();
    keys.retain(|key| !key.starts_with("o:"));
    assert_eq!(keys, ["t:1"]);
}
