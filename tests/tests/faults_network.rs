//! The links between the sink and its two servers break in every way that links break.
//!
//! Links that are only slow are in faults_slow.rs.
//!
//! `SEED=… make test ARGS='--test faults_network NAME'` repeats the chance of a run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rand::Rng;
use walmirror_tests::{
    DEADLINE, Db, Lsn, Mode, POSTGRES_AWAY, Pg, Proxy, REDIS_AWAY, Redis, SOON_AFTER_SILENCE, Scenario,
    Setup, Sink, Trap, Way, wait_for,
};

/// What the sink may say when it lost Redis or Postgres, and this.
fn lost(more: &[&'static str]) -> Vec<&'static str> {
    [
        &REDIS_AWAY[..],
        &POSTGRES_AWAY,
        &["cannot look for the extension"],
        more,
    ]
    .concat()
}

/// A link that is silent is given up after so long, and said to be so; a busy machine takes its time.
const GIVEN_UP: Duration = Duration::from_secs(15);
const BUSY: Duration = Duration::from_secs(8);

/// How often bits begin to flip.
const FLIPS: u32 = 30;

fn sprung(link: &Proxy, count: u64) {
    wait_for(DEADLINE, "the trap to spring", || {
        (link.sprung() >= count).then_some(())
    });
}

#[test]
fn connections_are_reset() {
    let mut s = Scenario::start("connections_are_reset", Setup::default());
    for round in 0..20 {
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..200)));
        match round % 3 {
            0 => s.redis_link.cut(),
            1 => s.pg_link.cut(),
            _ => {
                s.redis_link.cut();
                s.pg_link.cut();
            }
        }
        if round % 4 == 0 {
            s.recovers();
        }
    }
    s.finish(&lost(&[]));
}

/// Redis applies a batch, and nobody hears of it: the next session finds it in the progress and skips it.
#[test]
fn a_batch_is_applied_and_the_answer_lost() {
    let s = Scenario::start("a_batch_is_applied_and_the_answer_lost", Setup::default());
    for count in 1..=8 {
        s.redis_link.arm(Trap::LoseReply, "EXEC");
        sprung(&s.redis_link, count);
        s.recovers();
        s.repeats();
    }
    s.finish(&lost(&[]));
}

/// The connection ends in the middle of what is sent, and in the middle of what is answered.
#[test]
fn half_a_batch_and_half_an_answer() {
    let s = Scenario::start("half_a_batch_and_half_an_answer", Setup::default());
    for (count, trap) in [Trap::CutBefore, Trap::HalfReply]
        .into_iter()
        .cycle()
        .take(8)
        .enumerate()
    {
        s.redis_link
            .arm(trap, ["EXEC", "progress", "HSET", "item:"][count / 2]);
        sprung(&s.redis_link, count as u64 + 1);
        s.recovers();
    }
    s.finish(&lost(&[]));
}

/// The sink is killed at the three places where it can have done one half of what belongs together.
#[test]
fn killed_before_exec_after_it_and_before_the_feedback() {
    let s = Scenario::start(
        "killed_before_exec_after_it_and_before_the_feedback",
        Setup::default(),
    );
    for (count, trap) in [Trap::HoldBefore, Trap::HoldReply]
        .into_iter()
        .cycle()
        .take(6)
        .enumerate()
    {
        s.redis_link.arm(trap, "EXEC");
        sprung(&s.redis_link, count as u64 + 1);
        s.kill_sink();
        s.recovers();
        s.repeats();
    }
    for _ in 0..3 {
        // Redis answers, but Postgres does not hear of it any more.
        let before = s.progress();
        s.pg_link.set(Way::ToServer, Mode::BlackHole);
        wait_for(DEADLINE, "progress that nobody confirms", || {
            (s.progress() > before).then_some(())
        });
        s.m.sink(Sink::kill);
        s.pg_link.heal();
        s.m.sink(Sink::restart);
        s.recovers();
        s.repeats();
    }
    s.finish(&[]);
}

/// Nothing comes back, and nobody says so. What is stuck is noticed, given up, and begun anew.
#[test]
fn redis_is_a_black_hole() {
    let s = Scenario::start("redis_is_a_black_hole", Setup::default());
    for way in [Way::ToServer, Way::ToClient] {
        let seen = s.log().len();
        s.redis_link.set(way, Mode::BlackHole);
        let silent = Instant::now();
        s.is_ready(false);
        s.said("the connection to Redis at", seen);
        assert!(silent.elapsed() < GIVEN_UP + BUSY, "{:?}", silent.elapsed());
        s.redis_link.heal();
        // The session after it may have begun, and waits for an answer that was swallowed.
        s.recovers_within(SOON_AFTER_SILENCE);
    }
    s.finish(&lost(&[]));
}

/// The same towards Postgres, which gives up as well: `wal_sender_timeout` says when.
#[test]
fn postgres_is_a_black_hole() {
    let s = Scenario::start("postgres_is_a_black_hole", Setup::default());
    let silence = Duration::from_secs(3);
    s.silence("3s");
    for way in [Way::ToServer, Way::ToClient] {
        let seen = s.log().len();
        s.pg_link.set(way, Mode::BlackHole);
        let silent = Instant::now();
        s.is_ready(false);
        s.said("next_attempt_in", seen);
        assert!(silent.elapsed() < silence + BUSY, "{:?}", silent.elapsed());
        s.pg_link.heal();
        s.recovers_within(SOON_AFTER_SILENCE);
    }
    s.finish(&lost(&["the server is silent"]));
}

/// A worker of the backfill is in the middle of a query when the network goes: nobody waits for the answer to its cancel
/// request, which goes the same way.
#[test]
fn a_black_hole_in_the_middle_of_a_query() {
    let s = Scenario::start("a_black_hole_in_the_middle_of_a_query", Setup::default());
    s.silence("3s");
    // The backfill of a table waits for the transactions that were open when it was announced, asking again and again.
    let mut open = s.m.db.connect();
    open.batch_execute("BEGIN; SELECT pg_current_xact_id()").unwrap();
    s.m.sql("CREATE TABLE late (id int PRIMARY KEY); INSERT INTO late VALUES (1); SELECT walmirror.mirror('late')");
    for way in [Way::ToServer, Way::ToClient] {
        s.flow();
        let seen = s.log().len();
        s.pg_link.set(way, Mode::BlackHole);
        s.said("next_attempt_in", seen);
        s.pg_link.heal();
    }
    open.batch_execute("COMMIT").unwrap();
    s.flow();
    s.finish(&lost(&["the server is silent", "the server does not answer"]));
}

/// One connection of a worker falls silent, and all others are well: a proxy or a balancer that has lost one half of it, as far as its
/// other end or in the middle of an answer. TCP is content then, and so is the stream. The table was never read, and nothing said so.
#[test]
fn one_connection_of_a_worker_is_a_black_hole() {
    let s = Scenario::start("one_connection_of_a_worker_is_a_black_hole", Setup::default());
    s.silence("3s");
    let traps = [
        (Trap::HoldBefore, "COPY (SELECT t.ctid"),
        (Trap::HoldReply, "COPY (SELECT t.ctid"),
        (Trap::HoldBefore, "walmirror.marker"),
        (Trap::HoldReply, "pg_current_xact_id"),
    ];
    for (count, (trap, word)) in traps.into_iter().enumerate() {
        // Silences that follow each other are waited for twice as long each time.
        s.pg_link.cut();
        s.recovers();
        let seen = s.log().len();
        s.pg_link.arm(trap, word);
        s.m.sql(&format!(
            "CREATE TABLE late{count} (id int PRIMARY KEY, note text); \
             INSERT INTO late{count} SELECT i, repeat('x', 1000) FROM generate_series(1, 100) i; \
             SELECT walmirror.mirror('late{count}')"
        ));
        sprung(&s.pg_link, count as u64 + 1);
        let silent = Instant::now();
        s.said("the server does not answer", seen);
        assert!(
            silent.elapsed() < Duration::from_secs(3 + 5) + BUSY,
            "{:?}",
            silent.elapsed()
        );
        s.recovers();
        let key = format!("late{count}:100");
        wait_for(DEADLINE, "the last row", || {
            s.m.redis.command::<bool>(&format!("EXISTS {key}")).then_some(())
        });
    }
    s.finish(&lost(&["the server does not answer"]));
}

/// A refused connection is tried again for as long as it takes, and not more often than that: the pauses double from 100 ms on.
#[test]
fn nobody_listens() {
    let s = Scenario::start("nobody_listens", Setup::default());
    for link in [&s.redis_link, &s.pg_link] {
        link.refuse();
        s.tries_seldom(link);
        link.heal();
        s.recovers();
    }
    s.finish(&lost(&[]));
}

/// A reply that is no reply ends the session without a panic, and nothing wrong is written.
#[test]
fn a_bit_of_a_reply_flips() {
    let s = Scenario::start("a_bit_of_a_reply_flips", Setup::default());
    for count in 1..=4 {
        s.redis_link.arm(Trap::FlipReply, "EXEC");
        sprung(&s.redis_link, count);
        s.recovers();
    }
    s.finish(&lost(&["Redis' answer to * cannot be read"]));
}

/// How the sink has ended, if it has.
fn ended(s: &Scenario) -> Option<ExitStatus> {
    s.m.sink(Sink::exited)
}

/// Whoever ends says why, with an exit code for what cannot be read or for whatever a server may refuse at a start. The line, and the code.
#[track_caller]
fn reason(s: &Scenario, status: ExitStatus) -> (String, i32) {
    let log = s.log();
    let code = status.code().unwrap_or_else(|| panic!("{status}:\n{log}"));
    let last = log.lines().rfind(|line| !line.trim_start().starts_with("next:"));
    assert!(
        last.is_some_and(|line| line.contains("error: ")),
        "{status}, and {last:?}:\n{log}"
    );
    assert!((1..=4).contains(&code), "{status}:\n{log}");
    let last = last.unwrap_or_default();
    if last.contains("the stream cannot be followed") {
        let lsn = last
            .split_once(", at LSN ")
            .and_then(|(_, rest)| rest.split_once(": "));
        assert!(
            lsn.is_some_and(|(lsn, _)| lsn.parse::<Lsn>().is_ok_and(|lsn| lsn.0 > 0)),
            "no position: {last}"
        );
    }
    println!("exit code {code}: {last}");
    (last.to_owned(), code)
}

/// Starts the sink again. Where a bit of what Redis holds is another one, the sink ends again and says which key to remove; what else no
/// start gets over, only a new slot and an empty Redis do.
#[track_caller]
fn comes_back(s: &Scenario) {
    for attempt in 0..3 {
        let seen = s.log().len();
        s.m.sink(Sink::restart);
        let end = wait_for(DEADLINE, "the sink to stream, or to end", || {
            let end = ended(s);
            let streams = s.log().get(seen..)?.contains(" streaming slot=");
            (streams || end.is_some()).then_some(end)
        });
        let Some(end) = end else { return };
        let (line, _) = reason(s, end);
        let log = s.log();
        let advised = log
            .lines()
            .next_back()
            .and_then(|next| next.split_once("UNLINK '")?.1.split_once('\''));
        match advised {
            Some((key, _)) if attempt == 0 => {
                println!("as advised: UNLINK {key}, because {line}");
                let removed: u32 = s.m.redis.command(&format!("UNLINK {key}"));
                assert_eq!(removed, 1, "{log}");
            }
            _ => from_nothing(s),
        }
    }
    panic!("the sink does not come back:\n{}", s.log());
}

/// Takes the slot and all keys away; the sink does not run.
#[track_caller]
fn from_nothing(s: &Scenario) {
    wait_for(DEADLINE, "the slot to be dropped", || {
        let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = current_database()";
        s.m.db.connect().batch_execute(drop).ok()
    });
    let _: String = s.m.redis.command("FLUSHALL");
}

/// Bits flip anywhere in what one side says, again and again. What is read then may be anything, and is in part wrong where nobody can
/// know; but there is no panic, no value is told, and who ends says why and can be started again. From a new slot and an empty Redis
/// everything comes right.
fn bits_flip(name: &str, link: fn(&Scenario) -> &Proxy, way: Way) {
    let mut s = Scenario::start(name, Setup::default());
    s.resyncs();
    let mut ends: BTreeMap<i32, u32> = BTreeMap::new();
    for round in 0..FLIPS {
        let before = link(&s).flipped();
        let one_in = s.rng.random_range(1..60);
        link(&s).set(way, Mode::Flip(one_in));
        let since = Instant::now();
        wait_for(DEADLINE, "a bit to flip, and time to read it", || {
            let flipped = link(&s).flipped() > before;
            let over = since.elapsed() > Duration::from_millis(if flipped { 400 } else { 5_000 });
            (over || ended(&s).is_some()).then_some(())
        });
        link(&s).heal();
        // What a length of a thousand times as many bytes waits for never comes.
        link(&s).cut();
        // A session that broke may be in a long pause: another one is more of a test.
        if let Some(status) = ended(&s) {
            *ends.entry(reason(&s, status).1).or_default() += 1;
            comes_back(&s);
        } else if round % 3 == 0 {
            s.m.sink(Sink::kill);
            comes_back(&s);
        }
    }
    println!("{} bits flipped; ends by exit code: {ends:?}", link(&s).flipped());
    assert!(link(&s).flipped() >= u64::from(FLIPS) / 2);
    if ended(&s).is_none() {
        s.m.sink(Sink::kill);
    }
    from_nothing(&s);
    s.restart_sink();
    s.converge();
    // Anything may be said of bits that were other ones; a panic and a value of a row never.
    s.finish(&[""]);
}

#[test]
fn bits_of_what_redis_says_flip() {
    bits_flip("bits_of_what_redis_says_flip", |s| &s.redis_link, Way::ToClient);
}

#[test]
fn bits_of_what_redis_is_told_flip() {
    bits_flip(
        "bits_of_what_redis_is_told_flip",
        |s| &s.redis_link,
        Way::ToServer,
    );
}

#[test]
fn bits_of_what_postgres_says_flip() {
    bits_flip("bits_of_what_postgres_says_flip", |s| &s.pg_link, Way::ToClient);
}

#[test]
fn bits_of_what_postgres_is_told_flip() {
    bits_flip(
        "bits_of_what_postgres_is_told_flip",
        |s| &s.pg_link,
        Way::ToServer,
    );
}

/// The story: `init`, `tail` and `doctor` waited without end for a server that had taken their connection and then said nothing, as behind
/// a proxy that has lost its other half.
#[test]
fn a_command_gives_up_a_postgres_that_falls_silent() {
    let (pg, redis) = (Pg::shared(), Redis::start());
    let redis = redis.url();
    let commands = [
        // A check that fails.
        ("init", Trap::HoldReply, "IDENTIFY_SYSTEM", 3),
        ("init", Trap::HoldReply, "CREATE_REPLICATION_SLOT", 5),
        ("tail", Trap::HoldBefore, "shared_preload_libraries", 5),
        ("tail", Trap::HoldReply, "CREATE_REPLICATION_SLOT", 5),
        ("tail", Trap::HoldReply, "START_REPLICATION", 5),
    ];
    std::thread::scope(|scope| {
        for (command, trap, word, ends_with) in commands {
            let (pg, redis) = (&pg, redis.as_str());
            scope.spawn(move || {
                let db = Db::create(std::sync::Arc::clone(pg));
                let link = Proxy::to_socket(pg.socket());
                link.arm(trap, word);
                let port = link.port();
                let postgres = format!("host=127.0.0.1 port={port} user=postgres dbname={}", db.name);
                let mut args = vec![command, "--postgres", &postgres];
                if command == "init" {
                    args.extend(["--redis", redis, "--slot", &db.name]);
                }
                let (code, output) = Sink::run(&args, Duration::from_secs(60 + 5) + 2 * BUSY);
                assert_eq!(link.sprung(), 1, "{command} {word}: {output}");
                assert!(
                    output.contains("the server does not answer"),
                    "{command} {word}: {output}"
                );
                assert_eq!(code, Some(ends_with), "{command} {word}: {output}");
            });
        }
    });
}
