//! How each fault is done to a running scenario, and how all is made well again.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rand::Rng;
use rand::seq::IndexedRandom;
use rustix::process::{Pid, kill_process};
use walmirror_tests::{DEADLINE, Mode, Proxy, Redis, Scenario, Signal, Sink, Trap, Way, wait_for};

use super::DURABILITY;
use super::kinds::Fault::{self, *};

/// With everysec Redis answers before it has written while an fsync takes long, and a kill is a loss; that has tests of its own. The
/// snapshots are there to fail.
pub const REDIS: [&str; 19] = [
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

/// What has to be taken back besides settings.
#[derive(Default)]
pub struct Broken {
    second: Option<Sink>,
    is_slow: bool,
    postgres_is_slow: bool,
    walsender: Option<Pid>,
    cannot_save: bool,
    /// The row whose key somebody else has taken.
    row: Option<i32>,
    /// Rows of which that was so before.
    rows: i32,
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

const END_WALSENDER: &str = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = current_database() AND active";

/// Bits of `walmirror.failpoint`: an error and a panic in begin, change, commit and truncate.
const DECODER_FAILPOINTS: [u32; 8] = [4, 8, 16, 32, 64, 128, 256, 512];

/// Starts a sink that has ended, and waits until it listens to signals. One that is not let in ends again.
fn restart_sink(s: &Scenario) {
    let seen = s.log().len();
    s.m.sink(Sink::restart);
    wait_for(DEADLINE, "the sink to start", || {
        s.log().get(seen..)?.contains("walmirror starts").then_some(())
    });
}

/// The slot keeps more WAL than it may, and is given up, if there is one.
fn invalidate_the_slot(s: &mut Scenario) {
    s.resyncs();
    let invalidated = |s: &Scenario| s.m.db.pg.log().matches("invalidating ").count();
    let before = invalidated(s);
    s.m.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'");
    s.m.db.pg.reload();
    wait_for(DEADLINE, "the slot to be invalidated", || {
        // In one transaction nothing would be switched.
        for statement in ["SELECT pg_switch_wal()", "CHECKPOINT"] {
            s.m.sql(statement);
        }
        let slots = s.m.db.value("SELECT count(*) FROM pg_replication_slots");
        (slots == "0" || invalidated(s) > before).then_some(())
    });
    s.m.sql("ALTER SYSTEM RESET max_slot_wal_keep_size");
    s.m.db.pg.reload();
}

/// Postgres has the files that it had a moment ago.
fn put_back(s: &mut Scenario, is_slow: bool) {
    s.resyncs();
    // The fast stop waits until a walsender that is answered has sent everything: with 20 kB/s that takes minutes.
    s.m.db.pg.stop(if is_slow { Signal::QUIT } else { Signal::INT });
    let copy = s.m.db.pg.copy_data();
    s.m.db.pg.resume();
    s.m.db.reconnect();
    std::thread::sleep(Duration::from_millis(s.rng.random_range(0..2_000)));
    s.m.db.pg.stop(Signal::QUIT);
    s.m.db.pg.replace_data(&copy);
    s.m.db.pg.resume();
    s.m.db.reconnect();
    // A transaction that was prepared in the copy, and has ended since, is prepared again, and nobody knows of it.
    for row in
        s.m.db
            .rows("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
    {
        let name = row[0].as_deref().unwrap();
        // Or a writer has just ended it.
        let _ =
            s.m.db
                .connect()
                .batch_execute(&format!("ROLLBACK PREPARED '{name}'"));
    }
}

/// Redis dies the way that a power failure ends it, and what it wrote last is not there.
fn lose_the_tail(s: &mut Scenario) {
    let file = s.m.redis.append_only_file();
    let length = fs::metadata(&file).map_or(0, |data| data.len());
    std::thread::sleep(Duration::from_millis(s.rng.random_range(0..1_000)));
    s.watch.may_lose(true);
    s.m.redis.stop(Signal::KILL);
    // Nobody wrote, or another file is the last one by now: then nothing is lost.
    if s.m.redis.append_only_file() == file && length > 0 {
        let file = fs::File::options().write(true).open(&file).unwrap();
        if file.metadata().unwrap().len() > length {
            file.set_len(length).unwrap();
        }
    }
    s.m.redis.resume();
}

pub fn harm(s: &mut Scenario, broken: &mut Broken, fault: Fault) {
    match fault {
        SinkKilled => {
            s.m.sink(Sink::kill);
            restart_sink(s);
        }
        SinkStopped => {
            let is_slow = broken.is_slow;
            let status = s.m.sink(|sink| {
                sink.signal(Signal::TERM);
                if is_slow {
                    // What it has received may take minutes to apply: somebody does not wait for that.
                    sink.signal(Signal::TERM);
                }
                sink.wait(DEADLINE)
            });
            // One that was not let in may have ended before it heard of this. That a signal ended it has no code.
            let is_fine = matches!(status.code(), Some(0 | 3 | 4))
                || (is_slow && matches!(status.code(), None | Some(143)));
            assert!(is_fine, "{status}: {}", s.log());
            restart_sink(s);
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
            broken.is_slow = true;
            broken.postgres_is_slow = s.rng.random();
            let link = if broken.postgres_is_slow {
                &s.pg_link
            } else {
                &s.redis_link
            };
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
        WalsenderTerminated => s.m.sql(END_WALSENDER),
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
            let (number, text) = *[("bigint", "varchar"), ("int", "text")]
                .choose(&mut s.rng)
                .unwrap();
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
                let drop = format!("{END_WALSENDER}; SELECT pg_drop_replication_slot(current_database())");
                s.m.db.connect().batch_execute(&drop).ok()
            });
        }
        SlotInvalidated => invalidate_the_slot(s),
        DecoderFails => {
            let failpoint = *DECODER_FAILPOINTS.choose(&mut s.rng).unwrap();
            let name = s.m.db.name.clone();
            s.m.sql(&format!(
                "ALTER DATABASE {name} SET walmirror.failpoint = {failpoint}"
            ));
            s.m.sql(END_WALSENDER);
        }
        LoginTaken => {
            s.m.sql("ALTER ROLE mirror NOLOGIN");
            s.m.sql(END_WALSENDER);
        }
        PostgresPutBack => {
            // The server waits for its end.
            broken.thaw_walsender();
            put_back(s, broken.postgres_is_slow);
        }
        KeyTaken => {
            broken.rows += 1;
            let row = 900_000 + broken.rows;
            set(s, &format!("SET item:{row} foreign"));
            s.m.sql(&format!("INSERT INTO item VALUES ({row}, 0, 'its key is taken')"));
            broken.row = Some(row);
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
        RedisTailLost => lose_the_tail(s),
        WalsenderFrozen => {
            let query =
                "SELECT active_pid FROM pg_replication_slots WHERE slot_name = current_database() AND active";
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
pub fn heal(s: &mut Scenario, broken: &mut Broken) -> String {
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
    (broken.is_slow, broken.postgres_is_slow) = (false, false);
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
    if let Some(row) = broken.row.take() {
        // Whoever took the key gives it back, and the row is written once more.
        set(s, &format!("DEL item:{row}"));
        s.m.sql(&format!("UPDATE item SET n = n + 1 WHERE id = {row}"));
    }
    let name = s.m.db.name.clone();
    s.m.sql(&format!(
        "ALTER DATABASE {name} RESET walmirror.failpoint; ALTER ROLE mirror LOGIN"
    ));
    said
}
