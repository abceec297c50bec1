//! Chunks on their way through the gate: held until their marker comes, then planned piece by piece between transactions,
//! so that the stream never waits for a backfill for long.

use std::collections::{HashMap, VecDeque};

use walmirror_proto::pb::Mode;
use walmirror_proto::row::TupleRef;

use super::super::metrics::add;
use super::Planning;
use crate::backfill::{Chunk, Content, Life};
use crate::error::{Error, Source};
use crate::gate::Verdict;
use crate::plan::{Belongs, Keyed, Owned, RedisKeys, Trust};
use crate::rejected::Rejected;

/// Bytes of commands that one piece adds to a batch, about.
const PIECE_BYTES: usize = 128 * 1024;

/// Chunks that wait.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    /// For their marker.
    held: HashMap<u64, Chunk>,
    /// To be planned, the first from this item on.
    ready: VecDeque<Chunk>,
    position: usize,
}

impl Chunks {
    pub(super) fn hold(&mut self, chunk: Chunk) {
        self.held.insert(chunk.id, chunk);
    }

    pub(super) fn forget(&mut self, id: u64) {
        self.held.remove(&id);
    }

    /// The marker with this number came down the stream.
    pub(super) fn release(&mut self, id: u64) {
        self.ready.extend(self.held.remove(&id));
    }

    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }
}

impl Planning {
    /// Plans a piece of what is ready: of one chunk, or of many that are small. Where Redis is the bottleneck, there is one piece with each
    /// segment.
    pub(crate) fn piece(&mut self) -> Result<(), Error> {
        let most = self.assembly.weight() + PIECE_BYTES;
        while self.assembly.weight() <= most
            && let Some(chunk) = self.chunks.ready.pop_front()
        {
            self.piece_of(chunk, most)?;
        }
        // While Redis executes one batch the next one must not grow without end (INVARIANT I7): the stream may be silent, and no frame ends it.
        self.flush_if_full();
        Ok(())
    }

    /// Plans the next items of a chunk, as long as the batch weighs no more than that.
    fn piece_of(&mut self, chunk: Chunk, most: usize) -> Result<(), Error> {
        let start = std::mem::take(&mut self.chunks.position);
        if let Content::Catalog(catalog) = &chunk.content {
            self.reconcile(catalog)?;
            chunk.window.done(false);
            return Ok(());
        }
        if let Content::Horizon(horizon, tables) = &chunk.content {
            self.horizon(*horizon, tables);
            chunk.window.done(false);
            return Ok(());
        }
        let is_current = self
            .registry
            .get(chunk.relation)
            .is_some_and(|registered| registered.generation == chunk.generation);
        let is_orphaned = matches!(chunk.content, Content::Orphans(_));
        if !is_orphaned && (!is_current || chunk.window.is_stale()) {
            add(&self.shared.metrics.chunks_dropped.outdated, 1);
            chunk.window.done(true);
            return Ok(());
        }
        if matches!(chunk.content, Content::Changed) {
            self.doubt(chunk.relation);
        }
        // Its rows would have to be read again one by one, and the table would be called complete without them. So the worker begins
        // anew where it is, and waits for a better snapshot. What is pending waits for nobody: the gate may know its key.
        let is_whole = !matches!(chunk.content, Content::Keys(_) | Content::Orphans(_));
        if is_whole && start < chunk.content.len() && self.gate.may_have_forgotten(&chunk.snapshot) {
            add(&self.shared.metrics.chunks_dropped.forgotten, 1);
            chunk.window.narrow();
            chunk.window.done(true);
            return Ok(());
        }
        self.dirty = true;
        // What a key was to the table when it was found, it may no longer be.
        let owned = match &chunk.content {
            Content::Absent(keys) if !keys.is_empty() => self.registry.owned(chunk.relation),
            _ => None,
        };
        let mut position = start;
        while position < chunk.content.len() {
            if self.assembly.weight() > most {
                self.chunks.position = position;
                self.chunks.ready.push_front(chunk);
                return Ok(());
            }
            if !self.item(&chunk, position, owned.as_ref())? {
                // Read under another version of the table than the stream has announced so far.
                add(&self.shared.metrics.chunks_dropped.other_version, 1);
                self.doubt(chunk.relation);
                chunk.window.done(true);
                return Ok(());
            }
            position += 1;
        }
        if let Some(cursor) = &chunk.cursor {
            self.registry
                .advance(self.assembly.batch(), chunk.relation, cursor);
            if cursor.is_done() {
                // From here on rows are written without a removal, because one was done when the key was filled.
                self.assembly.batch().keep();
                self.restate();
            }
        }
        chunk.window.done(false);
        Ok(())
    }

    /// Plans one row or key. False: it is of another version of the table.
    fn item(&mut self, chunk: &Chunk, position: usize, owned: Option<&Owned>) -> Result<bool, Error> {
        match &chunk.content {
            Content::Rows(rows) => match rows.get(position) {
                Some(packed) => self.read_row(chunk, packed, None),
                None => Ok(true),
            },
            Content::Keys(keys) => match keys.get(position) {
                Some((key, Some(packed))) => self.read_row(chunk, packed, Some(key)),
                Some((key, None)) => {
                    self.absent(chunk, key, true);
                    Ok(true)
                }
                None => Ok(true),
            },
            Content::Absent(keys) => {
                if let (Some(key), Some(owned)) = (keys.get(position), owned) {
                    match owned.belongs(key) {
                        Belongs::ToRow(_) => self.absent(chunk, key, false),
                        // Rows of older versions came before the marker of this: nobody writes the key any more.
                        Belongs::ToNoRow => self.remove(chunk.relation, key),
                        Belongs::Elsewhere => {}
                    }
                }
                Ok(true)
            }
            Content::LeftOut(keys) => match keys.get(position) {
                Some(key) => self.left_out(chunk, key).map(|()| true),
                None => Ok(true),
            },
            Content::Orphans(keys) => {
                keys.get(position).into_iter().for_each(|key| self.orphan(key));
                Ok(true)
            }
            Content::Catalog(_) | Content::Horizon(..) | Content::Changed => Ok(true),
        }
    }

    /// Whoever was writing to these tables when they were announced has an id below `horizon`.
    fn horizon(&mut self, horizon: u64, tables: &[Life]) {
        for (relation, generation) in tables {
            let batch = self.assembly.batch();
            self.registry.set_horizon(batch, *relation, *generation, horizon);
        }
        self.dirty = true;
        self.restate();
    }

    /// A row that SQL read; `pending`: because its key was noted, so the note goes with the row.
    fn read_row(&mut self, chunk: &Chunk, packed: &[u8], pending: Option<&[u8]>) -> Result<bool, Error> {
        let Some(registered) = self.registry.get(chunk.relation) else {
            return Ok(false);
        };
        let mapping = std::sync::Arc::clone(&registered.mapping);
        let on_nothing = registered.cursor.on_nothing && pending.is_none();
        // As for a capture: nobody corrects it.
        let may_be_stale = mapping.mode == Mode::Cache && chunk.snapshot.may_miss_below(registered.horizon());
        let unreadable = |why: Source| {
            Error::stream(
                format!(
                    "a row of {} that walmirror.pack made cannot be read",
                    mapping.table
                ),
                why,
            )
        };
        let Some((fingerprint, tuple)) = packed.split_first_chunk::<8>() else {
            return Err(unreadable("it has too few bytes".into()));
        };
        if u64::from_be_bytes(*fingerprint) != mapping.fingerprint {
            return Ok(false);
        }
        let tuple = TupleRef::parse(tuple).map_err(|error| unreadable(error.into()))?;
        let row = mapping.datums(&tuple).map_err(|error| unreadable(error.into()))?;
        let keyed = self
            .planner
            .read_key(&mapping, &row)
            .map_err(|error| unreadable(error.into()))?;
        match keyed {
            Keyed::Yes => {}
            Keyed::Null => {
                add(&self.shared.metrics.rows_without_key, 1);
                return Ok(true);
            }
            Keyed::Reserved => return self.reject_reserved(mapping.table.clone()).map(|()| true),
            Keyed::TooLong => return self.reject_long_key(mapping.table.clone()).map(|()| true),
            // Where it was noted, the note is that one's business.
            Keyed::Claimed(by) => {
                return self.reject_claimed(mapping.table.clone(), by).map(|()| true);
            }
        }
        let hash = self.gate.hash(self.planner.key());
        let since = pending.and_then(|_| self.changes_since(chunk, &mapping, hash));
        match self.gate.admit(chunk.relation, hash, &chunk.snapshot) {
            // It stays noted.
            Verdict::Admit if pending.is_some() && self.may_miss_a_writer(chunk, hash) => {
                add(&self.shared.metrics.read_forgotten, 1);
            }
            Verdict::Admit if may_be_stale => {
                let key = self.planner.key().to_vec();
                self.remove(chunk.relation, &key);
                if pending.is_some() {
                    self.settle(&key, hash);
                }
            }
            Verdict::Admit => {
                add(&self.shared.metrics.read_admitted, 1);
                if tuple.has_unchanged() {
                    // walmirror.pack could tell only the key.
                    add(&self.shared.metrics.errors, 1);
                    let key = self.planner.key().to_vec();
                    self.planner
                        .remove(self.assembly.batch(), chunk.relation, hash, &key);
                    self.reject(Rejected {
                        key,
                        table: mapping.table.clone(),
                        lsn: self.lsn,
                        reason: "it could not be encoded; the server's log tells why".to_owned(),
                    })?;
                } else if self.planner.is_too_large(&mapping, &row) {
                    let key = self.planner.key().to_vec();
                    self.planner
                        .remove(self.assembly.batch(), chunk.relation, hash, &key);
                    self.reject_too_large(mapping.table.clone())?;
                } else {
                    let trust = if on_nothing {
                        Trust::Nothing
                    } else {
                        Trust::Refreshing
                    };
                    self.planner
                        .read_row(self.assembly.batch(), &mapping, trust, &row, hash);
                }
                if let Some(key) = pending {
                    self.settle(key, hash);
                }
            }
            Verdict::Changed
                if let Some(changes) = &since
                    && let Some(key) = pending
                    && !tuple.has_unchanged()
                    && !self.planner.is_too_large(&mapping, &row) =>
            {
                add(&self.shared.metrics.read_admitted, 1);
                self.planner
                    .read_row(self.assembly.batch(), &mapping, Trust::Refreshing, &row, hash);
                for change in changes {
                    let tuple = TupleRef::parse(change).map_err(|error| unreadable(error.into()))?;
                    let row = mapping.datums(&tuple).map_err(|error| unreadable(error.into()))?;
                    self.planner
                        .follow_up(self.assembly.batch(), &mapping, &row, hash);
                }
                self.settle(key, hash);
            }
            // What the change wrote stands; if it was a patch, it noted the key as pending itself.
            Verdict::Changed => add(&self.shared.metrics.read_changed, 1),
            Verdict::Forgotten => {
                add(&self.shared.metrics.read_forgotten, 1);
                self.planner.pend(self.assembly.batch(), &mapping);
                self.assembly.note_pending();
                self.backfill.note_pending();
                if let Some(key) = pending {
                    chunk.window.refuse(key);
                }
            }
        }
        Ok(true)
    }

    /// Whether what was read of a mirror may be older than what a transaction left that was writing to the table when it was announced,
    /// which is not in the stream. The fill, which waits for these, may have written that already. Who has changed the row since the
    /// table was announced had to wait for such a one, so that a snapshot that sees the former sees the latter. Not for ALTER TYPE, which
    /// locks no table: the gate knows that one, unless an earlier session has met it.
    fn may_miss_a_writer(&self, chunk: &Chunk, hash: u64) -> bool {
        let registered = self.registry.get(chunk.relation);
        registered.is_some_and(|registered| {
            let horizon = registered.horizon();
            let is_changed_since = || {
                self.gate.knows_truncation(chunk.relation)
                    && self.gate.changer(hash).is_some_and(|xid| xid >= horizon)
            };
            registered.mapping.mode == Mode::Mirror
                && chunk.snapshot.may_miss_below(horizon)
                && !is_changed_since()
        })
    }

    /// A key that has no row.
    fn absent(&mut self, chunk: &Chunk, key: &[u8], pending: bool) {
        if self.is_claimed(chunk.relation, key) {
            // Another table has taken it since it was noted, and so the note.
            return;
        }
        let hash = self.gate.hash(key);
        match self.gate.admit(chunk.relation, hash, &chunk.snapshot) {
            Verdict::Admit if pending && self.may_miss_a_writer(chunk, hash) => {}
            Verdict::Admit => {
                self.remove(chunk.relation, key);
                if pending {
                    self.settle(key, hash);
                }
            }
            Verdict::Changed => {}
            Verdict::Forgotten => {
                self.pend(chunk.relation, key);
                if pending {
                    chunk.window.refuse(key);
                }
            }
        }
    }

    /// A key whose row is there and cannot be read. Where it was written since, it is another one.
    fn left_out(&mut self, chunk: &Chunk, key: &[u8]) -> Result<(), Error> {
        let hash = self.gate.hash(key);
        match self.gate.admit(chunk.relation, hash, &chunk.snapshot) {
            Verdict::Admit if RedisKeys::is_reserved(key) || self.is_claimed(chunk.relation, key) => {}
            Verdict::Admit => {
                self.remove(chunk.relation, key);
                self.settle(key, hash);
            }
            Verdict::Changed => return Ok(()),
            Verdict::Forgotten => {
                self.pend(chunk.relation, key);
                return Ok(());
            }
        }
        let table = self.registry.get(chunk.relation);
        let table = table.map(|registered| registered.mapping.table.clone());
        self.reject(Rejected {
            key: key.to_vec(),
            table: table.unwrap_or_default(),
            lsn: self.lsn,
            reason: "it cannot be read: it has more than 1 GB, or what is stored of it is damaged".to_owned(),
        })
    }

    /// Whether a key that a table's template can make is another table's.
    fn is_claimed(&self, relation: u32, key: &[u8]) -> bool {
        let registered = self.registry.get(relation);
        registered.is_some_and(|registered| registered.mapping.claims.of(key).is_some())
    }

    fn remove(&mut self, relation: u32, key: &[u8]) {
        add(&self.shared.metrics.keys_removed, 1);
        let hash = self.gate.hash(key);
        self.planner.remove(self.assembly.batch(), relation, hash, key);
    }

    /// A key that was noted for a table whose it is not any more. Its table of today may have noted it too, in the same place.
    fn orphan(&mut self, key: &[u8]) {
        match self.registry.owner(key) {
            Some(relation) => self.pend(relation, key),
            None => self.settle(key, self.gate.hash(key)),
        }
    }

    /// The key is to be read again.
    fn pend(&mut self, relation: u32, key: &[u8]) {
        let (keys, relation) = (self.planner.keys().clone(), relation.to_string());
        self.assembly
            .batch()
            .bookkeeping()
            .command(&[b"HSET", &keys.pending, key, relation.as_bytes()]);
        self.assembly.note_pending();
        self.backfill.note_pending();
    }

    /// The key need not be read again. What was written to it just before stays in the batch: a change behind it may build on that.
    fn settle(&mut self, key: &[u8], hash: u64) {
        let keys = self.planner.keys().clone();
        self.assembly.batch().pin(hash);
        self.assembly
            .batch()
            .bookkeeping()
            .command(&[b"HDEL", &keys.pending, key]);
    }
}
