//! What may be confirmed: the slot follows what Redis holds durably, as `--durability` understands it. Pure: the clock is an
//! argument. The receiver asks it before every feedback.
//!
//! INVARIANT I1: `flushed`, which is what confirms the slot, never passes what Redis holds durably.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use walmirror_proto::Lsn;

use crate::config::Durability;
use crate::replication::Feedback;

/// The longest that anybody waits for something to say.
const TICK: Duration = Duration::from_millis(100);

/// What is known of Redis.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// Applied up to here.
    pub(super) applied: Lsn,
    /// Replicas or the disk say that they have everything up to here.
    pub(super) reported: Lsn,
    /// When the last command was sent that the connection that writes has had an answer to. Not when it came: it may have waited to
    /// be read for longer than Redis was there.
    pub(super) heard: Option<Instant>,
}

/// Remembers when what was applied, to know what is durable by now.
pub(super) struct Trail {
    durability: Durability,
    steps: VecDeque<(Instant, Lsn)>,
    durable: Lsn,
}

impl Trail {
    /// `confirmed`: what the slot was confirmed up to before. Without any position the server would release no COMMIT that
    /// waits for this standby until the first window is over.
    pub(super) fn new(durability: Durability, confirmed: Lsn) -> Self {
        Self {
            durability,
            steps: VecDeque::new(),
            durable: confirmed,
        }
    }

    /// What to tell the server now; `seen` is what is known of Redis.
    ///
    /// Memory is durable after its window only if Redis answers after it, on the connection that wrote: a Redis that crashed
    /// and came back meanwhile may have lost what it had applied, and an idle session has not noticed yet.
    pub(super) fn feedback(&mut self, seen: Seen, now: Instant) -> Feedback {
        let applied = seen.applied;
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
                    .filter(|(at, _)| seen.heard.is_some_and(|heard| heard >= *at + window))
                {
                    self.durable = self.durable.max(*lsn);
                    self.steps.pop_front();
                }
            }
            Durability::Replicas { .. } | Durability::Aof => self.durable = self.durable.max(seen.reported),
        }
        Feedback {
            written: applied,
            flushed: self.durable,
            applied,
        }
    }

    /// At an end in good order: memory counts as durable, because a Redis that goes on running has it.
    pub(super) fn last(&self, seen: Seen) -> Feedback {
        let applied = seen.applied;
        let flushed = match self.durability {
            Durability::Memory { .. } => applied,
            Durability::Replicas { .. } | Durability::Aof => self.durable.max(seen.reported),
        };
        Feedback {
            written: applied,
            flushed,
            applied,
        }
    }

    /// How long to wait until there may be something to say. What is overdue waits for an answer of Redis, which wakes.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        match (self.durability, self.steps.front()) {
            (Durability::Memory { window }, Some((at, _))) if *at + window > now => (*at + window)
                .duration_since(now)
                .clamp(Duration::from_millis(1), TICK),
            _ => TICK,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(1);

    fn applied(lsn: u64, heard: Option<Instant>) -> Seen {
        Seen {
            applied: Lsn(lsn),
            heard,
            ..Seen::default()
        }
    }

    #[test]
    fn memory_is_durable_after_its_window() {
        let mut trail = Trail::new(Durability::Memory { window: WINDOW }, Lsn(1));
        let start = Instant::now();
        let mut flushed = |lsn, milliseconds| {
            let now = start + Duration::from_millis(milliseconds);
            trail.feedback(applied(lsn, Some(now)), now).flushed.0
        };
        assert_eq!(flushed(10, 0), 1);
        assert_eq!(flushed(20, 500), 1);
        assert_eq!(flushed(30, 1_000), 10);
        assert_eq!(flushed(30, 1_500), 20);
        assert_eq!(flushed(30, 2_600), 30);
        assert_eq!(trail.last(applied(31, None)).flushed, Lsn(31));
    }

    #[test]
    fn written_is_what_is_applied() {
        let mut trail = Trail::new(Durability::Memory { window: WINDOW }, Lsn(1));
        let feedback = trail.feedback(applied(20, None), Instant::now());
        assert_eq!(
            (feedback.written, feedback.flushed, feedback.applied),
            (Lsn(20), Lsn(1), Lsn(20))
        );
    }

    /// Redis crashed and lost its tail while the session was idle: the window alone would have confirmed what is gone.
    #[test]
    fn memory_is_not_durable_until_redis_answers_behind_the_window() {
        let mut trail = Trail::new(Durability::Memory { window: WINDOW }, Lsn(1));
        let start = Instant::now();
        let later = start + Duration::from_secs(9);
        trail.feedback(applied(10, Some(start)), start);
        assert_eq!(trail.feedback(applied(10, Some(start)), later).flushed, Lsn(1));
        assert_eq!(trail.wait(later), TICK);
        assert_eq!(trail.feedback(applied(10, Some(later)), later).flushed, Lsn(10));
    }

    #[test]
    fn replicas_are_durable_when_they_say_so() {
        let mut trail = Trail::new(Durability::Replicas { count: 1 }, Lsn(1));
        let now = Instant::now();
        assert_eq!(trail.feedback(applied(10, Some(now)), now).flushed, Lsn(1));
        let reported = Seen {
            reported: Lsn(5),
            ..applied(10, Some(now))
        };
        assert_eq!(trail.feedback(reported, now).flushed, Lsn(5));
        assert_eq!(trail.last(reported).flushed, Lsn(5));
    }
}
