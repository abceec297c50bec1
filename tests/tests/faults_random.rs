//! Several faults at once, in an order that a seed decides, for as long as one likes. After each heal everything must hold.
//!
//!     SEED=1 make soak SECONDS=600

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rustix::process::{Pid, kill_process};
use walmirror_tests::{
    DEADLINE, GAP, Mode, POSTGRES_AWAY, Proxy, REDIS_AWAY, Redis, Scenario, Setup, Signal, Sink, Trap, Way,
    gap, unexpected, wait_for,
};

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
    HugeTransaction,
    SchemaChanged,
    TypesChanged,
    SecondSink,
    SlotDropped,
    RedisFailedOver,
    RedisEmptied,
    RedisFull,
    RedisReadOnly,
    RedisCannotSave,
    RedisPasswordChanged,
    RedisPaused,
    RedisClientsKilled,
    RedisScriptsFlushed,
    RedisScriptBusy,
    RedisFrozen,
    RedisRestarted,
    WalsenderFrozen,
    PostgresRestarted,
}

use Fault::*;

/// A master that is replaced may hold more than the default of 2 s allows for.
const DURABILITY: [&str; 2] = ["--durability", "memory=5s"];

/// What all of them together may make the sink say, besides what it says of a server that is away.
const ALLOWED: [&str; 20] = [
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
    "another walmirror has taken over this slot",
    "cannot claim the progress key",
    "SSL negotiation",
    // One that is stopped where the other side of a link is silent says so, and what comes again.
    "the mirror has stopped;",
    "could not receive data from server",
    "replication slot * does not exist",
    "the slot keeps * MiB of WAL, and nothing limits it",
];

/// All of it.
fn allowed() -> Vec<&'static str> {
    [&ALLOWED[..], &GAP, &REDIS_AWAY, &POSTGRES_AWAY].concat()
}

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

/// With everysec Redis answers before it has written while an fsync takes long, and a kill is a loss; that has tests of its own. The
/// snapshots are there to fail.
const REDIS: [&str; 19] = [
    "--appendonly",
    "yes",
    "--appendfsync",
    "no",
    "--save",
    "3600 1000000",
    "--enable-protected-configs",
    "yes",
    "--lua-time-limit",
    "100",
    "--repl-diskless-sync-delay",
    "0",
    "--user",
    "mirror",
    "on",
    ">first",
    "~*",
    "&*",
    "+@all",
];

/// What has to be taken back besides settings.
#[derive(Default)]
struct Broken {
    second: Option<Sink>,
    postgres_is_slow: bool,
    walsender: Option<Pid>,
    cannot_save: bool,
}

impl Broken {
    fn thaw_walsender(&mut self) {
        if let Some(pid) = self.walsender.take() {
            // Whoever waited for its end may have ended it.
            let _ = kill_process(pid, Signal::CONT);
        }
    }
}

/// Whether a script keeps Redis busy. To PING it says that it cannot save, where both are so.
fn is_busy(s: &Scenario) -> bool {
    let asked =
        s.m.redis
            .client()
            .get_connection()
            .and_then(|mut connection| redis::cmd("DBSIZE").query::<u64>(&mut connection));
    asked.is_err_and(|e| e.code() == Some("BUSY"))
}

/// A snapshot has been tried, and this became of it.
fn snapshot(s: &Scenario, dir: &Path, status: &str) {
    wait_for(DEADLINE, format!("bgsave {status}"), || {
        let info: String = s.m.redis.command("INFO persistence");
        if info.contains("bgsave_in_progress:1") || info.contains("aof_rewrite_in_progress:1") {
            return None;
        }
        if info.contains(&format!("rdb_last_bgsave_status:{status}")) {
            return Some(());
        }
        // It is gone where a turn before could not snapshot.
        fs::create_dir_all(dir).ok()?;
        set(s, &format!("CONFIG SET dir {}", dir.display()));
        if status == "err" {
            fs::remove_dir_all(dir).ok()?;
        }
        let _ = redis::cmd("BGSAVE").exec(&mut s.m.redis.connect());
        None
    });
}

/// A replica becomes the master, and the old one goes on for a while, which nobody will ever see.
fn fail_over(s: &mut Scenario) {
    let master = format!("127.0.0.1 {}", s.m.redis.port());
    let mut replica = Redis::start_with(&[&REDIS[..], &["--replicaof", &master]].concat());
    replica.set_options(&REDIS);
    wait_for(
        DEADLINE,
        "the replica to have everything, also in its file",
        || {
            let replication: String = replica.command("INFO replication");
            let persistence: String = replica.command("INFO persistence");
            let waits = ["aof_rewrite_in_progress:1", "aof_rewrite_scheduled:1"];
            let is_written = !waits.iter().any(|sign| persistence.contains(sign));
            (is_written && replication.contains("master_link_status:up")).then_some(())
        },
    );
    let _: String = replica.command("REPLICAOF NO ONE");
    std::thread::sleep(Duration::from_millis(s.rng.random_range(0..300)));
    s.watch.may_lose(true);
    s.redis_link.point_to_port(replica.port());
    s.watch.look_at(replica.port());
    let mut old = std::mem::replace(&mut s.m.redis, replica);
    old.stop(Signal::KILL);
    s.keeps_secret("the log of a Redis that was the master", &old.log());
    s.redis_link.cut();
}

fn harm(s: &mut Scenario, broken: &mut Broken, fault: Fault) {
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
            broken.postgres_is_slow = s.rng.random();
            let link = if broken.postgres_is_slow { &s.pg_link } else { &s.redis_link };
            link.set(way, mode);
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
        // More than `--transaction-bytes` where that is small, and a sweep of it later.
        HugeTransaction => s.m.sql(
            "INSERT INTO item SELECT i, 0, 'huge', repeat('h', 500) FROM generate_series(10000, 12000) i \
             ON CONFLICT (id) DO UPDATE SET n = item.n + 1, note = 'huge ' || item.n",
        ),
        TypesChanged => {
            s.refreshes();
            let (number, text) = *[("bigint", "varchar"), ("int", "text")].choose(&mut s.rng).unwrap();
            s.m.sql(&format!("ALTER TABLE hot ALTER n TYPE {number}"));
            s.m.sql(&format!("ALTER TABLE doc ALTER body TYPE {text}"));
        }
        SecondSink => {
            let args = [&["run"][..], &DURABILITY].concat();
            broken.second = Some(Sink::start(&s.m.arguments(&args)));
        }
        SlotDropped => {
            s.resyncs();
            wait_for(DEADLINE, "the slot to be dropped", || {
                let drop = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots \
                            WHERE slot_name = current_database() AND active; \
                            SELECT pg_drop_replication_slot(current_database())";
                s.m.db.connect().batch_execute(drop).ok()
            });
        }
        RedisFailedOver => fail_over(s),
        RedisFull => set(s, "CONFIG SET maxmemory 1mb"),
        RedisReadOnly => set(s, "REPLICAOF 127.0.0.1 1"),
        RedisCannotSave => {
            let dir = s.m.redis.dir().join("gone");
            fs::create_dir_all(&dir).unwrap();
            broken.cannot_save = true;
            snapshot(s, &dir, "err");
        }
        RedisPasswordChanged => {
            set(s, "ACL SETUSER mirror resetpass >second");
            s.redis_link.cut();
        }
        RedisPaused => set(s, "CLIENT PAUSE 700 WRITE"),
        RedisClientsKilled => set(s, "CLIENT KILL TYPE normal SKIPME yes"),
        RedisScriptsFlushed => set(s, "SCRIPT FLUSH"),
        RedisEmptied => {
            s.resyncs();
            set(s, "FLUSHALL");
        }
        RedisScriptBusy => {
            s.m.redis.keep_busy();
            wait_for(DEADLINE, "the script to keep Redis busy", || {
                is_busy(s).then_some(())
            });
        }
        RedisFrozen => s.m.redis.signal(Signal::STOP),
        RedisRestarted => {
            s.m.redis.stop(Signal::KILL);
            s.m.redis.resume();
        }
        WalsenderFrozen => {
            let query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = current_database() AND active";
            let rows = s.m.db.rows(query);
            let pid = rows.first().and_then(|row| row[0].as_deref()?.parse().ok());
            broken.walsender = pid.and_then(Pid::from_raw);
            if let Some(pid) = broken.walsender {
                let _ = kill_process(pid, Signal::STOP);
            }
        }
        PostgresRestarted => {
            // The server waits for its end.
            broken.thaw_walsender();
            let signals = [Signal::INT, Signal::QUIT, Signal::KILL];
            let mut signal = *signals.choose(&mut s.rng).unwrap();
            // The fast stop waits until a walsender that is answered has sent everything: with 20 kB/s that takes minutes.
            if broken.postgres_is_slow && signal == Signal::INT {
                signal = Signal::QUIT;
            }
            s.m.db.pg.restart(signal);
            s.m.db.reconnect();
        }
    }
}

/// Everything is well again, whatever it was, and there is one sink. Returns what the other one said.
fn heal(s: &mut Scenario, broken: &mut Broken) -> String {
    let said = broken.second.take().map_or(String::new(), |mut second| {
        second.assert_running();
        second.kill();
        second.output()
    });
    broken.thaw_walsender();
    s.m.sink(|sink| sink.signal(Signal::CONT));
    s.m.redis.signal(Signal::CONT);
    s.redis_link.heal();
    s.pg_link.heal();
    broken.postgres_is_slow = false;
    // A link that was held by a trap stays as it is until somebody gives it up: as long as Redis has to answer.
    s.redis_link.cut();
    wait_for(DEADLINE, "the end of a script", || {
        if !is_busy(s) {
            return Some(());
        }
        let _ = redis::cmd("SCRIPT").arg("KILL").exec(&mut s.m.redis.connect());
        None
    });
    if std::mem::take(&mut broken.cannot_save) {
        set(s, &format!("CONFIG SET dir {}", s.m.redis.dir().display()));
        snapshot(s, s.m.redis.dir(), "ok");
    }
    set(s, "ACL SETUSER mirror resetpass >first");
    set(s, "REPLICAOF NO ONE");
    set(s, "CONFIG SET maxmemory 0");
    said
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
    let setup = Setup {
        redis: Redis::start_with(&REDIS),
        redis_login: "mirror:first@".to_owned(),
        // A connection that says nothing, because its link is silent, keeps the server from its end for the latter.
        ..Setup::alone("wal_sender_timeout = 5s\nauthentication_timeout = 5s")
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
        let mut faults: Vec<Fault> = drawn
            .choose_multiple(&mut s.rng, rounds % 3 + 1)
            .copied()
            .collect();
        faults.sort_unstable();
        println!("{name}, {:?}: {faults:?}", start.elapsed());
        // What was taken away in an earlier round is healed and forgotten by now.
        no_gap(&s.log()[healed..]);
        for fault in &faults {
            harm(&mut s, &mut broken, *fault);
            std::thread::sleep(Duration::from_millis(s.rng.random_range(0..300)));
        }
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..1_500)));
        let said = heal(&mut s, &mut broken);
        // One that has never streamed ends where it is not let in, and somebody starts it again.
        if faults.contains(&RedisPasswordChanged) && !lives_on {
            s.m.sink(|sink| match sink.exited() {
                None => sink.kill(),
                Some(status) => assert_eq!(status.code(), Some(4), "{}", sink.output()),
            });
            s.restart_sink();
        }
        let taken_away = faults
            .iter()
            .any(|fault| [RedisEmptied, SlotDropped].contains(fault));
        // Half of the time the next faults come before the last ones are overcome. A gap that was made is healed first, so that
        // each further one is of a later round.
        let failed_over = faults.contains(&RedisFailedOver);
        if failed_over && !taken_away {
            // What the new master never got has come again.
            s.flow();
            s.watch.may_lose(false);
        }
        if taken_away || failed_over || s.rng.random() {
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
