//! The torture of the gate: writers, readers with old snapshots, a sink that is killed, and a checker that looks at
//! Redis all the time. Never may a key hold a value that Postgres had already replaced at the stream position that
//! stands beside it.
//!
//! 60 seconds in CI; `TORTURE_SECONDS=3600 make test ARGS='--test torture'` for longer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use walmirror_tests::{Lsn, Mirror, rng, wait_for};

const KEYS: i32 = 100;
const WRITERS: u64 = 8;
const READERS: u64 = 8;

/// What was written to a key: the version, and a position by which it was certainly committed.
type Written = (i64, Lsn);

/// All writes, by key. Versions of one key rise in commit order, because writers of one key take a lock first.
#[derive(Default)]
struct History {
    by_key: Mutex<HashMap<i32, Vec<Written>>>,
}

impl History {
    fn note(&self, keys: &[i32], version: i64, by: Lsn) {
        let mut history = self.by_key.lock().unwrap();
        for &key in keys {
            history.entry(key).or_default().push((version, by));
        }
    }

    /// A write that had replaced `version` of a key before `position`.
    fn replaced(&self, key: i32, version: i64, position: Lsn) -> Option<Written> {
        let history = self.by_key.lock().unwrap();
        history
            .get(&key)?
            .iter()
            .copied()
            .find(|&(newer, by)| newer > version && by <= position)
    }
}

/// One write transaction; returns the keys it touched.
fn write(client: &mut Client, rng: &mut StdRng) -> Result<(Vec<i32>, i64), postgres::Error> {
    let mut keys = vec![rng.random_range(0..KEYS)];
    let what = rng.random_range(0..1000);
    if what < 100 {
        keys.push(rng.random_range(0..KEYS));
        keys.sort_unstable();
        keys.dedup();
    }
    if what == 999 {
        keys = (0..KEYS).collect();
    }
    let mut tx = client.transaction()?;
    for key in &keys {
        tx.execute("SELECT pg_advisory_xact_lock($1)", &[&i64::from(*key)])?;
    }
    let version: i64 = tx.query_one("SELECT nextval('versions')", &[])?.get(0);
    let key = keys[0];
    match what {
        999 => {
            tx.batch_execute("TRUNCATE hot")?;
        }
        0..100 if keys.len() == 2 => {
            tx.execute("DELETE FROM hot WHERE id = $1", &[&keys[1]])?;
            tx.execute(
                "UPDATE hot SET id = $2, version = $3 WHERE id = $1",
                &[&key, &keys[1], &version],
            )?;
        }
        100..250 => {
            tx.execute("DELETE FROM hot WHERE id = $1", &[&key])?;
        }
        250..300 => {
            // A subtransaction that is rolled back must leave no trace.
            tx.batch_execute("SAVEPOINT s")?;
            tx.execute(
                "UPDATE hot SET version = -1, pad = 'never' WHERE id = $1",
                &[&key],
            )?;
            tx.batch_execute("ROLLBACK TO s")?;
            tx.execute("UPDATE hot SET version = $2 WHERE id = $1", &[&key, &version])?;
        }
        _ => {
            tx.execute(
                "INSERT INTO hot VALUES ($1, $2, repeat('x', 50)) ON CONFLICT (id) DO UPDATE SET version = excluded.version",
                &[&key, &version],
            )?;
        }
    }
    if rng.random_bool(0.1) {
        // Holds the commit back, so that snapshots see it in progress.
        thread::sleep(Duration::from_millis(rng.random_range(1..20)));
    }
    tx.commit()?;
    Ok((keys, version))
}

/// One reading transaction; some hold an old snapshot and read late.
fn read(client: &mut Client, rng: &mut StdRng) -> Result<(), postgres::Error> {
    let isolation = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"][rng.random_range(0..3)];
    client.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}"))?;
    if rng.random_bool(0.5) {
        client.batch_execute("SELECT 1 FROM pg_class LIMIT 1")?;
        thread::sleep(Duration::from_millis(rng.random_range(0..100)));
    }
    for _ in 0..rng.random_range(1..6) {
        let key = rng.random_range(0..KEYS);
        match rng.random_range(0..3) {
            0 => client.batch_execute(&format!("SELECT * FROM hot WHERE id = {key}"))?,
            1 => client.batch_execute(&format!(
                "SELECT version FROM hot WHERE id BETWEEN {key} AND {key} + 9"
            ))?,
            _ => client.batch_execute(&format!(
                "SELECT a.pad FROM hot a JOIN hot b ON a.id = b.id WHERE a.id = {key}"
            ))?,
        }
    }
    client.batch_execute("COMMIT")
}

#[test]
fn no_select_ever_makes_the_cache_stale() {
    let seconds: u64 = std::env::var("TORTURE_SECONDS")
        .map_or(60, |text| text.parse().expect("TORTURE_SECONDS is a number"));
    let mut seeds = rng("torture");
    let m = Mirror::alone("max_connections = 100\nwalmirror.capture_interval = 20");
    m.sql(
        "CREATE SEQUENCE versions; CREATE TABLE hot (id int PRIMARY KEY, version bigint, pad text); \
         INSERT INTO hot SELECT i, 0, 'p' FROM generate_series(0, 99) i; SELECT walmirror.cache('hot')",
    );
    m.start();
    m.sync();
    let (history, stop, checks, hits) = (
        History::default(),
        AtomicBool::new(false),
        AtomicU64::new(0),
        AtomicU64::new(0),
    );
    let start = Instant::now();
    let running = || !stop.load(Ordering::Relaxed) && start.elapsed() < Duration::from_secs(seconds);
    thread::scope(|scope| {
        for number in 0..WRITERS {
            let mut rng = StdRng::seed_from_u64(seeds.random());
            let (m, history, running) = (&m, &history, &running);
            scope.spawn(move || {
                let mut client = m.db.connect();
                while running() {
                    match write(&mut client, &mut rng) {
                        Ok((keys, version)) => {
                            let by: String = client
                                .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
                                .unwrap()
                                .get(0);
                            history.note(&keys, version, by.parse().unwrap());
                        }
                        Err(error) => assert!(
                            error
                                .as_db_error()
                                .is_some_and(|error| error.code().code().starts_with("40")),
                            "writer {number}: {error}"
                        ),
                    }
                    thread::sleep(Duration::from_millis(rng.random_range(0..8)));
                }
            });
        }
        for number in 0..READERS {
            let mut rng = StdRng::seed_from_u64(seeds.random());
            let (m, running) = (&m, &running);
            scope.spawn(move || {
                let mut client = m.db.connect();
                while running() {
                    if let Err(error) = read(&mut client, &mut rng) {
                        assert!(
                            error
                                .as_db_error()
                                .is_some_and(|error| error.code().code().starts_with("40")),
                            "reader {number}: {error}"
                        );
                        client.batch_execute("ROLLBACK").unwrap();
                    }
                }
            });
        }
        let (m2, history2, stop2, running2, checks2, hits2) = (&m, &history, &stop, &running, &checks, &hits);
        let seed = seeds.random();
        scope.spawn(move || {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut redis = m2.redis.connect();
            let progress = format!("walmirror:{{{}}}:progress", m2.db.name);
            while running2() {
                let key = rng.random_range(0..KEYS);
                let (lsn, version): (Option<String>, Option<i64>) = redis::pipe()
                    .atomic()
                    .cmd("HGET").arg(&progress).arg("lsn")
                    .cmd("HGET").arg(format!("hot:{key}")).arg("version")
                    .query(&mut redis)
                    .unwrap();
                checks2.fetch_add(1, Ordering::Relaxed);
                if let (Some(lsn), Some(version)) = (lsn, version) {
                    hits2.fetch_add(1, Ordering::Relaxed);
                    let lsn: Lsn = lsn.parse().unwrap();
                    if let Some((newer, by)) = history2.replaced(key, version, lsn) {
                        stop2.store(true, Ordering::Relaxed);
                        panic!("stale: hot:{key} holds version {version} at {lsn}, but version {newer} was committed by {by}");
                    }
                }
            }
        });
        while running() {
            thread::sleep(Duration::from_millis(seeds.random_range(3000..9000)));
            m.sink(|sink| {
                sink.kill();
                sink.restart();
            });
        }
    });
    m.sync();
    let rows: HashMap<String, String> =
        m.db.rows("SELECT id, version FROM hot")
            .into_iter()
            .map(|row| {
                (
                    format!("hot:{}", row[0].clone().unwrap()),
                    row[1].clone().unwrap(),
                )
            })
            .collect();
    let mut redis = m.redis.connect();
    let keys = m.redis.keys();
    for key in &keys {
        let version: Option<String> = redis::cmd("HGET")
            .arg(key)
            .arg("version")
            .query(&mut redis)
            .unwrap();
        assert_eq!(version.as_ref(), rows.get(key), "{key}");
    }
    println!(
        "{} writes, {} looks at Redis of which {} found a key, {} keys at the end",
        history
            .by_key
            .lock()
            .unwrap()
            .values()
            .map(Vec::len)
            .sum::<usize>(),
        checks.load(Ordering::Relaxed),
        hits.load(Ordering::Relaxed),
        keys.len()
    );
    // A cache that is always empty would pass, and prove nothing.
    assert!(
        hits.load(Ordering::Relaxed) * 20 > checks.load(Ordering::Relaxed),
        "the cache was hardly ever filled"
    );
    // Now that all is quiet, whatever is read is cached.
    m.sql("INSERT INTO hot VALUES (0, nextval('versions'), 'end') ON CONFLICT DO NOTHING");
    let rows = m.db.rows("SELECT id FROM hot").len();
    let mut client = m.db.connect();
    client
        .batch_execute("SET walmirror.capture_interval = 0")
        .unwrap();
    wait_for(Duration::from_secs(30), "every row in the cache", || {
        client.batch_execute("SELECT * FROM hot").unwrap();
        m.sync();
        (m.redis.keys().len() == rows).then_some(())
    });
}
