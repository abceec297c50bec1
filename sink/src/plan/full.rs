//! Writes of whole rows: after them the key holds exactly the row, whatever it held before.

use walmirror_proto::pb::ValueKind;
use walmirror_proto::row::Datum;

use super::patch::PatchMode;
use super::{Batch, Mapping, OpKind, Planner, Trust, unlink};
use crate::resp::Commands;

impl Planner {
    /// Writes the row whose key was rendered last.
    pub(super) fn write(
        &mut self,
        batch: &mut Batch,
        mapping: &Mapping,
        trust: Trust,
        row: &[Datum<'_>],
        hash: u64,
    ) {
        match mapping.value {
            ValueKind::Hash => self.write_hash(batch, mapping, trust, row, hash),
            ValueKind::String | ValueKind::Json => self.write_string(batch, mapping, row, hash, false),
        }
        self.give_back();
    }

    /// Brings a cached key up to date, if it is there.
    pub(super) fn refresh_cached(
        &mut self,
        batch: &mut Batch,
        mapping: &Mapping,
        row: &[Datum<'_>],
        hash: u64,
    ) {
        match mapping.value {
            // A patch of all columns is a write that needs the key to be there.
            ValueKind::Hash => self.patch_hash(batch, mapping, PatchMode::Cache, row, hash, None),
            ValueKind::String | ValueKind::Json => self.write_string(batch, mapping, row, hash, true),
        }
        self.give_back();
    }

    fn write_hash(
        &mut self,
        batch: &mut Batch,
        mapping: &Mapping,
        trust: Trust,
        row: &[Datum<'_>],
        hash: u64,
    ) {
        let value = |column: usize| row.get(column).unwrap_or(&Datum::Null);
        let nulls = mapping
            .fields
            .iter()
            .filter(|field| *value(field.column) == Datum::Null)
            .count();
        if nulls == mapping.fields.len() {
            // Redis has no empty hash.
            return unlink(batch, mapping.oid, hash, &self.key);
        }
        // Without a removal or HDEL it does not undo what the key holds, and so cannot stand for what would have.
        let kind = match trust {
            Trust::Nothing => OpKind::Patch,
            Trust::Settled | Trust::Refreshing | Trust::Outlived => OpKind::Whole,
        };
        let mut op = batch.op(mapping.oid, hash, kind, &self.key);
        if trust == Trust::Refreshing {
            op.commands().begin(2).arg(b"UNLINK").arg(&self.key);
        }
        op.commands()
            .begin(2 + 2 * (mapping.fields.len() - nulls))
            .arg(b"HSET");
        let commands = op.key(&self.key);
        for field in &mapping.fields {
            let datum = value(field.column);
            if *datum != Datum::Null {
                commands.encoded(&field.name);
                text_arg(commands, datum, &mut self.text);
            }
        }
        if nulls > 0 && trust == Trust::Settled {
            commands.begin(2 + nulls).arg(b"HDEL").arg(&self.key);
            for field in mapping
                .fields
                .iter()
                .filter(|field| *value(field.column) == Datum::Null)
            {
                commands.encoded(&field.name);
            }
        }
        if let Some(ttl) = &mapping.ttl {
            commands.command(&[b"PEXPIRE", &self.key, ttl]);
        }
    }

    /// SET, for strings and JSON; `existing`: only if the key is there.
    fn write_string(
        &mut self,
        batch: &mut Batch,
        mapping: &Mapping,
        row: &[Datum<'_>],
        hash: u64,
        existing: bool,
    ) {
        self.text.clear();
        let mut present = true;
        if mapping.value == ValueKind::Json {
            present = mapping.json.write(row, &mut self.text);
        } else {
            let datum = mapping
                .fields
                .first()
                .and_then(|field| row.get(field.column))
                .unwrap_or(&Datum::Null);
            present &= *datum != Datum::Null;
            datum.write_text(&mut self.text);
        }
        if !present {
            return unlink(batch, mapping.oid, hash, &self.key);
        }
        // With XX the write depends on what came before on the key, so it cannot replace it.
        let kind = if existing { OpKind::Patch } else { OpKind::Whole };
        let mut op = batch.op(mapping.oid, hash, kind, &self.key);
        let args = 3 + if existing { 1 } else { 0 } + if mapping.ttl.is_some() { 2 } else { 0 };
        op.commands().begin(args).arg(b"SET");
        let commands = op.key(&self.key).arg(&self.text);
        if existing {
            commands.arg(b"XX");
        }
        if let Some(ttl) = &mapping.ttl {
            commands.arg(b"PX").arg(ttl);
        }
    }
}

/// Appends a value as text. Text, which most values are or could be, goes without the detour.
#[inline]
pub(super) fn text_arg(commands: &mut Commands, datum: &Datum<'_>, scratch: &mut Vec<u8>) {
    match datum {
        Datum::Text(text) | Datum::Json(text) | Datum::NumericText(text) => {
            commands.arg(text);
        }
        Datum::Bool(value) => {
            commands.arg(if *value { b"true" } else { b"false" });
        }
        _ => {
            scratch.clear();
            datum.write_text(scratch);
            commands.arg(scratch);
        }
    }
}
