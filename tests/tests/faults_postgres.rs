//! Postgres goes away, forgets, is put back, or is replaced by another one.
//!
//! More of it in crash.rs (restarts with the order of every write watched), start.rs (a slot that was dropped), faults_logins.rs
//! (nobody is let in) and faults_schema.rs (what SQL itself does to the stream).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::Rng;
use walmirror_tests::{
    DEADLINE, Dir, Lsn, Mirror, POSTGRES_AWAY, Pg, Proxy, Raise, SOON_AFTER_SILENCE, Scenario, Setup, Signal,
    Sink, Tmpfs, skipped, wait_for,
};

/// How long an attempt to connect lasts where nobody answers.
const CONNECTING: Duration = Duration::from_secs(10);
/// What a busy machine may add to the time after which a silence is noticed.
const BUSY: Duration = Duration::from_secs(8);

#[test]
fn the_walsender_is_terminated_under_load() {
    let mut s = Scenario::start("the_walsender_is_terminated_under_load", Setup::default());
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(s.rng.random_range(0..200)));
        s.m.sql(&format!("SELECT pg_terminate_backend({})", s.walsender()));
        s.recovers();
    }
    s.finish(&POSTGRES_AWAY);
}

#[test]
fn restarted_and_crashed_under_load() {
    let s = Scenario::start("restarted_and_crashed_under_load", Setup::alone(""));
    for signal in [Signal::INT, Signal::QUIT, Signal::KILL, Signal::INT, Signal::QUIT] {
        s.m.db.pg.restart(signal);
        s.m.db.reconnect();
        s.recovers();
        // Also after a stop in good order: what is confirmed last is not in the slot's file.
        s.repeats();
    }
    s.finish(&POSTGRES_AWAY);
}

/// The walsender hangs: both sides give it up, and the slot is free once it is gone.
#[test]
fn the_walsender_is_frozen() {
    let s = Scenario::start("the_walsender_is_frozen", Setup::default());
    s.silence("3s");
    let walsender = rustix::process::Pid::from_raw(s.walsender()).unwrap();
    rustix::process::kill_process(walsender, Signal::STOP).unwrap();
    s.said("the server is silent", 0);
    s.said("is active for PID", 0);
    rustix::process::kill_process(walsender, Signal::CONT).unwrap();
    s.recovers();
    s.finish(&[&POSTGRES_AWAY[..], &["the server is silent"]].concat());
}

/// The whole server stands still, as on a machine that swaps or is being moved, with its listener: connections are taken, and nobody
/// answers. The session is given up, and so is each attempt after it.
#[test]
fn all_of_postgres_is_frozen() {
    let s = Scenario::start("all_of_postgres_is_frozen", Setup::alone(""));
    let silence = Duration::from_secs(3);
    s.silence("3s");
    for _ in 0..2 {
        let seen = s.log().len();
        let frozen = s.m.db.pg.freeze();
        let since = Instant::now();
        s.is_ready(false);
        s.said("the server is silent", seen);
        // A worker may just be connecting, which it gives up by itself.
        assert!(
            since.elapsed() < silence + CONNECTING + BUSY,
            "{:?}",
            since.elapsed()
        );
        wait_for(DEADLINE, "attempts", || {
            (since.elapsed() > Duration::from_secs(30)).then_some(())
        });
        let attempts = s.log()[seen..].matches("no answer from").count();
        assert!((1..=4).contains(&attempts), "{attempts} attempts: {}", s.log());
        drop(frozen);
        s.recovers_within(SOON_AFTER_SILENCE);
    }
    s.finish(&[&POSTGRES_AWAY[..], &["the server is silent"]].concat());
}

fn drop_slot(s: &Scenario) {
    wait_for(DEADLINE, "the slot to be dropped", || {
        let drop = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = current_database() AND active; \
             SELECT pg_drop_replication_slot(current_database())";
        s.m.db.connect().batch_execute(drop).ok()
    });
}

#[test]
fn the_slot_is_dropped_under_load() {
    let mut s = Scenario::start("the_slot_is_dropped_under_load", Setup::default());
    s.resyncs();
    drop_slot(&s);
    s.said("the slot is gone", 0);
    s.finish(
        &[
            &POSTGRES_AWAY[..],
            &["the slot is gone", "replication slot * does not exist"],
        ]
        .concat(),
    );
}

/// Dropped, and made again by somebody: what was committed in between is not in it.
#[test]
fn the_slot_is_dropped_and_made_again() {
    let mut s = Scenario::start("the_slot_is_dropped_and_made_again", Setup::default());
    s.m.sink(Sink::terminate);
    s.resyncs();
    drop_slot(&s);
    // All rows at once wait for no writer, and no writer for them.
    s.load.rest();
    s.m.sql("UPDATE item SET n = n + 1; DELETE FROM doc WHERE part = 1");
    s.load.resume();
    s.m.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    s.m.sink(Sink::restart);
    s.said("it lost what is between", 0);
    s.finish(&["it lost what is between"]);
}

/// While everything is read again, who reads Redis finds each row that was right there before, whole, at every look; a key
/// without a row is gone in the end.
#[test]
fn what_is_right_stays_readable_during_a_resync() {
    const ROWS: u32 = 20_000;
    let mut s = Scenario::start("what_is_right_stays_readable_during_a_resync", Setup::default());
    s.m.sql(&format!(
        "CREATE TABLE still (id int PRIMARY KEY, a text, b text); SELECT walmirror.mirror('still'); \
         INSERT INTO still SELECT i, 'a of ' || i, 'b of ' || i FROM generate_series(1, {ROWS}) i"
    ));
    s.load.rest();
    s.m.settle();
    s.load.resume();
    let _: u32 = s.m.redis.command("HSET still:0 a nobody");
    let (done, client) = (AtomicBool::new(false), s.m.redis.client());
    let looks = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut redis = client.get_connection().unwrap();
            let mut looks = 0;
            while !done.load(Ordering::Acquire) {
                let ids: Vec<u32> = (0..50).map(|_| rand::random_range(1..=ROWS)).collect();
                let mut pipe = redis::pipe();
                for id in &ids {
                    pipe.cmd("HMGET")
                        .arg(format!("still:{id}"))
                        .arg(&["id", "a", "b"]);
                }
                let rows: Vec<[Option<String>; 3]> = pipe.query(&mut redis).unwrap();
                for (id, row) in ids.iter().zip(rows) {
                    let whole = [id.to_string(), format!("a of {id}"), format!("b of {id}")];
                    assert_eq!(row, whole.map(Some), "still:{id}");
                }
                looks += 1;
            }
            looks
        });
        let end = Raise(&done);
        s.resyncs();
        drop_slot(&s);
        s.said("the slot is gone", 0);
        s.converge();
        drop(end);
        reader.join().unwrap()
    });
    assert!(looks > 20, "{looks} looks");
    assert!(
        !s.m.redis.command::<bool>("EXISTS still:0"),
        "a key without a row"
    );
    s.finish(
        &[
            &POSTGRES_AWAY[..],
            &["the slot is gone", "replication slot * does not exist"],
        ]
        .concat(),
    );
}

/// At the address of the server another one answers, with tables of the same names: a mirror of the first, and a link to the second.
fn another_cluster(args: &[&str]) -> (Mirror, Proxy) {
    let mut m = Mirror::alone("");
    let table = "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')";
    m.sql(table);
    m.sql("INSERT INTO t SELECT i, 'canary of the first ' || i FROM generate_series(1, 1000) i");
    let link = Proxy::to_socket(m.db.pg.socket());
    let conninfo = format!(
        "host=127.0.0.1 port={} user=postgres dbname={}",
        link.port(),
        m.db.name
    );
    m.start_at(&conninfo, &m.redis.url(), args, &[]);
    m.settle();
    let second = m.db.namesake(Arc::new(Pg::start_another_cluster("")));
    second.sql(table);
    second.sql("INSERT INTO t SELECT i, 'canary of the second ' || i FROM generate_series(500, 2500) i");
    m.db = second;
    link.point_to_socket(m.db.pg.socket());
    link.cut();
    (m, link)
}

const ANOTHER_CLUSTER: &str = "Redis mirrors the cluster with system identifier";

#[test]
fn another_cluster_takes_its_place() {
    let (m, _link) = another_cluster(&[]);
    wait_for(DEADLINE, "the sink to notice", || {
        m.sink(|sink| sink.output().contains(ANOTHER_CLUSTER).then_some(()))
    });
    assert_eq!(m.settle().rows, 2001);
    m.sql("DELETE FROM t WHERE id % 2 = 0");
    m.check();
    // Everything was made anew once.
    let log = m.sink(|sink| sink.output());
    assert_eq!(log.matches("do not fit together: ").count(), 1, "{log}");
    m.check_logs(&[&POSTGRES_AWAY[..], &[ANOTHER_CLUSTER]].concat(), "canary");
}

#[test]
fn another_cluster_takes_its_place_and_no_resync_is_allowed() {
    let (m, _link) = another_cluster(&["--on-gap", "fail"]);
    let before = m.redis.dump();
    let status = m.sink(|sink| sink.wait(DEADLINE));
    let log = m.sink(|sink| sink.output());
    assert_eq!(status.code(), Some(6), "{log}");
    assert!(
        log.contains(ANOTHER_CLUSTER) && log.contains("--on-gap resync"),
        "{log}"
    );
    // Who waits for what is in this one waits, also where the other one has got further.
    let stands_at = |lsn: Lsn| {
        let _: i64 = m
            .redis
            .command(&format!("HSET walmirror:{{{}}}:progress lsn {lsn}", m.db.name));
    };
    let had = m.progress().unwrap();
    stands_at(Lsn(0xFF << 32));
    let (code, output) = m.run(&["wait", "--timeout", "300ms"]);
    assert_eq!(code, Some(7), "{output}");
    assert_eq!(
        output.matches("the cluster with system identifier").count(),
        2,
        "{output}"
    );
    stands_at(had);
    assert!(m.redis.dump() == before, "Redis was touched");
    assert_eq!(
        m.db.value("SELECT count(*) FROM pg_replication_slots"),
        "0",
        "a slot was made"
    );
}

/// Nobody reads for so long that Postgres drops the WAL: its disk is worth more than a resync.
#[test]
fn the_slot_is_invalidated() {
    let settings =
        "max_slot_wal_keep_size = 16MB\nmax_wal_size = 32MB\nmin_wal_size = 32MB\nwal_keep_size = 0";
    let mut s = Scenario::start("the_slot_is_invalidated", Setup::alone(settings));
    s.m.sink(Sink::kill);
    s.resyncs();
    wait_for(DEADLINE, "the slot to be lost", || {
        s.m.sql("CREATE TABLE IF NOT EXISTS waste (v text); INSERT INTO waste SELECT repeat('w', 1000) FROM generate_series(1, 10000); \
                 SELECT pg_switch_wal(); CHECKPOINT");
        (s.m.db.value("SELECT wal_status FROM pg_replication_slots") == "lost").then_some(())
    });
    s.m.sink(Sink::restart);
    s.said("has lost the WAL", 0);
    // Half of what the slot may keep is there soon.
    s.finish(&["has lost the WAL", "the slot keeps"]);
}

/// With the limit, a full disk never stops Postgres, however long nobody reads.
#[test]
fn no_space_for_wal() {
    let settings =
        "max_slot_wal_keep_size = 32MB\nmax_wal_size = 48MB\nmin_wal_size = 32MB\nwal_keep_size = 0";
    let pg = walmirror_tests::Pg::create(settings);
    let dir = Dir::new("wal");
    let Some(_full) = Tmpfs::mount(dir.path(), "192m") else {
        skipped("this user may not mount a tmpfs");
        return;
    };
    let (wal, owner) = (pg.data().join("pg_wal"), fs::metadata(pg.data()).unwrap());
    let moved = dir.path().join("pg_wal");
    let status = std::process::Command::new("mv")
        .arg(&wal)
        .arg(&moved)
        .status()
        .unwrap();
    assert!(status.success());
    std::os::unix::fs::chown(dir.path(), Some(owner.uid()), Some(owner.gid())).unwrap();
    std::os::unix::fs::symlink(&moved, &wal).unwrap();
    pg.resume();
    let setup = Setup {
        pg: std::sync::Arc::new(pg),
        ..Setup::default()
    };
    let mut s = Scenario::start("no_space_for_wal", setup);
    s.m.sink(Sink::kill);
    s.resyncs();
    s.m.sql("CREATE TABLE waste (v text)");
    // Three times what the file system holds. How fast WAL may be written and removed is between Postgres and the disk.
    for _ in 0..6 {
        for _ in 0..10 {
            s.m.sql(
                "INSERT INTO waste SELECT repeat('w', 1000) FROM generate_series(1, 9000); TRUNCATE waste",
            );
        }
        s.m.sql("CHECKPOINT");
    }
    let log = s.m.db.pg.log();
    assert!(!log.contains("PANIC") && !log.contains("No space left"), "{log}");
    s.m.sink(Sink::restart);
    s.finish(&["has lost the WAL", "the slot keeps"]);
}

/// The data directory is put back to an earlier state, slot and all: what Redis has is of a future that never was.
#[test]
fn put_back_to_an_earlier_state() {
    let mut s = Scenario::start("put_back_to_an_earlier_state", Setup::alone(""));
    s.load.rest();
    s.m.db.pg.stop(Signal::INT);
    let copy = s.m.db.pg.copy_data();
    s.m.db.pg.resume();
    s.m.db.reconnect();
    s.load.resume();
    s.flow();
    s.m.sql("INSERT INTO item SELECT i, i, 'of a future that never was' FROM generate_series(2000, 2100) i");
    s.reach();
    s.load.rest();
    s.resyncs();
    s.m.db.pg.stop(Signal::QUIT);
    s.m.db.pg.replace_data(&copy);
    s.m.db.pg.resume();
    s.m.db.reconnect();
    s.said("put back to an earlier state", 0);
    s.m.settle();
    s.finish(&[&POSTGRES_AWAY[..], &["put back to an earlier state"]].concat());
}

/// A standby that is behind is promoted. Before Postgres 17 it has no slot: a gap, and Redis follows the new primary.
#[test]
fn failover_to_a_standby() {
    let mut s = Scenario::start("failover_to_a_standby", Setup::alone("hot_standby = on"));
    let backup = s.m.db.pg.base_backup();
    // The standby never gets these.
    s.flow();
    s.load.rest();
    s.m.sql("UPDATE item SET n = n + 1000; DELETE FROM doc");
    s.reach();
    s.resyncs();
    s.m.db.pg.stop(Signal::KILL);
    s.m.db.pg.replace_data(&backup);
    s.m.db.pg.resume();
    s.m.db.reconnect();
    // The sink waits for the promotion.
    s.said("is a standby", 0);
    s.is_ready(false);
    s.m.sql("SELECT pg_promote()");
    s.said("every table is backfilled anew", 0);
    s.m.settle();
    s.finish(
        &[
            &POSTGRES_AWAY[..],
            &["is a standby", "every table is backfilled anew"],
        ]
        .concat(),
    );
}

/// Others write in another database: the slot of one where nothing happens keeps no WAL because of that.
#[test]
fn another_database_is_busy() {
    let s = Scenario::start("another_database_is_busy", Setup::alone(""));
    s.load.rest();
    s.reach();
    let mut other = s.m.db.pg.connect("postgres");
    other.batch_execute("CREATE TABLE waste (v text)").unwrap();
    let mut took = Vec::new();
    for _ in 0..5 {
        other
            .batch_execute(
                "INSERT INTO waste SELECT repeat('w', 1000) FROM generate_series(1, 10000); CHECKPOINT",
            )
            .unwrap();
        let target = s.m.db.lsn();
        let asked = Instant::now();
        wait_for(DEADLINE, format!("the slot to be confirmed to {target}"), || {
            (s.m.db.confirmed() >= target).then_some(())
        });
        took.push(asked.elapsed());
    }
    took.sort();
    // What Redis has counts two seconds later, and the server is asked twice a second.
    assert!(took[2] < Duration::from_secs(5), "{took:?}");
    let kept: i64 =
        s.m.db
            .value("SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots")
            .parse()
            .unwrap();
    assert!(kept < 40 << 20, "{kept} bytes of WAL are kept");
    s.finish(&[]);
}
