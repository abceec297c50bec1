//! The shared memory of capture: counters, and the recently-captured table. There is none when the library is not in
//! `shared_preload_libraries`; capture is off then.

use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// Words of one set: the counters and the end of the last captured row in the WAL, padded to whole cache lines.
const SET: usize = (COUNTERS.len() + 1).next_multiple_of(LINE);
/// Words of a cache line.
const LINE: usize = 8;
/// A backend writes to the set that its process id picks: one that all shared would be a cache line that every
/// query of every core fights for.
const SETS: usize = 64;
const FLUSH: usize = size_of::<Flush>()
    .div_ceil(size_of::<AtomicU64>())
    .next_multiple_of(LINE);
/// Words before the recently-captured table: the counters and [`Flush`].
const HEAD: usize = SETS * SET + FLUSH;

/// What backends and the flusher tell each other.
#[repr(C)]
pub struct Flush {
    /// Not zero while the flusher sleeps until its latch is set.
    pub sleeping: AtomicU64,
    /// The address of the flusher's latch; zero while it does not run.
    pub latch: AtomicU64,
}

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

/// Words `from` and following, `count` of them; none without shared memory.
///
/// # Safety
/// They must lie within the [`bytes`] that were asked for.
unsafe fn words(from: usize, count: usize) -> &'static [AtomicU64] {
    // SAFETY: START is NULL or points to that much shared memory, which lives as long as the server.
    unsafe {
        if START.is_null() {
            &[]
        } else {
            slice::from_raw_parts(START.add(from), count)
        }
    }
}

/// The counters that this process adds to, in the order of [`COUNTERS`]; empty without shared memory.
pub fn own_counters() -> &'static [AtomicU64] {
    // SAFETY: one of the sets; MyProcPid is set when a process starts.
    unsafe { words((pg_sys::MyProcPid as usize % SETS) * SET, COUNTERS.len()) }
}

/// All sets of counters.
pub fn all_counters() -> impl Iterator<Item = &'static [AtomicU64]> {
    // SAFETY: the sets stand at the start.
    (0..SETS).map(|set| unsafe { words(set * SET, COUNTERS.len()) })
}

/// How far this process, and others with the same set, captured into the WAL; `None` without shared memory.
pub fn own_captured() -> Option<&'static AtomicU64> {
    // SAFETY: the word behind the counters of a set.
    unsafe { words((pg_sys::MyProcPid as usize % SETS) * SET + COUNTERS.len(), 1) }.first()
}

/// How far anybody captured into the WAL.
pub fn captured() -> u64 {
    let ends = (0..SETS).filter_map(|set| {
        // SAFETY: as above.
        unsafe { words(set * SET + COUNTERS.len(), 1) }.first()
    });
    ends.map(|end| end.load(Ordering::SeqCst)).max().unwrap_or(0)
}

/// What backends and the flusher tell each other; `None` without shared memory.
pub fn flush() -> Option<&'static Flush> {
    // SAFETY: as above; its words follow the counters, and it consists of such words alone.
    unsafe {
        if START.is_null() {
            None
        } else {
            Some(&*START.add(SETS * SET).cast::<Flush>())
        }
    }
}

/// The slots of the recently-captured table; empty without shared memory.
pub fn seen() -> &'static [AtomicU64] {
    // SAFETY: the slots follow, as many as the setting says, which cannot change while the server runs.
    unsafe { words(HEAD, settings::capture_table_size()) }
}
