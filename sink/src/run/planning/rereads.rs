//! Changes of the keys that are being read again. A row that changes more often than its marker takes to come down the stream is
//! never what was read, whenever it is read; so what changes while it is read is kept, and written behind it.
//!
//! INVARIANT I10 holds for what comes of both: whoever changed the key is seen by the snapshot, or is among what is written behind.

use std::collections::HashMap;

use walmirror_proto::pb::{Kind, Mode};
use walmirror_proto::row::TupleRef;

use super::Planning;
use crate::backfill::Chunk;
use crate::gate::Gate;
use crate::plan::{Change, Mapping, Planner};

/// What is kept takes at most about so much memory.
const BYTES_MAX: usize = 4 << 20;
/// What a key takes besides its changes, about.
const KEY_BYTES: usize = 128;
/// Most changes stand for those before them: as many as a key needs where each leaves other columns alone.
const CHANGES_MAX: usize = 16;

/// The keys that are being read again, by their hashes.
#[derive(Debug, Default)]
pub(super) struct Rereads {
    keys: HashMap<u64, Reread>,
    bytes: usize,
}

/// A key, and what came of it since it was said to be read.
#[derive(Debug)]
struct Reread {
    /// Another key may have the same hash.
    key: Vec<u8>,
    relation: u32,
    fingerprint: u64,
    /// Who had changed it last by then, if the gate knew.
    before: Option<u64>,
    /// Tuples, in order.
    changes: Vec<Vec<u8>>,
}

impl Rereads {
    fn add(&mut self, hash: u64, reread: Reread) {
        self.forget(hash);
        if self.take_room(KEY_BYTES + reread.key.len()) {
            self.keys.insert(hash, reread);
        }
    }

    /// It is not read any more.
    fn forget(&mut self, hash: u64) -> Option<Reread> {
        let reread = self.keys.remove(&hash)?;
        let changes = reread.changes.iter().map(Vec::len).sum::<usize>();
        self.bytes = self.bytes.saturating_sub(KEY_BYTES + reread.key.len() + changes);
        Some(reread)
    }

    /// Where there is no room, nothing is kept any more: what changes is read once more.
    fn take_room(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        if self.bytes > BYTES_MAX {
            *self = Self::default();
            return false;
        }
        true
    }

    /// The usual case: nothing is read again.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// As if the keys that are read again had the hashes of others.
    #[cfg(test)]
    pub(super) fn collide(&mut self) {
        for reread in self.keys.values_mut() {
            reread.key.push(b'!');
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// A change that was planned: its keys are those that the planner rendered last.
    #[cold]
    pub(super) fn note(
        &mut self,
        gate: &Gate,
        planner: &Planner,
        mapping: &Mapping,
        change: &Change<'_>,
        is_written: bool,
    ) {
        if change.old_key.is_some() {
            self.forget(gate.hash(planner.old_key()));
        }
        let hash = gate.hash(planner.key());
        let Some(reread) = self.keys.get_mut(&hash) else {
            return;
        };
        let fits = is_written
            && reread.key == planner.key()
            && change.kind != Kind::Delete
            && change.old_key.is_none()
            && (reread.relation, reread.fingerprint) == (mapping.oid, mapping.fingerprint);
        let freed = fits.then(|| reread.replace(&change.tuple)).flatten();
        let Some(freed) = freed else {
            self.forget(hash);
            return;
        };
        self.bytes = self.bytes.saturating_sub(freed);
        let tuple = change.tuple.as_bytes();
        if self.take_room(tuple.len())
            && let Some(reread) = self.keys.get_mut(&hash)
        {
            reread.changes.push(tuple.to_vec());
        }
    }
}

impl Reread {
    /// Makes room for a change: lets go those that it stands for, of so many bytes. None: there are too many.
    fn replace(&mut self, tuple: &TupleRef<'_>) -> Option<usize> {
        let mut freed = 0;
        self.changes.retain(|earlier| {
            let stays = TupleRef::parse(earlier).is_ok_and(|earlier| !tuple.stands_for(&earlier));
            freed += if stays { 0 } else { earlier.len() };
            stays
        });
        (self.changes.len() < CHANGES_MAX).then_some(freed)
    }
}

impl Planning {
    /// These keys are about to be read again.
    pub(crate) fn reread(&mut self, relation: u32, keys: &[Vec<u8>]) {
        let Some(registered) = self.registry.get(relation) else {
            return;
        };
        let fingerprint = registered.mapping.fingerprint;
        for key in keys {
            let hash = self.gate.hash(key);
            let reread = Reread {
                key: key.clone(),
                relation,
                fingerprint,
                before: self.gate.changer(hash),
                changes: Vec::new(),
            };
            self.rereads.add(hash, reread);
        }
    }

    /// None of those is being read any more.
    pub(crate) fn reread_over(&mut self) {
        self.rereads = Rereads::default();
    }

    /// Takes what has changed since the row was read whose key the planner rendered last, if that is known: whoever had changed it before
    /// is seen by the snapshot, and whoever has changed it since is among them. Those of them that the snapshot sees too write once more
    /// what was read.
    pub(super) fn changes_since(
        &mut self,
        chunk: &Chunk,
        mapping: &Mapping,
        hash: u64,
    ) -> Option<Vec<Vec<u8>>> {
        let reread = self.rereads.forget(hash)?;
        let snapshot = &chunk.snapshot;
        let sees_all_before = match reread.before {
            Some(xid) => snapshot.sees(xid),
            None => !self.gate.may_have_forgotten(snapshot),
        };
        let horizon = self.registry.get(chunk.relation)?.horizon();
        let is_known = reread.key == self.planner.key()
            && sees_all_before
            && (reread.relation, reread.fingerprint) == (chunk.relation, mapping.fingerprint)
            && mapping.mode == Mode::Mirror
            && !snapshot.may_miss_below(horizon)
            && !self.gate.is_truncated(chunk.relation, snapshot);
        is_known.then_some(reread.changes)
    }
}
