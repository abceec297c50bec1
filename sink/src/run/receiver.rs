//! The thread that owns the replication stream. It reads frames into a queue, never waits for anybody but the server, and
//! tells the server how far Redis is; `durability` decides what it may say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use walmirror_proto::Lsn;

use super::durability::{Seen, Trail};
use super::shared::{Input, Phase, Shared};
use crate::config::Durability;
use crate::error::{Class, Error};
use crate::pq::{ErrorKind, PqError};
use crate::replication::{Event, Stream};

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
        // Before what is known of Redis: what is known when the others have ended is the last of it.
        let phase = shared.phase();
        let seen = Seen {
            applied: shared.applied(),
            reported: shared.durable(),
            heard: shared.heard(),
        };
        match phase {
            Phase::Running => {}
            Phase::Draining => {
                stream.feedback(trail.feedback(seen, Instant::now()), false)?;
                stream.hold(TICK)?;
                continue;
            }
            Phase::Closing => {
                // A session that failed, or whose last word Redis did not answer, knows nothing about Redis any more: it may be what has
                // just lost its tail.
                let feedback = if shared.has_failed() || !shared.is_clean() {
                    trail.feedback(seen, Instant::now())
                } else {
                    trail.last(seen)
                };
                stream.feedback(feedback, false)?;
                if stream.close(CLOSE_TIMEOUT)? {
                    shared.set_acknowledged(feedback.flushed);
                }
                return Ok(());
            }
        }
        let now = Instant::now();
        let ask = now.duration_since(asked) > ASK_EVERY;
        if ask {
            asked = now;
        }
        let feedback = trail.feedback(seen, now);
        shared.health.note_confirmed(feedback.flushed);
        stream.feedback(feedback, ask)?;
        if shared.is_full() {
            // It is not the server that is silent.
            shared.health.note_stream(None);
            if shared.is_full_still() {
                stream.hold(TICK)?;
            }
            asked = Instant::now();
            listening = asked;
            continue;
        }
        match stream.next(trail.wait(now))? {
            Event::Frame {
                bytes,
                wal_start,
                wal_end,
            } => {
                shared.health.note_stream(Some(wal_end));
                asked = now;
                shared.queued(bytes.len());
                let _ = queue.send(Input::Frame(bytes, wal_start));
            }
            Event::Keepalive { wal_end, .. } => {
                shared.health.note_stream(Some(wal_end));
                shared.queued(0);
                let _ = queue.send(Input::Keepalive(wal_end));
            }
            Event::Timeout if listening.max(stream.heard()).elapsed() > silence => {
                let what = format!("it was asked, and said nothing for {silence:?}");
                let error = PqError::new(ErrorKind::Silence, what);
                return Err(Error::postgres("the server is silent", error).at(seen.applied));
            }
            Event::Timeout | Event::Woken => {}
            Event::End => {
                let error = PqError::new(
                    ErrorKind::Connection,
                    "the server ended the stream (it is shutting down)",
                );
                debug_assert_eq!(error.class(), Class::Retry);
                return Err(Error::postgres("the stream ended", error).at(seen.applied));
            }
        }
    }
}
