//! While a value is read, no function runs that a user wrote. Whoever owns a type may give it a cast to json, to_jsonb()
//! calls its function for what stands within arrays and rows, and values are read by others: by whoever SELECTs the row, by
//! walsenders, by a backfill.
//!
//! Plans refuse types with such casts (`plan::types`). But the function behind a cast can be replaced, and a cast can come
//! while a value is read. So Postgres is asked to tell of such functions when they are about to run.

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::catalog_types::is_c_function;
use crate::error::Refusal;

/// Whether a value is being read. Read by the hooks, which may not touch anything that needs dropping.
static mut READING: bool = false;
static mut NEXT_NEEDS: pg_sys::needs_fmgr_hook_type = None;
static mut NEXT_CALL: pg_sys::fmgr_hook_type = None;

/// Sets the hooks; in `_PG_init`.
pub fn hook() {
    // SAFETY: hooks are chained in _PG_init, as Postgres prescribes.
    unsafe {
        NEXT_NEEDS = pg_sys::needs_fmgr_hook;
        pg_sys::needs_fmgr_hook = Some(needs);
        NEXT_CALL = pg_sys::fmgr_hook;
        pg_sys::fmgr_hook = Some(call);
    }
}

/// Reads a value; a function that is not written in C ends that with an ERROR before it has begun.
pub fn kept_out<T>(read: impl FnOnce() -> T) -> T {
    let _reading = Reading::begin();
    read()
}

struct Reading {
    before: bool,
}

impl Reading {
    fn begin() -> Self {
        // SAFETY: a plain variable of this single-threaded backend.
        unsafe {
            let before = READING;
            READING = true;
            Self { before }
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // SAFETY: as above. An ERROR within comes by as an unwind, so that this runs then too.
        unsafe { READING = self.before }
    }
}

/// Whether calls of a function are to be told of; asked when it is looked up.
unsafe extern "C-unwind" fn needs(function: pg_sys::Oid) -> bool {
    // SAFETY: written once, in _PG_init; the next hook gets the argument as it came.
    unsafe { NEXT_NEEDS.is_some_and(|next| next(function)) || (READING && is_users(function)) }
}

/// Such a call begins or ends. Unguarded, with nothing to drop: an ERROR of the next hook jumps over it as over C.
unsafe extern "C-unwind" fn call(
    event: pg_sys::FmgrHookEventType::Type,
    function: *mut pg_sys::FmgrInfo,
    argument: *mut pg_sys::Datum,
) {
    // SAFETY: fmgr_security_definer passes the function that it is about to call; the next hook gets what came.
    unsafe {
        if READING && event == pg_sys::FmgrHookEventType::FHET_START {
            refuse((*function).fn_oid);
        }
        if let Some(next) = NEXT_CALL {
            next(event, function, argument);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn is_users(function: pg_sys::Oid) -> bool {
    !is_c_function(function)
}

#[pg_guard]
unsafe extern "C-unwind" fn refuse(function: pg_sys::Oid) {
    if !is_c_function(function) {
        Refusal::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            "walmirror does not run functions in other languages than C to read a value",
            "Drop the cast to json that calls it.",
        )
        .raise();
    }
}
