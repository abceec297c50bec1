//! What Redis refused within an EXEC: which keys, whether that may be, and the notes of it that an EXEC of their own writes.

use redis::{ServerError, Value};

use super::super::error::{class_of, reply_error, row_error, wrong_type};
use super::{Refused, Segment, Writer, touched};
use crate::config::OnBadRow;
use crate::error::{Class, Error};
use crate::plan::Batch;
use crate::progress::Step;
use crate::rejected::Rejected;
use crate::resp::Commands;
use crate::shown;

/// What an EXEC that Redis refuses as a whole comes to.
pub(super) const NOTHING_APPLIED: &str = "Redis refused a batch, and nothing of it was applied";

/// The commands of an EXEC that Redis refused.
pub(super) struct Refusals {
    /// Their numbers.
    commands: Vec<usize>,
    /// What it said of the first.
    first: ServerError,
    /// It said of each that the key holds another type.
    are_types: bool,
}

impl Refusals {
    pub(super) fn add(refused: &mut Option<Self>, command: usize, reply: ServerError) {
        let is_type = reply.code() == "WRONGTYPE";
        let all = refused.get_or_insert_with(|| Self {
            commands: Vec::new(),
            first: reply,
            are_types: true,
        });
        all.commands.push(command);
        all.are_types &= is_type;
    }
}

impl Writer {
    /// The keys that were refused, if each of them just holds another type and such rows are skipped.
    pub(super) fn skipped(&self, refused: &Refusals) -> Option<Vec<Refused>> {
        if self.on_bad_row != OnBadRow::Skip || !refused.are_types {
            return None;
        }
        let mut skipped: Vec<Refused> = Vec::new();
        for command in &refused.commands {
            let located = self.locate(*command);
            if located.is_empty() || located.iter().any(|refused| refused.relation == 0) {
                return None;
            }
            // A row may take several commands, which stand side by side.
            if skipped.last() != located.last() {
                skipped.extend(located);
            }
        }
        Some(skipped)
    }

    /// Notes rows that were refused. Their EXEC is done, so this is a step of its own: if it does not come about, the keys
    /// are left for `verify` to find.
    pub fn note_rejected(&mut self, rejected: &[Rejected]) -> Result<(), Error> {
        let mut commands = Commands::new();
        Self::open(&mut commands);
        for one in rejected {
            one.write(&mut commands, &self.keys);
        }
        self.note(commands)
    }

    /// Redis does not undo a transaction of which one command failed, so the progress counts as applied what is not. The
    /// keys are noted as pending: once the cause is gone, their rows are read again.
    pub(super) fn refused(&mut self, refused: &Refusals, step: Step) -> Error {
        let first = refused.commands.first().copied().unwrap_or_default();
        let count = refused.commands.len();
        let error = match self.locate(first).into_iter().find(|at| at.relation != 0) {
            Some(row) => {
                let what = format!(
                    "Redis refused to write {} ({count} refused in this batch)",
                    self.told(&row)
                );
                row_error(what, &refused.first, &row.key)
            }
            None => {
                let (name, key) = self.name_and_key(first);
                let what = format!(
                    "Redis refused {name} of the sink's own key {:?}",
                    shown::key(&key)
                );
                match refused.are_types {
                    true => wrong_type(what, &refused.first, &key),
                    false => reply_error(what, &refused.first),
                }
            }
        }
        .at(step.lsn);
        if let Err(failure) = self.note_pending(refused) {
            tracing::error!(lsn = %step.lsn, "the keys that Redis refused could not be noted for repair: {failure}");
        }
        error
    }

    /// A command of the open MULTI that Redis did not queue, so that its EXEC did nothing. Where it may be the key that is refused, that is
    /// named; a Redis that is full would have refused any.
    pub(super) fn unqueued(&self, command: usize, reply: &ServerError) -> Error {
        if class_of(reply.code(), reply.details()) == Class::Retry {
            return reply_error(NOTHING_APPLIED, reply);
        }
        let (name, key) = self.name_and_key(command);
        let row = self.locate(command).into_iter().find(|at| at.relation != 0);
        let at = row.map_or_else(
            || format!("the key {:?}", shown::key(&key)),
            |row| self.told(&row),
        );
        reply_error(format!("{NOTHING_APPLIED}: it refuses {name} for {at}"), reply)
    }

    /// A key and its table, for a person.
    fn told(&self, row: &Refused) -> String {
        let name = self.tables.0(row.relation);
        let table = name.unwrap_or_else(|| format!("with oid {}", row.relation));
        format!("the key {:?} of the table {table}", shown::key(&row.key))
    }

    fn note_pending(&mut self, refused: &Refusals) -> Result<(), Error> {
        self.check_behind()?;
        let mut commands = Commands::new();
        Self::open(&mut commands);
        for command in &refused.commands {
            let mut located = self.locate(*command);
            let relation = located.first().map_or(0, |refused| refused.relation);
            let old = self.moved_from(*command);
            located.extend(old.map(|key| Refused { key, relation }));
            for Refused { key, relation } in located.iter().filter(|refused| refused.relation != 0) {
                commands.command(&[b"HSET", &self.keys.pending, key, relation.to_string().as_bytes()]);
            }
        }
        self.note(commands)
    }

    /// Applies bookkeeping by itself, under the fence like everything.
    fn note(&mut self, mut commands: Commands) -> Result<(), Error> {
        self.retract()?;
        let count = commands.count() - 1;
        Self::close(&mut commands, &self.keys);
        self.connection.send(commands.as_bytes())?;
        self.expect_ok("MULTI")?;
        self.expect_queued(count)?;
        match self.connection.receive()? {
            Value::Array(_) => self.check_watch(),
            Value::ServerError(reply) => {
                let cause = self.not_queued.take().map_or(reply, |(_, cause)| cause);
                Err(reply_error("Redis refuses to note keys", &cause))
            }
            _ => Err(touched(&self.keys)),
        }
    }

    /// The name of a command inside of the open MULTI, and its first argument. What stands before the first segment is of a purge.
    fn name_and_key(&self, command: usize) -> (String, Vec<u8>) {
        let of_purge = || ("a command".to_owned(), self.keys.progress.clone());
        let Some((batch, command)) = self.segment_of(command) else {
            return of_purge();
        };
        batch
            .commands()
            .name_and_key(command)
            .map_or_else(of_purge, |(name, key)| (shown::key(name), key.to_vec()))
    }

    /// The key that a patch was to move its row from. Where the script came to nothing it is still there, and no row has it.
    fn moved_from(&self, command: usize) -> Option<Vec<u8>> {
        let (batch, command) = self.segment_of(command)?;
        match batch.commands().args(command, 6)?.as_slice() {
            // Script, number of keys, key, pending hash, old key.
            [b"EVALSHA", _, b"3", _, _, old] => Some(old.to_vec()),
            _ => None,
        }
    }

    /// The keys of the command with this number inside of the open MULTI, and their relations.
    fn locate(&self, command: usize) -> Vec<Refused> {
        let Some((batch, command)) = self.segment_of(command) else {
            return Vec::new();
        };
        let refused = |op| Refused {
            key: batch.key_of(op).to_vec(),
            relation: op.relation,
        };
        batch.ops_of_command(command).iter().map(refused).collect()
    }

    /// The batch of a command inside of the open MULTI, and its number there.
    fn segment_of(&self, command: usize) -> Option<(&Batch, usize)> {
        let mut command = command.checked_sub(self.prefix)?;
        for Segment { batch, opens, .. } in &self.open {
            // MULTI is a command of the segment, but has no element in the EXEC.
            command += usize::from(*opens);
            let count = batch.commands().count();
            if command < count {
                return Some((batch, command));
            }
            command -= count;
        }
        None
    }
}
