//! Turns changes into Redis commands. Pure: rows and snapshots in, RESP bytes out; called by the planner thread, which
//! decides when a batch goes out.
//!
//! INVARIANT I3: every command sets or removes, none counts or appends, so applying a transaction twice equals once. The
//! one exception is the rename of a key whose row has unchanged TOAST; that the progress is written in the same EXEC
//! (INVARIANT I2) keeps it from being applied twice.

mod batch;
mod claims;
mod full;
mod keys;
mod mapping;
#[cfg(test)]
mod model;
mod owned;
mod patch;
mod purge;
mod scripts;

use walmirror_proto::pb::{self, Kind, Mode, OnWrite};
use walmirror_proto::row::{Datum, TupleRef, WireError};

pub use batch::{Batch, Op, OpKind};
pub use claims::Claims;
pub use keys::RedisKeys;
pub use mapping::{Field, Keyed, Mapping, MappingError, OUTDATED};
pub(crate) use owned::is_text;
pub use owned::{Belongs, Owned};
pub use purge::Purge;
pub use scripts::{PENDING_REPLY, Script, Scripts};

use crate::gate::Gate;

/// What Redis takes unless it is configured otherwise (proto-max-bulk-len).
pub const VALUE_BYTES: usize = 512 << 20;

/// Why a row could not be planned: the stream is broken or of a later version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The row's bytes do not fit its relation.
    #[error("a row of {table}: {source}")]
    Row {
        /// `schema.name`
        table: String,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// The relation's definition cannot be used.
    #[error(transparent)]
    Mapping(#[from] MappingError),
}

/// What became of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planned {
    /// Commands were written.
    Done,
    /// A key column is NULL, so the row has no key; a key that it had before is removed.
    NoKey,
    /// Its key would be a bookkeeping key, so it is not written; a key that it had before is removed.
    Reserved,
    /// Its key is one of the table with this oid, whose template is more specific, so it is not written; a key that it had before is
    /// removed.
    Claimed(u32),
    /// Redis takes no value as large as one of the row's; the key is removed.
    TooLarge,
    /// Redis takes no key as long as the row's, so it is not written; a key that it had before is removed.
    KeyTooLong,
}

/// One change of the stream.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// INSERT, UPDATE or DELETE.
    pub kind: Kind,
    /// The new row; for DELETE the old key columns.
    pub tuple: TupleRef<'a>,
    /// UPDATE that changed the key: the old key columns.
    pub old_key: Option<TupleRef<'a>>,
}

/// Whether what Redis holds of a table can be built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The table is mirrored: its keys are what the stream made of them.
    Settled,
    /// For a row that was read: its key is missing, or as this very row. See [`crate::backfill::Cursor::on_nothing`].
    Nothing,
    /// The table is being backfilled, or the row was written under another version of the table than the current one: a
    /// key may be missing, stale, of another type, or have fields that are no longer columns.
    Refreshing,
    /// For a change of a table that nobody reads again, a cache: its transaction was in progress when the definition changed, and the
    /// row may be what it was before. Its key goes.
    Outlived,
}

/// Between rows no buffer keeps more than this.
const KEPT_BYTES: usize = 1024 * 1024;

/// Writes commands for rows. Holds the buffers that rows are rendered in, so that a row allocates next to nothing.
#[derive(Debug)]
pub struct Planner {
    keys: RedisKeys,
    scripts: Scripts,
    key: Vec<u8>,
    old_key: Vec<u8>,
    text: Vec<u8>,
    /// Redis takes no longer value.
    value_bytes: usize,
}

impl Planner {
    /// A planner for this slot's bookkeeping keys.
    pub fn new(keys: RedisKeys, scripts: Scripts) -> Self {
        Self {
            keys,
            scripts,
            key: Vec::new(),
            old_key: Vec::new(),
            text: Vec::new(),
            value_bytes: VALUE_BYTES,
        }
    }

    /// Values longer than this are not written.
    pub fn limit_values(&mut self, value_bytes: usize) {
        self.value_bytes = value_bytes;
    }

    /// The slot's bookkeeping keys.
    pub fn keys(&self) -> &RedisKeys {
        &self.keys
    }

    /// Plans a change that transaction `xid` made, and tells the gate.
    pub fn change(
        &mut self,
        batch: &mut Batch,
        gate: &mut Gate,
        xid: u64,
        mapping: &Mapping,
        trust: Trust,
        change: &Change<'_>,
    ) -> Result<Planned, PlanError> {
        let broken = |source| PlanError::Row {
            table: mapping.table.clone(),
            source,
        };
        let row = mapping.datums(&change.tuple).map_err(broken)?;
        let has_old_key = match &change.old_key {
            Some(tuple) => {
                let old_row = mapping.datums(tuple).map_err(broken)?;
                let keyed = mapping.key(&old_row, &mut self.old_key)?;
                self.limited(keyed, &self.old_key) == Keyed::Yes
            }
            None => false,
        };
        let keyed = self.read_key(mapping, &row)?;
        let has_key = keyed == Keyed::Yes;
        let old_hash = gate.hash(&self.old_key);
        let moved = has_old_key && (!has_key || self.old_key != self.key);
        if moved {
            gate.record(old_hash, xid);
        }
        let removes = change.kind == Kind::Delete
            || trust == Trust::Outlived
            || mapping.mode == Mode::Cache && mapping.on_write == OnWrite::Invalidate;
        if !has_key {
            if moved {
                unlink(batch, mapping.oid, old_hash, &self.old_key);
            }
            return Ok(match keyed {
                Keyed::Reserved if !removes => Planned::Reserved,
                Keyed::Claimed(by) if !removes => Planned::Claimed(by),
                Keyed::TooLong if !removes => Planned::KeyTooLong,
                _ => Planned::NoKey,
            });
        }
        let hash = gate.hash(&self.key);
        gate.record(hash, xid);
        if removes {
            if moved {
                unlink(batch, mapping.oid, old_hash, &self.old_key);
            }
            unlink(batch, mapping.oid, hash, &self.key);
        } else if self.is_too_large(mapping, &row) {
            if moved {
                unlink(batch, mapping.oid, old_hash, &self.old_key);
            }
            unlink(batch, mapping.oid, hash, &self.key);
            return Ok(Planned::TooLarge);
        } else if change.tuple.has_unchanged() && value_has_unchanged(mapping, &row) {
            let moved_from = moved.then_some(old_hash);
            self.patch(batch, mapping, trust, &row, hash, moved_from);
        } else {
            if moved {
                unlink(batch, mapping.oid, old_hash, &self.old_key);
            }
            if mapping.mode == Mode::Cache && mapping.on_write == OnWrite::Refresh {
                self.refresh_cached(batch, mapping, &row, hash);
            } else {
                self.write(batch, mapping, trust, &row, hash);
            }
        }
        Ok(Planned::Done)
    }

    /// Renders the key of a row.
    pub fn read_key(&mut self, mapping: &Mapping, row: &[Datum<'_>]) -> Result<Keyed, PlanError> {
        let keyed = mapping.key(row, &mut self.key)?;
        Ok(self.limited(keyed, &self.key))
    }

    /// A key has the limit of a value: Redis would refuse it, and close the connection.
    fn limited(&self, keyed: Keyed, key: &[u8]) -> Keyed {
        if keyed == Keyed::Yes && key.len() > self.value_bytes {
            Keyed::TooLong
        } else {
            keyed
        }
    }

    /// Plans a row that SQL read and the gate has admitted, after [`Self::read_key`] has rendered its key: the row
    /// replaces the key, whatever that held.
    pub fn read_row(
        &mut self,
        batch: &mut Batch,
        mapping: &Mapping,
        trust: Trust,
        row: &[Datum<'_>],
        hash: u64,
    ) {
        self.write(batch, mapping, trust, row, hash);
    }

    /// Plans what a change made of the row that [`Self::read_row`] has just written.
    pub fn follow_up(&mut self, batch: &mut Batch, mapping: &Mapping, row: &[Datum<'_>], hash: u64) {
        if value_has_unchanged(mapping, row) {
            self.patch(batch, mapping, Trust::Settled, row, hash, None);
        } else {
            // It takes the place of that row in the batch, and so removes what was there as well.
            self.write(batch, mapping, Trust::Refreshing, row, hash);
        }
    }

    /// Whether Redis would refuse one of the row's values, and close the connection.
    pub fn is_too_large(&self, mapping: &Mapping, row: &[Datum<'_>]) -> bool {
        // A byte becomes six at most, as JSON. Nearly every row is far below.
        let bytes: usize = row.iter().map(byte_len).sum();
        if bytes < self.value_bytes / 8 {
            return false;
        }
        let mut text = Vec::new();
        let is_json = mapping.value == pb::ValueKind::Json;
        if is_json && mapping.json.write(row, &mut text) {
            return text.len() > self.value_bytes;
        }
        mapping.fields.iter().any(|field| {
            text.clear();
            if let Some(datum) = row.get(field.column)
                && !matches!(datum, Datum::Null | Datum::Unchanged)
            {
                if is_json {
                    datum.write_json(&mut text);
                } else {
                    datum.write_text(&mut text);
                }
            }
            text.len() > self.value_bytes
        })
    }

    #[cfg(test)]
    pub(crate) fn kept(&self) -> usize {
        self.text.capacity()
    }

    /// A large row must not keep its room until the session ends.
    fn give_back(&mut self) {
        if self.text.capacity() > KEPT_BYTES {
            self.text = Vec::new();
        }
    }

    /// Notes that the row of the key rendered last has to be read again.
    pub fn pend(&mut self, batch: &mut Batch, mapping: &Mapping) {
        let mut oid = itoa::Buffer::new();
        let commands = batch.bookkeeping();
        commands.command(&[
            b"HSET",
            &self.keys.pending,
            &self.key,
            oid.format(mapping.oid).as_bytes(),
        ]);
    }

    /// The key rendered last.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// The old key of the change that was planned last, where it had one.
    pub fn old_key(&self) -> &[u8] {
        &self.old_key
    }

    /// Removes a key of a relation.
    pub fn remove(&self, batch: &mut Batch, relation: u32, hash: u64, key: &[u8]) {
        unlink(batch, relation, hash, key);
    }
}

/// How long a value of no fixed length is.
#[inline]
fn byte_len(datum: &Datum<'_>) -> usize {
    match datum {
        Datum::Text(bytes) | Datum::Json(bytes) | Datum::Bytea(bytes) | Datum::NumericText(bytes) => {
            bytes.len()
        }
        _ => 32,
    }
}

fn unlink(batch: &mut Batch, relation: u32, hash: u64, key: &[u8]) {
    let mut op = batch.op(relation, hash, OpKind::Whole, key);
    op.commands().begin(2).arg(b"UNLINK");
    op.key(key);
}

fn value_has_unchanged(mapping: &Mapping, row: &[Datum<'_>]) -> bool {
    mapping
        .fields
        .iter()
        .any(|field| row.get(field.column) == Some(&Datum::Unchanged))
}
