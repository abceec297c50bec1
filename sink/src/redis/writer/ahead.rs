//! Sends the commands of the next segment while Redis still works on the one before, so that it never waits for them. Behind
//! MULTI they are only queued: what does them is their EXEC, and that is sent once the fence has been looked at (INVARIANT I4).

use super::{Segment, Writer, watch};
use crate::error::Error;
use crate::resp::Commands;

/// What was sent ahead of a segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    /// Length, from the beginning of the segment.
    pub(super) bytes: usize,
    /// Commands, and how many of them Redis answers with QUEUED.
    pub(super) sent: usize,
    queued: usize,
}

impl Writer {
    /// Sends of a segment what changes nothing by itself, because the MULTI before it is known to be open or begins it. One that
    /// removes keys before its MULTI has to wait for its turn.
    pub(super) fn send_ahead(&mut self, segment: &Segment) -> Result<(), Error> {
        if !segment.purges.is_empty() {
            return Ok(());
        }
        let commands = segment.batch.commands();
        let mut ahead = Ahead {
            bytes: commands.len(),
            sent: commands.count(),
            queued: commands.count() - usize::from(segment.opens),
        };
        if segment.step.is_some() {
            let mut end = Commands::new();
            Self::close(&mut end, &self.keys);
            ahead.bytes = ahead.bytes.saturating_sub(end.len());
            ahead.sent = ahead.sent.saturating_sub(end.count());
            ahead.queued = ahead.queued.saturating_sub(end.count());
        }
        self.connection
            .send(commands.as_bytes().get(..ahead.bytes).unwrap_or_default())?;
        self.ahead = Some(ahead);
        Ok(())
    }

    /// Takes back what was sent ahead, for a command that must not be queued: the segment is sent anew in its turn. Only behind an
    /// EXEC, where what is ahead began with MULTI.
    pub(super) fn retract(&mut self) -> Result<(), Error> {
        let Some(ahead) = self.ahead.take() else {
            return Ok(());
        };
        let mut commands = Commands::new();
        commands.command(&[b"DISCARD"]);
        watch(&mut commands, &self.keys);
        self.connection.send(commands.as_bytes())?;
        // DISCARD, WATCH and HMGET are behind it, too.
        self.expect_multi(ahead.queued + commands.count())?;
        self.expect_queued(ahead.queued)?;
        // What was refused will be so again when it is sent anew.
        self.not_queued = None;
        self.expect_ok("DISCARD")?;
        self.check_watch()
    }
}
