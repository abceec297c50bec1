//! The executor's hooks for SELECT capture.
//!
//! After ExecutorStart every scan node of a cached table gets a wrapper around its ExecProcNode: when the node has
//! returned a tuple, its scan slot holds the whole row, whatever columns, joins or conditions the query has. Index-only
//! scans have no whole row and are left alone.
//!
//! The hooks themselves are plain: they call the next hook or Postgres' own function without pgrx's guard and hold nothing
//! that would have to be dropped, so that an ERROR of the user's query jumps over them as it would over C, with all of its
//! fields. Only what they do before and after is guarded.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::atomic::Ordering;

use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use pgrx::{PgTryBuilder, pg_sys};
use walmirror_proto::pb;

use super::datum::Row;
use super::memory::Context;
use super::output_plugin::{full_xid_before, next_full_xid};
use super::{settings, shared, value};
use crate::capture::session::Next;
use crate::capture::stats::{self, Counter};
use crate::capture::{self, Session};
use crate::plan::Plan;

/// A node's function (`ExecProcNodeMtd`).
pub type ExecProcNode =
    unsafe extern "C-unwind" fn(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot;

thread_local! {
    static SESSION: RefCell<Option<Session>> = const { RefCell::new(None) };
}

/// Whether a query that captures is running. Read by the hooks, which may not touch anything that needs dropping.
static mut BUSY: bool = false;
static mut NEXT_START: pg_sys::ExecutorStart_hook_type = None;
static mut NEXT_RUN: pg_sys::ExecutorRun_hook_type = None;
static mut NEXT_END: pg_sys::ExecutorEnd_hook_type = None;

/// Sets the hooks; in `_PG_init` while the postmaster preloads libraries.
pub fn hook() {
    // SAFETY: hooks are chained in _PG_init, as Postgres prescribes.
    unsafe {
        NEXT_START = pg_sys::ExecutorStart_hook;
        pg_sys::ExecutorStart_hook = Some(start);
        NEXT_RUN = pg_sys::ExecutorRun_hook;
        pg_sys::ExecutorRun_hook = Some(run);
        NEXT_END = pg_sys::ExecutorEnd_hook;
        pg_sys::ExecutorEnd_hook = Some(end);
    }
}

/// Runs `work` on the session's capture state; `None` if it is busy, as when an output function runs a query.
fn with_session<R>(work: impl FnOnce(&mut Session) -> R) -> Option<R> {
    SESSION.with(|session| {
        let mut session = session.try_borrow_mut().ok()?;
        Some(work(session.get_or_insert_with(|| {
            super::hooks::register_relcache_callback();
            Session::new(Context::top().child(c"walmirror capture"))
        })))
    })
}

unsafe extern "C-unwind" {
    // The functions themselves, without the guard that pgrx's bindings put around them.
    fn standard_ExecutorStart(query: *mut pg_sys::QueryDesc, flags: c_int);
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
    fn standard_ExecutorEnd(query: *mut pg_sys::QueryDesc);
}

unsafe extern "C-unwind" fn start(query: *mut pg_sys::QueryDesc, flags: c_int) {
    // SAFETY: the query is passed on as it came, and is valid and started afterwards.
    unsafe {
        match NEXT_START {
            Some(next) => next(query, flags),
            None => standard_ExecutorStart(query, flags),
        }
        if settings::capture() && (*query).operation == pg_sys::CmdType::CMD_SELECT {
            started(query, flags);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn started(query: *mut pg_sys::QueryDesc, flags: c_int) {
    // SAFETY: the query is valid and started.
    unsafe {
        if is_candidate(query, flags) {
            catching(|| attach(query));
        }
    }
}

/// Whether the rows that a query reads may be captured at all; the cheap questions first.
///
/// # Safety
/// `query` must be started.
unsafe fn is_candidate(query: *mut pg_sys::QueryDesc, flags: c_int) -> bool {
    // SAFETY: a started query has a planned statement and an MVCC snapshot or none.
    unsafe {
        let statement = (*query).plannedstmt;
        if !shared::is_there()
            || (*statement).relationOids.is_null()
            || flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as c_int != 0
            || (*statement).hasModifyingCTE
            || (*query).planstate.is_null()
            || (*query).snapshot.is_null()
            || (*(*query).snapshot).snapshot_type != pg_sys::SnapshotType::SNAPSHOT_MVCC
            || pg_sys::wal_level < pg_sys::WalLevel::WAL_LEVEL_LOGICAL as c_int
            || pg_sys::RecoveryInProgress()
        {
            return false;
        }
        let oids = (*statement).relationOids;
        let length = usize::try_from((*oids).length).unwrap_or(0);
        let tables = std::slice::from_raw_parts((*oids).elements, length);
        let cached = with_session(|session| {
            tables
                .iter()
                .any(|cell| session.captures(u32::from(cell.oid_value)))
        });
        if cached != Some(true) {
            return false;
        }
        let reason = if transaction_wrote() {
            Counter::SkippedWrote
        } else if !(*statement).rowMarks.is_null() {
            Counter::SkippedRowLock
        } else if pg_sys::ParallelWorkerNumber >= 0 {
            Counter::SkippedParallel
        } else if (*query).instrument_options != 0
            && std::ptr::eq((*query).dest, (&raw const pg_sys::None_Receiver).read().cast())
        {
            Counter::SkippedExplain
        } else {
            return true;
        };
        stats::add(reason, 1);
        false
    }
}

/// Wraps the scans of cached tables.
///
/// # Safety
/// `query` must be started and a candidate.
unsafe fn attach(query: *mut pg_sys::QueryDesc) {
    // SAFETY: the callback's memory and its argument live as long as the query's context, which it is registered on; the
    // argument is only compared. The plan state tree is complete after ExecutorStart.
    unsafe {
        let context = (*(*query).estate).es_query_cxt;
        let callback = pg_sys::MemoryContextAllocZero(context, size_of::<pg_sys::MemoryContextCallback>())
            .cast::<pg_sys::MemoryContextCallback>();
        (*callback).func = Some(forget);
        (*callback).arg = query.cast();
        pg_sys::MemoryContextRegisterResetCallback(context, callback);
        if with_session(|session| session.start(query as usize)).is_some() {
            BUSY = true;
            visit((*query).planstate, std::ptr::null_mut());
        }
    }
}

/// The query's memory goes, be it at its end or after an error.
unsafe extern "C-unwind" fn forget(query: *mut c_void) {
    end_query(query as usize);
}

/// Wraps this node if it scans a cached table, and visits those below it.
unsafe extern "C-unwind" fn visit(node: *mut pg_sys::PlanState, context: *mut c_void) -> bool {
    use pg_sys::NodeTag::{
        T_BitmapHeapScanState, T_IndexScanState, T_SampleScanState, T_SeqScanState, T_TidRangeScanState,
        T_TidScanState,
    };
    if node.is_null() {
        return false;
    }
    // SAFETY: the tag tells that the node is a ScanState; its relation is open while the query runs. planstate_tree_walker
    // visits the node's children.
    unsafe {
        if matches!(
            (*node).type_,
            T_SeqScanState
                | T_SampleScanState
                | T_IndexScanState
                | T_BitmapHeapScanState
                | T_TidScanState
                | T_TidRangeScanState
        ) {
            let relation = (*node.cast::<pg_sys::ScanState>()).ss_currentRelation;
            if let (false, Some(original)) = (relation.is_null(), (*node).ExecProcNodeReal) {
                let table = u32::from((*relation).rd_id);
                let wrap = with_session(|session| {
                    let captures = session.captures(table);
                    if captures {
                        session.attach(node as usize, original, table);
                    }
                    captures
                });
                if wrap == Some(true) {
                    pg_sys::ExecSetExecProcNode(node, Some(wrapper));
                }
            }
        }
        walk(node, context)
    }
}

/// # Safety
/// `node` must be a plan state.
#[cfg(any(feature = "pg14", feature = "pg15"))]
unsafe fn walk(node: *mut pg_sys::PlanState, context: *mut c_void) -> bool {
    unsafe extern "C-unwind" {
        fn planstate_tree_walker(
            node: *mut pg_sys::PlanState,
            walker: unsafe extern "C-unwind" fn(*mut pg_sys::PlanState, *mut c_void) -> bool,
            context: *mut c_void,
        ) -> bool;
    }
    // SAFETY: by the caller's promise; the guard turns an ERROR into an unwind.
    unsafe { pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| planstate_tree_walker(node, visit, context)) }
}

/// # Safety
/// `node` must be a plan state.
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
unsafe fn walk(node: *mut pg_sys::PlanState, context: *mut c_void) -> bool {
    // SAFETY: by the caller's promise.
    unsafe { pg_sys::planstate_tree_walker_impl(node, Some(visit), context) }
}

/// Runs in place of a scan node: the node itself, and then capture of the row that it returned.
unsafe extern "C-unwind" fn wrapper(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the original function of this very node.
    unsafe {
        let original = original(node);
        let slot = original(node);
        if !slot.is_null() && (*slot).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 == 0 {
            returned(node, original);
        }
        slot
    }
}

/// The function that runs a wrapped node when nobody captures.
#[pg_guard]
unsafe extern "C-unwind" fn original(node: *mut pg_sys::PlanState) -> ExecProcNode {
    match with_session(|session| session.scan(node as usize)).flatten() {
        Some(scan) => scan.original,
        // The wrapper stands only on nodes that were attached, and those are known as long as the query lives.
        None => error!("walmirror: a captured scan is unknown"),
    }
}

/// A wrapped node has returned a row.
#[pg_guard]
unsafe extern "C-unwind" fn returned(node: *mut pg_sys::PlanState, original: ExecProcNode) {
    // SAFETY: a wrapped node is a ScanState.
    unsafe {
        let source = ScanSlot {
            slot: (*node.cast::<pg_sys::ScanState>()).ss_ScanTupleSlot,
            _node: std::marker::PhantomData,
        };
        if !source.is_filled() {
            return;
        }
        if with_session(|session| session.row(node as usize, &source)) == Some(Next::Stop) {
            pg_sys::ExecSetExecProcNode(node, Some(original));
        }
    }
}

#[cfg(not(feature = "pg18"))]
unsafe extern "C-unwind" fn run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
    once: bool,
) {
    // SAFETY: the arguments are passed on as they came.
    unsafe {
        match NEXT_RUN {
            Some(next) => next(query, direction, count, once),
            None => standard_ExecutorRun(query, direction, count, once),
        }
        if BUSY {
            emit(query);
        }
    }
}

#[cfg(feature = "pg18")]
unsafe extern "C-unwind" fn run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
) {
    // SAFETY: the arguments are passed on as they came.
    unsafe {
        match NEXT_RUN {
            Some(next) => next(query, direction, count),
            None => standard_ExecutorRun(query, direction, count),
        }
        if BUSY {
            emit(query);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn emit(query: *mut pg_sys::QueryDesc) {
    with_session(|session| session.emit(query as usize));
}

unsafe extern "C-unwind" fn end(query: *mut pg_sys::QueryDesc) {
    // SAFETY: the argument is passed on as it came.
    unsafe {
        if BUSY {
            // Its nodes go now, so their addresses may come again.
            ended(query);
        }
        match NEXT_END {
            Some(next) => next(query),
            None => standard_ExecutorEnd(query),
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn ended(query: *mut pg_sys::QueryDesc) {
    end_query(query as usize);
}

fn end_query(query: usize) {
    with_session(|session| {
        session.end(query);
        // SAFETY: a plain variable of this single-threaded backend.
        unsafe { BUSY = !session.is_idle() };
    });
}

/// The scan slot of a node that has just returned a row.
pub struct ScanSlot<'a> {
    slot: *mut pg_sys::TupleTableSlot,
    _node: std::marker::PhantomData<&'a ()>,
}

impl ScanSlot<'_> {
    fn is_filled(&self) -> bool {
        // SAFETY: the slot of a started node is NULL or valid.
        unsafe { !self.slot.is_null() && (*self.slot).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 == 0 }
    }

    /// Block and offset of the row version.
    pub fn place(&self) -> (u32, u16) {
        // SAFETY: a filled slot of a table scan has the row's place.
        unsafe {
            let place = (*self.slot).tts_tid;
            (
                u32::from(place.ip_blkid.bi_hi) << 16 | u32::from(place.ip_blkid.bi_lo),
                place.ip_posid,
            )
        }
    }

    /// Takes the row apart, TOASTed values fetched. `false` if one of them is larger than `max_bytes`.
    pub fn read(&self, row: &mut Row, plan: &Plan, max_bytes: usize) -> bool {
        // SAFETY: a filled slot; after slot_getsomeattrs_int its arrays hold as many items as its descriptor has columns.
        unsafe {
            let columns = (*(*self.slot).tts_tupleDescriptor).natts;
            if i32::from((*self.slot).tts_nvalid) < columns {
                pg_sys::slot_getsomeattrs_int(self.slot, columns);
            }
            let columns = usize::try_from(columns).unwrap_or(0);
            row.copy(
                std::slice::from_raw_parts((*self.slot).tts_values, columns),
                std::slice::from_raw_parts((*self.slot).tts_isnull, columns),
            );
        }
        plan.fields
            .iter()
            .all(|field| value::fetch_toasted(&field.read, row, field.position, max_bytes))
    }
}

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
    // SAFETY: reads backend-local state.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// `pg_database.oid` of this session.
pub fn database() -> u32 {
    // SAFETY: set when the session started.
    u32::from(unsafe { pg_sys::MyDatabaseId })
}

/// When the client's statement started, in milliseconds since 2000-01-01. No system call.
pub fn statement_time_ms() -> u64 {
    // SAFETY: reads backend-local state.
    u64::try_from(unsafe { pg_sys::GetCurrentStatementStartTimestamp() } / 1000).unwrap_or(0)
}

/// Runs work whose errors concern capture alone; `None` if it failed. What the session has to hear goes on its way: a
/// cancel, a timeout, a shutdown (class 57).
pub fn catching<R>(work: impl FnOnce() -> R) -> Option<R> {
    let work = std::panic::AssertUnwindSafe(work);
    PgTryBuilder::new(move || {
        let work = work;
        Some((work.0)())
    })
    .catch_others(|error| match error {
        CaughtError::PostgresError(report)
            if super::function::is_operator_intervention(report.sql_error_code()) =>
        {
            CaughtError::PostgresError(report).rethrow()
        }
        _ => None,
    })
    .catch_rust_panic(|_| None)
    .execute()
}

/// The WAL writer is not woken more often than this: a busy server would do little else, and flushes by its commits.
const NUDGE_MS: u64 = 10;

/// Writes captured rows to the WAL and has the WAL writer flush them soon.
pub fn write_capture(content: &[u8]) {
    settings::failpoint(settings::Failpoint::CaptureWrite);
    let lsn = super::hooks::log_message(capture::PREFIX, content, false);
    // SAFETY: only touches shared memory. From now on the WAL writer flushes up to there at its next round, which is
    // wal_writer_delay away.
    unsafe { pg_sys::XLogSetAsyncXactLSN(lsn) };
    let (Some(last), now) = (shared::last_nudge(), statement_time_ms()) else {
        return;
    };
    let before = last.load(Ordering::Relaxed);
    let due = now.abs_diff(before) >= NUDGE_MS;
    if due
        && last
            .compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    {
        wake_wal_writer();
    }
}

fn wake_wal_writer() {
    // SAFETY: the WAL writer's latch stands in shared memory and is there while the server runs.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        {
            let latch = (*pg_sys::ProcGlobal).walwriterLatch;
            if !latch.is_null() {
                pg_sys::SetLatch(latch);
            }
        }
        #[cfg(feature = "pg18")]
        {
            let writer = (*pg_sys::ProcGlobal).walwriterProc;
            if let Ok(number) = usize::try_from(writer) {
                pg_sys::SetLatch(&raw mut (*(*pg_sys::ProcGlobal).allProcs.add(number)).procLatch);
            }
        }
    }
}
