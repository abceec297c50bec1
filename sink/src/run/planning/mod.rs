//! The planner's state: what comes down the stream goes in, segments for Redis come out. No thread, no socket, no clock;
//! `plan_loop` owns one and feeds it.

mod assembly;
mod captures;
mod chunks;
mod history;
mod labels;
mod records;
mod registry;
mod replay;
mod requests;
mod rereads;
#[cfg(test)]
mod tests;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use walmirror_proto::Lsn;
use walmirror_proto::pb;

use super::shared::Shared;
use crate::backfill::{Backfill, Chunk};
use crate::config::OnBadRow;
use crate::continuity::Continuity;
use crate::error::Error;
use crate::gate::Gate;
use crate::plan::{Mapping, Planner, RedisKeys, Scripts, Trust};
use crate::progress::{Progress, Step, write_healed, write_resync_begun};
use crate::redis::{Segment, Stored};
use crate::rejected::Told;
use crate::spool::Spool;
use crate::transaction::{Commit, Transactions};

use assembly::Assembly;
use chunks::Chunks;
use registry::Registry;
use replay::Replay;
use rereads::Rereads;

/// What the planner is limited to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// A batch goes out at this weight.
    pub(super) batch_bytes: usize,
    /// A transaction is cut at this weight.
    pub(super) transaction_bytes: usize,
    /// Redis takes no longer value.
    pub(super) value_bytes: usize,
}

/// What a planner starts with.
pub(super) struct Start {
    pub(super) keys: RedisKeys,
    pub(super) scripts: Scripts,
    pub(super) stored: Stored,
    /// Where the progress begins anew, if it does: then every backfill does.
    pub(super) fresh: Option<Lsn>,
    pub(super) continuity: Continuity,
    pub(super) gate: Gate,
    pub(super) slot: String,
    pub(super) marker_prefix: String,
    pub(super) limits: Limits,
    pub(super) on_bad_row: OnBadRow,
    pub(super) spool: Spool,
    pub(super) backfill: Arc<Backfill>,
    pub(super) shared: Arc<Shared>,
}

/// How a row of a definition is to be treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Trusted(Trust),
    /// Redis is kept by no version of the table now, as its label did not fit it, or rows came of a version that nobody announced.
    Outdated,
    /// Another version than the one that Redis is kept by, and nobody announced it.
    Stray,
    /// Nobody announced it yet. Where the progress begins anew it is registered with its first row: its label is older than the stream. Else
    /// an earlier session may have forgotten it, and the catalog has to say.
    Unregistered,
    /// Its keys may be another table's by now: it is an older transaction that knows the table by them.
    Taken,
    /// The table was dropped or unlabelled: what an older transaction did to it is of no interest.
    Forgotten,
}

/// A version of a table, as rows name it.
#[derive(Debug)]
struct Definition {
    relation: pb::Relation,
    mapping: Arc<Mapping>,
    standing: Standing,
    /// Rows of transactions below this may be what they were before the table was announced, and nobody reads them again.
    horizon: u64,
}

pub(super) struct Planning {
    transactions: Transactions,
    continuity: Continuity,
    gate: Gate,
    planner: Planner,
    registry: Registry,
    /// By Relation.index, which counts from 1.
    definitions: Vec<Option<Definition>>,
    /// Transactions in progress, and the one of them that has just committed.
    spool: Spool,
    replay: Option<Replay>,
    /// The progress begins anew with this session, so that none before it has forgotten a table.
    begins_anew: bool,
    assembly: Assembly,
    chunks: Chunks,
    rereads: Rereads,
    /// Relations that were announced or forgotten in this session: about them the stream knows better than the catalog.
    announced: HashSet<u32>,
    /// Relations that may be others by now, while a catalog is on its way that may be too old to tell.
    doubted: HashSet<u32>,
    forgotten: HashSet<u32>,
    backfill: Arc<Backfill>,
    shared: Arc<Shared>,
    limits: Limits,
    on_bad_row: OnBadRow,
    /// The log, of rows that the segment leaves out.
    told: Told,
    /// What requests begin with.
    slot: String,
    marker_prefix: Vec<u8>,
    /// The end of the last transaction that is planned whole, or a keepalive behind it.
    lsn: Lsn,
    last: Option<Commit>,
    /// The progress hash may hold a part.
    part_stored: bool,
    /// The progress hash says that what was begun anew is not whole yet.
    healing: bool,
    /// Something waits for an EXEC.
    dirty: bool,
    /// `lsn` rose by a keepalive alone.
    advanced: bool,
    out: VecDeque<Segment>,
    /// How much was put there while nothing may go out.
    held_bytes: usize,
}

impl Planning {
    pub(super) fn new(start: Start) -> Result<Self, Error> {
        let Start {
            keys,
            scripts,
            stored,
            fresh,
            continuity,
            gate,
            slot,
            marker_prefix,
            limits,
            on_bad_row,
            spool,
            backfill,
            shared,
        } = start;
        let unusable = |error| Error::stream("the definition of a table in Redis cannot be used", error);
        let mut progress = stored.progress.unwrap_or_default();
        if let Some(lsn) = fresh {
            progress = Progress {
                lsn,
                cursors: progress.cursors,
                resync: true,
                ..Progress::default()
            };
        }
        backfill.set_gate(&gate);
        let registry = Registry::new(
            keys.clone(),
            Arc::clone(&backfill),
            stored.relations,
            stored.nothing_else,
            &progress.cursors,
            gate.horizon(),
        )
        .map_err(unusable)?;
        let mut planning = Self {
            transactions: Transactions::resume(progress.lsn, progress.part),
            continuity,
            gate,
            planner: Planner::new(keys.clone(), scripts),
            registry,
            definitions: Vec::new(),
            spool,
            replay: None,
            begins_anew: fresh.is_some(),
            assembly: Assembly::new(keys),
            chunks: Chunks::default(),
            rereads: Rereads::default(),
            announced: HashSet::new(),
            doubted: HashSet::new(),
            forgotten: HashSet::new(),
            backfill,
            shared,
            limits,
            on_bad_row,
            told: Told::default(),
            slot,
            marker_prefix: marker_prefix.into_bytes(),
            lsn: progress.lsn,
            last: None,
            part_stored: progress.part.is_some(),
            healing: progress.healing || progress.resync,
            dirty: false,
            advanced: false,
            out: VecDeque::new(),
            held_bytes: 0,
        };
        planning.planner.limit_values(limits.value_bytes);
        if progress.resync {
            let batch = planning.assembly.batch();
            let purges = planning.registry.restart_all(batch).map_err(unusable)?;
            write_resync_begun(batch.bookkeeping(), planning.planner.keys());
            planning.purge(purges);
            planning.dirty = true;
        }
        Ok(planning)
    }

    /// The server has sent everything before `wal_end`.
    pub(super) fn keepalive(&mut self, wal_end: Lsn) -> Result<(), Error> {
        self.reached(wal_end)?;
        if !self.transactions.is_open() && wal_end > self.lsn {
            self.lsn = wal_end;
            self.advanced = true;
        }
        self.bounded()
    }

    /// A worker read something.
    pub(super) fn chunk(&mut self, chunk: Chunk) {
        self.chunks.hold(chunk);
    }

    /// It has no marker, or nobody knows of one.
    pub(super) fn forget_chunk(&mut self, id: u64) {
        self.chunks.forget(id);
    }

    /// Whether a chunk could be planned now. While nothing goes out, what is planned would pile up: chunks that are held are bounded in bytes
    /// (INVARIANT I7).
    pub(super) fn wants_piece(&self) -> bool {
        self.chunks.is_ready() && !self.transactions.is_open() && self.hands_out()
    }

    /// Whether there are whole transactions (or other changes) that have not gone out.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty && !self.transactions.is_open()
    }

    /// Whether the position rose and nothing says so yet.
    pub(super) fn is_advanced(&self) -> bool {
        self.advanced && !self.transactions.is_open()
    }

    /// The next segment that has to go out.
    pub(super) fn next_segment(&mut self) -> Option<Segment> {
        if !self.hands_out() {
            return None;
        }
        self.out.pop_front()
    }

    /// Until the stream is known to be of the history that Redis mirrors, nothing is to go out.
    fn hands_out(&self) -> bool {
        self.continuity.is_proved() && !self.transactions.awaits_part()
    }

    /// Once everything is filled that was begun anew, the progress no longer says that it is not.
    pub(super) fn note_healed(&mut self) {
        if self.healing && !self.transactions.is_open() && self.backfill.is_idle() {
            self.healing = false;
            write_healed(self.assembly.batch().bookkeeping(), self.planner.keys());
            self.dirty = true;
        }
    }

    /// Hands out what is complete. Only between transactions.
    pub(super) fn flush(&mut self) {
        if !self.transactions.is_open() {
            self.close();
        }
    }

    /// Hands out what is too large to wait: a full batch, or a piece of a large transaction. Once a transaction is cut, each batch
    /// of it is a piece: the next one is planned while Redis executes the one before.
    fn flush_if_full(&mut self) {
        if self.assembly.weight() < self.limits.batch_bytes {
            return;
        }
        let is_cut = self.part_stored && !self.assembly.is_split();
        let is_too_large = self.assembly.total_weight() >= self.limits.transaction_bytes;
        if !self.transactions.is_open() || is_cut || is_too_large {
            self.close();
        } else {
            let segment = self.assembly.split();
            self.told.end();
            self.put_out(segment);
        }
    }

    /// Ends the MULTI. INVARIANT I2: the step that it makes is written by it.
    fn close(&mut self) {
        let part = self.transactions.part();
        let step = Step {
            lsn: self.lsn,
            last: self.last.take(),
            part,
            clear_part: self.part_stored,
        };
        self.part_stored = part.is_some();
        self.dirty = false;
        self.advanced = false;
        let segment = self.assembly.close(step, self.backfill.asked());
        self.told.end();
        self.put_out(segment);
    }

    /// What changed in the registry changes how rows are treated.
    fn restate(&mut self) {
        let (registry, forgotten) = (&self.registry, &self.forgotten);
        for definition in self.definitions.iter_mut().flatten() {
            definition.standing = standing(registry, forgotten, &definition.relation);
            definition.horizon = registry.cache_horizon(definition.relation.oid);
            let claims = registry.claims(&definition.relation);
            if definition.mapping.claims != claims {
                Arc::make_mut(&mut definition.mapping).claims = claims;
            }
        }
    }
}

fn standing(registry: &Registry, forgotten: &HashSet<u32>, relation: &pb::Relation) -> Standing {
    match registry.get(relation.oid) {
        // The cheap question first: thousands of tables may be forgotten at once.
        _ if !forgotten.contains(&relation.oid) && registry.is_taken(relation) => Standing::Taken,
        Some(registered) => match registered.is_settled_for(relation) {
            Some(_) if registered.is_outdated() => Standing::Outdated,
            Some(true) => Standing::Trusted(Trust::Settled),
            Some(false) => Standing::Trusted(Trust::Refreshing),
            None => Standing::Stray,
        },
        None if forgotten.contains(&relation.oid) => Standing::Forgotten,
        None => Standing::Unregistered,
    }
}
