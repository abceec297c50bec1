//! The horizon of tables that were just announced: a transaction id above those of all transactions that were writing to them at that
//! time. SECURITY LABEL and ALTER TYPE do not wait for such writers. What they wrote is not in the stream, or as it was before, and the
//! planner leaves it out of Redis by this. Nothing is captured of a table before it is known, so it has a thread of its own: the other workers may be
//! reading for long.

use std::sync::Arc;

use super::sql::transaction_id;
use super::worker::{Context, IDLE, Role};
use super::{Content, Window};
use crate::error::Error;
use crate::gate::Snapshot;

/// Until the session ends.
pub(super) fn work(context: &Context) -> Result<(), Error> {
    let window = Arc::default();
    while !context.stopped() {
        take(context, &window)?;
        context.backfill.wait(IDLE);
    }
    Ok(())
}

/// Takes a transaction id for the tables that need one, and hands it to the planner. Nothing is waited for; while an id is on its way,
/// no other one is taken.
fn take(context: &Context, window: &Arc<Window>) -> Result<(), Error> {
    if window.outstanding() > 0 {
        return Ok(());
    }
    // Before the id: whatever is announced behind this list needs another one.
    let tables = context.backfill.without_horizon();
    if tables.is_empty() {
        return Ok(());
    }
    let mut sql = context.connect(Role::Horizons)?;
    let content = Content::Horizon(transaction_id(&mut sql)?, tables);
    context.submit_for(&mut sql, window, 0, 0, Snapshot::default(), content, None)
}
