//! What capture asks about the running query and its transaction, and how its own errors are kept from it.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgTryBuilder, pg_sys};
use walmirror_proto::pb;

use super::output_plugin::{full_xid_before, next_full_xid};
use super::unguarded;

/// The snapshot of a running query, with full transaction ids. `query` is the address of its QueryDesc.
pub fn snapshot(query: usize) -> pb::Snapshot {
    // SAFETY: queries that capture are running, with an MVCC snapshot; xip holds xcnt ids of top-level transactions.
    unsafe {
        let raw = (*(query as *mut pg_sys::QueryDesc)).snapshot;
        let count = usize::try_from((*raw).xcnt).unwrap_or(0);
        let in_progress = if count == 0 {
            &[]
        } else {
            std::slice::from_raw_parts((*raw).xip, count)
        };
        let next = next_full_xid();
        pb::Snapshot {
            xmin: full_xid_before(next, (*raw).xmin.into_inner()),
            xmax: full_xid_before(next, (*raw).xmax.into_inner()),
            xip: in_progress
                .iter()
                .map(|xid| full_xid_before(next, xid.into_inner()))
                .collect(),
        }
    }
}

/// Whether this transaction has an id: then it may have seen its own uncommitted writes.
pub fn transaction_wrote() -> bool {
    // SAFETY: reads backend-local state. Zero is InvalidTransactionId.
    unsafe { unguarded::GetTopTransactionIdIfAny() != 0 }
}

/// `pg_database.oid` of this session.
pub fn database() -> u32 {
    // SAFETY: set when the session started.
    u32::from(unsafe { pg_sys::MyDatabaseId })
}

/// When the client's statement started, in milliseconds since 2000-01-01. No system call.
pub fn statement_time_ms() -> u64 {
    // SAFETY: reads backend-local state.
    u64::try_from(unsafe { unguarded::GetCurrentStatementStartTimestamp() } / 1000).unwrap_or(0)
}

/// Runs work whose errors concern capture alone; `None` if it failed. What the session has to hear goes on its way: a
/// cancel, a timeout, a shutdown (class 57).
pub fn catching<R>(work: impl FnOnce() -> R) -> Option<R> {
    // pgrx's try block allocates for its handlers, so it is only built once there is something to handle.
    match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Some(done),
        Err(payload) => {
            handle(payload);
            None
        }
    }
}

#[cold]
fn handle(payload: Box<dyn Any + Send>) {
    PgTryBuilder::new(AssertUnwindSafe(move || std::panic::resume_unwind(payload)))
        .catch_others(|error| match error {
            CaughtError::PostgresError(report)
                if super::function::is_operator_intervention(report.sql_error_code()) =>
            {
                CaughtError::PostgresError(report).rethrow()
            }
            _ => (),
        })
        .catch_rust_panic(|_| ())
        .execute()
}
