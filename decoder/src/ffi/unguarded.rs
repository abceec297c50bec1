//! Functions of Postgres that raise no error, declared without the guard that pgrx's bindings put around every call: a
//! guard costs a sigsetjmp, and these run for every query.

use pgrx::pg_sys;

use super::scan::ExecProcNode;

unsafe extern "C-unwind" {
    /// xlog.c
    pub fn RecoveryInProgress() -> bool;
    /// xact.c
    pub fn GetTopTransactionIdIfAny() -> u32;
    /// xact.c
    pub fn IsInParallelMode() -> bool;
    /// xact.c; microseconds since 2000-01-01.
    pub fn GetCurrentStatementStartTimestamp() -> i64;
    /// mcxt.c
    pub fn MemoryContextRegisterResetCallback(
        context: pg_sys::MemoryContext,
        callback: *mut pg_sys::MemoryContextCallback,
    );
    /// execProcnode.c
    pub fn ExecSetExecProcNode(node: *mut pg_sys::PlanState, function: ExecProcNode);
    /// timestamp.c; microseconds since 2000-01-01.
    pub fn GetCurrentTimestamp() -> i64;
    /// mbutils.c
    pub fn GetDatabaseEncoding() -> std::ffi::c_int;
    /// latch.c
    pub fn SetLatch(latch: *mut pg_sys::Latch);
}
