//! The callbacks of the output plugin (`OutputPluginCallbacks`, replication/output_plugin.h), and nothing else: each takes
//! its C arguments apart and calls [`Decoder`].
//!
//! The decoder's state hangs on the decoding context's memory: shutdown_cb does not run after an ERROR, so a reset
//! callback of that memory context frees it.

use std::ffi::{CStr, c_char, c_void};
use std::slice;

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::datum::Tuple;
use super::memory::Context;
use super::relation::Rel;
use super::{hold, settings, text};
use crate::capture;
use crate::decode::ddl_message::{self, DdlMessage};
use crate::decode::{Change, Decoder, Output, Transaction};
use crate::options::{Format, Options, Origin};

/// The prefix of the messages that the sink writes to learn where in the stream it stands.
const MARKER_PREFIX: &CStr = c"walmirror.marker";

/// Called by Postgres when it loads the library as an output plugin.
///
/// # Safety
/// `callbacks` points to the structure to fill in (LoadOutputPlugin).
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn _PG_output_plugin_init(callbacks: *mut pg_sys::OutputPluginCallbacks) {
    // SAFETY: by the contract of this function; the structure was zeroed by the caller.
    let callbacks = unsafe { &mut *callbacks };
    callbacks.startup_cb = Some(startup);
    callbacks.begin_cb = Some(begin);
    callbacks.change_cb = Some(change);
    callbacks.truncate_cb = Some(truncate);
    callbacks.commit_cb = Some(commit);
    callbacks.message_cb = Some(message);
    callbacks.filter_by_origin_cb = Some(filter_by_origin);
    callbacks.stream_start_cb = Some(stream_start);
    callbacks.stream_stop_cb = Some(stream_stop);
    callbacks.stream_abort_cb = Some(stream_abort);
    callbacks.stream_commit_cb = Some(stream_commit);
    callbacks.stream_change_cb = Some(change);
    callbacks.stream_message_cb = Some(message);
    callbacks.stream_truncate_cb = Some(truncate);
    super::hooks::register_callbacks();
}

/// The writing side of one callback.
struct Writer {
    context: *mut pg_sys::LogicalDecodingContext,
    /// Whether this is the last write of a transaction.
    last: bool,
}

impl Output for Writer {
    fn write(&mut self, frame: &[u8]) {
        let Ok(length) = i32::try_from(frame.len()) else {
            error!("walmirror: a frame of {} bytes is too large", frame.len())
        };
        // SAFETY: called within a callback that may write; the context is the one that the callback was given, and
        // `out` is its StringInfo between PrepareWrite and Write.
        unsafe {
            pg_sys::OutputPluginPrepareWrite(self.context, self.last);
            pg_sys::appendBinaryStringInfo((*self.context).out, frame.as_ptr().cast(), length);
            hold::writing(frame.len(), || pg_sys::OutputPluginWrite(self.context, self.last));
        }
    }

    fn progress(&mut self) {
        // SAFETY: as above.
        #[cfg(feature = "pg14")]
        unsafe {
            pg_sys::OutputPluginUpdateProgress(self.context);
        }
        // SAFETY: as above. `false`: the transaction is not told to be skipped whole, so that no keepalive is forced for
        // each (the walsender sends them at its own pace).
        #[cfg(not(feature = "pg14"))]
        unsafe {
            pg_sys::OutputPluginUpdateProgress(self.context, false);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup(
    context: *mut pg_sys::LogicalDecodingContext,
    output: *mut pg_sys::OutputPluginOptions,
    is_init: bool,
) {
    // SAFETY: the context is valid for the whole decoding session, and so is its memory context.
    unsafe {
        let options = match if is_init {
            Ok(Options::default())
        } else {
            Options::parse(
                pairs((*context).output_plugin_options)
                    .iter()
                    .map(|(name, value)| (name.as_str(), value.as_deref())),
            )
        } {
            Ok(options) => options,
            Err(refusal) => refusal.raise(),
        };
        (*output).output_type = match options.format {
            Format::Protobuf => pg_sys::OutputPluginOutputType::OUTPUT_PLUGIN_BINARY_OUTPUT,
            Format::Json => pg_sys::OutputPluginOutputType::OUTPUT_PLUGIN_TEXTUAL_OUTPUT,
        };
        (*output).receive_rewrites = false;
        // True so far, as the callbacks are there.
        (*context).streaming = options.streaming;
        if options.origin == Origin::Any {
            // Postgres asks about every record otherwise.
            (*context).callbacks.filter_by_origin_cb = None;
        }
        let holds = !is_init && options.format == Format::Protobuf;
        let decoder = Box::new(Decoder::new(options, Context::from_raw((*context).context)));
        let decoder = Box::into_raw(decoder);
        (*context).output_plugin_private = decoder.cast();
        let callback =
            pg_sys::MemoryContextAllocZero((*context).context, size_of::<pg_sys::MemoryContextCallback>())
                .cast::<pg_sys::MemoryContextCallback>();
        (*callback).func = Some(free_decoder);
        (*callback).arg = decoder.cast();
        pg_sys::MemoryContextRegisterResetCallback((*context).context, callback);
        if holds {
            hold::start(context);
        }
    }
    settings::failpoint(settings::Failpoint::Startup);
}

/// Runs where Postgres cleans up, perhaps after an ERROR: a second one would end the session at best. So whatever fails here is told, and
/// what it leaves behind is not freed.
unsafe extern "C-unwind" fn free_decoder(decoder: *mut c_void) {
    hold::stop();
    let freed = std::panic::catch_unwind(|| {
        settings::failpoint(settings::Failpoint::Free);
        // SAFETY: registered once, with the pointer that Box::into_raw gave; Postgres calls it once. Dropping the decoder
        // touches no Postgres memory: its plans have no destructors that do.
        drop(unsafe { Box::from_raw(decoder.cast::<Decoder>()) });
    });
    if freed.is_err() {
        warning!("walmirror: the memory of the decoder could not be freed");
    }
}

/// The options as given: a list of DefElem.
///
/// # Safety
/// `list` must be NULL or a valid list of DefElem.
unsafe fn pairs(list: *mut pg_sys::List) -> Vec<(String, Option<String>)> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: by the caller's promise; an option without a value has arg NULL.
    unsafe {
        let length = usize::try_from((*list).length).unwrap_or(0);
        slice::from_raw_parts((*list).elements, length)
            .iter()
            .map(|cell| {
                let element = cell.ptr_value.cast::<pg_sys::DefElem>();
                let value = if (*element).arg.is_null() {
                    None
                } else {
                    text::string(pg_sys::defGetString(element))
                };
                (text::string((*element).defname).unwrap_or_default(), value)
            })
            .collect()
    }
}

/// The decoder of a session.
///
/// # Safety
/// `context` must be the context of a callback, after startup.
unsafe fn decoder<'a>(context: *mut pg_sys::LogicalDecodingContext) -> &'a mut Decoder {
    // SAFETY: startup put it there, and callbacks of one session never overlap.
    unsafe { &mut *(*context).output_plugin_private.cast::<Decoder>() }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(
    context: *mut pg_sys::LogicalDecodingContext,
    txn: *mut pg_sys::ReorderBufferTXN,
) {
    settings::failpoint(settings::Failpoint::Begin);
    // SAFETY: both are valid for the call.
    unsafe {
        hold::before_transaction((*txn).total_size);
        decoder(context).begin(transaction(txn));
    }
}

/// What is known of a transaction that has committed.
///
/// # Safety
/// `txn` must be the transaction of a callback.
unsafe fn transaction(txn: *const pg_sys::ReorderBufferTXN) -> Transaction {
    // SAFETY: by the caller's promise; the union holds commit_time once the commit record was read.
    unsafe {
        #[cfg(feature = "pg14")]
        let commit_time = (*txn).commit_time;
        #[cfg(not(feature = "pg14"))]
        let commit_time = (*txn).xact_time.commit_time;
        Transaction {
            xid: xid_number((*txn).xid),
            commit_lsn: (*txn).final_lsn,
            commit_time,
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_start(
    context: *mut pg_sys::LogicalDecodingContext,
    txn: *mut pg_sys::ReorderBufferTXN,
) {
    settings::failpoint(settings::Failpoint::Begin);
    // SAFETY: both are valid for the call.
    unsafe {
        hold::before_transaction((*txn).total_size);
        decoder(context).part(xid_number((*txn).xid));
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_stop(
    context: *mut pg_sys::LogicalDecodingContext,
    _txn: *mut pg_sys::ReorderBufferTXN,
) {
    settings::failpoint(settings::Failpoint::StreamStop);
    // SAFETY: the context is valid for the call.
    unsafe { decoder(context).part_end(&mut Writer { context, last: false }) }
}

/// `txn` is what was rolled back: a transaction that was sent while it was in progress, or a subtransaction of it.
#[pg_guard]
unsafe extern "C-unwind" fn stream_abort(
    context: *mut pg_sys::LogicalDecodingContext,
    txn: *mut pg_sys::ReorderBufferTXN,
    _abort_lsn: pg_sys::XLogRecPtr,
) {
    settings::failpoint(settings::Failpoint::Rollback);
    // SAFETY: both are valid for the call; `toptxn` is NULL in a top-level transaction.
    unsafe {
        let top = if (*txn).toptxn.is_null() {
            txn
        } else {
            (*txn).toptxn
        };
        let writer = &mut Writer { context, last: false };
        decoder(context).rollback(writer, xid_number((*top).xid), xid_number((*txn).xid));
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn stream_commit(
    context: *mut pg_sys::LogicalDecodingContext,
    txn: *mut pg_sys::ReorderBufferTXN,
    _commit_lsn: pg_sys::XLogRecPtr,
) {
    settings::failpoint(settings::Failpoint::Commit);
    // SAFETY: both are valid for the call.
    unsafe {
        let writer = &mut Writer { context, last: true };
        decoder(context).late_commit(writer, transaction(txn), (*txn).end_lsn, subtransactions(txn));
    }
}

/// The subtransactions that belong to a transaction: one that was rolled back does not any more (`ReorderBufferAbort` takes it out, by
/// `ReorderBufferCleanupTXN`).
///
/// # Safety
///
/// `txn` is a top-level transaction of the reorder buffer, which is not changed as long as the iterator lives.
unsafe fn subtransactions(txn: *const pg_sys::ReorderBufferTXN) -> impl Iterator<Item = u32> {
    // SAFETY: by the caller's promise; the head is a member of `txn`.
    let head = unsafe { &raw const (*txn).subtxns.head };
    let mut at = head;
    std::iter::from_fn(move || {
        // SAFETY: a circle of nodes that ends where it begins; of one that was never used, the first pointer is NULL (ilist.h). Each
        // node but the head is the member `node` of a subtransaction.
        unsafe {
            at = (*at).next;
            if at.is_null() || std::ptr::eq(at, head) {
                return None;
            }
            let sub = at.byte_sub(std::mem::offset_of!(pg_sys::ReorderBufferTXN, node));
            Some(xid_number((*sub.cast::<pg_sys::ReorderBufferTXN>()).xid))
        }
    })
    .fuse()
}

#[pg_guard]
unsafe extern "C-unwind" fn change(
    context: *mut pg_sys::LogicalDecodingContext,
    _txn: *mut pg_sys::ReorderBufferTXN,
    relation: pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    settings::failpoint(settings::Failpoint::Change);
    use pg_sys::ReorderBufferChangeType as Type;
    // SAFETY: all are valid for the call; `tp` is the union's member for row changes. Tuples stay valid until the
    // callback returns.
    unsafe {
        let rows = (*change).data.tp;
        let (old, new) = (tuple(rows.oldtuple), tuple(rows.newtuple));
        let what = match ((*change).action, old, new) {
            (Type::REORDER_BUFFER_CHANGE_INSERT, _, Some(new)) => Change::Insert(new),
            (Type::REORDER_BUFFER_CHANGE_UPDATE, old, Some(new)) => Change::Update { old, new },
            (Type::REORDER_BUFFER_CHANGE_DELETE, Some(old), _) => Change::Delete(old),
            (Type::REORDER_BUFFER_CHANGE_DELETE, None, _) => Change::Lost,
            _ => return,
        };
        let table = Rel::borrowed(relation);
        let writer = &mut Writer { context, last: false };
        decoder(context).change(writer, &table, what, changer(change), (*change).lsn);
    }
}

/// The transaction or subtransaction that did a change.
///
/// # Safety
/// `change` must be the change of a callback.
unsafe fn changer(change: *const pg_sys::ReorderBufferChange) -> u32 {
    // SAFETY: by the caller's promise; the reorder buffer sets `txn` in each change.
    unsafe { xid_number((*(*change).txn).xid) }
}

/// # Safety
/// `raw` must be NULL or a tuple of the reorder buffer.
#[cfg(any(feature = "pg17", feature = "pg18"))]
unsafe fn tuple(raw: pg_sys::HeapTuple) -> Option<Tuple> {
    // SAFETY: by the caller's promise.
    unsafe { Tuple::from_raw(raw) }
}

/// # Safety
/// `raw` must be NULL or a tuple of the reorder buffer.
#[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
unsafe fn tuple(raw: *mut pg_sys::ReorderBufferTupleBuf) -> Option<Tuple> {
    if raw.is_null() {
        return None;
    }
    // SAFETY: by the caller's promise; the tuple stands in the buffer.
    unsafe { Tuple::from_raw(&raw mut (*raw).tuple) }
}

#[pg_guard]
unsafe extern "C-unwind" fn truncate(
    context: *mut pg_sys::LogicalDecodingContext,
    _txn: *mut pg_sys::ReorderBufferTXN,
    count: i32,
    relations: *mut pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    settings::failpoint(settings::Failpoint::Truncate);
    // SAFETY: `relations` holds `count` open relations.
    unsafe {
        let tables: Vec<Rel> = slice::from_raw_parts(relations, usize::try_from(count).unwrap_or(0))
            .iter()
            .map(|&relation| Rel::borrowed(relation))
            .collect();
        let writer = &mut Writer { context, last: false };
        decoder(context).truncate(writer, &tables, changer(change), (*change).lsn);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn commit(
    context: *mut pg_sys::LogicalDecodingContext,
    txn: *mut pg_sys::ReorderBufferTXN,
    _commit_lsn: pg_sys::XLogRecPtr,
) {
    settings::failpoint(settings::Failpoint::Commit);
    // SAFETY: both are valid for the call.
    unsafe { decoder(context).commit(&mut Writer { context, last: true }, (*txn).end_lsn) }
}

#[pg_guard]
unsafe extern "C-unwind" fn message(
    context: *mut pg_sys::LogicalDecodingContext,
    txn: *mut pg_sys::ReorderBufferTXN,
    lsn: pg_sys::XLogRecPtr,
    transactional: bool,
    prefix: *const c_char,
    size: pg_sys::Size,
    content: *const c_char,
) {
    settings::failpoint(settings::Failpoint::Message);
    // SAFETY: the prefix is a C string and the content has `size` bytes; `txn` is NULL only if not transactional.
    unsafe {
        let prefix = CStr::from_ptr(prefix);
        let content = slice::from_raw_parts(content.cast::<u8>(), size);
        let writer = &mut Writer {
            context,
            last: !transactional,
        };
        if transactional && prefix.to_bytes() == ddl_message::PREFIX.as_bytes() {
            // Anybody may write logical messages: one that is not ours is none of our business.
            if let Ok(message) = serde_json::from_slice::<DdlMessage>(content) {
                decoder(context).ddl(writer, &message, message_writer(txn), lsn);
            }
        } else if !transactional && prefix == MARKER_PREFIX {
            decoder(context).marker(writer, content, lsn);
        } else if !transactional && prefix == capture::PREFIX {
            decoder(context).capture(writer, content);
        }
    }
}

/// The transaction or subtransaction that wrote a transactional message. The callback is not told, but before each change of a
/// transaction in progress Postgres notes who did it, to find out whether that was rolled back, unless it has committed
/// (SetupCheckXidLive): then it cannot be.
///
/// # Safety
/// `txn` must be the transaction of a callback.
unsafe fn message_writer(txn: *const pg_sys::ReorderBufferTXN) -> u32 {
    // SAFETY: by the caller's promise, and a variable of this process.
    unsafe {
        match xid_number(pg_sys::CheckXidAlive) {
            0 => xid_number((*txn).xid),
            xid => xid,
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn filter_by_origin(
    context: *mut pg_sys::LogicalDecodingContext,
    origin: pg_sys::RepOriginId,
) -> bool {
    settings::failpoint(settings::Failpoint::FilterByOrigin);
    // SAFETY: the context is valid, and startup comes first.
    unsafe { decoder(context).filters_origin(origin) }
}

/// A transaction id with its epoch, as of now.
pub fn full_xid(xid: u32) -> u64 {
    full_xid_before(next_full_xid(), xid)
}

/// The next transaction id to be assigned, with its epoch, or one that was so just now: its lock, which every transaction
/// that writes needs, is not taken.
pub fn next_full_xid() -> u64 {
    #[cfg(any(feature = "pg14", feature = "pg15", feature = "pg16"))]
    use pg_sys::ShmemVariableCache as variables;
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    use pg_sys::TransamVariables as variables;
    // SAFETY: points to shared memory since the backend started. An aligned word of 64 bits is read whole.
    unsafe { (&raw const (*variables).nextXid.value).read_volatile() }
}

/// A transaction id with its epoch. What is being decoded or read lies less than 2^31 transactions back, so the epoch is
/// that of the next transaction id, or the one before.
pub fn full_xid_before(next: u64, xid: u32) -> u64 {
    let same_epoch = (next & !u64::from(u32::MAX)) | u64::from(xid);
    if same_epoch > next {
        same_epoch.saturating_sub(1 << 32)
    } else {
        same_epoch
    }
}

fn xid_number(xid: pg_sys::TransactionId) -> u32 {
    xid.into_inner()
}
