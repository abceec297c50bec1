//! The shared memory of capture: counters, and the recently-captured table. There is none when the library is not in
//! `shared_preload_libraries`; capture is off then.

use std::slice;
use std::sync::atomic::AtomicU64;

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::settings;
use crate::capture::stats::COUNTERS;

const NAME: &std::ffi::CStr = c"walmirror capture";

// Set before the postmaster forks, and inherited by every backend.
static mut START: *const AtomicU64 = std::ptr::null();
#[cfg(not(feature = "pg14"))]
static mut NEXT_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut NEXT_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// What stands before the recently-captured table: the counters, and when the WAL writer was woken last.
const HEAD: usize = COUNTERS.len() + 1;

fn bytes() -> usize {
    (HEAD + settings::capture_table_size()) * size_of::<AtomicU64>()
}

/// Asks for the memory; in `_PG_init` while the postmaster preloads libraries.
pub fn request() {
    // SAFETY: hooks are chained in _PG_init, as Postgres prescribes.
    unsafe {
        #[cfg(not(feature = "pg14"))]
        {
            NEXT_REQUEST = pg_sys::shmem_request_hook;
            pg_sys::shmem_request_hook = Some(request_hook);
        }
        #[cfg(feature = "pg14")]
        pg_sys::RequestAddinShmemSpace(bytes());
        NEXT_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup_hook);
    }
}

#[cfg(not(feature = "pg14"))]
#[pg_guard]
unsafe extern "C-unwind" fn request_hook() {
    // SAFETY: called by the postmaster, when sizes may be asked for.
    unsafe {
        if let Some(next) = NEXT_REQUEST {
            next();
        }
        pg_sys::RequestAddinShmemSpace(bytes());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup_hook() {
    // SAFETY: called by the postmaster when shared memory exists, before any backend. AtomicU64 has the layout of u64 and
    // zero is a valid value.
    unsafe {
        if let Some(next) = NEXT_STARTUP {
            next();
        }
        let mut found = false;
        let start = pg_sys::ShmemInitStruct(NAME.as_ptr(), bytes(), &mut found);
        if !found {
            std::ptr::write_bytes(start.cast::<u8>(), 0, bytes());
        }
        START = start.cast::<AtomicU64>().cast_const();
    }
}

/// Whether there is shared memory.
pub fn is_there() -> bool {
    // SAFETY: written before the fork.
    !unsafe { START }.is_null()
}

/// The counters, in the order of [`COUNTERS`]; empty without shared memory.
pub fn counters() -> &'static [AtomicU64] {
    // SAFETY: START is NULL or points to `bytes()` bytes of shared memory, which live as long as the server.
    unsafe {
        if START.is_null() {
            &[]
        } else {
            slice::from_raw_parts(START, COUNTERS.len())
        }
    }
}

/// When capture woke the WAL writer last, in milliseconds since 2000-01-01.
pub fn last_nudge() -> Option<&'static AtomicU64> {
    // SAFETY: as above; the word follows the counters.
    unsafe {
        if START.is_null() {
            None
        } else {
            Some(&*START.add(COUNTERS.len()))
        }
    }
}

/// The slots of the recently-captured table; empty without shared memory.
pub fn seen() -> &'static [AtomicU64] {
    // SAFETY: as above; the slots follow the counters.
    unsafe {
        if START.is_null() {
            &[]
        } else {
            slice::from_raw_parts(START.add(HEAD), settings::capture_table_size())
        }
    }
}
