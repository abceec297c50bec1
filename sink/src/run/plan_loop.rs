//! The planner's thread: takes what the stream and the workers bring, and hands segments to the applier. It never waits
//! for more when something is complete and the applier has room; while the applier is busy, batches grow by themselves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, select};

use super::planning::Planning;
use super::shared::{Input, Shared};
use crate::error::Error;
use crate::redis::Segment;

/// Segments that are on their way to Redis: one that is being applied, one whose commands are sent ahead, one that waits.
const AHEAD: usize = 3;
/// Batches that are not full follow each other at this distance at least. An EXEC of one small transaction costs both
/// sides and the scheduler some 40 µs of CPU, ten times what the change itself costs; where transactions come one by one, none
/// of them waits.
const LINGER: Duration = Duration::from_micros(400);
/// A position that rose without a change is written at most so often.
const KEEPALIVE_EVERY: Duration = Duration::from_millis(200);

/// The channels of the thread.
pub(super) struct Channels {
    pub(super) input: Receiver<Input>,
    pub(super) segments: Sender<Segment>,
    /// One message for each segment that is done with.
    pub(super) room: Receiver<()>,
}

/// Plans until the session ends. What is complete by then still goes out.
pub(super) fn plan(mut planning: Planning, channels: &Channels, shared: &Arc<Shared>) -> Result<(), Error> {
    follow(&mut planning, channels, shared)?;
    if planning.is_dirty() {
        planning.flush();
    }
    while let Some(segment) = planning.next_segment() {
        if channels.segments.send(segment).is_err() {
            break;
        }
    }
    Ok(())
}

/// Who goes next, the stream or the workers' chunks.
struct Turns {
    /// Segments that the applier has not done with.
    outstanding: usize,
    /// A segment went out since the last piece of a chunk.
    is_owed: bool,
}

impl Turns {
    fn sent(&mut self) {
        self.outstanding += 1;
        self.is_owed = true;
    }

    fn done(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    fn is_full(&self) -> bool {
        self.outstanding >= AHEAD
    }

    /// Whether a piece of a chunk may be planned. Where Redis is no bottleneck, as many as there are; where it is, one with each
    /// segment: else a stream that fills every batch would leave a backfill where it is for as long as that lasts.
    fn takes_piece(&self) -> bool {
        !self.is_full() || self.is_owed
    }

    fn took_piece(&mut self) {
        self.is_owed = false;
    }
}

fn follow(planning: &mut Planning, channels: &Channels, shared: &Arc<Shared>) -> Result<(), Error> {
    let mut turns = Turns {
        outstanding: 0,
        is_owed: true,
    };
    let mut written = Instant::now();
    // When a position was written last that no change went with; at first none was.
    let mut positioned: Option<Instant> = None;
    let until_due = |positioned: Option<Instant>| {
        positioned.map_or(Duration::ZERO, |at| KEEPALIVE_EVERY.saturating_sub(at.elapsed()))
    };
    while shared.is_running() {
        while channels.room.try_recv().is_ok() {
            turns.done();
        }
        while let Some(segment) = planning.next_segment() {
            while turns.is_full() {
                match channels.room.recv_timeout(Duration::from_millis(100)) {
                    Ok(()) => turns.done(),
                    Err(_) if shared.is_running() => {}
                    Err(_) => return Ok(()),
                }
            }
            if channels.segments.send(segment).is_err() {
                return Ok(());
            }
            turns.sent();
            written = Instant::now();
        }
        if turns.takes_piece() && planning.wants_piece() {
            planning.piece()?;
            turns.took_piece();
        }
        if planning.is_replaying() {
            planning.replay()?;
            continue;
        }
        // Also where the stream never pauses.
        planning.note_healed();
        let input = match channels.input.try_recv() {
            Ok(input) => Some(input),
            Err(TryRecvError::Disconnected) => return Ok(()),
            Err(TryRecvError::Empty) => {
                let due = planning.is_advanced() && until_due(positioned).is_zero();
                // While an EXEC is under way, what is complete waits for the next one: it would only stand in line.
                if turns.outstanding == 0 && (planning.is_dirty() || due) {
                    match LINGER.saturating_sub(written.elapsed()) {
                        Duration::ZERO => {
                            if !planning.is_dirty() {
                                positioned = Some(Instant::now());
                            }
                            planning.flush();
                        }
                        rest => std::thread::sleep(rest),
                    }
                    continue;
                }
                if turns.takes_piece() && planning.wants_piece() {
                    continue;
                }
                let timeout = if planning.is_advanced() {
                    until_due(positioned)
                } else {
                    KEEPALIVE_EVERY
                };
                select! {
                    recv(channels.input) -> input => match input {
                        Ok(input) => Some(input),
                        Err(_) => return Ok(()),
                    },
                    recv(channels.room) -> room => match room {
                        Ok(()) => {
                            turns.done();
                            None
                        }
                        Err(_) => return Ok(()),
                    },
                    default(timeout.max(Duration::from_millis(1))) => None,
                }
            }
        };
        match input {
            Some(Input::Frame(bytes, start)) => {
                planning.frame(&bytes, start)?;
                shared.taken(bytes.len());
            }
            Some(Input::Keepalive(wal_end)) => {
                planning.keepalive(wal_end)?;
                shared.taken(0);
            }
            Some(Input::Chunk(chunk)) => planning.chunk(*chunk),
            Some(Input::Forget(id)) => planning.forget_chunk(id),
            Some(Input::Reread(relation, keys)) => planning.reread(relation, &keys),
            Some(Input::RereadOver) => planning.reread_over(),
            Some(Input::Stop) => return Ok(()),
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_fills_every_batch_leaves_chunks_a_turn() {
        let mut turns = Turns {
            outstanding: 0,
            is_owed: false,
        };
        assert!(turns.takes_piece());
        (0..AHEAD).for_each(|_| turns.sent());
        for _ in 0..3 {
            assert!(turns.is_full() && turns.takes_piece());
            turns.took_piece();
            assert!(!turns.takes_piece());
            // The applier is done with one, and the next is there already.
            turns.done();
            turns.sent();
        }
    }
}
