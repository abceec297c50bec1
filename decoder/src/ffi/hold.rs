//! Many small transactions in one send.
//!
//! A walsender sends what an output plugin writes at once, and again looks for something to send after each WAL record. For a
//! transaction of one row that system call, and the wake of the reader at the other end, cost more than the row. So while
//! a walsender has more WAL to read, small writes stay in its send buffer. They leave
//!
//! - before the walsender waits for WAL, or for a standby that is to have it first: it then flushes while it reads a page,
//! - when it flushes twice without having read anything in between,
//! - when [`HOLD_BYTES`] or [`HOLD_MICROSECONDS`] are full,
//! - before a large transaction is decoded, be it one that sends nothing,
//!
//! so an idle or a lightly used server sends as ever. The place to decide is the table of functions behind Postgres' `pq_*`
//! calls (`PqCommMethods`, libpq/libpq.h), which others replace too (parallel workers send to a queue in this way). It is
//! replaced in a walsender alone, for as long as a decoding context lives, and each function ends in the one it replaces.

use std::cell::Cell;
use std::ffi::{c_char, c_int};

use pgrx::pg_sys;

use super::local::Local;
use super::{ahead, unguarded};

/// More is not held.
const HOLD_BYTES: usize = 16 * 1024;
/// Nor for longer. A session that waits for the sink's answer to its COMMIT may wait for so much more.
const HOLD_MICROSECONDS: i64 = 250;
/// A transaction of so many bytes of changes is decoded in less time than that, about.
const LARGE_TRANSACTION: usize = 256 * 1024;

/// `PQcommMethods` of libpq/libpq.h, Postgres 14 to 18.
#[derive(Clone, Copy)]
#[repr(C)]
struct Methods {
    comm_reset: unsafe extern "C-unwind" fn(),
    flush: unsafe extern "C-unwind" fn() -> c_int,
    flush_if_writable: unsafe extern "C-unwind" fn() -> c_int,
    is_send_pending: unsafe extern "C-unwind" fn() -> bool,
    putmessage: unsafe extern "C-unwind" fn(c_char, *const c_char, usize) -> c_int,
    putmessage_noblock: unsafe extern "C-unwind" fn(c_char, *const c_char, usize),
}

unsafe extern "C-unwind" {
    /// libpq/pqcomm.c; pgrx has no binding for it.
    static mut PqCommMethods: *const Methods;
}

/// What is held in this walsender.
struct Held {
    original: Cell<Option<&'static Methods>>,
    ours: Cell<Option<Methods>>,
    /// The walsender's reader of WAL.
    reader: Cell<*mut pg_sys::XLogReaderState>,
    /// Whether the output plugin is writing.
    writing: Cell<bool>,
    /// Bytes that were written since the last flush, about.
    bytes: Cell<usize>,
    /// When the first of them was, in microseconds since 2000-01-01.
    since: Cell<i64>,
    /// How often the walsender wanted to flush.
    calls: Cell<u32>,
    /// How far the reader was when the walsender last wanted to flush.
    read: Cell<u64>,
    /// Whether the socket did not take everything at the last flush: then nothing is held until it has.
    blocked: Cell<bool>,
    /// Whether the server's CopyDone was written, after which no CopyData may come: then the walsender does all as it would alone.
    done: Cell<bool>,
}

static HELD: Local<Held> = Local::new(Held {
    original: Cell::new(None),
    ours: Cell::new(None),
    reader: Cell::new(std::ptr::null_mut()),
    writing: Cell::new(false),
    bytes: Cell::new(0),
    since: Cell::new(0),
    calls: Cell::new(0),
    read: Cell::new(0),
    blocked: Cell::new(false),
    done: Cell::new(false),
});

/// Starts to hold writes back, if this is a walsender that streams.
///
/// # Safety
/// `context` must be the context of startup_cb, and [`stop`] must be called before its memory goes.
pub unsafe fn start(context: *mut pg_sys::LogicalDecodingContext) {
    let held = HELD.get();
    // SAFETY: by the caller's promise. The functions of SQL that read a slot run in a transaction; a walsender, which may run them as
    // well, has none when it streams. PqCommMethods always points to constants.
    unsafe {
        if pg_sys::MyBackendType != pg_sys::BackendType::B_WAL_SENDER
            || unguarded::IsTransactionState()
            || held.original.get().is_some()
        {
            return;
        }
        let original = &*PqCommMethods;
        held.reader.set((*context).reader);
        held.bytes.set(0);
        held.blocked.set(false);
        held.done.set(false);
        held.writing.set(false);
        held.original.set(Some(original));
        held.ours.set(Some(Methods {
            flush_if_writable,
            is_send_pending,
            putmessage_noblock,
            ..*original
        }));
        if let Some(ours) = &*held.ours.as_ptr() {
            PqCommMethods = ours;
        }
        ahead::start(context);
    }
}

/// Puts Postgres' own functions back. What is held is in its send buffer, before all that follows.
pub fn stop() {
    if let Some(original) = HELD.get().original.take() {
        // SAFETY: a variable of this process.
        unsafe { PqCommMethods = original };
        ahead::stop();
    }
}

/// Does a write of the output plugin, of so many bytes.
pub fn writing(bytes: usize, write: impl FnOnce()) {
    let held = HELD.get();
    if held.original.get().is_none() {
        return write();
    }
    if held.bytes.get() == 0 {
        held.since.set(now());
    }
    held.bytes.set(held.bytes.get() + bytes);
    held.writing.set(true);
    ahead::busy(write);
    held.writing.set(false);
}

/// A transaction is going to be decoded, with so many bytes of changes.
pub fn before_transaction(bytes: usize) {
    let held = HELD.get();
    if let (true, Some(original)) = (
        held.bytes.get() > 0 && bytes > LARGE_TRANSACTION,
        held.original.get(),
    ) {
        // A connection that is gone is found out by the next write.
        send(held, original);
    }
}

fn now() -> i64 {
    // SAFETY: asks the clock.
    unsafe { unguarded::GetCurrentTimestamp() }
}

fn send(held: &Held, original: &Methods) -> c_int {
    held.bytes.set(0);
    // SAFETY: Postgres' own functions, which raise no error.
    unsafe {
        let result = (original.flush_if_writable)();
        held.blocked.set((original.is_send_pending)());
        result
    }
}

/// In place of `socket_flush_if_writable`: 0, or EOF when the connection is gone.
unsafe extern "C-unwind" fn flush_if_writable() -> c_int {
    let held = HELD.get();
    let Some(original) = held.original.get() else {
        return 0;
    };
    if held.done.get() || ahead::is_reading() {
        return send(held, original);
    }
    let turned = ahead::turn(|| held.bytes.get() < HOLD_BYTES && !held.blocked.get() && !held.done.get());
    let bytes = held.bytes.get();
    // Asking the clock costs as much as the rest: every eighth time is a few records late at most, unless those are turns.
    let calls = held.calls.get().wrapping_add(1);
    held.calls.set(calls);
    let may_wait = bytes > 0
        && bytes < HOLD_BYTES
        && !held.blocked.get()
        && (!(turned || calls.is_multiple_of(8)) || now().wrapping_sub(held.since.get()) < HOLD_MICROSECONDS);
    if may_wait {
        if held.writing.get() {
            return 0;
        }
        // SAFETY: the reader lives as long as the decoding context.
        let read = unsafe { (*held.reader.get()).EndRecPtr };
        // The walsender has read a record since, so it is in its loop and comes by again before it waits.
        if held.read.replace(read) != read {
            return 0;
        }
    }
    send(held, original)
}

/// In place of `socket_is_send_pending`: what is held is not to be waited for.
unsafe extern "C-unwind" fn is_send_pending() -> bool {
    let held = HELD.get();
    let Some(original) = held.original.get() else {
        return false;
    };
    // SAFETY: Postgres' own function, which raises no error.
    (held.bytes.get() == 0 || held.blocked.get() || held.done.get())
        && unsafe { (original.is_send_pending)() }
}

/// In place of `socket_putmessage_noblock`, which raises errors: the walsender answers the client's CopyDone with its own.
unsafe extern "C-unwind" fn putmessage_noblock(kind: c_char, body: *const c_char, length: usize) {
    /// CopyDone of the protocol.
    const COPY_DONE: u8 = b'c';
    let held = HELD.get();
    if kind as u8 == COPY_DONE {
        held.done.set(true);
    }
    if let Some(original) = held.original.get() {
        // SAFETY: the arguments are passed on as they came.
        unsafe { (original.putmessage_noblock)(kind, body, length) }
    }
}
