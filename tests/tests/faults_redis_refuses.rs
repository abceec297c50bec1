//! Redis answers, and refuses: every write, or whoever logs in. Nothing is confirmed meanwhile, and nothing is given up.
//!
//! A Redis that goes away or does not answer is in faults_redis.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::time::{Duration, Instant};

use walmirror_tests::{
    DEADLINE, Dir, Mirror, REDIS_AWAY, Redis, Scenario, Setup, Signal, Sink, Tmpfs, skipped, wait_for,
};

fn with(options: &[&str]) -> Setup {
    Setup {
        redis: Redis::start_with(options),
        ..Setup::default()
    }
}

/// Redis answers before it has written where an fsync takes long: a kill may be a loss.
const EVERYSEC: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "everysec"];

/// What is in memory is confirmed after this (`--durability memory`).
const WINDOW: Duration = Duration::from_secs(2);

/// Redis answers every write with an error for a while. Nothing is confirmed meanwhile, and nothing is given up.
fn refused(name: &str, setup: Setup, code: &str, harm: impl Fn(&Scenario), heal: impl Fn(&Scenario)) {
    let said = Scenario::said;
    refused_and(said, name, setup, code, harm, heal);
}

/// The same where only a person can mend it: the ERROR line has the next command.
fn forbidden(name: &str, setup: Setup, code: &str, harm: impl Fn(&Scenario), heal: impl Fn(&Scenario)) {
    let said = Scenario::said_what_to_do;
    refused_and(said, name, setup, code, harm, heal);
}

fn refused_and(
    said: fn(&Scenario, &str, usize),
    name: &str,
    setup: Setup,
    code: &str,
    harm: impl Fn(&Scenario),
    heal: impl Fn(&Scenario),
) {
    let s = Scenario::start(name, setup);
    for _ in 0..2 {
        let seen = s.log().len();
        harm(&s);
        said(&s, code, seen);
        s.is_ready(false);
        nothing_is_confirmed(&s, &heal);
        s.recovers();
    }
    s.finish(&[&REDIS_AWAY[..], &[code]].concat());
}

/// Redis refuses, and is healed: for longer than what is applied waits to be confirmed neither it nor the slot moves, while the load goes on.
#[track_caller]
fn nothing_is_confirmed(s: &Scenario, heal: &impl Fn(&Scenario)) {
    // Redis does not tell where it stands while it is busy.
    let stood = s.progress();
    let (before, committed, since) = (s.m.db.confirmed(), s.load.committed(), Instant::now());
    wait_for(DEADLINE, "what is applied to be confirmed", || {
        s.m.sink(Sink::assert_running);
        (since.elapsed() > WINDOW * 2 && s.load.committed() > committed + 20).then_some(())
    });
    let confirmed = s.m.db.confirmed();
    assert_eq!(confirmed, before, "Redis refuses, and the slot moves");
    // Nobody writes to Redis between its healing and the look at it.
    s.m.sink(|sink| sink.signal(Signal::STOP));
    heal(s);
    let stands = s.progress().expect("where Redis stands");
    s.m.sink(|sink| sink.signal(Signal::CONT));
    assert!(
        stood.is_none_or(|stood| stood == stands),
        "Redis refuses, and went from {stood:?} to {stands}"
    );
    assert!(
        confirmed <= stands,
        "{confirmed} is confirmed, and Redis stands at {stands}"
    );
}

fn set(s: &Scenario, command: &str) {
    let _: String = s.m.redis.command(command);
}

#[test]
fn out_of_memory() {
    let full = |s: &Scenario| set(s, "CONFIG SET maxmemory 1mb");
    let free = |s: &Scenario| set(s, "CONFIG SET maxmemory 0");
    refused("out_of_memory", Setup::default(), "OOM", full, free);
}

#[test]
fn read_only() {
    let follow = |s: &Scenario| set(s, "REPLICAOF 127.0.0.1 1");
    let lead = |s: &Scenario| set(s, "REPLICAOF NO ONE");
    refused("read_only", Setup::default(), "READONLY", follow, lead);
}

/// The story: a replica that takes writes was written to as if it were a master, and what it was about to lose counted as safe.
#[test]
fn a_replica_that_takes_writes() {
    let follow = |s: &Scenario| {
        set(s, "CONFIG SET replica-read-only no");
        set(s, "REPLICAOF 127.0.0.1 1");
    };
    let lead = |s: &Scenario| set(s, "REPLICAOF NO ONE");
    refused(
        "a_replica_that_takes_writes",
        Setup::default(),
        "READONLY",
        follow,
        lead,
    );
}

/// A session that is never idle is not checked: it asks between its batches. Here each row is written as soon as the one before is in
/// Redis.
#[test]
fn a_replica_that_takes_writes_from_a_busy_session() {
    let m = Mirror::with("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    let _: String = m.redis.command("CONFIG SET replica-read-only no");
    let mut redis = m.redis.connect();
    let mut id = 0;
    // An idle session is checked after a second. A busy machine may make it so idle, which shows nothing.
    let shown = (0..20).any(|_| {
        let seen = m.sink(|sink| sink.output().len());
        let is_told = || {
            let log = m.sink(|sink| sink.output());
            log.get(seen..).is_some_and(|new| new.contains("READONLY"))
        };
        let _: String = m.redis.command("REPLICAOF 127.0.0.1 1");
        let (start, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
        let told = loop {
            id += 1;
            m.sql(&format!("INSERT INTO t VALUES ({id})"));
            let told = wait_for(DEADLINE, "the row, or that it is not written", || {
                let written: bool = redis::cmd("EXISTS")
                    .arg(format!("t:{id}"))
                    .query(&mut redis)
                    .unwrap();
                if written {
                    return Some(is_told());
                }
                is_told().then_some(true)
            });
            longest = longest.max(last.elapsed());
            last = Instant::now();
            if told || start.elapsed() > Duration::from_secs(3) {
                break told;
            }
        };
        let _: String = m.redis.command("REPLICAOF NO ONE");
        m.sync();
        let was_busy = longest < Duration::from_millis(400);
        assert!(
            told || !was_busy,
            "after {id} rows a busy session has not asked whether this is a master"
        );
        told && was_busy
    });
    assert!(
        shown,
        "the machine was never fast enough for a session that is busy"
    );
    m.check();
}

/// A snapshot that cannot be saved stops all writes.
#[test]
fn cannot_save() {
    let dir = Dir::new("gone");
    let path = dir.path().join("dump");
    let saved = |s: &Scenario, status: &str| {
        wait_for(DEADLINE, format!("bgsave {status}"), || {
            let info: String = s.m.redis.command("INFO persistence");
            let busy = info.contains("rdb_bgsave_in_progress:1");
            (!busy && info.contains(&format!("rdb_last_bgsave_status:{status}"))).then_some(())
        });
    };
    let harm = |s: &Scenario| {
        fs::create_dir_all(&path).unwrap();
        set(s, &format!("CONFIG SET dir {}", path.display()));
        fs::remove_dir_all(&path).unwrap();
        set(s, "BGSAVE");
        saved(s, "err");
    };
    let heal = |s: &Scenario| {
        set(s, &format!("CONFIG SET dir {}", s.m.redis.dir().display()));
        set(s, "BGSAVE");
        saved(s, "ok");
    };
    refused(
        "cannot_save",
        with(&["--save", "3600 1000000", "--enable-protected-configs", "yes"]),
        "MISCONF",
        harm,
        heal,
    );
}

#[test]
fn busy_with_a_script() {
    let spin = |s: &Scenario| {
        s.m.redis.keep_busy();
    };
    let kill = |s: &Scenario| {
        wait_for(DEADLINE, "the script to end", || {
            redis::cmd("SCRIPT")
                .arg("KILL")
                .exec(&mut s.m.redis.connect())
                .ok()
        });
    };
    refused(
        "busy_with_a_script",
        with(&["--lua-time-limit", "100"]),
        "BUSY",
        spin,
        kill,
    );
}

/// The file system of the append-only file is full.
#[test]
fn no_space_for_the_append_only_file() {
    let dir = Dir::new("full");
    let Some(full) = Tmpfs::mount(dir.path(), "2m") else {
        skipped("this user may not mount a tmpfs");
        return;
    };
    let setup = with(&[&EVERYSEC[..], &["--dir", &dir.path().display().to_string()]].concat());
    let s = Scenario::start("no_space_for_the_append_only_file", setup);
    s.said("MISCONF", 0);
    full.resize("200m");
    s.recovers();
    s.finish(&[&REDIS_AWAY[..], &["MISCONF"]].concat());
    drop(full);
}

/// And Redis is killed before there is room: what it took since, and never could write, is not confirmed.
#[test]
fn killed_with_no_space_for_the_append_only_file() {
    let dir = Dir::new("full");
    let Some(full) = Tmpfs::mount(dir.path(), "2m") else {
        skipped("this user may not mount a tmpfs");
        return;
    };
    let setup = with(&[&EVERYSEC[..], &["--dir", &dir.path().display().to_string()]].concat());
    let mut s = Scenario::start("killed_with_no_space_for_the_append_only_file", setup);
    s.said("MISCONF", 0);
    // Longer than the window of time: what is in memory only is old by now. The sink tries again and again, and is told no.
    let start = Instant::now();
    wait_for(DEADLINE, "more attempts", || {
        let attempts = s.log().matches("MISCONF").count();
        (attempts > 5 && start.elapsed() > Duration::from_secs(4)).then_some(())
    });
    s.watch.may_lose(true);
    s.redis_link.refuse();
    let (confirmed, before) = (s.m.db.confirmed(), s.progress());
    s.m.redis.stop(Signal::KILL);
    full.resize("200m");
    s.m.redis.resume();
    let after = s.progress();
    assert!(after < before, "nothing was lost: {before:?}, {after:?}");
    assert!(
        Some(confirmed) <= after,
        "{confirmed} is confirmed, and the file had {after:?}"
    );
    s.redis_link.heal();
    s.flow();
    s.watch.may_lose(false);
    assert!(!s.log().contains("do not fit"), "{}", s.log());
    s.finish(&[&REDIS_AWAY[..], &["MISCONF", "LOADING"]].concat());
    drop(full);
}

/// A password is changed on Redis first. It is an ERROR with the next command, until the old one is right again.
#[test]
fn the_password_is_changed() {
    let setup = Setup {
        redis_login: "mirror:first@".to_owned(),
        ..Setup::default()
    };
    let _: String = setup.redis.command("ACL SETUSER mirror on >first ~* &* +@all");
    let change = |s: &Scenario| {
        set(s, "ACL SETUSER mirror resetpass >second");
        s.redis_link.cut();
    };
    let restore = |s: &Scenario| set(s, "ACL SETUSER mirror resetpass >first");
    forbidden(
        "the_password_is_changed",
        setup,
        "Password authentication failed",
        change,
        restore,
    );
}

#[test]
fn a_right_is_taken_away() {
    let setup = Setup {
        redis_login: "mirror:first@".to_owned(),
        ..Setup::default()
    };
    let _: String = setup.redis.command("ACL SETUSER mirror on >first ~* &* +@all");
    let change = |s: &Scenario| set(s, "ACL SETUSER mirror -hset");
    let restore = |s: &Scenario| set(s, "ACL SETUSER mirror +hset");
    forbidden("a_right_is_taken_away", setup, "NOPERM", change, restore);
}

/// The story: somebody took MULTI away from a login that was logged in. What was sent behind it was done by itself, as far as it was allowed: the
/// position passed changes that had been refused, and they never came.
#[test]
fn multi_is_taken_away() {
    let m = Mirror::new();
    let acl = |rules: &str| {
        let _: String = m.redis.command(&format!("ACL SETUSER mirror {rules}"));
    };
    acl("on >first ~* &* +@all");
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, n int, doc text); ALTER TABLE t ALTER doc SET STORAGE EXTERNAL; \
         INSERT INTO t SELECT i, 0, repeat('x', 9000) FROM generate_series(1, 20) i; SELECT walmirror.mirror('t', value => 'json')",
    );
    let url = m.redis.url().replace("redis://", "redis://mirror:first@");
    m.start_at(&m.db.pg.conninfo(&m.db.name), &url, &[], &[]);
    m.settle();
    for round in 1..4 {
        let seen = m.sink(|sink| sink.output()).len();
        // What is left writes hashes, and runs no script: so no patch.
        acl("-@transaction -@scripting");
        m.sql(&format!(
            "UPDATE t SET n = {round}; DELETE FROM t WHERE id = {round}"
        ));
        wait_for(DEADLINE, "the refusal to be told of", || {
            m.sink(|sink| sink.output())
                .split_off(seen)
                .contains("NOPERM")
                .then_some(())
        });
        acl("+@transaction +@scripting");
        m.settle();
    }
}
