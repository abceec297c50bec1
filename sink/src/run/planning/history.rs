//! Whether the stream is of the history that Redis mirrors, asked wherever it gets somewhere: a transaction begins or has come whole, or a
//! position is reached between transactions. Where it is not, the session ends with a gap, and the next one makes everything
//! anew.

use walmirror_proto::{Lsn, pb};

use super::Planning;
use crate::continuity::Diverged;
use crate::error::Error;
use crate::redis::Segment;
use crate::transaction::{Commit, OrderError};

/// So much may wait until the stream is known to be of the history that Redis mirrors (INVARIANT I7), or two batches.
const HELD_BYTES: usize = 64 * 1024 * 1024;

impl Planning {
    /// A segment is complete.
    pub(super) fn put_out(&mut self, segment: Segment) {
        if !self.continuity.is_proved() {
            self.held_bytes += size_of::<Segment>() + segment.batch.weight();
        }
        self.out.push_back(segment);
    }

    /// What is held because it may not go out is not to become too much.
    pub(super) fn bounded(&self) -> Result<(), Error> {
        let held = self.held_bytes + self.assembly.weight();
        let most = HELD_BYTES.max(self.limits.batch_bytes.saturating_mul(2));
        self.continuity.holds(held, most).map_err(gap)
    }

    pub(super) fn begin(&mut self, what: &'static str, begin: &pb::Begin) -> Result<(), Error> {
        let proved = self.continuity.begun(Commit {
            lsn: Lsn(begin.commit_lsn),
            xid: begin.xid,
            time: begin.commit_time,
        });
        self.proved(proved)?;
        let begun = self.transactions.begin(begin);
        begun.map_err(|error| self.misplaced(what, error))
    }

    /// The open transaction commits: if it was applied before, it must be one that was.
    pub(super) fn known(&mut self) -> Result<(), Error> {
        match self.transactions.skipped() {
            Some(commit) => self.continuity.skipped(commit).map_err(gap),
            None => Ok(()),
        }
    }

    /// The server has sent all that ends before this.
    pub(super) fn reached(&mut self, lsn: Lsn) -> Result<(), Error> {
        if self.transactions.is_open() {
            return Ok(());
        }
        let proved = self.continuity.reached(lsn);
        self.proved(proved)?;
        let reached = self.transactions.reached(lsn);
        reached.map_err(|error| self.misplaced("a position", error))
    }

    /// What stands there between transactions an earlier session has seen, and it comes again only because the stream begins before the
    /// position.
    pub(super) fn is_before(&self, lsn: Lsn) -> bool {
        !self.continuity.is_proved() && lsn < self.lsn
    }

    /// Whether more has to come of a transaction that is skipped, to know whether it is one that was applied.
    pub(super) fn is_unknown(&self) -> bool {
        !self.continuity.is_proved() && self.transactions.skipped().is_none()
    }

    /// INVARIANT I1, of a server that was put back: what Redis has counts as applied once it is known to be of this stream.
    fn proved(&self, proved: Result<bool, Diverged>) -> Result<(), Error> {
        if proved.map_err(gap)? {
            // Not what is planned: behind the position that may be more already, where a purge is waited for.
            self.shared.set_applied(self.continuity.at());
            self.shared.health.proved();
        }
        Ok(())
    }

    /// A transaction that is applied in part and does not come is of another history too.
    pub(super) fn misplaced(&self, what: &str, error: OrderError) -> Error {
        match error {
            OrderError::PartLost { .. } => Error::gap(error.to_string()),
            _ => self.broken(what, error),
        }
    }
}

fn gap(diverged: Diverged) -> Error {
    Error::gap(diverged.to_string())
}
