//! Says so when what is applied does not become durable: the slot stands still then, Postgres keeps its WAL, and nothing else would tell why.
//! Pure: the clock is an argument.

use std::time::{Duration, Instant};

/// How long a position may be waited for without a word …
const PATIENCE: Duration = Duration::from_secs(30);
/// … and how long after that it is said again.
const AGAIN: Duration = Duration::from_secs(600);

/// Since when nothing has become durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stalled {
    /// Nothing that was applied waited then.
    since: Instant,
    said: Option<Instant>,
}

impl Stalled {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            said: None,
        }
    }

    /// Something became durable, or nothing waits.
    pub(super) fn moves(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// Something waits. Some: it is time to say so, and for how long it has.
    pub(super) fn waits(&mut self, now: Instant) -> Option<Duration> {
        let waited = now.duration_since(self.since);
        let is_due = match self.said {
            None => waited >= PATIENCE,
            Some(said) => now.duration_since(said) >= AGAIN,
        };
        if !is_due {
            return None;
        }
        self.said = Some(now);
        Some(waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_after_half_a_minute_and_then_every_ten() {
        let start = Instant::now();
        let mut stalled = Stalled::new(start);
        let mut said = Vec::new();
        for second in 0..1300 {
            said.extend(
                stalled
                    .waits(start + Duration::from_secs(second))
                    .map(|waited| waited.as_secs()),
            );
        }
        assert_eq!(said, [30, 630, 1230]);
        let later = start + Duration::from_secs(1300);
        stalled.moves(later);
        assert_eq!(stalled.waits(later + Duration::from_secs(29)), None);
        assert_eq!(
            stalled.waits(later + Duration::from_secs(31)),
            Some(Duration::from_secs(31))
        );
    }
}
