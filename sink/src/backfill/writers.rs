//! Transactions that were writing to a table when it was announced. What such a one did before is not in the stream, so a snapshot that
//! does not see it would bring rows that nothing corrects: a table is read when all that are below its horizon are over. Until then it
//! waits alone. (What the gate has forgotten at the start of a session is seen to where a snapshot is taken.)

use std::time::{Duration, Instant};

use super::sql::Sql;
use super::{Backfill, Task};
use crate::error::Error;

/// Who is waited for is told of after so long.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// As far as they are known to be over.
#[derive(Debug, Default)]
pub(super) struct Writers {
    /// All transactions below this are.
    oldest: u64,
    /// Tables wait since then, and for whom was told.
    waiting: Option<Instant>,
    told: u64,
}

impl Writers {
    /// Whether the table can be read.
    pub(super) fn are_over(&self, task: &Task) -> bool {
        let horizon = task.cursor.horizon;
        horizon.is_some_and(|horizon| horizon <= self.oldest)
    }

    /// Whether a table has to wait, as far as is known.
    pub(super) fn hold_up_any(&self, backfill: &Backfill) -> bool {
        backfill.behind_writers(self.oldest).is_some()
    }

    /// Looks who is over by now, and tells of one who is not.
    pub(super) fn look(&mut self, backfill: &Backfill, sql: &mut Sql) -> Result<(), Error> {
        self.oldest = sql.oldest_running()?;
        let Some((table, tables)) = backfill.behind_writers(self.oldest) else {
            self.waiting = None;
            return Ok(());
        };
        let since = self.waiting.get_or_insert_with(Instant::now);
        if since.elapsed() > TOLD_AFTER && self.told != self.oldest {
            self.told = self.oldest;
            let who = sql.whoever_runs(self.oldest)?;
            tracing::info!(
                table,
                tables,
                xid = self.oldest,
                "the backfill waits for a transaction that is older than it: {who}"
            );
        }
        Ok(())
    }

    /// When it is worth a look again.
    pub(super) fn pause(&self) -> Duration {
        pause(self.waiting)
    }
}

/// Transactions that may have committed before a time and be invisible still, as a COMMIT is that waits for a standby: it is in the WAL,
/// and in the stream, before snapshots see it. One whose session idles inside of it behind that time, or that is prepared, has not.
#[derive(Debug)]
pub(super) struct Committing {
    open: Vec<u64>,
    since: Instant,
    is_told: bool,
    /// How many times the catalog was wanted before that time.
    pub(super) wishes: u64,
}

impl Committing {
    /// Those of now.
    pub(super) fn look(sql: &mut Sql, wishes: u64) -> Result<Self, Error> {
        Ok(Self {
            open: sql.running()?,
            since: Instant::now(),
            is_told: false,
            wishes,
        })
    }

    /// Whether all that have committed before that time are visible. Tells of one who may not be.
    pub(super) fn are_over(&mut self, sql: &mut Sql) -> Result<bool, Error> {
        if self.open.is_empty() {
            return Ok(true);
        }
        let now = sql.snapshot()?;
        self.open.retain(|xid| !now.sees(*xid));
        if !self.open.is_empty() {
            let undecided = sql.undecided()?;
            self.open.retain(|xid| !undecided.contains(&(*xid as u32)));
        }
        let Some(oldest) = self.open.first() else {
            return Ok(true);
        };
        if self.since.elapsed() > TOLD_AFTER && !self.is_told {
            self.is_told = true;
            let who = sql.whoever_runs(*oldest)?;
            tracing::info!(
                xid = oldest,
                "the list of mirrored tables waits for a transaction that may be committing; tables that are known are read meanwhile: {who}"
            );
        }
        Ok(false)
    }

    /// When it is worth a look again.
    pub(super) fn pause(&self) -> Duration {
        pause(Some(self.since))
    }
}

/// Between two looks at those that are waited for since then.
fn pause(since: Option<Instant>) -> Duration {
    let is_long = since.is_some_and(|since| since.elapsed() > TOLD_AFTER);
    Duration::from_millis(if is_long { 200 } else { 10 })
}
