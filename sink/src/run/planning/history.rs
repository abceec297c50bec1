//! Whether the stream is of the history that Redis mirrors, asked wherever it gets somewhere: a transaction begins, or a position is
//! reached between transactions. Where it is not, the session ends with a gap, and the next one makes everything anew.

use walmirror_proto::{Lsn, pb};

use super::Planning;
use crate::error::{Error, Source};
use crate::transaction::OrderError;

impl Planning {
    pub(super) fn begin(&mut self, begin: &pb::Begin) -> Result<(), Error> {
        let proved = self.continuity.begin(begin);
        self.proved(proved)?;
        let begun = self.transactions.begin(begin);
        begun.map_err(|error| self.misplaced("BEGIN", error))
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

    /// INVARIANT I1, of a server that was put back: what Redis has counts as applied once it is known to be of this stream.
    fn proved(&self, proved: Result<bool, impl Into<Source>>) -> Result<(), Error> {
        match proved {
            Ok(true) => self.shared.set_applied(self.lsn),
            Ok(false) => {}
            Err(diverged) => return Err(Error::gap(diverged.into().to_string())),
        }
        Ok(())
    }

    /// A transaction that is applied in part and does not come is of another history too.
    fn misplaced(&self, what: &str, error: OrderError) -> Error {
        match error {
            OrderError::PartLost { .. } => Error::gap(error.to_string()),
            _ => self.broken(what, error),
        }
    }
}
