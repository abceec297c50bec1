//! The horizon of tables that were just announced: a transaction id above those of all transactions that were writing to them at that
//! time. SECURITY LABEL and ALTER TYPE do not wait for such writers. What they wrote is not in the stream, or as it was before, and the
//! planner leaves it out of Redis by this.

use std::sync::Arc;

use super::sql::transaction_id;
use super::worker::{Context, Role};
use super::{Content, Window};
use crate::error::Error;
use crate::gate::Snapshot;

/// Takes a transaction id for the tables that need one, and hands it to the planner. Nothing is waited for; while an id is on its way,
/// no other one is taken.
pub(super) fn take(context: &Context, window: &Arc<Window>) -> Result<(), Error> {
    if window.outstanding() > 0 {
        return Ok(());
    }
    // Before the id: whatever is announced behind this list needs another one.
    let tables = context.backfill.without_horizon();
    if tables.is_empty() {
        return Ok(());
    }
    let mut sql = context.connect(Role::Pending)?;
    let content = Content::Horizon(transaction_id(&mut sql)?, tables);
    context.submit_for(&mut sql, window, 0, 0, Snapshot::default(), content, None)
}
