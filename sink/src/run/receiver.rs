//! The thread that owns the replication stream. It reads frames into a queue, never waits for anybody but the server, and
//! tells the server how far Redis is.
//!
//! INVARIANT I1: `flushed`, which is what confirms the slot, never passes what Redis holds durably.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use walmirror_proto::Lsn;

use super::shared::{Input, Phase, QUEUE_BYTES, Shared};
use crate::config::Durability;
use crate::error::{Class, Error};
use crate::pq::{ErrorKind, PqError};
use crate::replication::{Event, Feedback, Stream};

/// How long to wait for anything before looking around.
const TICK: Duration = Duration::from_millis(100);
/// On an idle stream the server is asked this often how far it is, so that the progress follows within a second.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How long the server may take to end the stream.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Receives until the session ends, then sends the last feedback.
pub(super) fn receive(
    mut stream: Stream,
    shared: &Arc<Shared>,
    queue: &Sender<Input>,
    durability: Durability,
    confirmed: Lsn,
    silence: Duration,
) -> Result<(), Error> {
    let mut trail = Trail::new(durability, confirmed);
    let mut asked = Instant::now();
    // While nothing is read, nothing can be heard.
    let mut listening = Instant::now();
    loop {
        let applied = shared.applied();
        match shared.phase() {
            Phase::Running => {}
            Phase::Draining => {
                stream.feedback(trail.feedback(shared, applied, Instant::now()), false)?;
                stream.hold(TICK)?;
                continue;
            }
            Phase::Closing => {
                // A session that failed knows nothing about Redis any more: it may be what has just lost its tail.
                let feedback = if shared.has_failed() {
                    trail.feedback(shared, applied, Instant::now())
                } else {
                    trail.last(shared, applied)
                };
                stream.feedback(feedback, false)?;
                return stream.close(CLOSE_TIMEOUT);
            }
        }
        let now = Instant::now();
        let ask = now.duration_since(asked) > ASK_EVERY;
        if ask {
            asked = now;
        }
        stream.feedback(trail.feedback(shared, applied, now), ask)?;
        if shared.queued_bytes.load(Ordering::Acquire) >= QUEUE_BYTES {
            // Looked at again after the flag is up, so that the planner cannot miss it.
            shared.held.store(true, Ordering::SeqCst);
            if shared.queued_bytes.load(Ordering::SeqCst) >= QUEUE_BYTES {
                stream.hold(TICK)?;
            }
            asked = Instant::now();
            listening = asked;
            continue;
        }
        match stream.next(trail.wait(now))? {
            Event::Frame { bytes, .. } => {
                asked = now;
                shared.queued_bytes.fetch_add(bytes.len(), Ordering::AcqRel);
                let _ = queue.send(Input::Frame(bytes));
            }
            Event::Keepalive { wal_end, .. } => drop(queue.send(Input::Keepalive(wal_end))),
            Event::Timeout if listening.max(stream.heard()).elapsed() > silence => {
                let what = format!("it was asked, and said nothing for {silence:?}");
                let error = PqError::new(ErrorKind::Silence, what);
                return Err(Error::postgres("the server is silent", error).at(applied));
            }
            Event::Timeout | Event::Woken => {}
            Event::End => {
                let error = PqError::new(
                    ErrorKind::Connection,
                    "the server ended the stream (it is shutting down)",
                );
                debug_assert_eq!(error.class(), Class::Retry);
                return Err(Error::postgres("the stream ended", error).at(applied));
            }
        }
    }
}

/// Remembers when what was applied, to know what is durable by now.
struct Trail {
    durability: Durability,
    steps: VecDeque<(Instant, Lsn)>,
    durable: Lsn,
}

impl Trail {
    /// `confirmed`: what the slot was confirmed up to before. Without any position the server would release no COMMIT that
    /// waits for this standby until the first window is over.
    fn new(durability: Durability, confirmed: Lsn) -> Self {
        Self {
            durability,
            steps: VecDeque::new(),
            durable: confirmed,
        }
    }

    fn feedback(&mut self, shared: &Shared, applied: Lsn, now: Instant) -> Feedback {
        match self.durability {
            Durability::Memory { window } => {
                // A few steps a window say enough, and keep the queue short.
                let space = window / 16;
                if self
                    .steps
                    .back()
                    .is_none_or(|(at, lsn)| *lsn < applied && now.duration_since(*at) >= space)
                {
                    self.steps.push_back((now, applied));
                }
                while let Some((_, lsn)) = self
                    .steps
                    .front()
                    .filter(|(at, _)| now.duration_since(*at) >= window)
                {
                    self.durable = self.durable.max(*lsn);
                    self.steps.pop_front();
                }
            }
            Durability::Replicas { .. } | Durability::Aof => {
                self.durable = self.durable.max(shared.durable())
            }
        }
        Feedback {
            written: applied,
            flushed: self.durable,
            applied,
        }
    }

    /// At an end in good order: memory counts as durable, because a Redis that goes on running has it.
    fn last(&self, shared: &Shared, applied: Lsn) -> Feedback {
        let flushed = match self.durability {
            Durability::Memory { .. } => applied,
            Durability::Replicas { .. } | Durability::Aof => self.durable.max(shared.durable()),
        };
        Feedback {
            written: applied,
            flushed,
            applied,
        }
    }

    /// How long to wait until there is something to say.
    fn wait(&self, now: Instant) -> Duration {
        match (self.durability, self.steps.front()) {
            (Durability::Memory { window }, Some((at, _))) => (*at + window)
                .saturating_duration_since(now)
                .clamp(Duration::from_millis(1), TICK),
            _ => TICK,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_durable_after_its_window() {
        let window = Duration::from_secs(1);
        let mut trail = Trail::new(Durability::Memory { window }, Lsn(1));
        let shared = Shared::default();
        let start = Instant::now();
        assert_eq!(trail.feedback(&shared, Lsn(10), start).flushed, Lsn(1));
        let later = trail.feedback(&shared, Lsn(20), start + Duration::from_millis(500));
        assert_eq!(
            (later.written, later.flushed, later.applied),
            (Lsn(20), Lsn(1), Lsn(20))
        );
        assert_eq!(
            trail
                .feedback(&shared, Lsn(30), start + Duration::from_millis(1_000))
                .flushed,
            Lsn(10)
        );
        assert_eq!(
            trail
                .feedback(&shared, Lsn(30), start + Duration::from_millis(1_500))
                .flushed,
            Lsn(20)
        );
        assert_eq!(
            trail
                .feedback(&shared, Lsn(30), start + Duration::from_millis(2_600))
                .flushed,
            Lsn(30)
        );
        assert_eq!(trail.last(&shared, Lsn(31)).flushed, Lsn(31));
    }

    #[test]
    fn replicas_are_durable_when_they_say_so() {
        let mut trail = Trail::new(Durability::Replicas { count: 1 }, Lsn(1));
        let shared = Shared::default();
        let start = Instant::now();
        assert_eq!(
            trail
                .feedback(&shared, Lsn(10), start + Duration::from_secs(9))
                .flushed,
            Lsn(1)
        );
        shared.set_durable(Lsn(5));
        assert_eq!(trail.feedback(&shared, Lsn(10), start).flushed, Lsn(5));
        assert_eq!(trail.last(&shared, Lsn(10)).flushed, Lsn(5));
    }
}
