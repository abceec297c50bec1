//! Functions of Postgres, declared without the guard that pgrx's bindings put around every call: a guard costs a sigsetjmp,
//! and these run for every query or every WAL record. They raise no error, but for those that say so.

use pgrx::pg_sys;

use super::scan::ExecProcNode;

unsafe extern "C-unwind" {
    /// xlog.c
    pub fn RecoveryInProgress() -> bool;
    /// xact.c
    pub fn GetTopTransactionIdIfAny() -> u32;
    /// xact.c
    pub fn IsInParallelMode() -> bool;
    /// xact.c; 1 outside of subtransactions.
    pub fn GetCurrentTransactionNestLevel() -> std::ffi::c_int;
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
    /// xact.c
    pub fn IsTransactionState() -> bool;
    /// xlogreader.c; raises errors, which must pass over nothing that needs dropping.
    pub fn XLogReadRecord(
        reader: *mut pg_sys::XLogReaderState,
        error: *mut *mut std::ffi::c_char,
    ) -> *mut pg_sys::XLogRecord;
    /// xlogreader.c
    pub fn XLogBeginRead(reader: *mut pg_sys::XLogReaderState, position: pg_sys::XLogRecPtr);
    /// decode.c; raises errors, which must pass over nothing that needs dropping.
    pub fn LogicalDecodingProcessRecord(
        context: *mut pg_sys::LogicalDecodingContext,
        record: *mut pg_sys::XLogReaderState,
    );
    #[cfg(feature = "pg14")]
    fn GetFlushRecPtr() -> u64;
    #[cfg(not(feature = "pg14"))]
    fn GetFlushRecPtr(timeline: *mut pg_sys::TimeLineID) -> u64;
    /// mbutils.c
    pub fn GetDatabaseEncoding() -> std::ffi::c_int;
    /// miscinit.c
    pub fn GetUserIdAndSecContext(user: *mut pg_sys::Oid, security_context: *mut std::ffi::c_int);
    /// guc.c
    pub fn NewGUCNestLevel() -> std::ffi::c_int;
    /// guc.c; raises errors only where settings are set back.
    pub fn AtEOXact_GUC(is_commit: bool, nest_level: std::ffi::c_int);
    /// latch.c
    pub fn SetLatch(latch: *mut pg_sys::Latch);
}

/// How far WAL is flushed on a primary (`GetFlushRecPtr`).
///
/// # Safety
/// Not in recovery.
pub unsafe fn flushed() -> u64 {
    // SAFETY: by the caller's promise; the timeline is not asked for.
    unsafe {
        #[cfg(feature = "pg14")]
        return GetFlushRecPtr();
        #[cfg(not(feature = "pg14"))]
        GetFlushRecPtr(std::ptr::null_mut())
    }
}
