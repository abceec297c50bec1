//! The executor's hooks for SELECT capture: which queries are captured from, and when their rows are written.
//!
//! The hooks themselves are plain: they call the next hook or Postgres' own function without pgrx's guard and hold nothing
//! that would have to be dropped, so that an ERROR of the user's query jumps over them as it would over C, with all of its
//! fields. Only what they do before and after is guarded.
//!
//! They run for every query of the server, so what they ask is asked in the order of its cost, and functions of Postgres
//! that raise no error are called without the guard (`unguarded`).

use std::cell::RefCell;
use std::ffi::{c_int, c_void};

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::local::Local;
use super::memory::Context;
use super::query;
use super::unguarded;
use super::{scan, settings, shared};
use crate::capture::Session;
use crate::capture::stats::{self, Counter};

static SESSION: Local<RefCell<Option<Session>>> = Local::new(RefCell::new(None));

/// Whether a query that captures is running. Read by the hooks, which may not touch anything that needs dropping.
static mut BUSY: bool = false;
static mut NEXT_START: pg_sys::ExecutorStart_hook_type = None;
static mut NEXT_RUN: pg_sys::ExecutorRun_hook_type = None;
static mut NEXT_FINISH: pg_sys::ExecutorFinish_hook_type = None;

/// Sets the hooks; in `_PG_init` while the postmaster preloads libraries.
pub fn hook() {
    // SAFETY: hooks are chained in _PG_init, as Postgres prescribes.
    unsafe {
        NEXT_START = pg_sys::ExecutorStart_hook;
        pg_sys::ExecutorStart_hook = Some(start);
        NEXT_RUN = pg_sys::ExecutorRun_hook;
        pg_sys::ExecutorRun_hook = Some(run);
        NEXT_FINISH = pg_sys::ExecutorFinish_hook;
        pg_sys::ExecutorFinish_hook = Some(finish);
    }
}

/// Runs `work` on the session's capture state; `None` if it is busy, as when an output function runs a query.
pub(super) fn with_session<R>(work: impl FnOnce(&mut Session) -> R) -> Option<R> {
    let mut session = SESSION.get().try_borrow_mut().ok()?;
    Some(work(session.get_or_insert_with(|| {
        super::hooks::register_callbacks();
        Session::new(Context::top().child(c"walmirror capture"))
    })))
}

unsafe extern "C-unwind" {
    // The functions themselves, without the guard that pgrx's bindings put around them.
    fn standard_ExecutorStart(query: *mut pg_sys::QueryDesc, flags: c_int);
    fn standard_ExecutorFinish(query: *mut pg_sys::QueryDesc);
    #[cfg(not(feature = "pg18"))]
    fn standard_ExecutorRun(
        query: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
        once: bool,
    );
    #[cfg(feature = "pg18")]
    fn standard_ExecutorRun(
        query: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
    );
}

unsafe extern "C-unwind" fn start(query: *mut pg_sys::QueryDesc, flags: c_int) {
    // SAFETY: the query is passed on as it came, and is valid and started afterwards.
    unsafe {
        match NEXT_START {
            Some(next) => next(query, flags),
            None => standard_ExecutorStart(query, flags),
        }
        if settings::capture()
            && (*query).operation == pg_sys::CmdType::CMD_SELECT
            && !(*(*query).plannedstmt).relationOids.is_null()
            && shared::is_there()
        {
            started(query, flags);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn started(query: *mut pg_sys::QueryDesc, flags: c_int) {
    // SAFETY: the query is valid and started.
    unsafe {
        if query::catching(|| is_candidate(query, flags)) == Some(true) {
            query::catching(|| attach(query));
        }
    }
}

/// Whether the rows that a query reads may be captured.
///
/// # Safety
/// `query` must be started, and name the tables that it reads.
unsafe fn is_candidate(query: *mut pg_sys::QueryDesc, flags: c_int) -> bool {
    // SAFETY: a started query has a planned statement and an MVCC snapshot or none. The functions only read state.
    unsafe {
        let statement = (*query).plannedstmt;
        // Before the tables are asked about: to look one up takes a subtransaction, for nothing on a standby.
        if flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as c_int != 0
            || (*statement).hasModifyingCTE
            || (*query).planstate.is_null()
            || (*query).snapshot.is_null()
            || (*(*query).snapshot).snapshot_type != pg_sys::SnapshotType::SNAPSHOT_MVCC
            || pg_sys::wal_level < pg_sys::WalLevel::WAL_LEVEL_LOGICAL as c_int
            || unguarded::RecoveryInProgress()
            // It holds the transactions in progress in another way, and all of them were of another server.
            || (*(*query).snapshot).takenDuringRecovery
        {
            return false;
        }
        let oids = (*statement).relationOids;
        let length = usize::try_from((*oids).length).unwrap_or(0);
        let tables = std::slice::from_raw_parts((*oids).elements, length);
        let tables = tables.iter().map(|cell| u32::from(cell.oid_value));
        let cached = with_session(|session| session.captures_any(tables));
        if cached != Some(true) {
            return false;
        }
        let reason = if query::transaction_wrote() {
            Counter::SkippedWrote
        } else if !(*statement).rowMarks.is_null() {
            Counter::SkippedRowLock
        } else if pg_sys::ParallelWorkerNumber >= 0 {
            Counter::SkippedParallel
        } else {
            return true;
        };
        stats::add(reason, 1);
        false
    }
}

/// Whether a query's rows go to nobody: those of EXPLAIN ANALYZE, among the queries that are measured. When a query starts nobody can tell:
/// a portal gets its receiver when it runs, and auto_explain may have any query measured.
///
/// # Safety
/// `receiver` must be the receiver of a query that is about to run.
unsafe fn shows_no_rows(receiver: *mut pg_sys::DestReceiver) -> bool {
    // SAFETY: by the caller's promise.
    unsafe {
        // EXPLAIN (ANALYZE, SERIALIZE) formats the rows and drops them.
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        if (*receiver).mydest == pg_sys::CommandDest::DestExplainSerialize {
            return true;
        }
        std::ptr::eq(receiver, (&raw const pg_sys::None_Receiver).read().cast())
    }
}

/// Wraps the scans of cached tables.
///
/// # Safety
/// `query` must be started and a candidate.
unsafe fn attach(query: *mut pg_sys::QueryDesc) {
    // SAFETY: the query's context lives as long as its plan state; the tree is complete after ExecutorStart.
    unsafe {
        if with_session(|session| session.start(query as usize)).is_some() {
            BUSY = true;
            Tracked::register(query);
            scan::wrap((*query).planstate);
        }
    }
}

/// Has Postgres tell when a query's memory goes, be it at its end or after an error. Its nodes live until then.
#[repr(C)]
struct Tracked {
    callback: pg_sys::MemoryContextCallback,
    query: usize,
}

/// Those that are not in use: as many as the deepest nesting of queries was.
static SPARE: Local<RefCell<Vec<*mut Tracked>>> = Local::new(RefCell::new(Vec::new()));

impl Tracked {
    /// # Safety
    /// `query` must be started.
    unsafe fn register(query: *mut pg_sys::QueryDesc) {
        let tracked = SPARE.get().borrow_mut().pop().unwrap_or_else(|| {
            Box::into_raw(Box::new(Self {
                callback: Default::default(),
                query: 0,
            }))
        });
        // SAFETY: the callback is nobody's until it is called, and never freed. Registering only links it in.
        unsafe {
            (*tracked).query = query as usize;
            (*tracked).callback.func = Some(forget);
            (*tracked).callback.arg = tracked.cast();
            unguarded::MemoryContextRegisterResetCallback(
                (*(*query).estate).es_query_cxt,
                &raw mut (*tracked).callback,
            );
        }
    }
}

unsafe extern "C-unwind" fn forget(tracked: *mut c_void) {
    let tracked = tracked.cast::<Tracked>();
    // SAFETY: the argument that was registered with the callback.
    let query = unsafe { (*tracked).query };
    SPARE.get().borrow_mut().push(tracked);
    scan::forget();
    with_session(|session| {
        session.end(query);
        // SAFETY: a plain variable of this single-threaded backend.
        unsafe { BUSY = !session.is_idle() };
    });
}

#[cfg(not(feature = "pg18"))]
unsafe extern "C-unwind" fn run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
    once: bool,
) {
    // SAFETY: the arguments are passed on as they came; the query is about to run.
    unsafe {
        leave_out_explained(query);
        match NEXT_RUN {
            Some(next) => next(query, direction, count, once),
            None => standard_ExecutorRun(query, direction, count, once),
        }
        if BUSY {
            ran(query, count);
        }
    }
}

#[cfg(feature = "pg18")]
unsafe extern "C-unwind" fn run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
) {
    // SAFETY: the arguments are passed on as they came; the query is about to run.
    unsafe {
        leave_out_explained(query);
        match NEXT_RUN {
            Some(next) => next(query, direction, count),
            None => standard_ExecutorRun(query, direction, count),
        }
        if BUSY {
            ran(query, count);
        }
    }
}

/// What EXPLAIN ANALYZE runs is not captured.
///
/// # Safety
/// `query` must be about to run.
unsafe fn leave_out_explained(query: *mut pg_sys::QueryDesc) {
    // SAFETY: by the caller's promise it has a receiver.
    unsafe {
        if BUSY && (*query).instrument_options != 0 && shows_no_rows((*query).dest) {
            explained(query);
        }
    }
}

/// EXPLAIN ANALYZE is about to run a query.
#[pg_guard]
unsafe extern "C-unwind" fn explained(query: *mut pg_sys::QueryDesc) {
    with_session(|session| session.leave_out(query as usize));
}

/// A query has returned as many rows as it was asked for, or all.
#[pg_guard]
unsafe extern "C-unwind" fn ran(query: *mut pg_sys::QueryDesc, count: u64) {
    // SAFETY: the query ran just now, so that it has an executor state and a receiver.
    let more = unsafe {
        // A set-returning function in SQL asks its query for one row at a time: a message for each would be a lot. More is
        // asked at once, but for what reads slowly (`Session::emit_older`). A cursor's client may never ask again.
        count != 0
            && (*(*query).estate).es_processed >= count
            && (*(*query).dest).mydest == pg_sys::CommandDest::DestSQLFunction
    };
    with_session(|session| {
        if more {
            session.emit_older(query as usize);
        } else {
            session.emit(query as usize);
        }
    });
}

unsafe extern "C-unwind" fn finish(query: *mut pg_sys::QueryDesc) {
    // SAFETY: the argument is passed on as it came.
    unsafe {
        match NEXT_FINISH {
            Some(next) => next(query),
            None => standard_ExecutorFinish(query),
        }
        if BUSY {
            finished(query);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn finished(query: *mut pg_sys::QueryDesc) {
    with_session(|session| session.emit(query as usize));
}
