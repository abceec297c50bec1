//! A model of Postgres: tables whose rows have versions, transactions with snapshots and row locks, labels, a WAL and a
//! slot. A commit is in the WAL before snapshots see it. `statements` is what a transaction can do in between.

mod statements;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use walmirror_proto::pb::{Kind, Mode, OnWrite, ValueKind};

use super::history::History;
use super::table::{Definition, Id, NARROW, NEXT, Row, TAKING};
use crate::gate::Snapshot;

pub(super) const IDS: Id = 7;
pub(super) const OIDS: [u32; 5] = [101, 102, 103, NARROW, NEXT];
/// What there is to pick of a definition.
pub(super) const CHOICES: u64 = 24 * TAKING.len() as u64;

/// What a transaction did, as the decoder sees it.
#[derive(Clone, Debug)]
pub(super) enum Record {
    Row {
        definition: Arc<Definition>,
        kind: Kind,
        row: Row,
        /// The big column is not in the WAL.
        unchanged: bool,
        old: Option<Id>,
    },
    Truncate(Arc<Definition>),
    Announce(Arc<Definition>, bool),
    /// The table, and whether its keys are kept.
    Forget(u32, bool),
}

#[derive(Clone, Debug)]
pub(super) enum Wal {
    Commit {
        xid: u64,
        lsn: u64,
        end: u64,
        /// When it committed. No two transactions ever have the same, not in a server that is put back either.
        time: u64,
        records: Vec<Record>,
    },
    Marker {
        lsn: u64,
        content: Vec<u8>,
    },
    Capture {
        lsn: u64,
        definition: Arc<Definition>,
        snapshot: Snapshot,
        rows: Vec<Row>,
    },
}

/// What a transaction did to the world, in order: rows by oid and id, and labels by oid.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    Row(u32, Id, Option<Row>),
    Label(u32, Option<Arc<Definition>>),
    /// The next label of the table to go leaves its keys.
    Keep(u32),
    /// Rows were changed without a record of them.
    Rewrite(u32),
}

#[derive(Clone, Debug)]
pub(super) struct Transaction {
    pub(super) xid: u64,
    records: Vec<Record>,
    effects: Vec<Effect>,
    rows: BTreeSet<(u32, Id)>,
    tables: BTreeSet<u32>,
    exclusive: BTreeSet<u32>,
    /// Tables that it labelled: others may write to them, but not label them.
    labelled: BTreeSet<u32>,
    /// The commit record is written, but snapshots still show it as in progress.
    pub(super) logged: bool,
}

impl Transaction {
    /// What it did so far.
    pub(super) fn records(&self) -> &[Record] {
        &self.records
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) confirmed: u64,
    /// What a crash of the server takes it back to.
    pub(super) persisted: u64,
    /// Whether standbys have it too.
    pub(super) failover: bool,
}

/// What writers made of something, each with its id; None: it is not there.
type Versions<T> = Vec<(u64, Option<T>)>;

#[derive(Clone, Debug)]
pub(super) struct Postgres {
    next_xid: u64,
    latest_completed: u64,
    pub(super) open: Vec<Transaction>,
    /// The versions of every row in the order of their writers, the uncommitted last.
    rows: BTreeMap<(u32, Id), Versions<Row>>,
    labels: BTreeMap<u32, Versions<Arc<Definition>>>,
    writes: u64,
    fingerprints: u64,
    clock: u64,
    /// How often it was put back, or a standby promoted.
    pub(super) incarnation: usize,
    /// Where the timelines before the one that it is on were left.
    left: Vec<u64>,
    /// Whether slots are made so that standbys have them.
    pub(super) failover: bool,
    pub(super) wal: Vec<Wal>,
    pub(super) end: u64,
    pub(super) history: History,
    pub(super) slot: Option<Slot>,
}

impl Postgres {
    pub(super) fn new() -> Self {
        Self {
            next_xid: 10,
            latest_completed: 9,
            open: Vec::new(),
            rows: BTreeMap::new(),
            labels: BTreeMap::new(),
            writes: 0,
            fingerprints: 0,
            clock: 0,
            incarnation: 0,
            left: Vec::new(),
            failover: true,
            wal: Vec::new(),
            end: 1000,
            history: History::default(),
            slot: None,
        }
    }

    /// Takes a transaction id and ends it at once, as a marker does.
    pub(super) fn burn_xid(&mut self) -> u64 {
        let xid = self.next_xid;
        self.next_xid += 1;
        self.latest_completed = self.latest_completed.max(xid);
        xid
    }

    /// Commits a transaction that forgets a table that there is not.
    pub(super) fn landmark(&mut self) {
        let index = self.begin();
        self.open[index].records.push(Record::Forget(0, false));
        self.commit(index);
        self.finish(index);
    }

    pub(super) fn begin(&mut self) -> usize {
        self.open.push(Transaction {
            xid: self.next_xid,
            records: Vec::new(),
            effects: Vec::new(),
            rows: BTreeSet::new(),
            tables: BTreeSet::new(),
            exclusive: BTreeSet::new(),
            labelled: BTreeSet::new(),
            logged: false,
        });
        self.next_xid += 1;
        self.open.len() - 1
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let xmax = self.latest_completed + 1;
        let xip: Vec<u64> = self
            .open
            .iter()
            .map(|open| open.xid)
            .filter(|xid| *xid < xmax)
            .collect();
        Snapshot::new(xip.iter().copied().min().unwrap_or(xmax), xmax, xip)
    }

    pub(super) fn oldest_running(&self) -> u64 {
        self.snapshot().xmin
    }

    /// What one would take for the snapshot who thinks that a commit in the WAL is a commit that everybody sees.
    pub(super) fn snapshot_by_lsn(&self) -> Snapshot {
        let xip: Vec<u64> = self
            .open
            .iter()
            .filter(|open| !open.logged)
            .map(|open| open.xid)
            .collect();
        Snapshot::new(0, self.next_xid, xip)
    }

    pub(super) fn row(&self, oid: u32, id: Id, snapshot: &Snapshot) -> Option<Row> {
        let versions = self.rows.get(&(oid, id))?;
        versions
            .iter()
            .rev()
            .find(|(xid, _)| snapshot.sees(*xid))
            .and_then(|(_, row)| row.clone())
    }

    pub(super) fn label(&self, oid: u32, snapshot: &Snapshot) -> Option<Arc<Definition>> {
        let versions = self.labels.get(&oid)?;
        versions
            .iter()
            .rev()
            .find(|(xid, _)| snapshot.sees(*xid))
            .and_then(|(_, label)| label.clone())
    }

    /// Whether SELECT would have to wait for DDL.
    pub(super) fn is_locked(&self, oid: u32) -> bool {
        self.open.iter().any(|open| open.exclusive.contains(&oid))
    }

    /// The first half of COMMIT: the record is in the WAL.
    pub(super) fn commit(&mut self, index: usize) {
        let open = &mut self.open[index];
        if open.logged {
            return;
        }
        open.logged = true;
        let (lsn, end) = (self.end, self.end + 8);
        self.end = end;
        self.clock += 1;
        let records = std::mem::take(&mut open.records);
        self.history.add(lsn, end, &open.effects);
        self.wal.push(Wal::Commit {
            xid: open.xid,
            lsn,
            end,
            time: self.clock,
            records,
        });
    }

    /// The second half: snapshots see it.
    pub(super) fn finish(&mut self, index: usize) {
        if self.open[index].logged {
            let open = self.open.remove(index);
            self.latest_completed = self.latest_completed.max(open.xid);
        }
    }

    pub(super) fn roll_back(&mut self, index: usize) {
        if !self.open[index].logged {
            let open = self.open.remove(index);
            self.rows
                .values_mut()
                .for_each(|versions| versions.retain(|(xid, _)| *xid != open.xid));
            self.labels
                .values_mut()
                .for_each(|versions| versions.retain(|(xid, _)| *xid != open.xid));
            self.latest_completed = self.latest_completed.max(open.xid);
        }
    }

    pub(super) fn end_all(&mut self) {
        while !self.open.is_empty() {
            self.commit(0);
            self.finish(0);
        }
    }

    /// The files as they are, started again: what has not committed is gone, and the slot is what the checkpoint says.
    pub(super) fn copy(&self) -> Self {
        let mut copy = self.clone();
        while let Some(open) = copy.open.first() {
            if open.logged {
                copy.finish(0);
            } else {
                copy.roll_back(0);
            }
        }
        if let Some(slot) = &mut copy.slot {
            slot.confirmed = slot.persisted;
        }
        copy
    }

    /// Puts such a copy back, and returns what was lost. Positions and transaction ids are used once more; values and times
    /// are not, so that the one history can be told from the other.
    pub(super) fn put_back(&mut self, copy: Self) -> Self {
        let lost = std::mem::replace(self, copy);
        (self.writes, self.fingerprints, self.clock) = (lost.writes, lost.fingerprints, lost.clock);
        self.incarnation = lost.incarnation + 1;
        self.write_up_to(self.end);
        lost
    }

    /// It was the standby of one that is gone.
    pub(super) fn promote(&mut self) {
        self.left.push(self.end);
    }

    pub(super) fn timeline(&self) -> u32 {
        self.left.len() as u32 + 1
    }

    /// Where this timeline was left; None: it is not that of an ancestor.
    pub(super) fn left(&self, timeline: u32) -> Option<u64> {
        self.left.get((timeline as usize).checked_sub(1)?).copied()
    }

    /// The history file of the timeline.
    pub(super) fn ancestors(&self) -> String {
        let left = self.left.iter().zip(1..);
        left.map(|(left, timeline)| format!("{timeline}\t{}\tpromoted\n", walmirror_proto::Lsn(*left)))
            .collect()
    }

    /// WAL of no interest, up to this position or a little more. What is written after the files were put back has positions of its own:
    /// that two histories come to the very same one is no matter of chance in 64 bits.
    pub(super) fn write_up_to(&mut self, position: u64) {
        let end = self.end.max(position);
        self.end = end + (self.incarnation as u64).wrapping_sub(end) % 8;
    }

    pub(super) fn message(&mut self, make: impl FnOnce(u64) -> Wal) {
        self.wal.push(make(self.end));
        self.end += 8;
    }

    /// `outrun` of the handshake; a landmark is smaller than this here.
    pub(super) fn outrun(&mut self, position: u64) {
        if (self.end..self.end + 64).contains(&position) {
            self.write_up_to(position + 8);
        }
    }

    /// A new slot: everything that runs has to end first.
    pub(super) fn create_slot(&mut self) -> u64 {
        self.end_all();
        self.history.begin_stream();
        self.slot = Some(Slot {
            confirmed: self.end,
            persisted: self.end,
            failover: self.failover,
        });
        self.end
    }
}

/// A definition of one of the tables; `choice` picks what there is to pick.
pub(super) fn definition(oid: u32, fingerprint: u64, choice: u64) -> Definition {
    let own = |letter, mode| (format!("{letter}{}:", choice % 2), mode);
    let (prefix, mode) = match oid {
        101 => own("a", Mode::Mirror),
        102 => own("b", Mode::Mirror),
        103 => own("c", Mode::Cache),
        NEXT => match choice / 24 % 4 {
            0 => own("c", Mode::Cache),
            1 => own("c", Mode::Mirror),
            2 => own("a", Mode::Cache),
            _ => own("a", Mode::Mirror),
        },
        _ => {
            let (prefix, mode) = TAKING[(choice / 24) as usize % TAKING.len()];
            (prefix.to_owned(), mode)
        }
    };
    Definition {
        oid,
        fingerprint,
        prefix,
        mode,
        value: [
            ValueKind::Hash,
            ValueKind::Json,
            ValueKind::Hash,
            ValueKind::String,
        ][(choice / 2 % 4) as usize],
        on_write: [OnWrite::Refresh, OnWrite::Populate, OnWrite::Invalidate][(choice / 8 % 3) as usize],
        renames: 0,
    }
}
