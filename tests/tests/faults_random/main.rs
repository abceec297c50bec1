//! Several faults at once, in an order that a seed decides, for as long as one likes. After each heal everything must hold.
//!
//!     SEED=1 make soak SECONDS=600

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod faults;
mod kinds;

use std::sync::Arc;
use std::time::{Duration, Instant};

use faults::{Broken, REDIS, harm, heal};
use kinds::Fault::*;
use kinds::{FAULTS, Fault, in_order};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use walmirror_tests::{
    DEADLINE, GAP, POSTGRES_AWAY, Pg, REDIS_AWAY, Redis, Scenario, Setup, gap, unexpected, wait_for,
};

/// A master that is replaced may hold more than the default of 2 s allows for.
const DURABILITY: [&str; 2] = ["--durability", "memory=5s"];

/// A connection that says nothing, because its link is silent, keeps the server from its end for `authentication_timeout`. The files
/// are copied now and then, and much old WAL would be among them.
const SETTINGS: &str =
    "wal_sender_timeout = 5s\nauthentication_timeout = 5s\nmax_wal_size = 256MB\nmin_wal_size = 32MB";

/// What all of them together may make the sink say, besides what it says of a server that is away.
const ALLOWED: [&str; 24] = [
    "the server is silent",
    "the server does not answer",
    "no answer from",
    ": OOM ",
    ": LOADING ",
    ": READONLY ",
    ": NOSCRIPT ",
    ": MISCONF ",
    ": BUSY ",
    "Password authentication failed",
    "the database system is starting up",
    "the database system is shutting down",
    "the progress changed while",
    "changed while this session began",
    "another walmirror has taken over this slot",
    "cannot claim the progress key",
    "SSL negotiation",
    // One that is stopped where the other side of a link is silent says so, and what comes again.
    "the mirror has stopped;",
    "could not receive data from server",
    "replication slot * does not exist",
    "the slot keeps * MiB of WAL",
    "is not permitted to log in",
    "walmirror.failpoint",
    "its key holds another type",
];

/// All of it.
fn allowed() -> Vec<&'static str> {
    [&ALLOWED[..], &GAP, &REDIS_AWAY, &POSTGRES_AWAY].concat()
}

/// Nothing was taken away while the sink said this, so it does not speak of a gap.
#[track_caller]
fn no_gap(said: &str) {
    assert_eq!(gap(said), None, "nothing was taken away");
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
    let pg = Pg::start(SETTINGS);
    pg.connect("postgres")
        .batch_execute("CREATE ROLE mirror LOGIN REPLICATION; GRANT pg_read_all_data TO mirror")
        .unwrap();
    let setup = Setup {
        pg: Arc::new(pg),
        user: "mirror".to_owned(),
        redis: Redis::start_with(&REDIS),
        redis_login: "mirror:first@".to_owned(),
        ..Setup::default()
    };
    // How far behind the replica of a failover may be, on a busy machine.
    let mut setup = setup.args(&DURABILITY);
    if lives_on {
        setup = setup.args(&["--transaction-bytes", "65536"]);
    }
    let mut s = Scenario::start(name, setup);
    // With one SEED the two tests would draw alike; the first name is the one that a seed is remembered for.
    if lives_on {
        s.rng = StdRng::seed_from_u64(s.rng.random::<u64>() ^ 1);
    }
    let (start, mut rounds, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    // The log of the sink up to where the last gap that a fault made was healed, and what second sinks said.
    let (mut healed, mut broken, mut others) = (0, Broken::default(), String::new());
    while start.elapsed() < Duration::from_secs(seconds) / 2 {
        rounds += 1;
        let faults: Vec<Fault> = drawn
            .choose_multiple(&mut s.rng, rounds % 4 + 1)
            .copied()
            .collect();
        let faults = in_order(faults, &mut s.rng);
        println!("{name}, {:?}: {faults:?}", start.elapsed());
        // What was taken away in an earlier round is healed and forgotten by now.
        no_gap(&s.log()[healed..]);
        for fault in &faults {
            harm(&mut s, &mut broken, *fault);
            std::thread::sleep(Duration::from_millis(s.rng.random_range(0..300)));
        }
        // Now and then until those who wait for an answer have given up: Postgres after 5 s, the sink after 15 s.
        let longest = if rounds % 12 == 0 { 20_000 } else { 1_500 };
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..longest)));
        let said = heal(&mut s, &mut broken);
        // One that has never streamed ends where it is not let in, and somebody starts it again.
        let is_shut_out = |fault: &Fault| [RedisPasswordChanged, LoginTaken, DecoderFails].contains(fault);
        if faults.iter().any(is_shut_out) && !lives_on {
            s.m.sink(|sink| match sink.exited() {
                None => sink.kill(),
                Some(status) => assert!(
                    matches!(status.code(), Some(3 | 4)),
                    "{status}: {}",
                    sink.output()
                ),
            });
            s.restart_sink();
        }
        let taken_away = faults
            .iter()
            .any(|fault| [RedisEmptied, SlotDropped, SlotInvalidated, PostgresPutBack].contains(fault));
        // Half of the time the next faults come before the last ones are overcome. A gap that was made is healed first, so that
        // each further one is of a later round.
        let went_back = faults
            .iter()
            .any(|fault| [RedisFailedOver, RedisTailLost].contains(fault));
        if went_back && !taken_away {
            // What Redis has lost has come again.
            s.flow();
            s.watch.may_lose(false);
        }
        if taken_away || went_back || s.rng.random() {
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
    // A sink that is ended again and again before the window of --durability is over confirms nothing. Afterwards all is let go.
    s.converge();
    let written = s.m.db.lsn();
    wait_for(DEADLINE, "the slot to be confirmed", || {
        (s.m.db.confirmed() >= written).then_some(())
    });
    assert!(rounds < 20 || s.cached > 0, "no cache ever held a row");
    println!("{rounds} rounds, the slowest recovery took {slowest:?}");
    assert_eq!(unexpected(&others, &allowed()), [""; 0], "of a second sink");
    s.keeps_secret("a second sink's log", &others);
    s.finish(&allowed());
}
