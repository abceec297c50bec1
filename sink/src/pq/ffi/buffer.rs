//! The memory of one COPY message.

use std::ffi::{c_char, c_void};
use std::ops::Deref;
use std::ptr::NonNull;

use pq_sys as pq;

/// One message of a COPY, in the memory that libpq read it into: it is never copied, and freed on drop.
///
/// It is independent of the connection and may go to another thread.
pub struct CopyBuffer {
    buffer: NonNull<c_char>,
    length: usize,
    start: usize,
}

// SAFETY: the buffer is plain memory with this one owner; PQfreemem is free(), which any thread may call.
unsafe impl Send for CopyBuffer {}
// SAFETY: shared references only read the bytes.
unsafe impl Sync for CopyBuffer {}

impl CopyBuffer {
    /// Takes what PQgetCopyData gave: `length` bytes at `buffer`, which nobody else owns.
    pub(super) fn new(buffer: NonNull<c_char>, length: usize) -> Self {
        Self {
            buffer,
            length,
            start: 0,
        }
    }

    /// Leaves off the first `count` bytes, at most all. Costs nothing; the memory stays with the buffer.
    pub fn skip(mut self, count: usize) -> Self {
        self.start = self.start.saturating_add(count).min(self.length);
        self
    }
}

impl Deref for CopyBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: PQgetCopyData gave `length` initialised bytes at `buffer`, nobody writes to them, and `start` never
        // exceeds `length`.
        unsafe {
            std::slice::from_raw_parts(
                self.buffer.as_ptr().cast::<u8>().add(self.start),
                self.length - self.start,
            )
        }
    }
}

impl AsRef<[u8]> for CopyBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for CopyBuffer {
    // INVARIANT I8: the length only, because the bytes are rows.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CopyBuffer({} bytes)", self.len())
    }
}

impl Drop for CopyBuffer {
    fn drop(&mut self) {
        // SAFETY: PQgetCopyData allocated the buffer, and this is its only owner.
        unsafe { pq::PQfreemem(self.buffer.as_ptr().cast::<c_void>()) }
    }
}
