//! How captured rows get from the WAL buffers to the walsender soon, at little cost to the query that read them.
//!
//! A walsender sees only flushed WAL, and a non-transactional message is not flushed by itself. What Postgres offers
//! (`XLogSetAsyncXactLSN`, which each commit of a transaction that wrote WAL calls) wakes the WAL writer nearly every time,
//! which costs more than the capture. So a background worker does it: while captures come in it flushes every
//! [`ROUND`], and it sleeps when there are none. A backend tells it how far to flush by one atomic operation, and sets its
//! latch only when it sleeps. The operation is on a word that few others share.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder, BgWorkerStartTime, SignalWakeFlags};
use pgrx::pg_sys;
use pgrx::prelude::*;

use super::shared::{self, Flush};
use super::{hooks, settings, unguarded};
use crate::capture;

/// How long captures may wait for the next flush while they come in fast.
const ROUND: Duration = Duration::from_millis(10);

/// Registers the worker; in `_PG_init` while the postmaster preloads libraries. It takes one of `max_worker_processes`; where none
/// is left Postgres logs so, and captures are flushed by the WAL writer instead.
pub fn register() {
    BackgroundWorkerBuilder::new("walmirror capture flusher")
        .set_library("walmirror")
        .set_function("walmirror_capture_flusher")
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
}

/// The worker's main function, which Postgres finds by its name.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn walmirror_capture_flusher(_argument: pg_sys::Datum) {
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    let Some(flush) = shared::flush() else {
        return;
    };
    // SAFETY: MyLatch is this process's latch. It stands in its PGPROC, in shared memory at the same address in every process,
    // so others may set it as long as the server runs; after this process's end that wakes its successor for nothing.
    flush.latch.store(unsafe { pg_sys::MyLatch } as u64, SeqCst);
    let mut flushed = 0;
    loop {
        // The flag first and then the position, and backends do it the other way round: one of the two sees the other.
        flush.sleeping.store(1, SeqCst);
        let wanted = shared::captured();
        let pause = (wanted != flushed).then_some(ROUND);
        if wanted != flushed {
            flush.sleeping.store(0, SeqCst);
            // SAFETY: the position is one that XLogInsert returned, and recovery is over.
            unsafe { pg_sys::XLogFlush(wanted) };
            flushed = wanted;
        }
        if !BackgroundWorker::wait_latch(pause) {
            break;
        }
    }
    // Whoever captures from here on sees to it himself.
    flush.latch.store(0, SeqCst);
    // What was asked for before that is flushed to its end. A walsender that is to stop waits for the end of the record of which it has the
    // first pages, and a fast stop of the server waits for the walsender.
    let wanted = shared::captured();
    if wanted != flushed {
        // SAFETY: as above.
        unsafe { pg_sys::XLogFlush(wanted) };
    }
}

/// Writes captured rows to the WAL and sees to it that they are flushed soon.
pub fn write_capture(content: &[u8]) {
    settings::failpoint(settings::Failpoint::CaptureWrite);
    // SAFETY: a variable of this backend. LogLogicalMessage moves it, and a transaction without an id for which it is set
    // has its commit wake the WAL writer: the capture does not need that, and nothing else of it does.
    let before = unsafe { pg_sys::XactLastRecEnd };
    let lsn = hooks::log_message(capture::PREFIX, content, false);
    // SAFETY: as above.
    unsafe { pg_sys::XactLastRecEnd = before };
    let flusher = shared::flush();
    if let Some(flush) = flusher {
        ask(flush, lsn);
    }
    // Asked first and looked at then, and the worker does it the other way round when it ends: one of the two sees the other.
    if flusher.is_none_or(|flush| flush.latch.load(SeqCst) == 0) {
        // SAFETY: only touches shared memory.
        unsafe { pg_sys::XLogSetAsyncXactLSN(lsn) };
    }
}

fn ask(flush: &Flush, lsn: u64) {
    if let Some(captured) = shared::own_captured() {
        captured.fetch_max(lsn, SeqCst);
    }
    if flush.sleeping.load(SeqCst) != 0 && flush.sleeping.swap(0, SeqCst) != 0 {
        let latch = flush.latch.load(SeqCst) as *mut pg_sys::Latch;
        if !latch.is_null() {
            // SAFETY: the worker's latch, see above.
            unsafe { unguarded::SetLatch(latch) };
        }
    }
}
