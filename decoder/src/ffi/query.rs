//! What capture asks about the running query and its transaction, and how its own errors are kept from it.

use std::any::Any;
use std::ffi::c_int;
use std::panic::AssertUnwindSafe;

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgTryBuilder, pg_sys};
use walmirror_proto::pb;

use super::output_plugin::{full_xid_before, next_full_xid};
use super::{settings, unguarded};

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

/// The time, in microseconds since 2000-01-01.
pub fn now_us() -> i64 {
    // SAFETY: reads the clock.
    unsafe { unguarded::GetCurrentTimestamp() }
}

/// Whether no subtransaction can start: the leader of a parallel plan runs, or a worker. Then nothing can be [`isolated`].
pub fn in_parallel_mode() -> bool {
    // SAFETY: reads backend-local state.
    unsafe { unguarded::IsInParallelMode() }
}

/// Runs work whose errors concern capture alone; `None` if it failed. What the session has to hear goes on its way: a
/// cancel, a timeout, a shutdown (class 57), and what left a subtransaction by half, which only the end of the transaction mends.
///
/// INVARIANT I9: an error leaves what its work held, as buffers, locks and pins, to the end of a transaction, and here none
/// comes. So this is only for work that computes and allocates; what reads tables or calls functions is [`isolated`].
pub fn catching<R>(work: impl FnOnce() -> R) -> Option<R> {
    let before = nest_level();
    // pgrx's try block allocates for its handlers, so it is only built once there is something to handle.
    match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Some(done),
        Err(payload) => {
            handle(payload, before);
            None
        }
    }
}

/// The same for work that may do anything a query does, in a subtransaction (`BeginInternalSubTransaction`, as PL/pgSQL's
/// EXCEPTION has it) that ends with the work. Where it says `None` too, all that it did is undone.
///
/// Not in parallel mode, where Postgres has no subtransactions.
pub fn isolated<R>(work: impl FnOnce() -> Option<R>) -> Option<R> {
    let before = nest_level();
    let outer = match std::panic::catch_unwind(Subtransaction::begin) {
        Ok(outer) => outer,
        Err(payload) => {
            handle(payload, before);
            return None;
        }
    };
    let within = nest_level();
    // An error of the release undoes the work too, as in PL/pgSQL (exec_stmt_block).
    let released = AssertUnwindSafe(|| {
        let done = work();
        if done.is_some() {
            settings::failpoint(settings::Failpoint::CaptureRelease);
            outer.release();
        }
        done
    });
    match std::panic::catch_unwind(released) {
        Ok(Some(done)) => Some(done),
        Ok(None) => {
            outer.roll_back();
            None
        }
        // A subtransaction within this one is left by half.
        Err(payload) if nest_level() != within => std::panic::resume_unwind(payload),
        Err(payload) => {
            // Also for what goes on its way: who catches it further out ends the subtransaction that they began.
            outer.roll_back();
            handle(payload, before);
            None
        }
    }
}

/// How deep subtransactions are nested: one that is begun or ended by half still counts, as it goes last of all (`PopTransaction`).
fn nest_level() -> c_int {
    // SAFETY: reads backend-local state.
    unsafe { unguarded::GetCurrentTransactionNestLevel() }
}

/// What was current when a subtransaction began.
struct Subtransaction {
    context: pg_sys::MemoryContext,
    owner: pg_sys::ResourceOwner,
}

impl Subtransaction {
    fn begin() -> Self {
        // SAFETY: within a transaction, as every query is, and not in parallel mode. The work goes on in the memory context
        // that it began in, so that what it makes there outlives the subtransaction.
        unsafe {
            let outer = Self {
                context: pg_sys::CurrentMemoryContext,
                owner: pg_sys::CurrentResourceOwner,
            };
            pg_sys::BeginInternalSubTransaction(std::ptr::null());
            settings::failpoint(settings::Failpoint::CaptureBegin);
            pg_sys::CurrentMemoryContext = outer.context;
            outer
        }
    }

    fn release(&self) {
        // SAFETY: ends the subtransaction that `begin` began; those within it have ended before.
        unsafe { pg_sys::ReleaseCurrentSubTransaction() };
        self.restore();
    }

    fn roll_back(&self) {
        // SAFETY: as above; pgrx has copied the error away (FlushErrorState), as a rollback demands.
        unsafe { pg_sys::RollbackAndReleaseCurrentSubTransaction() };
        self.restore();
    }

    fn restore(&self) {
        // SAFETY: both are of the query that runs, and older than the subtransaction.
        unsafe {
            pg_sys::CurrentMemoryContext = self.context;
            pg_sys::CurrentResourceOwner = self.owner;
        }
    }
}

/// Drops an error, unless it is to go on its way. `before` is the nest level at which the work began.
#[cold]
fn handle(payload: Box<dyn Any + Send>, before: c_int) {
    if nest_level() != before {
        std::panic::resume_unwind(payload);
    }
    PgTryBuilder::new(AssertUnwindSafe(move || std::panic::resume_unwind(payload)))
        .catch_others(|error| match error {
            CaughtError::PostgresError(report)
                if super::failure::is_operator_intervention(report.sql_error_code()) =>
            {
                CaughtError::PostgresError(report).rethrow()
            }
            _ => (),
        })
        .catch_rust_panic(|_| ())
        .execute()
}
