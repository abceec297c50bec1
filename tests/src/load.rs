//! The load of the fault tests: writers that go on whatever happens to the server, transfers between accounts whose sum
//! never changes, and a word in every row that must never be seen in a log.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use postgres::error::SqlState;
use postgres::{Client, NoTls};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::{DEADLINE, wait_for};

/// Accounts, and what all of them hold together.
pub const ACCOUNTS: i32 = 20;
/// See [`ACCOUNTS`].
pub const SUM: i64 = ACCOUNTS as i64 * 1000;
/// Item ids are below this.
const ITEMS: i32 = 300;
/// Rows of `item` and of `seen` up to this id are neither deleted nor moved, and their `n` only ever grows.
pub const COUNTED: i32 = 20;
/// The most rows that a transaction changes: those of `scratch` that are there before and after it is emptied, or of `seen`.
pub const ROWS_MAX: usize = 6;
/// The kind of transactions that are prepared, and end later.
const PREPARED: usize = 11;
/// Kinds of transactions.
const KINDS: usize = 12;
/// After so many transactions each kind was among those that were committed; the rarest is one of eighty.
const ENOUGH: u64 = 1000;
/// What a fault, or another writer, does to a statement: deadlocks and serialisation, a key that is taken, a prepared transaction that
/// a server has again whose files were put back, a lock that is not to be had, a server that ends or begins, a lost connection, a database
/// that is not there yet, a standby, no room.
const EXPECTED: [&str; 14] = [
    "42710", "40P01", "40001", "23505", "55P03", "57P01", "57P02", "57P03", "57P05", "08", "3D000", "25006",
    "53", "58030",
];

/// The tables of the load. `word` is in every note; statements of the writers never spell it, because Postgres logs those
/// that fail.
pub fn tables(word: &str) -> String {
    format!(
        "CREATE TABLE secret (word text); INSERT INTO secret VALUES ('{word}'); \
         CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL); \
         CREATE TABLE item (id int PRIMARY KEY, n int NOT NULL, note text, big text); \
         ALTER TABLE item ALTER big SET STORAGE EXTERNAL; \
         CREATE TABLE doc (owner int, part int, body text, PRIMARY KEY (owner, part)); \
         CREATE TABLE marker (id int PRIMARY KEY, note text); \
         CREATE TABLE scratch (id int PRIMARY KEY, note text); \
         CREATE TABLE seen (id int PRIMARY KEY, n int NOT NULL, note text, big text); \
         ALTER TABLE seen ALTER big SET STORAGE EXTERNAL; \
         CREATE TABLE hot (owner int, part text, n int NOT NULL, PRIMARY KEY (owner, part)); \
         DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET walmirror.capture_interval = 0', current_database()); END $$; \
         INSERT INTO account SELECT i, 1000 FROM generate_series(0, {ACCOUNTS} - 1) i; \
         INSERT INTO item SELECT i, 0, word, repeat(word, 300) FROM generate_series(1, 100) i, secret; \
         INSERT INTO doc SELECT i, 1, word FROM generate_series(1, 50) i, secret; \
         SELECT walmirror.mirror('account'), walmirror.mirror('item'), walmirror.mirror('marker'), walmirror.mirror('scratch'), \
                walmirror.mirror('doc', value => 'json', ttl => '1 day'), walmirror.cache('seen'), \
                walmirror.cache('hot', key => 'hot:{{part}}:{{owner}}', value => 'json', on_write => 'populate', ttl => '2 s')"
    )
}

/// Running writers.
pub struct Load {
    stop: Arc<AtomicBool>,
    paused: Arc<AtomicBool>,
    /// Writers that may be in a transaction.
    busy: Arc<AtomicUsize>,
    committed: Arc<[AtomicU64; KINDS]>,
    /// Errors that no fault explains.
    unexpected: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts so many writers, each of which rests for `pause` after a transaction.
    pub fn start(config: &postgres::Config, rng: &mut StdRng, writers: usize, pause: Duration) -> Load {
        let (stop, paused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let busy = Arc::new(AtomicUsize::new(0));
        let committed = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
        let unexpected = Arc::new(Mutex::new(Vec::new()));
        let threads = (0..writers)
            .map(|writer| {
                let (config, mut rng) = (config.clone(), StdRng::seed_from_u64(rng.random()));
                let (stop, paused, busy) = (Arc::clone(&stop), Arc::clone(&paused), Arc::clone(&busy));
                let committed: Arc<[AtomicU64; KINDS]> = Arc::clone(&committed);
                let unexpected = Arc::clone(&unexpected);
                thread::spawn(move || {
                    let mut client: Option<Client> = None;
                    // How the prepared transaction that there may be is to end. Until then the writer is busy.
                    let mut prepared: Option<String> = None;
                    while !stop.load(Ordering::Acquire) || prepared.is_some() {
                        let Some(open) = client.as_mut().filter(|client| !client.is_closed()) else {
                            client = config.connect(NoTls).ok();
                            thread::sleep(Duration::from_millis(20));
                            continue;
                        };
                        let mut run = |kind: usize, sql: &str| match open.batch_execute(sql) {
                            Ok(()) => {
                                committed[kind].fetch_add(1, Ordering::AcqRel);
                                true
                            }
                            Err(error) => {
                                let is_gone =
                                    kind == PREPARED && error.code() == Some(&SqlState::UNDEFINED_OBJECT);
                                if !is_gone && !is_expected(&error) {
                                    let mut all = unexpected.lock().unwrap_or_else(|e| e.into_inner());
                                    all.push(format!("{sql}: {error:?}"));
                                }
                                let _ = open.batch_execute("ROLLBACK");
                                is_gone
                            }
                        };
                        if let Some(end) = &prepared {
                            if run(PREPARED, end) {
                                prepared = None;
                                busy.fetch_sub(1, Ordering::SeqCst);
                            }
                            continue;
                        }
                        // First this and then a look at `paused`: who pauses does it the other way round.
                        busy.fetch_add(1, Ordering::SeqCst);
                        let rests = paused.load(Ordering::SeqCst);
                        if !rests {
                            let (kind, sql) = transaction(&mut rng);
                            if kind == PREPARED {
                                // Also where nobody says that it worked. The name is the whole server's, which tests share.
                                let (name, end) = (
                                    format!("{} writer {writer}", config.get_dbname().unwrap_or_default()),
                                    ["COMMIT", "ROLLBACK"][rng.random_range(0..2)],
                                );
                                prepared = Some(format!("{end} PREPARED '{name}'"));
                                run(kind, &format!("{sql}; PREPARE TRANSACTION '{name}'"));
                                continue;
                            }
                            run(kind, &sql);
                        }
                        busy.fetch_sub(1, Ordering::SeqCst);
                        thread::sleep(if rests { Duration::from_millis(5) } else { pause });
                    }
                })
            })
            .collect();
        Load {
            stop,
            paused,
            busy,
            committed,
            unexpected,
            threads,
        }
    }

    /// Transactions that were committed for certain.
    pub fn committed(&self) -> u64 {
        self.committed
            .iter()
            .map(|kind| kind.load(Ordering::Acquire))
            .sum()
    }

    /// Lets the writers go on.
    pub fn resume(&self) {
        self.paused.store(false, Ordering::SeqCst);
    }

    /// Lets the writers rest, and waits until none is in a transaction.
    #[track_caller]
    pub fn rest(&self) {
        self.paused.store(true, Ordering::SeqCst);
        wait_for(DEADLINE, "the writers to rest", || {
            (self.busy.load(Ordering::SeqCst) == 0).then_some(())
        });
        let unexpected = self.unexpected.lock().unwrap_or_else(|e| e.into_inner());
        assert!(unexpected.is_empty(), "{}", unexpected.join("\n"));
    }

    /// Ends the writers, who have done everything that they can do.
    #[track_caller]
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.join().expect("a writer");
        }
        self.rest();
        let missing = self
            .committed
            .iter()
            .position(|kind| kind.load(Ordering::Acquire) == 0);
        if self.committed() >= ENOUGH {
            assert_eq!(missing, None, "no transaction of this kind was ever committed");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// Whether a fault or another writer explains it. An error that did not come from the server is of the connection.
fn is_expected(error: &postgres::Error) -> bool {
    error.is_closed()
        || error
            .code()
            .is_none_or(|state| EXPECTED.iter().any(|expected| state.code().starts_with(expected)))
}

/// What to do next, and of which kind it is.
fn transaction(rng: &mut StdRng) -> (usize, String) {
    let id = rng.random_range(1..ITEMS);
    match rng.random_range(0..80) {
        0..24 => (0, transfer(rng)),
        24..36 => (
            1,
            format!("UPDATE item SET n = n + 1 WHERE id IN ({id}, {})", id / 2),
        ),
        36..42 => (
            2,
            format!(
                "UPDATE item SET n = n + 1, note = word || n, big = repeat(word || n, {}) FROM secret WHERE id = {id}",
                rng.random_range(1..400)
            ),
        ),
        42..47 => (
            3,
            format!(
                "INSERT INTO item SELECT {id}, 0, word, repeat(word, 250) FROM secret ON CONFLICT DO NOTHING"
            ),
        ),
        47..50 => (4, format!("DELETE FROM item WHERE id = {id} AND id > {COUNTED}")),
        50..53 => (
            5,
            format!(
                "UPDATE item SET id = {} WHERE id = {id} AND id > {COUNTED} AND NOT EXISTS (SELECT FROM item WHERE id = {})",
                id + ITEMS,
                id + ITEMS
            ),
        ),
        53..56 => (
            6,
            format!(
                "BEGIN; SAVEPOINT a; UPDATE item SET note = 'never' WHERE id = {id}; ROLLBACK TO a; \
             DELETE FROM item WHERE id = {} + {ITEMS}; COMMIT",
                id / 2
            ),
        ),
        56..59 => (
            7,
            format!(
                "INSERT INTO doc SELECT {}, {}, word FROM secret ON CONFLICT (owner, part) DO UPDATE SET body = excluded.body || doc.part",
                id % 60,
                id % 4
            ),
        ),
        59..67 => (9, look(rng)),
        67..75 => (10, cached(rng, id)),
        75..79 => (
            PREPARED,
            format!(
                "{}; UPDATE item SET n = n + 1 WHERE id = {id}; UPDATE seen SET n = n + 1 WHERE id = {id}",
                transfer(rng).trim_end_matches("; COMMIT")
            ),
        ),
        // A table that is emptied, with rows of the same transaction before and after.
        _ => (
            8,
            format!(
                "BEGIN; INSERT INTO scratch SELECT -1, word FROM secret ON CONFLICT DO NOTHING; TRUNCATE scratch; \
             INSERT INTO scratch SELECT {id} + i, word FROM secret, generate_series(1, 5) i; COMMIT"
            ),
        ),
    }
}

/// What brings rows of caches into Redis.
fn look(rng: &mut StdRng) -> String {
    let id = rng.random_range(1..ITEMS);
    match rng.random_range(0..4) {
        0 => format!("SELECT n FROM seen WHERE id = {id}"),
        1 => format!(
            "SELECT count(note) FROM seen WHERE id BETWEEN {id} AND {} AND n >= 0",
            id + 20
        ),
        2 => format!(
            "SELECT s.n, h.n FROM seen s JOIN hot h ON h.owner = s.id % 10 WHERE s.id > {id} AND s.note IS NOT NULL"
        ),
        _ => format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT n FROM hot WHERE owner = {}; SELECT pg_sleep(0.01); \
             SELECT n FROM hot WHERE n >= 0; SELECT n FROM seen WHERE n >= 0 LIMIT 30; COMMIT",
            id % 10
        ),
    }
}

/// A write to a cache.
fn cached(rng: &mut StdRng, id: i32) -> String {
    let (owner, part) = (id % 10, ["", "a:b", "%", "c"][rng.random_range(0..4)]);
    match rng.random_range(0..8) {
        0 => format!(
            "INSERT INTO seen SELECT {id}, 0, word, repeat(word, 250) FROM secret ON CONFLICT DO NOTHING"
        ),
        1 => format!("UPDATE seen SET n = n + 1 WHERE id BETWEEN {id} AND {}", id + 5),
        2 => format!(
            "UPDATE seen SET note = word || n, big = repeat(word || n, 200) FROM secret WHERE id = {id}"
        ),
        3 => format!("DELETE FROM seen WHERE id = {id} AND id > {COUNTED}"),
        4 => format!(
            "UPDATE seen SET id = {id} + {ITEMS} WHERE id = {id} AND id > {COUNTED} \
             AND NOT EXISTS (SELECT FROM seen WHERE id = {id} + {ITEMS})"
        ),
        5 => format!(
            "BEGIN; UPDATE hot SET n = -1 WHERE owner = {owner}; ROLLBACK; DELETE FROM hot WHERE owner = {owner} AND part = '{part}'"
        ),
        6 => format!("UPDATE hot SET n = n + 1 WHERE owner = {owner}"),
        _ => format!(
            "INSERT INTO hot VALUES ({owner}, '{part}', 0) ON CONFLICT (owner, part) DO UPDATE SET n = hot.n + 1"
        ),
    }
}

fn transfer(rng: &mut StdRng) -> String {
    let from = rng.random_range(0..ACCOUNTS);
    let to = (from + rng.random_range(1..ACCOUNTS)) % ACCOUNTS;
    let amount = rng.random_range(1..50) * if from < to { 1 } else { -1 };
    let (first, second) = (from.min(to), from.max(to));
    format!(
        "BEGIN; UPDATE account SET balance = balance - {amount} WHERE id = {first}; \
         UPDATE account SET balance = balance + {amount} WHERE id = {second}; COMMIT"
    )
}
