//! Several faults at once, in an order that a seed decides, for as long as one likes. After each heal everything must hold.
//!
//!     SEED=1 make faults SECONDS=600 ARGS='--test faults_random'

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use rand::Rng;
use rand::seq::IndexedRandom;
use walmirror_tests::{Mode, Proxy, Redis, Scenario, Setup, Signal, Sink, Trap, Way};

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
const ALLOWED: [&str; 24] = [
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
    "lost the progress key",
    "somebody changed the key",
    "the progress changed while",
    "cannot claim the progress key",
    "do not fit together",
    "SSL negotiation",
    "could not receive data from server",
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

fn harm(s: &mut Scenario, fault: Fault) {
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
        SchemaChanged => s.m.sql(
            "ALTER TABLE doc DROP COLUMN IF EXISTS extra; ALTER TABLE doc ADD extra int DEFAULT 5; \
             UPDATE doc SET extra = owner WHERE part = 1",
        ),
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

/// Everything is well again, whatever it was.
fn heal(s: &mut Scenario) {
    s.m.sink(|sink| sink.signal(Signal::CONT));
    s.m.redis.signal(Signal::CONT);
    s.redis_link.heal();
    s.pg_link.heal();
    // A link that was held by a trap stays as it is until somebody gives it up: as long as Redis has to answer.
    s.redis_link.cut();
    set(s, "REPLICAOF NO ONE");
    set(s, "CONFIG SET maxmemory 0");
}

#[test]
fn random_faults_at_once() {
    let seconds =
        std::env::var("FAULT_SECONDS").map_or(40, |text| text.parse().expect("FAULT_SECONDS is a number"));
    let setup = Setup {
        redis: Redis::start_with(&["--appendonly", "yes", "--appendfsync", "everysec"]),
        // A connection that says nothing, because its link is silent, keeps the server from its end for the latter.
        ..Setup::alone("wal_sender_timeout = 5s\nauthentication_timeout = 5s")
    };
    let mut s = Scenario::start("random_faults_at_once", setup);
    let (start, mut rounds, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while start.elapsed() < Duration::from_secs(seconds) {
        rounds += 1;
        let mut faults: Vec<Fault> = FAULTS
            .choose_multiple(&mut s.rng, rounds % 3 + 1)
            .copied()
            .collect();
        faults.sort_unstable();
        println!("{:?} {faults:?}", start.elapsed());
        for fault in &faults {
            harm(&mut s, *fault);
            std::thread::sleep(Duration::from_millis(s.rng.random_range(0..300)));
        }
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..1_500)));
        heal(&mut s);
        // Half of the time the next faults come before the last ones are overcome.
        if s.rng.random() {
            slowest = slowest.max(s.converge());
        }
        // Pauses between attempts would grow to six seconds: that is how it should be, and would test less.
        if rounds % 5 == 0 {
            s.kill_sink();
        }
        s.watch.assert_holds();
    }
    println!("{rounds} rounds, the slowest recovery took {slowest:?}");
    s.finish(&ALLOWED);
}
