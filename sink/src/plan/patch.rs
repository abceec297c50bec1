//! Changes that leave a TOASTed column as it was: the stream does not have its value, so the key is patched where it is,
//! and never written in part. scripts.rs has the Redis side.

use walmirror_proto::pb::{Mode, ValueKind};
use walmirror_proto::row::Datum;

use super::full::text_arg;
use super::{Batch, Mapping, OpKind, Planner, Script, Trust};
use crate::resp::Commands;

/// What a patch does where the key is not there; the scripts know it by its letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PatchMode {
    /// Note the key as pending: the row is read again.
    Mirror,
    /// Leave it absent.
    Cache,
    /// Note it as pending even where it is there: it may be stale.
    Refreshing,
}

impl PatchMode {
    fn letter(self) -> &'static [u8] {
        match self {
            Self::Mirror => b"m",
            Self::Cache => b"c",
            Self::Refreshing => b"r",
        }
    }
}

impl Planner {
    /// Patches the key rendered last; `moved_from` is the hash of the old key, where the key has changed.
    pub(super) fn patch(
        &mut self,
        batch: &mut Batch,
        mapping: &Mapping,
        trust: Trust,
        row: &[Datum<'_>],
        hash: u64,
        moved_from: Option<u64>,
    ) {
        let mode = match (mapping.mode, trust) {
            (Mode::Cache, _) => PatchMode::Cache,
            (Mode::Mirror, Trust::Settled) => PatchMode::Mirror,
            (Mode::Mirror, Trust::Refreshing | Trust::Nothing | Trust::Outlived) => PatchMode::Refreshing,
        };
        match mapping.value {
            ValueKind::Hash => self.patch_hash(batch, mapping, mode, row, hash, moved_from),
            ValueKind::String => {
                self.eval(batch, mapping, Script::PatchString, mode, hash, moved_from, 0);
            }
            ValueKind::Json => {
                let args = 2 * mapping.members.len();
                let mut text = std::mem::take(&mut self.text);
                let commands = self.eval(batch, mapping, Script::PatchJson, mode, hash, moved_from, args);
                for member in &mapping.members {
                    text.clear();
                    match row.get(member.column) {
                        Some(Datum::Unchanged) => {}
                        datum => datum.unwrap_or(&Datum::Null).write_json(&mut text),
                    }
                    commands.encoded(&member.name).arg(&text);
                }
                self.text = text;
            }
        }
        self.give_back();
    }

    /// Sets and deletes the fields of a hash that is there.
    pub(super) fn patch_hash(
        &mut self,
        batch: &mut Batch,
        mapping: &Mapping,
        mode: PatchMode,
        row: &[Datum<'_>],
        hash: u64,
        moved_from: Option<u64>,
    ) {
        let value = |column: usize| row.get(column).unwrap_or(&Datum::Null);
        let is_null = |column: usize| *value(column) == Datum::Null;
        let is_set = |column: usize| !is_null(column) && *value(column) != Datum::Unchanged;
        let sets = mapping.fields.iter().filter(|field| is_set(field.column)).count();
        let nulls = mapping
            .fields
            .iter()
            .filter(|field| is_null(field.column))
            .count();
        let mut text = std::mem::take(&mut self.text);
        let commands = self.eval(
            batch,
            mapping,
            Script::PatchHash,
            mode,
            hash,
            moved_from,
            1 + 2 * sets + nulls,
        );
        commands.int(sets as u64);
        for field in mapping.fields.iter().filter(|field| is_set(field.column)) {
            commands.encoded(&field.name);
            text_arg(commands, value(field.column), &mut text);
        }
        for field in mapping.fields.iter().filter(|field| is_null(field.column)) {
            commands.encoded(&field.name);
        }
        self.text = text;
    }

    /// Starts `EVALSHA`; `args` more arguments have to follow.
    #[allow(clippy::too_many_arguments)]
    fn eval<'b>(
        &self,
        batch: &'b mut Batch,
        mapping: &Mapping,
        script: Script,
        mode: PatchMode,
        hash: u64,
        moved_from: Option<u64>,
        args: usize,
    ) -> &'b mut Commands {
        batch.load(script);
        let kind = match moved_from {
            Some(old_hash) => {
                batch.pin(old_hash);
                OpKind::Other
            }
            None => OpKind::Patch,
        };
        let keys = if moved_from.is_some() { 3 } else { 2 };
        let mut op = batch.op(mapping.oid, hash, kind, &self.key);
        op.commands()
            .begin(3 + keys + 3 + args)
            .arg(b"EVALSHA")
            .arg(self.scripts.hash(script))
            .int(keys as u64);
        op.key(&self.key).arg(&self.keys.pending);
        if moved_from.is_some() {
            op.commands().arg(&self.old_key);
        }
        op.commands()
            .int(u64::from(mapping.oid))
            .arg(mapping.ttl.as_deref().unwrap_or(b"0"))
            .arg(mode.letter());
        op.into_commands()
    }
}
