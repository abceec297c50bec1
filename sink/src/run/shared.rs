//! What the threads of a session share: how far each is, how much is queued, and whether to stop.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use walmirror_proto::Lsn;

use super::health::Health;
use super::metrics::Metrics;
use crate::backfill::Chunk;
use crate::error::Error;
use crate::pq::{CopyBuffer, Waker};

/// Bytes of the stream that may wait for the planner. Beyond this the stream is not read (INVARIANT I7).
const QUEUE_BYTES: usize = 8 * 1024 * 1024;
/// What a message takes there besides its bytes, about. A keepalive has none, and a server whose other databases are busy sends
/// one each time that it has caught up with them.
const MESSAGE_BYTES: usize = 64;

/// What the planner gets, in the order in which it counts.
#[derive(Debug)]
pub enum Input {
    /// One write of the output plugin, and where it was.
    Frame(CopyBuffer, Lsn),
    /// The server has sent everything before this.
    Keepalive(Lsn),
    /// A worker read something; its marker follows in the stream.
    Chunk(Box<Chunk>),
    /// The marker of this chunk could not be written.
    Forget(u64),
    /// These keys of a relation are about to be read again.
    Reread(u32, Vec<Vec<u8>>),
    /// None of those is being read any more.
    RereadOver,
    /// The session ends.
    Stop,
}

/// How far the end of a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Streaming.
    Running,
    /// Nothing new is planned or read; what is on its way to Redis gets there.
    Draining,
    /// Redis has what it gets: the stream may send its last feedback and end.
    Closing,
}

/// Shared by the threads of one session.
#[derive(Debug, Default)]
pub(super) struct Shared {
    applied: AtomicU64,
    durable: AtomicU64,
    queued_bytes: AtomicUsize,
    /// The receiver waits for the queue to get shorter.
    held: AtomicBool,
    /// When the last command was sent that Redis has answered on the connection that writes.
    heard: Mutex<Option<Instant>>,
    /// At the end the applier has asked Redis once more, and it was there.
    is_clean: AtomicBool,
    /// What the last feedback confirmed, once the server has taken it.
    acknowledged: OnceLock<Lsn>,
    phase: AtomicU8,
    stream_waker: OnceLock<Waker>,
    failure: Mutex<Option<Error>>,
    pub(super) health: Arc<Health>,
    pub(super) metrics: Arc<Metrics>,
}

impl Shared {
    pub(super) fn new(applied: Lsn) -> Self {
        let shared = Self::default();
        shared.applied.store(applied.0, Ordering::Release);
        shared
    }

    /// The same, as a part of this process.
    pub(super) fn of(health: &Arc<Health>, applied: Lsn) -> Self {
        Self {
            metrics: Arc::clone(&health.metrics),
            health: Arc::clone(health),
            ..Self::new(applied)
        }
    }

    pub(super) fn set_stream_waker(&self, waker: Waker) {
        let _ = self.stream_waker.set(waker);
    }

    pub(super) fn wake_stream(&self) {
        if let Some(waker) = self.stream_waker.get() {
            waker.wake();
        }
    }

    /// A message of so many bytes waits for the planner.
    pub(super) fn queued(&self, bytes: usize) {
        self.queued_bytes
            .fetch_add(MESSAGE_BYTES + bytes, Ordering::AcqRel);
    }

    /// It does no longer.
    pub(super) fn taken(&self, bytes: usize) {
        let bytes = MESSAGE_BYTES + bytes;
        let left = self.queued_bytes.fetch_sub(bytes, Ordering::SeqCst) - bytes;
        if left < QUEUE_BYTES / 2 && self.held.swap(false, Ordering::SeqCst) {
            self.wake_stream();
        }
    }

    /// Whether so much waits that the stream is not to be read.
    pub(super) fn is_full(&self) -> bool {
        self.queued_bytes.load(Ordering::SeqCst) >= QUEUE_BYTES
    }

    /// The same for who wants to be woken when it is so no longer.
    pub(super) fn is_full_still(&self) -> bool {
        // Looked at again after the flag is up, so that the planner cannot miss it.
        self.held.store(true, Ordering::SeqCst);
        self.is_full()
    }

    /// Everything before this is applied. INVARIANT I4: it never goes back.
    pub(super) fn set_applied(&self, lsn: Lsn) {
        if self.applied.fetch_max(lsn.0, Ordering::AcqRel) < lsn.0 {
            self.wake_stream();
        }
    }

    pub(super) fn applied(&self) -> Lsn {
        Lsn(self.applied.load(Ordering::Acquire))
    }

    /// Everything before this is on replicas or disk, where that is asked for.
    pub(super) fn set_durable(&self, lsn: Lsn) {
        if self.durable.fetch_max(lsn.0, Ordering::AcqRel) < lsn.0 {
            self.wake_stream();
        }
    }

    pub(super) fn durable(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::Acquire))
    }

    /// Redis answered what was sent then on the connection that writes: it was there, and had what was applied.
    pub(super) fn set_heard(&self, sent: Instant) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(sent);
        self.health.note_redis();
    }

    pub(super) fn set_clean(&self) {
        self.is_clean.store(true, Ordering::Release);
    }

    pub(super) fn is_clean(&self) -> bool {
        self.is_clean.load(Ordering::Acquire)
    }

    pub(super) fn set_acknowledged(&self, lsn: Lsn) {
        let _ = self.acknowledged.set(lsn);
    }

    pub(super) fn acknowledged(&self) -> Option<Lsn> {
        self.acknowledged.get().copied()
    }

    pub(super) fn heard(&self) -> Option<Instant> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Running,
            1 => Phase::Draining,
            _ => Phase::Closing,
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        self.wake_stream();
    }

    pub(super) fn is_running(&self) -> bool {
        self.phase() == Phase::Running
    }

    /// Keeps the first error of the session: the others follow from it. One that only says that a wait was interrupted
    /// comes when the session ends already, and is none.
    pub(super) fn fail(&self, error: Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_none() && self.is_running() {
            *failure = Some(error);
        } else {
            tracing::debug!("while the session ends: {error}");
        }
        drop(failure);
        self.enter(Phase::Draining);
    }

    pub(super) fn has_failed(&self) -> bool {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.is_some()
    }

    pub(super) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// While Redis removed the keys of a large table for minutes, and other databases were busy, these were kept without end.
    #[test]
    fn keepalives_fill_the_queue_too() {
        let shared = Shared::default();
        let most = QUEUE_BYTES / MESSAGE_BYTES;
        (1..most).for_each(|_| shared.queued(0));
        assert!(!shared.is_full());
        shared.queued(0);
        assert!(shared.is_full() && shared.is_full_still());
        (0..most).for_each(|_| shared.taken(0));
        assert!(!shared.is_full() && !shared.held.load(Ordering::SeqCst));
        assert!(size_of::<Input>() <= MESSAGE_BYTES);
    }
}
