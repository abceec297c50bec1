//! What `--admin` says while a link is slow or silent: figures are compared with what Redis and Postgres say just before and just after.
//!
//! More of it in admin.rs, where a server is away.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use walmirror_tests::{
    DEADLINE, Lsn, Mode, POSTGRES_AWAY, REDIS_AWAY, Raise, SOON_AFTER_SILENCE, Scenario, Setup, Signal, Way,
    wait_for,
};

/// `/readyz` says no within 6 s of silence (docs/operations.md), and a busy machine takes its time.
const NOT_READY: Duration = Duration::from_secs(6 + 3);
/// The server is asked every 5 s beside the stream, and has to answer.
const ASKED: Duration = Duration::from_secs(8);
/// The stream is not slow, and each frame tells how far the WAL is.
const TOLD: Duration = Duration::from_secs(4);
/// What a busy machine may add to a look at anything.
const BUSY: Duration = Duration::from_secs(2);

/// The figure of this name.
fn figure(text: &str, name: &str) -> Option<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.parse().ok()
}

fn figures(s: &Scenario) -> String {
    wait_for(DEADLINE, "the metrics", || s.get("/metrics"))
}

/// Rows that are written one after the other, and when: just before the statement, and when it had committed.
#[derive(Default)]
struct Ticks(Mutex<Vec<(Instant, Instant)>>);

impl Ticks {
    fn write(&self, s: &Scenario, done: &AtomicBool) {
        let mut client = s.m.db.connect();
        for id in 0.. {
            if done.load(Ordering::Acquire) {
                return;
            }
            let before = Instant::now();
            let insert = format!("INSERT INTO tick VALUES ({id}, repeat('tick', 750))");
            client.batch_execute(&insert).unwrap();
            self.0.lock().unwrap().push((before, Instant::now()));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// When it was committed, at the earliest and at the latest; None: it is not, as far as is known.
    fn committed(&self, id: usize) -> Option<(Instant, Instant)> {
        self.0.lock().unwrap().get(id).copied()
    }
}

/// How many there are in Redis. They come in order.
fn arrived(s: &Scenario, known: usize) -> usize {
    let mut redis = s.m.redis.connect();
    let is_there = |id: &usize| {
        let mut exists = redis::cmd("EXISTS");
        exists
            .arg(format!("tick:{id}"))
            .query::<bool>(&mut redis)
            .unwrap()
    };
    known + (known..).take_while(is_there).count()
}

/// A link that takes half of what is written: Redis falls behind, and both figures say by how much, at every look. Nothing is silent, so
/// it is ready all the time. Then the link is dead: it is not ready in time, the WAL that the slot keeps is warned of, and when the link
/// is back all of it passes.
#[test]
fn the_lag_is_true_while_a_link_is_slow() {
    let setup = Setup::alone("max_slot_wal_keep_size = '96MB'").args(&["--batch-bytes", "16KiB"]);
    let s = Scenario::start("the_lag_is_true_while_a_link_is_slow", setup);
    s.load.rest();
    let seen = s.log().len();
    s.m.sql("CREATE TABLE tick (id int PRIMARY KEY, v text); SELECT walmirror.mirror('tick')");
    s.said("the keys of the table are complete", seen);
    s.is_ready(true);
    s.redis_link.set(Way::ToServer, Mode::Throttle(30_000));
    let (ticks, done) = (Ticks::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let end = Raise(&done);
        scope.spawn(|| ticks.write(&s, &done));
        follow(&s, &ticks);
        drop(end);
    });
    s.redis_link.heal();
    s.reach();
    wait_for(DEADLINE, "nothing to lag", || {
        let text = figures(&s);
        let lag = ["walmirror_lag_bytes", "walmirror_lag_seconds"].map(|name| figure(&text, name));
        (lag == [Some(0.0); 2]).then_some(())
    });
    // Nobody else writes, or the slot would be lost.
    s.redis_link.set_both(Mode::BlackHole);
    let silent = Instant::now();
    s.is_ready(false);
    assert!(silent.elapsed() < NOT_READY, "{:?}", silent.elapsed());
    let seen = s.log().len();
    s.m.sql("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000)) FROM generate_series(1, 52)");
    s.said("the slot keeps", seen);
    // The story: each look at Postgres waited for one at Redis, and figures and warning came with its end.
    assert!(silent.elapsed() < NOT_READY + ASKED, "{:?}", silent.elapsed());
    let kept = wait_for(ASKED, "the slot to be looked at", || {
        figure(&figures(&s), "walmirror_slot_retained_bytes").filter(|kept| *kept > 48e6)
    });
    let safe = figure(&figures(&s), "walmirror_slot_safe_bytes").unwrap();
    assert!(safe < 64e6, "{kept} bytes are kept, {safe} may be written");
    s.redis_link.heal();
    let healed = Instant::now();
    s.is_ready(true);
    assert!(
        healed.elapsed() < SOON_AFTER_SILENCE + BUSY,
        "{:?}",
        healed.elapsed()
    );
    wait_for(DEADLINE, "less to be kept", || {
        s.m.sql("CHECKPOINT");
        figure(&figures(&s), "walmirror_slot_retained_bytes").filter(|kept| *kept < 40e6)
    });
    s.finish(&[&REDIS_AWAY[..], &["the slot keeps"]].concat());
}

/// Redis is silent for so long that Postgres gives the slot up, as its disk is worth more than a resync. Log and figures say so while there
/// is time to do something.
#[test]
fn a_slot_in_danger_is_told_before_it_is_lost() {
    let limits = "max_slot_wal_keep_size = 64MB\nmax_wal_size = 32MB\nmin_wal_size = 32MB\nwal_keep_size = 0";
    let mut s = Scenario::start("a_slot_in_danger_is_told_before_it_is_lost", Setup::alone(limits));
    s.load.rest();
    s.resyncs();
    let safe = s.figure("walmirror_slot_safe_bytes");
    let seen = s.log().len();
    s.m.redis.signal(Signal::STOP);
    let write = |megabytes: u32| {
        let message = "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))";
        s.m.sql(&format!("{message} FROM generate_series(1, {megabytes})"));
        s.m.sql("CHECKPOINT");
    };
    let is_lost = || {
        let status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = current_database()";
        s.m.db.value(status) == "lost"
    };
    write(40);
    s.said("the slot keeps", seen);
    wait_for(ASKED, "less to be safe", || {
        let left = s.figure("walmirror_slot_safe_bytes");
        (0.0..safe - 30e6).contains(&left).then_some(())
    });
    assert!(!is_lost(), "it is told too late");
    wait_for(DEADLINE, "the slot to be lost", || {
        write(20);
        is_lost().then_some(())
    });
    s.m.redis.signal(Signal::CONT);
    s.said("has lost the WAL", seen);
    let more = ["the slot keeps", "has lost the WAL"];
    s.finish(&[&REDIS_AWAY[..], &POSTGRES_AWAY, &more].concat());
}

/// Looks for as long as it takes to fall behind for some seconds.
fn follow(s: &Scenario, ticks: &Ticks) {
    let started = Instant::now();
    // Where the WAL ended, and where Redis was.
    let mut past: VecDeque<(Instant, Lsn, Lsn)> = VecDeque::new();
    let (mut known, mut looks, mut longest) = (0, 0, 0.0_f64);
    while started.elapsed() < Duration::from_secs(25) {
        known = arrived(s, known);
        let (before, position) = (Instant::now(), s.progress().unwrap());
        let text = figures(s);
        let after = Instant::now();
        past.push_back((after, s.m.db.lsn(), position));
        let [bytes, seconds, applied] = [
            "walmirror_lag_bytes",
            "walmirror_lag_seconds",
            "walmirror_applied_lsn",
        ]
        .map(|name| figure(&text, name).unwrap());
        let (end, now) = (s.m.db.lsn().0 as f64, s.progress().unwrap().0 as f64);
        assert!(applied <= now, "{applied} is applied, and Redis is at {now}");
        assert!(
            bytes <= end - applied,
            "{bytes} bytes from {applied} are beyond {end}"
        );
        let of = |age: Duration| past.iter().rev().find(|(at, ..)| at.elapsed() > age);
        if let Some((_, _, was)) = of(BUSY) {
            assert!(
                applied >= was.0 as f64,
                "{applied} is applied, and Redis was at {was} long ago"
            );
        }
        if let Some((_, end, _)) = of(TOLD) {
            let least = end.0 as f64 - applied;
            assert!(bytes >= least, "{bytes} bytes, and there were {least} long ago");
        }
        // Redis has `known` of them, and perhaps more by now.
        if let Some((commit, _)) = known.checked_sub(1).and_then(|last| ticks.committed(last)) {
            let most = (after - commit + BUSY).as_secs_f64();
            assert!(seconds <= most, "{seconds} s, and Redis has what is {most} s old");
        }
        known = arrived(s, known);
        if let Some((_, commit)) = ticks.committed(known) {
            let least = before
                .saturating_duration_since(commit)
                .saturating_sub(BUSY / 2)
                .as_secs_f64();
            assert!(
                seconds >= least,
                "{seconds} s, and Redis lacks what is {least} s old"
            );
            longest = longest.max(least);
        }
        assert_eq!(figure(&text, "walmirror_ready"), Some(1.0), "{}", s.log());
        looks += 1;
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("{looks} looks, {longest} s behind at most");
    assert!(
        looks > 20 && longest > 3.0,
        "{looks} looks, {longest} s: that is no lag"
    );
}
