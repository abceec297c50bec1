//! Several WAL records in one turn of the walsender's loop.
//!
//! After each record a walsender asks the client whether it said something (`recv`), looks at its latch and at the clock. In a
//! backlog of small transactions that is a third of its CPU, more than decoding them takes. So where it wants to flush in
//! its loop, up to [`TURN`] further records are read and decoded (`XLogReadRecord`, `LogicalDecodingProcessRecord`, as
//! `XLogSendLogical` does) before it goes on.
//!
//! What makes this safe:
//!
//! - It happens only between two records. Every other place that flushes is known, as it lies behind a function pointer that
//!   is wrapped here ([`busy`]): the reader's page_read, in which a walsender waits for WAL, the output plugin's writes, and
//!   update_progress.
//! - At least half of [`REST`] bytes of flushed WAL stay for the loop itself: a large record that leaves less is given back. So a
//!   walsender that has caught up, the one whose latency matters, works as ever. Its position (`sentPtr`), which only the loop's own
//!   records move, is behind by a turn at most, never ahead; at the end of the WAL it is the end, for which a server that is stopped waits.
//!   A record of which only the first pages are flushed is waited for as the loop waits, in page_read.
//! - A turn ends when there is something to send or [`TURN_MICROSECONDS`] are over, so answers, signals and timeouts are seen in time.
//! - What cannot be read is left to the loop, which reads it again and raises the error.

use std::cell::Cell;
use std::ffi::{c_char, c_int};

use pgrx::pg_sys;

use super::local::Local;
use super::unguarded;

/// Records of one turn.
const TURN: u32 = 32;
/// Further records are not read once a turn has taken so long.
const TURN_MICROSECONDS: i64 = 500;
/// The clock is asked after so many records.
const CLOCK: u32 = 4;
/// Bytes of flushed WAL behind which no further record is read.
const REST: u64 = 64 * 1024;

type UpdateProgress = pg_sys::LogicalOutputPluginWriterUpdateProgress;

/// The walsender whose context lives.
struct Walsender {
    context: Cell<*mut pg_sys::LogicalDecodingContext>,
    page_read: Cell<pg_sys::XLogPageReadCB>,
    update_progress: Cell<UpdateProgress>,
    /// Whether a record is being read or decoded, so that no other may be.
    busy: Cell<bool>,
    /// Whether the page of a record is being read.
    reading: Cell<bool>,
    /// How far WAL was flushed when that was last asked.
    flushed: Cell<u64>,
}

static WALSENDER: Local<Walsender> = Local::new(Walsender {
    context: Cell::new(std::ptr::null_mut()),
    page_read: Cell::new(None),
    update_progress: Cell::new(None),
    busy: Cell::new(false),
    reading: Cell::new(false),
    flushed: Cell::new(0),
});

/// Wraps what a walsender's context calls.
///
/// # Safety
/// `context` must be the context of startup_cb in a walsender that streams, and [`stop`] must be called before its memory goes.
pub unsafe fn start(context: *mut pg_sys::LogicalDecodingContext) {
    let walsender = WALSENDER.get();
    walsender.context.set(context);
    walsender.busy.set(false);
    walsender.reading.set(false);
    walsender.flushed.set(0);
    // SAFETY: by the caller's promise; both pointers are the context's own, and go with it.
    unsafe {
        let routine = &mut (*(*context).reader).routine;
        walsender.page_read.set(routine.page_read);
        routine.page_read = Some(page_read);
        walsender.update_progress.set((*context).update_progress);
        if (*context).update_progress.is_some() {
            (*context).update_progress = Some(update_progress);
        }
    }
}

/// The context goes.
pub fn stop() {
    WALSENDER.get().context.set(std::ptr::null_mut());
}

/// Runs what may flush while a record is being read or decoded. An ERROR out of it ends the stream, and with it the context.
pub fn busy<R>(work: impl FnOnce() -> R) -> R {
    let busy = &WALSENDER.get().busy;
    let before = busy.replace(true);
    let result = work();
    busy.set(before);
    result
}

/// Whether a walsender that flushes does so because it is about to wait for WAL, or for a standby that is to have it
/// (`WalSndWaitForWal`).
pub fn is_reading() -> bool {
    WALSENDER.get().reading.get()
}

/// Decodes further records while `goes_on`; called where the walsender wants to flush. Whether it did.
pub fn turn(goes_on: impl Fn() -> bool) -> bool {
    let walsender = WALSENDER.get();
    let context = walsender.context.get();
    if context.is_null() || walsender.busy.get() || !goes_on() {
        return false;
    }
    // SAFETY: the context lives until `stop`. A walsender in its loop has no transaction; one that waits for WAL is busy.
    unsafe {
        let reader = (*context).reader;
        // Zero: it was not told yet where to begin.
        let position = (*reader).EndRecPtr;
        if position == 0 || !walsender.has_more(position, REST) || unguarded::IsTransactionState() {
            return false;
        }
        let began = unguarded::GetCurrentTimestamp();
        busy(|| {
            for record in 1..=TURN {
                let mut error: *mut c_char = std::ptr::null_mut();
                if unguarded::XLogReadRecord(reader, &mut error).is_null() || !error.is_null() {
                    return;
                }
                if !walsender.has_more((*reader).EndRecPtr, REST / 2) {
                    unguarded::XLogBeginRead(reader, (*reader).ReadRecPtr);
                    return;
                }
                unguarded::LogicalDecodingProcessRecord(context, reader);
                let late = record % CLOCK == 0
                    && unguarded::GetCurrentTimestamp().wrapping_sub(began) > TURN_MICROSECONDS;
                if late || !goes_on() || !walsender.has_more((*reader).EndRecPtr, REST) {
                    return;
                }
            }
        });
    }
    true
}

impl Walsender {
    /// Whether more than so many bytes of WAL behind a position are flushed. On a standby, where that is another question,
    /// there never are.
    fn has_more(&self, position: u64, bytes: u64) -> bool {
        let far = |flushed: u64| flushed.saturating_sub(position) > bytes;
        if far(self.flushed.get()) {
            return true;
        }
        // SAFETY: both read shared memory.
        self.flushed.set(unsafe {
            if unguarded::RecoveryInProgress() {
                0
            } else {
                unguarded::flushed()
            }
        });
        far(self.flushed.get())
    }
}

/// In place of `logical_read_xlog_page`, which waits for WAL and flushes meanwhile.
unsafe extern "C-unwind" fn page_read(
    reader: *mut pg_sys::XLogReaderState,
    page: pg_sys::XLogRecPtr,
    length: c_int,
    record: pg_sys::XLogRecPtr,
    buffer: *mut c_char,
) -> c_int {
    let walsender = WALSENDER.get();
    match walsender.page_read.get() {
        Some(original) => busy(|| {
            walsender.reading.set(true);
            // SAFETY: the arguments are passed on as they came.
            let read = unsafe { original(reader, page, length, record, buffer) };
            walsender.reading.set(false);
            read
        }),
        // It was set before this function was; -1 means that there is no page.
        None => -1,
    }
}

/// In place of `WalSndUpdateProgress`, which may send what is pending.
#[cfg(feature = "pg14")]
unsafe extern "C-unwind" fn update_progress(
    context: *mut pg_sys::LogicalDecodingContext,
    position: pg_sys::XLogRecPtr,
    xid: pg_sys::TransactionId,
) {
    if let Some(original) = WALSENDER.get().update_progress.get() {
        // SAFETY: the arguments are passed on as they came.
        busy(|| unsafe { original(context, position, xid) });
    }
}

/// In place of `WalSndUpdateProgress`, which may send what is pending.
#[cfg(not(feature = "pg14"))]
unsafe extern "C-unwind" fn update_progress(
    context: *mut pg_sys::LogicalDecodingContext,
    position: pg_sys::XLogRecPtr,
    xid: pg_sys::TransactionId,
    skipped: bool,
) {
    if let Some(original) = WALSENDER.get().update_progress.get() {
        // SAFETY: the arguments are passed on as they came.
        busy(|| unsafe { original(context, position, xid, skipped) });
    }
}
