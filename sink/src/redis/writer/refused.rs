//! What Redis refused within an EXEC: which keys, whether that may be, and the notes of it that an EXEC of their own writes.

use redis::{ServerError, Value};

use super::super::error::reply_error;
use super::{Refused, Segment, Writer, touched};
use crate::config::OnBadRow;
use crate::error::Error;
use crate::progress::Step;
use crate::rejected::Rejected;
use crate::resp::Commands;

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
        let first = refused.commands.first().map(|command| self.locate(*command));
        let Refused { key, relation } = first.unwrap_or_default().into_iter().next().unwrap_or_default();
        let what = format!(
            "Redis refused to write the key \"{}\" of the table with oid {relation} ({} refused in this batch)",
            String::from_utf8_lossy(&key),
            refused.commands.len()
        );
        let error = reply_error(what, &refused.first).at(step.lsn);
        if let Err(failure) = self.note_pending(refused) {
            tracing::error!(lsn = %step.lsn, "the keys that Redis refused could not be noted for repair: {failure}");
        }
        error
    }

    fn note_pending(&mut self, refused: &Refusals) -> Result<(), Error> {
        self.check_watch()?;
        let mut commands = Commands::new();
        Self::open(&mut commands);
        let located = refused.commands.iter().flat_map(|command| self.locate(*command));
        for Refused { key, relation } in located.filter(|refused| refused.relation != 0) {
            commands.command(&[b"HSET", &self.keys.pending, &key, relation.to_string().as_bytes()]);
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
                let cause = self.not_queued.take().unwrap_or(reply);
                Err(reply_error("Redis refuses to note keys", &cause))
            }
            _ => Err(touched(&self.keys)),
        }
    }

    /// The keys of the command with this number inside of the open MULTI, and their relations.
    fn locate(&self, command: usize) -> Vec<Refused> {
        let Some(mut command) = command.checked_sub(self.prefix) else {
            return Vec::new();
        };
        for Segment { batch, opens, .. } in &self.open {
            // MULTI is a command of the segment, but has no element in the EXEC.
            command += usize::from(*opens);
            let count = batch.commands().count();
            if command < count {
                let refused = |op| Refused {
                    key: batch.key_of(op).to_vec(),
                    relation: op.relation,
                };
                return batch.ops_of_command(command).iter().map(refused).collect();
            }
            command -= count;
        }
        Vec::new()
    }
}
