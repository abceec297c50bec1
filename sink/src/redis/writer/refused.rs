//! What Redis refused within an EXEC: which keys, whether that may be, and the notes of it that an EXEC of their own writes.

use redis::{ServerError, Value};

use super::super::error::reply_error;
use super::{REFUSED_MAX, Refused, Segment, Writer, touched};
use crate::config::OnBadRow;
use crate::error::Error;
use crate::progress::Step;
use crate::rejected::Rejected;
use crate::resp::Commands;

impl Writer {
    /// The keys that were refused, if each of them just holds another type and such rows are skipped.
    pub(super) fn skipped(&self, refused: &[(usize, ServerError)]) -> Option<Vec<Refused>> {
        let is_skipped = self.on_bad_row == OnBadRow::Skip && refused.len() < REFUSED_MAX;
        let mut skipped: Vec<Refused> = Vec::new();
        for (command, reply) in refused {
            let located = self.locate(*command);
            let are_rows = !located.is_empty() && located.iter().all(|refused| refused.relation != 0);
            if !is_skipped || reply.code() != "WRONGTYPE" || !are_rows {
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
    pub(super) fn refused(&mut self, refused: &[(usize, ServerError)], step: Step) -> Error {
        let Some((first, reply)) = refused.first() else {
            return Error::bug("nothing was refused");
        };
        let located = self.locate(*first).into_iter().next();
        let Refused { key, relation } = located.unwrap_or_default();
        let what = format!(
            "Redis refused to write the key \"{}\" of the table with oid {relation} ({} refused in this batch)",
            String::from_utf8_lossy(&key),
            refused.len()
        );
        let error = reply_error(what, reply).at(step.lsn);
        if let Err(failure) = self.note_pending(refused) {
            tracing::error!(lsn = %step.lsn, "the keys that Redis refused could not be noted for repair: {failure}");
        }
        error
    }

    fn note_pending(&mut self, refused: &[(usize, ServerError)]) -> Result<(), Error> {
        self.check_watch()?;
        let mut commands = Commands::new();
        Self::open(&mut commands);
        let located = refused.iter().flat_map(|(command, _)| self.locate(*command));
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
