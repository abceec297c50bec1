//! The configuration parameters `walmirror.*`.

use std::ffi::c_int;

use pgrx::pg_sys;
use pgrx::prelude::*;

// The variables that Postgres sets. Each backend has its own copy, and only this thread reads it.
static mut CAPTURE: bool = true;
static mut CAPTURE_INTERVAL: c_int = 1000;
static mut CAPTURE_MAX_ROWS: c_int = 1000;
static mut CAPTURE_MAX_BYTES: c_int = 64 * 1024;
static mut CAPTURE_TABLE_SIZE: c_int = 256 * 1024;
static mut FAILPOINT: c_int = 0;

/// Defines the parameters; once, in `_PG_init`. `preloading`: at server start, when shared memory can still be sized.
pub fn define(preloading: bool) {
    // SAFETY: names and texts are constants, the variables are statics, and there are no hooks.
    unsafe {
        pg_sys::DefineCustomBoolVariable(
            c"walmirror.capture".as_ptr(),
            c"Whether SELECTs of cached tables fill Redis.".as_ptr(),
            std::ptr::null(),
            &raw mut CAPTURE,
            true,
            pg_sys::GucContext::PGC_USERSET,
            0,
            None,
            None,
            None,
        );
        let user = pg_sys::GucContext::PGC_USERSET;
        integer(
            c"walmirror.capture_interval",
            c"A row that was captured is not captured again for this long.",
            &raw mut CAPTURE_INTERVAL,
            1000,
            0,
            3_600_000,
            user,
            pg_sys::GUC_UNIT_MS,
        );
        integer(
            c"walmirror.capture_max_rows",
            c"At most this many rows of one scan are captured.",
            &raw mut CAPTURE_MAX_ROWS,
            1000,
            0,
            i32::MAX,
            user,
            0,
        );
        integer(
            c"walmirror.capture_max_bytes",
            c"Rows that are larger when encoded are not captured.",
            &raw mut CAPTURE_MAX_BYTES,
            64 * 1024,
            64,
            256 << 20,
            user,
            pg_sys::GUC_UNIT_BYTE,
        );
        if preloading {
            let start = pg_sys::GucContext::PGC_POSTMASTER;
            integer(
                c"walmirror.capture_table_size",
                c"How many recently captured rows are remembered, 8 bytes of shared memory each.",
                &raw mut CAPTURE_TABLE_SIZE,
                256 * 1024,
                1024,
                1 << 28,
                start,
                0,
            );
        }
        let hidden = pg_sys::GUC_NO_SHOW_ALL | pg_sys::GUC_NOT_IN_SAMPLE;
        integer(
            c"walmirror.failpoint",
            c"For tests: where to fail on purpose.",
            &raw mut FAILPOINT,
            0,
            0,
            i32::MAX,
            pg_sys::GucContext::PGC_SUSET,
            hidden,
        );
        #[cfg(feature = "pg14")]
        pg_sys::EmitWarningsOnPlaceholders(c"walmirror".as_ptr());
        #[cfg(not(feature = "pg14"))]
        pg_sys::MarkGUCPrefixReserved(c"walmirror".as_ptr());
    }
}

/// # Safety
/// `variable` must be a static; within `_PG_init`.
#[allow(clippy::too_many_arguments)]
unsafe fn integer(
    name: &'static std::ffi::CStr,
    description: &'static std::ffi::CStr,
    variable: *mut c_int,
    default: c_int,
    min: c_int,
    max: c_int,
    context: pg_sys::GucContext::Type,
    flags: u32,
) {
    // SAFETY: by the caller's promise, and the texts are constants.
    unsafe {
        pg_sys::DefineCustomIntVariable(
            name.as_ptr(),
            description.as_ptr(),
            std::ptr::null(),
            variable,
            default,
            min,
            max,
            context,
            flags as c_int,
            None,
            None,
            None,
        );
    }
}

/// `walmirror.capture`
pub fn capture() -> bool {
    // SAFETY: a plain variable of this single-threaded backend.
    unsafe { CAPTURE }
}

/// `walmirror.capture_interval`, in milliseconds
pub fn capture_interval_ms() -> u64 {
    // SAFETY: a plain variable of this single-threaded backend.
    u64::try_from(unsafe { CAPTURE_INTERVAL }).unwrap_or(0)
}

/// `walmirror.capture_max_rows`
pub fn capture_max_rows() -> u64 {
    // SAFETY: a plain variable of this single-threaded backend.
    u64::try_from(unsafe { CAPTURE_MAX_ROWS }).unwrap_or(0)
}

/// `walmirror.capture_max_bytes`
pub fn capture_max_bytes() -> usize {
    // SAFETY: a plain variable of this single-threaded backend.
    usize::try_from(unsafe { CAPTURE_MAX_BYTES }).unwrap_or(0)
}

/// `walmirror.capture_table_size`, in slots
pub fn capture_table_size() -> usize {
    // SAFETY: set at server start, not changed afterwards.
    usize::try_from(unsafe { CAPTURE_TABLE_SIZE }).unwrap_or(0)
}

/// Places where a test can have the extension fail: bits of `walmirror.failpoint`. The bit after each makes it a panic
/// instead of an error.
#[derive(Debug, Clone, Copy)]
pub enum Failpoint {
    CaptureEncode = 1,
    Begin = 4,
    Change = 16,
    Commit = 64,
    Truncate = 256,
    Message = 1024,
    CaptureWrite = 4096,
    Rollback = 16384,
    CaptureBegin = 65536,
    CaptureRelease = 262_144,
    Startup = 1 << 20,
    StreamStop = 1 << 22,
    FilterByOrigin = 1 << 24,
    Free = 1 << 26,
}

/// Fails here if a test asked for it.
#[inline]
pub fn failpoint(place: Failpoint) {
    // SAFETY: a plain variable of this single-threaded backend.
    let armed = unsafe { FAILPOINT };
    if armed != 0 {
        fail(place as c_int, armed);
    }
}

#[cold]
#[allow(
    clippy::panic,
    reason = "only superusers who test arm it, and a panic is what they test"
)]
fn fail(place: c_int, armed: c_int) {
    if armed & place != 0 {
        error!("walmirror.failpoint {place}");
    }
    if armed & (place << 1) != 0 {
        panic!("walmirror.failpoint {}", place << 1);
    }
}
