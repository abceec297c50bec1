//! What Redis refused within an EXEC: which keys, whether that may be, and the notes of it that an EXEC of their own writes.

use redis::{ServerError, Value};

use super::super::error::reply_error;
use super::{REFUSED_MAX, Refused, Writer, touched};
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
            let (key, relation) = self.locate(*command)?;
            if !is_skipped || reply.code() != "WRONGTYPE" || relation == 0 {
                return None;
            }
            // A row may take several commands, which stand side by side.
            if skipped.last().is_none_or(|last| last.key != key) {
                skipped.push(Refused { key, relation });
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
        let (key, relation) = self.locate(*first).unwrap_or_default();
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
        for (command, _) in refused {
            if let Some((key, relation)) = self.locate(*command).filter(|(_, relation)| *relation != 0) {
                commands.command(&[b"HSET", &self.keys.pending, &key, relation.to_string().as_bytes()]);
            }
        }
        self.note(commands)
    }

    /// Applies bookkeeping by itself, under the fence like everything.
    fn note(&mut self, mut commands: Commands) -> Result<(), Error> {
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

    /// The key and relation of the command with this number inside of the open MULTI.
    fn locate(&self, command: usize) -> Option<(Vec<u8>, u32)> {
        let mut command = command.checked_sub(self.prefix)?;
        for segment in &self.open {
            // MULTI is a command of the segment, but has no element in the EXEC.
            command += usize::from(segment.opens);
            let count = segment.batch.commands().count();
            if command < count {
                let op = segment.batch.op_of_command(command)?;
                return Some((segment.batch.key_of(op).to_vec(), op.relation));
            }
            command -= count;
        }
        None
    }
}
