//! Several faults at once, in an order that a seed decides, for as long as one likes. After each heal everything must hold.
//!
//!     SEED=1 make soak SECONDS=600

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use walmirror_tests::{DEADLINE, Mode, Proxy, Redis, Scenario, Setup, Signal, Sink, Trap, Way, wait_for};

macro_rules! faults {
    ($($fault:ident,)*) => {
        /// What may break. What comes first is done first, where several are drawn: a server that is down cannot be told
        /// anything.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        enum Fault {
            $($fault,)*
        }

        const FAULTS: &[Fault] = &[$(Fault::$fault,)*];
    };
}

faults! {
    SinkKilled,
    SinkStopped,
    SinkFrozen,
    LinkCut,
    LinkSilent,
    LinkSlow,
    Trapped,
    WalsenderTerminated,
    PostgresBusy,
    SchemaChanged,
    SecondSink,
    SlotDropped,
    RedisEmptied,
    RedisFull,
    RedisReadOnly,
    RedisPaused,
    RedisClientsKilled,
    RedisScriptsFlushed,
    RedisFrozen,
    RedisRestarted,
    PostgresRestarted,
}

use Fault::*;

/// What all of them together may make the sink say.
const ALLOWED: [&str; 23] = [
    "the connection to Redis at",
    "cannot connect to Redis at",
    "broke",
    "server closed the connection",
    "cannot connect to Postgres",
    "cannot open a replication connection",
    "terminating connection",
    "the stream ended",
    "is active for PID",
    "the server is silent",
    "the server does not answer",
    "no answer from",
    "OOM",
    "LOADING",
    "the database system is",
    "READONLY",
    "NOSCRIPT",
    "the progress changed while",
    "cannot claim the progress key",
    "SSL negotiation",
    // One that is stopped where the other side of a link is silent says so, and what comes again.
    "the mirror has stopped;",
    "could not receive data from server",
    "does not exist",
];

/// What it may say only where something was taken away from it: a gap that nobody made is a defect, however well it is healed.
const GAP: [&str; 3] = [
    "lost the progress key",
    "somebody changed the key",
    "do not fit together",
];

fn link(s: &mut Scenario) -> &Proxy {
    if s.rng.random() { &s.redis_link } else { &s.pg_link }
}

fn way(s: &mut Scenario) -> Way {
    if s.rng.random() {
        Way::ToServer
    } else {
        Way::ToClient
    }
}

fn set(s: &Scenario, command: &str) {
    let mut words = command.split(' ');
    let mut connection = s.m.redis.connect();
    redis::cmd(words.next().unwrap())
        .arg(words.collect::<Vec<_>>())
        .exec(&mut connection)
        .unwrap_or_else(|e| panic!("{command}: {e}"));
}

fn harm(s: &mut Scenario, second: &mut Option<Sink>, fault: Fault) {
    match fault {
        SinkKilled => s.kill_sink(),
        SinkStopped => {
            let status = s.m.sink(Sink::terminate);
            assert_eq!(status.code(), Some(0), "{}", s.log());
            s.restart_sink();
        }
        SinkFrozen => s.m.sink(|sink| sink.signal(Signal::STOP)),
        LinkCut => link(s).cut(),
        LinkSilent => {
            let way = way(s);
            link(s).set(way, Mode::BlackHole);
        }
        LinkSlow => {
            let mode = [
                Mode::Delay(5, 20),
                Mode::Throttle(20_000),
                Mode::Split(1),
                Mode::Split(100),
            ];
            let mode = *mode.choose(&mut s.rng).unwrap();
            let way = way(s);
            link(s).set(way, mode);
        }
        Trapped => {
            let traps = [
                Trap::CutBefore,
                Trap::HoldBefore,
                Trap::LoseReply,
                Trap::HoldReply,
                Trap::HalfReply,
            ];
            let trap = *traps.choose(&mut s.rng).unwrap();
            let word = *["EXEC", "progress", "WATCH", "HSET"].choose(&mut s.rng).unwrap();
            s.redis_link.arm(trap, word);
        }
        WalsenderTerminated => s.m.sql(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = current_database() AND active",
        ),
        PostgresBusy => s.m.sql(
            "INSERT INTO item SELECT i, 0, 'many', repeat('m', 500) FROM generate_series(3000, 9000) i; \
             DELETE FROM item WHERE id BETWEEN 3000 AND 9000; CHECKPOINT",
        ),
        SchemaChanged => {
            s.refreshes();
            s.m.sql(
                "ALTER TABLE doc DROP COLUMN IF EXISTS extra; ALTER TABLE doc ADD extra int DEFAULT 5; \
                 UPDATE doc SET extra = owner WHERE part = 1",
            );
        }
        SecondSink => *second = Some(s.m.second_sink()),
        SlotDropped => {
            s.resyncs();
            wait_for(DEADLINE, "the slot to be dropped", || {
                let drop = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots \
                            WHERE slot_name = current_database() AND active; \
                            SELECT pg_drop_replication_slot(current_database())";
                s.m.db.connect().batch_execute(drop).ok()
            });
        }
        RedisFull => set(s, "CONFIG SET maxmemory 1mb"),
        RedisReadOnly => set(s, "REPLICAOF 127.0.0.1 1"),
        RedisPaused => set(s, "CLIENT PAUSE 700 WRITE"),
        RedisClientsKilled => set(s, "CLIENT KILL TYPE normal SKIPME yes"),
        RedisScriptsFlushed => set(s, "SCRIPT FLUSH"),
        RedisEmptied => {
            s.resyncs();
            set(s, "FLUSHALL");
        }
        RedisFrozen => s.m.redis.signal(Signal::STOP),
        RedisRestarted => {
            s.m.redis.stop(Signal::KILL);
            s.m.redis.resume();
        }
        PostgresRestarted => {
            let signals = [Signal::INT, Signal::QUIT, Signal::KILL];
            let signal = *signals.choose(&mut s.rng).unwrap();
            s.m.db.pg.restart(signal);
            s.m.db.reconnect();
        }
    }
}

/// Everything is well again, whatever it was, and there is one sink. Returns what the other one said.
fn heal(s: &mut Scenario, second: &mut Option<Sink>) -> String {
    let said = second.take().map_or(String::new(), |mut second| {
        second.assert_running();
        second.kill();
        second.output()
    });
    s.m.sink(|sink| sink.signal(Signal::CONT));
    s.m.redis.signal(Signal::CONT);
    s.redis_link.heal();
    s.pg_link.heal();
    // A link that was held by a trap stays as it is until somebody gives it up: as long as Redis has to answer.
    s.redis_link.cut();
    set(s, "REPLICAOF NO ONE");
    set(s, "CONFIG SET maxmemory 0");
    said
}

/// Nothing was taken away while the sink said this, so it does not speak of a gap.
#[track_caller]
fn no_gap(said: &str) {
    let gap = said
        .lines()
        .find(|line| GAP.iter().any(|sign| line.contains(sign)));
    assert_eq!(gap, None, "nothing was taken away");
}

#[test]
fn random_faults_at_once() {
    random_faults("random_faults_at_once", FAULTS);
}

/// With other dice, and a sink that nobody ends: it lives through all of them, and what it does not give back adds up.
#[test]
fn random_faults_in_one_life() {
    let faults: Vec<Fault> = FAULTS
        .iter()
        .copied()
        .filter(|fault| ![SinkKilled, SinkStopped].contains(fault))
        .collect();
    random_faults("random_faults_in_one_life", &faults);
}

fn random_faults(name: &str, drawn: &[Fault]) {
    let lives_on = !drawn.contains(&SinkKilled);
    let seconds: u64 =
        std::env::var("FAULT_SECONDS").map_or(40, |text| text.parse().expect("FAULT_SECONDS is a number"));
    let setup = Setup {
        // With everysec Redis answers before it has written while an fsync takes long, and a kill is a loss; that has tests of its own.
        redis: Redis::start_with(&["--appendonly", "yes", "--appendfsync", "no"]),
        // A connection that says nothing, because its link is silent, keeps the server from its end for the latter.
        ..Setup::alone("wal_sender_timeout = 5s\nauthentication_timeout = 5s")
    };
    let mut s = Scenario::start(name, setup);
    // With one SEED the two tests would draw alike; the first name is the one that a seed is remembered for.
    if lives_on {
        s.rng = StdRng::seed_from_u64(s.rng.random::<u64>() ^ 1);
    }
    let (start, mut rounds, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    // The log of the sink up to where the last gap that a fault made was healed, and what second sinks said.
    let (mut healed, mut second, mut others) = (0, None, String::new());
    while start.elapsed() < Duration::from_secs(seconds) / 2 {
        rounds += 1;
        let mut faults: Vec<Fault> = drawn
            .choose_multiple(&mut s.rng, rounds % 3 + 1)
            .copied()
            .collect();
        faults.sort_unstable();
        println!("{name}, {:?}: {faults:?}", start.elapsed());
        // What was taken away in an earlier round is healed and forgotten by now.
        no_gap(&s.log()[healed..]);
        for fault in &faults {
            harm(&mut s, &mut second, *fault);
            std::thread::sleep(Duration::from_millis(s.rng.random_range(0..300)));
        }
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..1_500)));
        let said = heal(&mut s, &mut second);
        let taken_away = faults
            .iter()
            .any(|fault| [RedisEmptied, SlotDropped].contains(fault));
        // Half of the time the next faults come before the last ones are overcome. A gap that was made is healed first, so that
        // each further one is of a later round.
        if taken_away || s.rng.random() {
            slowest = slowest.max(s.converge());
        }
        if taken_away {
            healed = s.log().len();
        } else {
            no_gap(&said);
            no_gap(&s.log()[healed..]);
        }
        others.push_str(&said);
        // Pauses between attempts would grow to six seconds: that is how it should be, and would test less.
        if rounds % 5 == 0 && !lives_on {
            s.kill_sink();
        }
        s.watch.assert_holds();
    }
    no_gap(&s.log()[healed..]);
    assert!(rounds < 20 || s.cached > 0, "no cache ever held a row");
    println!("{rounds} rounds, the slowest recovery took {slowest:?}");
    let unexpected = others.lines().find(|line| {
        [" ERROR ", "error:", "panicked", "internal error"]
            .iter()
            .any(|sign| line.contains(sign))
            && !ALLOWED.iter().chain(&GAP).any(|allowed| line.contains(allowed))
    });
    assert_eq!(unexpected, None, "of a second sink");
    s.finish(&[&ALLOWED[..], &GAP].concat());
}
