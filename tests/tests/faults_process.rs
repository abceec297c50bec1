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

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use rand::Rng;
use walmirror_tests::{
    Cgroup, DEADLINE, Dir, Mode, POSTGRES_AWAY, REDIS_AWAY, Resource, Scenario, Setup, Signal, Sink, Trap,
    Way, skipped, wait_for,
};

/// How often the sink is killed; `KILLS` sets another number.
fn kills() -> u32 {
    std::env::var("KILLS").map_or(200, |text| text.parse().expect("KILLS is a number"))
}

#[test]
fn killed_at_many_random_moments() {
    let mut s = Scenario::start("killed_at_many_random_moments", Setup::default());
    let mut again = 0;
    for kill in 0..kills() {
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..120)));
        s.kill_sink();
        if kill % 8 == 0 {
            s.recovers();
            again += s.repeats();
        }
    }
    let looks = s.finish(&[]);
    if kills() >= 200 {
        assert!(again > 0, "no kill came before what was applied was confirmed");
        assert!(looks.items > 0 && looks.cached > 0, "no row counts up: {looks:?}");
    }
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
        assert_eq!(
            Some(s.m.db.confirmed()),
            s.progress(),
            "everything applied is acknowledged"
        );
        s.restart_sink();
        s.recovers();
        assert_eq!(s.repeats(), 0, "something came again that was acknowledged");
    }
    s.finish(&[]);
}

/// Redis dies, and the sink is stopped before it could notice. What Redis may have lost is not confirmed.
#[test]
fn stopped_when_redis_has_just_died() {
    // However long it takes until Redis is killed, nothing is confirmed by then.
    let setup = Setup::default().args(&["--durability", "memory=20s"]);
    let mut s = Scenario::start("stopped_when_redis_has_just_died", setup);
    s.load.rest();
    s.reach();
    s.m.sql("UPDATE item SET n = n + 7 WHERE id % 2 = 0");
    let updated = s.m.db.lsn();
    s.reach_lsn(updated);
    s.m.redis.stop(Signal::KILL);
    let status = s.m.sink(|sink| {
        sink.signal(Signal::TERM);
        sink.wait(DEADLINE)
    });
    assert_eq!(status.code(), Some(0), "{}", s.log());
    let confirmed = s.m.db.confirmed();
    assert!(
        confirmed < updated,
        "{confirmed} is confirmed, and Redis has nothing of {updated}"
    );
}

/// Once the load has gone on for a while, the sink is asked to end, and does so soon and well. Returns its log.
#[track_caller]
fn stops_under_load(s: &Scenario) -> String {
    let before = s.m.db.lsn();
    wait_for(DEADLINE, "the load to go on", || {
        (s.m.db.lsn().0 > before.0 + 100_000).then_some(())
    });
    let asked = Instant::now();
    let status = s.m.sink(|sink| {
        sink.signal(Signal::TERM);
        sink.wait(DEADLINE)
    });
    let took = asked.elapsed();
    let log = s.log();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(took < Duration::from_secs(10), "{took:?}: {log}");
    log
}

/// The story: for 14 seconds nothing happened, and then the log said that all was acknowledged, which what was in flight was not.
#[test]
fn stopped_while_redis_is_frozen() {
    let mut s = Scenario::start("stopped_while_redis_is_frozen", Setup::default());
    s.flow();
    s.m.redis.signal(Signal::STOP);
    // Without this the sink may have nothing in flight.
    let log = stops_under_load(&s);
    assert!(!log.contains("everything that was applied"), "{log}");
    assert!(log.contains("comes again at the next start"), "{log}");
    s.m.redis.signal(Signal::CONT);
    assert!(Some(s.m.db.confirmed()) <= s.progress());
    s.restart_sink();
    s.recovers();
    s.finish(&["comes again at the next start"]);
}

/// Postgres says nothing and takes nothing, so that it cannot be told how far Redis is: it is waited for a while, and then the log says so.
#[test]
fn stopped_while_postgres_is_silent() {
    let s = Scenario::start("stopped_while_postgres_is_silent", Setup::default());
    s.flow();
    s.pg_link.set_both(Mode::BlackHole);
    // There is more of the stream by then.
    let log = stops_under_load(&s);
    let signs = [
        " WARN ",
        "Postgres did not take the last position",
        "comes again at the next start",
    ];
    let warns = |line: &str| signs.iter().all(|sign| line.contains(sign));
    assert!(log.lines().any(warns), "{log}");
    assert!(!log.contains("everything that was applied"), "{log}");
    assert!(Some(s.m.db.confirmed()) <= s.progress());
    s.pg_link.heal();
    s.restart_sink();
    s.recovers();
    s.finish(&["comes again at the next start"]);
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
        s.recovers();
    }
    // A read with a timeout that a stop interrupts ends when the process goes on.
    let woken = "the connection to Redis at * broke: Interrupted system call";
    s.finish(&[&POSTGRES_AWAY[..], &["the server is silent", woken]].concat());
}

/// What a sink may say that another has taken over from, which is killed then: it may have written on while the first began a session.
fn taken() -> Vec<&'static str> {
    let more = [
        "the server is silent",
        "the progress changed while this session began",
    ];
    [&REDIS_AWAY[..], &POSTGRES_AWAY, &more].concat()
}

/// A sink is frozen, in one round for a minute, another takes over, and the first wakes up: it has lost the right to write, notices, and
/// waits.
#[test]
fn the_frozen_one_wakes_up_after_another_took_over() {
    let s = Scenario::start(
        "the_frozen_one_wakes_up_after_another_took_over",
        Setup::default(),
    );
    s.silence("2s");
    for round in 0..3 {
        s.m.sink(|sink| sink.signal(Signal::STOP));
        let frozen = Instant::now();
        let mut second = s.m.second_sink();
        let from = s.progress();
        let before = s.m.db.lsn();
        wait_for(Duration::from_secs(30), "the second to take over", || {
            second.assert_running();
            s.progress().filter(|&lsn| lsn > before && Some(lsn) > from)
        });
        if round == 1 {
            wait_for(Duration::from_secs(70), "a minute to be over", || {
                second.assert_running();
                s.watch.assert_holds();
                (frozen.elapsed() >= Duration::from_secs(60)).then_some(())
            });
        }
        // What the first one still has in its hands is older than what is in Redis now.
        s.m.sink(|sink| sink.signal(Signal::CONT));
        let deadline = Duration::from_secs(30);
        if round == 0 {
            // Its connection to Redis was ended by the second; it tries again and waits for the slot, like any second sink.
            s.said("next_attempt_in", 0);
        }
        let target = s.m.db.lsn();
        wait_for(deadline, "the second to go on", || {
            s.watch.assert_holds();
            s.progress().filter(|&lsn| lsn >= target)
        });
        second.kill();
        s.keeps_secret("the second sink's log", &second.output());
        s.flow();
    }
    s.finish(&taken());
}

/// Cuts the sink off from both servers, in the middle of what it sends to Redis and with more to come, and has another take over.
#[track_caller]
fn taken_over(s: &Scenario, word: &str) -> Sink {
    let (walsender, sprung) = (s.walsender(), s.redis_link.sprung());
    s.redis_link.arm(Trap::StallBefore, word);
    wait_for(DEADLINE, "the trap to spring", || {
        (s.redis_link.sprung() > sprung).then_some(())
    });
    let passed = s.pg_link.passed(Way::ToClient);
    wait_for(DEADLINE, "more of the stream", || {
        (s.pg_link.passed(Way::ToClient) > passed + 10_000).then_some(())
    });
    s.pg_link.set_both(Mode::BlackHole);
    wait_for(Duration::from_secs(30), "the walsender to give up", || {
        let gone = format!("SELECT FROM pg_stat_activity WHERE pid = {walsender}");
        s.m.db.rows(&gone).is_empty().then_some(())
    });
    let mut second = s.m.second_sink();
    let before = s.m.db.lsn();
    wait_for(Duration::from_secs(30), "the second to take over", || {
        second.assert_running();
        s.progress().filter(|&lsn| lsn > before)
    });
    second
}

/// A sink is cut off from both servers, another takes over, and the links heal: what the first had on its way is older than what is in
/// Redis now.
#[test]
fn cut_off_and_back_after_another_took_over() {
    let s = Scenario::start("cut_off_and_back_after_another_took_over", Setup::default());
    s.silence("2s");
    for word in ["EXEC", "WATCH"] {
        let seen = s.log().len();
        let mut second = taken_over(&s, word);
        s.redis_link.heal();
        s.pg_link.heal();
        s.said("next_attempt_in", seen);
        // It waits for the slot, like any second sink.
        s.flow();
        second.kill();
        s.flow();
    }
    s.finish(&taken());
}

/// The same where Redis does not let the second end the connection of the first: only the epoch stands between them. The first finds
/// it, in the batch that was on its way (its WATCH is broken) or before the next one, and waits for the slot. (It stopped once, and whoever had
/// two sinks had one from then on.)
#[test]
fn cut_off_and_back_and_only_the_epoch_is_in_its_way() {
    let s = Scenario::start(
        "cut_off_and_back_and_only_the_epoch_is_in_its_way",
        Setup::default(),
    );
    let _: String = s.m.redis.command("ACL SETUSER default -client|kill");
    s.silence("2s");
    for word in ["WATCH", "EXEC"] {
        // Who has waited for 15 seconds for an answer of Redis gives up by himself. A busy machine may take so long.
        let fenced = (0..5).any(|_| {
            let seen = s.log().len();
            let mut second = taken_over(&s, word);
            // An idle session writes nothing: no WATCH of the first breaks that is set from now on.
            s.load.rest();
            s.reach();
            let reached = s.progress();
            s.redis_link.heal();
            let fenced = wait_for(DEADLINE, "the first to fail", || {
                let log = s.log();
                let new = log.get(seen..)?;
                let fenced = new.contains("another walmirror has taken over this slot");
                (fenced || new.contains("next_attempt_in")).then_some(fenced)
            });
            let kept = s.progress();
            assert!(kept >= reached, "Redis went back from {reached:?} to {kept:?}");
            let report = s.m.compare();
            assert!(report.equal(), "{report}");
            s.pg_link.heal();
            s.load.resume();
            s.flow();
            s.m.sink(Sink::assert_running);
            let told = second.output();
            assert!(
                told.contains("the connection of an older walmirror stays"),
                "{told}"
            );
            assert!(told.contains("ACL SETUSER default '+client|kill'"), "{told}");
            second.kill();
            s.flow();
            fenced
        });
        assert!(fenced, "before {word}: {}", s.log());
    }
    let words = [
        "the server is silent",
        "another walmirror has taken over this slot",
        "the connection of an older walmirror stays",
        // The second had written on since the first had looked where the WAL ends, and then it was killed.
        "the progress changed while this session began",
    ];
    s.finish(&[&REDIS_AWAY[..], &POSTGRES_AWAY, &words].concat());
}

/// The clock of the sink's machine is set, forwards and back, by hours. Only what is printed for people shows it.
#[test]
fn the_clock_is_set() {
    let library = std::fs::read_dir("/usr/lib")
        .unwrap()
        .filter_map(|entry| Some(entry.ok()?.path().join("faketime/libfaketimeMT.so.1")))
        .find(|path| path.exists());
    let Some(library) = library else {
        skipped("there is no libfaketime here");
        return;
    };
    let dir = Dir::new("clock");
    let clock = dir.path().join("clock");
    std::fs::write(&clock, "+0\n").unwrap();
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let setup = Setup {
        environment: vec![
            variable("LD_PRELOAD", &library.display().to_string()),
            variable("FAKETIME_TIMESTAMP_FILE", &clock.display().to_string()),
            variable("FAKETIME_NO_CACHE", "1"),
            // Setting a clock leaves the monotonic one alone.
            variable("DONT_FAKE_MONOTONIC", "1"),
        ],
        ..Setup::default()
    };
    let s = Scenario::start("the_clock_is_set", setup);
    for step in ["+1h", "-1h", "+400d", "-400d", "+0"] {
        std::fs::write(&clock, format!("{step}\n")).unwrap();
        s.flow();
        let target = s.m.db.lsn();
        wait_for(Duration::from_secs(20), "the slot to follow", || {
            (s.m.db.confirmed() >= target).then_some(())
        });
    }
    // And across a restart of the sink, which sees another time from the beginning: another year, in its log.
    std::fs::write(&clock, "+400d\n").unwrap();
    s.kill_sink();
    s.flow();
    let log = s.log();
    let starts = log.lines().filter(|line| line.contains("walmirror starts"));
    let years: Vec<&str> = starts.map(|line| &line[..4]).collect();
    assert!(years.len() == 2 && years[0] < years[1], "{years:?}");
    s.finish(&[]);
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
    s.tries_seldom(&s.redis_link);
    s.said("Too many open files", seen);
    // Nor for whoever asks how it is. The story: with the first one it could not take, the admin server ended for good.
    // What the session before has closed may be free, so that the limit is lower still.
    limit(3);
    for _ in 0..3 {
        assert_eq!(s.get("/readyz"), None, "a descriptor was left");
    }
    limit(1024);
    s.recovers();
    s.finish(&[
        "the connection to Redis at * broke: ",
        "cannot connect to Redis at ",
        "cannot connect to Postgres",
        "cannot make a waker",
        "Too many open files",
        "cannot open a replication connection",
    ]);
}

/// The kernel kills a process that wants more memory than its group may have: as any other death, however often.
#[test]
fn killed_for_want_of_memory() {
    let Some(group) = Cgroup::create(Resource::Memory) else {
        skipped("this user may not make control groups");
        return;
    };
    let mut s = Scenario::start("killed_for_want_of_memory", Setup::default());
    s.m.sql("CREATE TABLE wide (id int PRIMARY KEY, v text); SELECT walmirror.mirror('wide')");
    for round in 0..3 {
        group.limit_memory(2 << 20);
        s.m.sink(|sink| group.add(sink.pid()));
        s.m.sql(&format!(
            "INSERT INTO wide SELECT i, repeat(md5(i::text), 10) FROM generate_series({round} * 50000 + 1, {round} * 50000 + 50000) i"
        ));
        let status = s.m.sink(|sink| sink.wait(DEADLINE));
        assert_eq!(status.signal(), Some(9), "{}", s.log());
        s.restart_sink();
        s.converge();
    }
    s.finish(&[]);
}

/// With a fiftieth of a processor it is slow, and nothing else.
#[test]
fn hardly_any_processor_time() {
    let Some(group) = Cgroup::create(Resource::Cpu) else {
        skipped("this user may not make control groups");
        return;
    };
    let mut s = Scenario::start("hardly_any_processor_time", Setup::default());
    group.limit_cpu(20);
    s.m.sink(|sink| group.add(sink.pid()));
    wait_for(DEADLINE, "the sink to have no time for seconds", || {
        s.flow();
        (group.throttled() > 50).then_some(())
    });
    drop(group);
    s.converge();
    s.finish(&[]);
}
