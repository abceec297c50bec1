//! The gate: decides whether a row that SQL read (backfill, capture, a read by key) may still be written, now that newer
//! commits may have been applied since. Called by the planner for every change (`record`) and every read row (`admit`).
//! Pure: no clock, no I/O. docs/gate.md has the rule, why it holds and its corner cases.
//!
//! INVARIANT I10: a row is admitted only if no transaction applied so far that changed its key (or truncated its table)
//! is invisible to the snapshot that the row was read in.

mod evicted;
#[cfg(test)]
mod model;
mod snapshot;
mod table;

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use evicted::Evicted;
pub use snapshot::{ParseSnapshotError, Snapshot};
use table::ChangerTable;

/// What the gate says about a row that was read in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing newer was applied: write it.
    Admit,
    /// A change that the snapshot does not see was applied: what that change wrote stands.
    Changed,
    /// The gate no longer knows whether such a change was applied: read the row again in a newer snapshot.
    Forgotten,
}

/// The last changers of recently changed keys, in fixed memory.
#[derive(Debug)]
pub struct Gate {
    changers: ChangerTable,
    /// Relation oid -> the last transaction that truncated it.
    truncations: HashMap<u32, u64>,
    /// Makes the hash differ from run to run, so that no data can be made to collide.
    seed: u64,
}

impl Gate {
    /// A gate whose table takes about `memory_bytes`, and what tells what it has forgotten as many. Every transaction applied before it existed (by an earlier session)
    /// must have an id below `horizon`: the planner takes a freshly assigned xid, which is above all of them, while a
    /// snapshot's xmax may be below one that is committed in the WAL and still in progress for snapshots.
    pub fn new(memory_bytes: usize, horizon: u64, seed: u64) -> Self {
        Self {
            changers: ChangerTable::new(memory_bytes, horizon),
            truncations: HashMap::new(),
            seed,
        }
    }

    /// The hash that `record` and `admit` know a key by.
    #[inline]
    pub fn hash(&self, key: &[u8]) -> u64 {
        xxh3_64_with_seed(key, self.seed)
    }

    /// A change of this key by this top-level transaction was applied (or is in the batch being built).
    #[inline]
    pub fn record(&mut self, key_hash: u64, xid: u64) {
        self.changers.set(key_hash, xid);
    }

    /// Every row of the relation was removed by this transaction, or may have been changed by it without a record of any.
    pub fn record_truncate(&mut self, relation: u32, xid: u64) {
        self.truncations.insert(relation, xid);
    }

    /// The relation was dropped or is no longer mirrored. If it comes back, its backfill starts from a snapshot that sees
    /// everything from before, so the fence may go.
    pub fn forget_relation(&mut self, relation: u32) {
        self.truncations.remove(&relation);
    }

    /// Whether a row of `relation` with this key, read in `snapshot`, may be written at this point of the stream.
    pub fn admit(&self, relation: u32, key_hash: u64, snapshot: &Snapshot) -> Verdict {
        if self.is_truncated(relation, snapshot) {
            return Verdict::Changed;
        }
        match self.changers.get(key_hash) {
            // Writers of one row wait for each other, so a snapshot that sees the last one sees all before it.
            Some(xid) if snapshot.sees(xid) => Verdict::Admit,
            Some(_) => Verdict::Changed,
            None if self.may_have_forgotten(snapshot) => Verdict::Forgotten,
            None => Verdict::Admit,
        }
    }

    /// Whether the relation was truncated, or may have been changed without a record, by a transaction that the snapshot does not see.
    pub fn is_truncated(&self, relation: u32, snapshot: &Snapshot) -> bool {
        let truncation = self.truncations.get(&relation);
        truncation.is_some_and(|&xid| !snapshot.sees(xid))
    }

    /// The last transaction that changed this key, if the gate remembers it.
    pub fn changer(&self, key_hash: u64) -> Option<u64> {
        self.changers.get(key_hash)
    }

    /// Whether the gate remembers who truncated the relation, or changed it without a record.
    pub fn knows_truncation(&self, relation: u32) -> bool {
        self.truncations.contains_key(&relation)
    }

    /// Whether keys that the gate does not remember would be refused in this snapshot.
    pub fn may_have_forgotten(&self, snapshot: &Snapshot) -> bool {
        self.changers.evicted().hidden_from(snapshot).is_some()
    }

    /// The transactions that it has forgotten, all of them: for readers, who need not bother to read in a snapshot that misses one.
    pub fn forgotten(&self) -> Arc<Evicted> {
        Arc::clone(self.changers.evicted())
    }

    /// What the gate has forgotten is below this id. Only ever rises.
    pub fn horizon(&self) -> u64 {
        self.changers.evicted().horizon()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn gate() -> Gate {
        Gate::new(1 << 12, 100, 7)
    }

    fn snapshot(text: &str) -> Snapshot {
        text.parse().unwrap()
    }

    #[test]
    fn an_unchanged_key_is_admitted_from_a_snapshot_above_the_horizon() {
        assert_eq!(gate().admit(1, 5, &snapshot("100:100:")), Verdict::Admit);
        assert_eq!(gate().admit(1, 5, &snapshot("90:99:")), Verdict::Forgotten);
    }

    #[test]
    fn a_low_xmin_alone_does_not_make_a_snapshot_forgotten() {
        // xmin below the horizon with nothing in progress below it cannot be, but the rule must not lean on xmin.
        assert_eq!(gate().admit(1, 5, &snapshot("50:120:110")), Verdict::Admit);
        assert_eq!(gate().admit(1, 5, &snapshot("50:120:50")), Verdict::Forgotten);
    }

    #[test]
    fn a_changer_decides_by_visibility() {
        let mut gate = gate();
        gate.record(5, 110);
        assert_eq!(gate.admit(1, 5, &snapshot("110:110:")), Verdict::Changed);
        assert_eq!(gate.admit(1, 5, &snapshot("110:112:110")), Verdict::Changed);
        assert_eq!(gate.admit(1, 5, &snapshot("111:111:")), Verdict::Admit);
    }

    #[test]
    fn a_known_changer_needs_no_horizon() {
        let mut gate = gate();
        gate.record(5, 110);
        assert_eq!(gate.admit(1, 5, &snapshot("60:120:60")), Verdict::Admit);
    }

    #[test]
    fn a_truncation_shuts_out_rows_of_its_relation_only() {
        let mut gate = gate();
        gate.record_truncate(1, 110);
        assert_eq!(gate.admit(1, 5, &snapshot("110:110:")), Verdict::Changed);
        assert_eq!(gate.admit(2, 5, &snapshot("110:110:")), Verdict::Admit);
        assert_eq!(gate.admit(1, 5, &snapshot("111:111:")), Verdict::Admit);
        gate.forget_relation(1);
        assert_eq!(gate.admit(1, 5, &snapshot("110:110:")), Verdict::Admit);
    }

    #[test]
    fn who_still_runs_has_changed_nothing_that_was_forgotten() {
        let mut gate = Gate::new(1 << 10, 100, 7);
        // 150 and 151 run all the time, and 151 is applied at last.
        for key in 0..1_000u64 {
            gate.record(gate.hash(&key.to_le_bytes()), 200 + key);
        }
        assert_eq!(gate.admit(1, 5, &snapshot("150:1200:150,151")), Verdict::Admit);
        gate.record(gate.hash(b"of 151"), 151);
        gate.record(gate.hash(b"of 151"), 1_200);
        assert_eq!(gate.admit(1, 5, &snapshot("150:1201:150,151")), Verdict::Admit);
        for key in 0..1_000u64 {
            gate.record(gate.hash(&key.to_le_bytes()), 151);
        }
        assert_eq!(gate.admit(1, 5, &snapshot("150:1201:150")), Verdict::Admit);
        assert_eq!(
            gate.admit(1, 5, &snapshot("150:1201:150,151")),
            Verdict::Forgotten
        );
        assert_eq!(gate.admit(1, 5, &snapshot("99:1201:99")), Verdict::Forgotten);
    }

    /// Readers ask before they read, and get the answer that a key which the gate does not know would get.
    #[test]
    fn readers_see_what_is_forgotten() {
        let mut gate = Gate::new(1 << 10, 100, 7);
        let forgotten = gate.forgotten();
        for text in ["99:99:", "99:120:99", "110:110:", "110:1000:110"] {
            let hidden = text.starts_with("99").then_some(99);
            assert_eq!(forgotten.hidden_from(&snapshot(text)), hidden, "{text}");
        }
        for key in 0..1_000u64 {
            gate.record(gate.hash(&key.to_le_bytes()), 110);
        }
        for (text, hidden) in [
            ("99:1201:99", Some(99)),
            ("110:110:", Some(110)),
            ("105:1000:105,110", Some(110)),
            ("120:1000:120", None),
        ] {
            assert_eq!(forgotten.hidden_from(&snapshot(text)), hidden, "{text}");
        }
    }

    #[test]
    fn what_is_evicted_raises_the_horizon() {
        let mut gate = Gate::new(0, 100, 7);
        for key in 0..1_000u64 {
            gate.record(gate.hash(&key.to_le_bytes()), 200 + key);
        }
        assert!(gate.horizon() > 1_000, "{}", gate.horizon());
        assert_eq!(gate.admit(1, 5, &snapshot("300:300:")), Verdict::Forgotten);
        assert_eq!(gate.admit(1, 5, &snapshot("1200:1200:")), Verdict::Admit);
    }
}
