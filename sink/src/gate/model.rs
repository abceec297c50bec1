//! A small model of Postgres and of a sink that uses a gate: transactions write, delete, truncate and commit; a commit is
//! in the WAL before snapshots see it; SQL reads a row in a snapshot and its marker enters the WAL later; the sink
//! applies the WAL late and restarts now and then. After every step each key must hold what the stream position says, or
//! something newer.
//!
//! A failure prints its seed; `WALMIRROR_GATE_SEED=<seed>` replays it alone.

#![allow(clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeMap;

use super::{Gate, Snapshot, Verdict};

const KEYS: u64 = 6;
const RELATION: u32 = 1;

/// What decides in the sink. The second implementation is wrong on purpose.
trait Rule {
    fn start(next_xid: u64) -> Self;
    fn changed(&mut self, key: u64, xid: u64, commit_lsn: u64);
    fn truncated(&mut self, xid: u64, commit_lsn: u64);
    fn admit(&self, key: u64, read: &Read) -> Verdict;
}

impl Rule for Gate {
    fn start(next_xid: u64) -> Self {
        // One bucket, so that evictions are common.
        Gate::new(0, next_xid, 0)
    }

    fn changed(&mut self, key: u64, xid: u64, _commit_lsn: u64) {
        self.record(key + 1, xid);
    }

    fn truncated(&mut self, xid: u64, _commit_lsn: u64) {
        self.record_truncate(RELATION, xid);
    }

    fn admit(&self, key: u64, read: &Read) -> Verdict {
        Gate::admit(self, RELATION, key + 1, &read.snapshot)
    }
}

/// What one would write without thinking of snapshots: a row is fresh if nothing that was applied to its key lies behind
/// the WAL position at which the row was read.
struct LsnRule {
    last: BTreeMap<u64, u64>,
    truncated: u64,
}

impl Rule for LsnRule {
    fn start(_next_xid: u64) -> Self {
        Self {
            last: BTreeMap::new(),
            truncated: 0,
        }
    }

    fn changed(&mut self, key: u64, _xid: u64, commit_lsn: u64) {
        self.last.insert(key, commit_lsn);
    }

    fn truncated(&mut self, _xid: u64, commit_lsn: u64) {
        self.truncated = commit_lsn;
    }

    fn admit(&self, key: u64, read: &Read) -> Verdict {
        let changed = self.last.get(&key).copied().unwrap_or(0).max(self.truncated);
        if changed <= read.lsn {
            Verdict::Admit
        } else {
            Verdict::Changed
        }
    }
}

/// A value is the number of its write, so that a higher one is newer; `present` is false for a deleted row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Version {
    write: u64,
    present: bool,
}

#[derive(Clone, Debug)]
struct Change {
    key: u64,
    version: Version,
}

/// A row read by SQL: all keys as the snapshot saw them, as a backfill chunk would bring them.
#[derive(Clone, Debug)]
struct Read {
    snapshot: Snapshot,
    /// The end of the WAL when it was read; only the wrong rule looks at it.
    lsn: u64,
    rows: BTreeMap<u64, Version>,
}

#[derive(Debug)]
enum Wal {
    Commit {
        xid: u64,
        changes: Vec<Change>,
        truncate: Option<u64>,
    },
    Marker(usize),
}

#[derive(Debug)]
struct Transaction {
    xid: u64,
    changes: Vec<Change>,
    truncate: bool,
    /// The commit record is written, but snapshots still show it as in progress.
    logged: bool,
}

#[derive(Default)]
struct Postgres {
    next_xid: u64,
    next_write: u64,
    open: Vec<Transaction>,
    /// The versions of every key in the order of their transactions' ends, with the xid that wrote them.
    history: BTreeMap<u64, Vec<(u64, Version)>>,
    latest_completed: u64,
    wal: Vec<Wal>,
    reads: Vec<Read>,
    unmarked: Vec<usize>,
}

impl Postgres {
    fn locked(&self, key: u64) -> bool {
        self.open
            .iter()
            .any(|t| t.truncate || t.changes.iter().any(|c| c.key == key))
    }

    fn write(&mut self, index: usize, key: u64, present: bool) {
        let mine = self.open[index].truncate || self.open[index].changes.iter().any(|c| c.key == key);
        if self.open[index].logged || (!mine && self.locked(key)) {
            return;
        }
        self.next_write += 1;
        let version = Version {
            write: self.next_write,
            present,
        };
        self.open[index].changes.push(Change { key, version });
    }

    fn truncate(&mut self, index: usize) {
        // TRUNCATE takes the table for itself: nobody else may have written and not ended.
        let alone = self
            .open
            .iter()
            .enumerate()
            .all(|(i, t)| i == index || (t.changes.is_empty() && !t.truncate));
        if self.open[index].logged || !alone {
            return;
        }
        self.open[index].truncate = true;
        for key in 0..KEYS {
            self.next_write += 1;
            let version = Version {
                write: self.next_write,
                present: false,
            };
            self.open[index].changes.push(Change { key, version });
        }
    }

    /// The commit record enters the WAL.
    fn log(&mut self, index: usize) {
        let transaction = &mut self.open[index];
        if transaction.logged {
            return;
        }
        transaction.logged = true;
        let truncate = transaction.truncate.then_some(transaction.xid);
        self.wal.push(Wal::Commit {
            xid: transaction.xid,
            changes: transaction.changes.clone(),
            truncate,
        });
    }

    /// Snapshots see it from now on, and its locks are gone.
    fn publish(&mut self, index: usize) {
        if !self.open[index].logged {
            return;
        }
        let transaction = self.open.remove(index);
        self.latest_completed = self.latest_completed.max(transaction.xid);
        for change in transaction.changes {
            self.history
                .entry(change.key)
                .or_default()
                .push((transaction.xid, change.version));
        }
    }

    fn read(&mut self) {
        let xmax = self.latest_completed + 1;
        let xip: Vec<u64> = self
            .open
            .iter()
            .map(|t| t.xid)
            .filter(|&xid| xid < xmax)
            .collect();
        let xmin = xip.iter().copied().min().unwrap_or(xmax);
        let snapshot = Snapshot::new(xmin, xmax, xip);
        let rows = (0..KEYS)
            .map(|key| {
                let seen = self
                    .history
                    .get(&key)
                    .and_then(|h| h.iter().rev().find(|(xid, _)| snapshot.sees(*xid)));
                (key, seen.map(|(_, version)| *version).unwrap_or_default())
            })
            .collect();
        self.unmarked.push(self.reads.len());
        self.reads.push(Read {
            snapshot,
            lsn: self.wal.len() as u64,
            rows,
        });
    }
}

struct Sink<R> {
    rule: R,
    position: usize,
    cache: BTreeMap<u64, Version>,
    /// Reads taken before this session are lost with the process that held them.
    first_read: usize,
    admitted: usize,
}

impl<R: Rule> Sink<R> {
    fn step(&mut self, postgres: &Postgres) -> Result<(), String> {
        let Some(record) = postgres.wal.get(self.position) else {
            return Ok(());
        };
        self.position += 1;
        match record {
            Wal::Commit {
                xid,
                changes,
                truncate,
            } => {
                if let Some(truncater) = truncate {
                    self.rule.truncated(*truncater, self.position as u64);
                }
                for change in changes {
                    // A truncate is known by its fence alone: no key is recorded for it.
                    if truncate.is_none() {
                        self.rule.changed(change.key, *xid, self.position as u64);
                    }
                    self.cache.insert(change.key, change.version);
                }
            }
            Wal::Marker(read) if *read >= self.first_read => {
                let read = &postgres.reads[*read];
                for (&key, &version) in &read.rows {
                    if self.rule.admit(key, read) == Verdict::Admit {
                        self.admitted += 1;
                        self.cache.insert(key, version);
                    }
                }
            }
            Wal::Marker(_) => {}
        }
        self.check(postgres)
    }

    fn check(&self, postgres: &Postgres) -> Result<(), String> {
        let mut expected: BTreeMap<u64, Version> = BTreeMap::new();
        for record in postgres.wal.iter().take(self.position) {
            if let Wal::Commit { changes, .. } = record {
                expected.extend(changes.iter().map(|c| (c.key, c.version)));
            }
        }
        for (key, version) in expected {
            let held = self.cache.get(&key).copied().unwrap_or_default();
            if held.write < version.write {
                return Err(format!(
                    "key {key} holds {held:?} at position {}, which says {version:?}",
                    self.position
                ));
            }
        }
        Ok(())
    }
}

/// A generator that is small, seedable and the same everywhere (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }
}

/// Runs one schedule; returns how many rows were admitted.
fn schedule<R: Rule>(seed: u64) -> Result<usize, String> {
    let mut dice = Dice(seed);
    let mut postgres = Postgres {
        next_xid: 100,
        latest_completed: 99,
        ..Postgres::default()
    };
    let mut sink = Sink {
        rule: R::start(100),
        position: 0,
        cache: BTreeMap::new(),
        first_read: 0,
        admitted: 0,
    };
    for _ in 0..200 {
        let transaction = (!postgres.open.is_empty()).then(|| dice.roll(postgres.open.len() as u64) as usize);
        match (dice.roll(20), transaction) {
            (0..=2, _) if postgres.open.len() < 4 => {
                let xid = postgres.next_xid;
                postgres.next_xid += 1;
                postgres.open.push(Transaction {
                    xid,
                    changes: Vec::new(),
                    truncate: false,
                    logged: false,
                });
            }
            (3..=7, Some(index)) => postgres.write(index, dice.roll(KEYS), dice.roll(5) > 0),
            (8, Some(index)) if dice.roll(3) == 0 => postgres.truncate(index),
            (9 | 10, Some(index)) => postgres.log(index),
            (11, Some(index)) => postgres.publish(index),
            (12 | 13, _) => postgres.read(),
            (14 | 15, _) if !postgres.unmarked.is_empty() => {
                let read = postgres.unmarked.remove(0);
                postgres.wal.push(Wal::Marker(read));
            }
            (16..=18, _) => sink.step(&postgres)?,
            (19, _) if dice.roll(6) == 0 => {
                // A restart: the gate forgets, and a freshly assigned xid is above all that was applied.
                sink.rule = R::start(postgres.next_xid);
                postgres.next_xid += 1;
                sink.first_read = postgres.reads.len();
            }
            _ => {}
        }
    }
    while !postgres.open.is_empty() {
        postgres.log(0);
        postgres.publish(0);
    }
    while sink.position < postgres.wal.len() {
        sink.step(&postgres)?;
    }
    Ok(sink.admitted)
}

#[test]
fn no_schedule_makes_a_key_older_than_the_stream() {
    if let Some(seed) = std::env::var("WALMIRROR_GATE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
    {
        println!("seed {seed}: {:?}", schedule::<Gate>(seed));
    }
    let mut admitted = 0;
    for seed in 0..5_000 {
        match schedule::<Gate>(seed) {
            Ok(rows) => admitted += rows,
            Err(why) => panic!("WALMIRROR_GATE_SEED={seed}: {why}"),
        }
    }
    // A gate that admits nothing would pass as well.
    assert!(admitted > 50_000, "{admitted} rows admitted");
}

#[test]
fn the_model_finds_the_fault_of_comparing_lsns() {
    let caught = (0..5_000)
        .filter(|&seed| schedule::<LsnRule>(seed).is_err())
        .count();
    assert!(caught > 10, "{caught} schedules caught it");
}
