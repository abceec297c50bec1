//! Tables that could not be read: a right is lacking, a file is damaged, a function raises an error. Each of them is told of and
//! tried again after a while; the others and the stream go on. Every worker has a list of its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::error::Error;

/// The pause after the first failure; twice as long after each further one.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The list.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    tables: BTreeMap<u32, Trouble>,
}

#[derive(Debug)]
struct Trouble {
    until: Instant,
    pause: Duration,
}

impl Troubles {
    /// Tells of an error that belongs to one table, and has the table left alone for a while. Any other error comes back.
    pub(super) fn take(&mut self, relation: u32, table: &str, error: Error) -> Result<(), Error> {
        if !error.is_of_one_table() {
            return Err(error);
        }
        let pause = self.note(relation, Instant::now());
        tracing::error!(
            table,
            next = error.next_command(),
            "{error}; the other tables go on, and this one is tried again in {} s",
            pause.as_secs()
        );
        Ok(())
    }

    fn note(&mut self, relation: u32, now: Instant) -> Duration {
        let before = self.tables.get(&relation).map(|trouble| trouble.pause);
        let pause = before.map_or(PAUSE_MIN, |pause| (pause * 2).min(PAUSE_MAX));
        let until = now + pause;
        self.tables.insert(relation, Trouble { until, pause });
        pause
    }

    /// It could be read.
    pub(super) fn clear(&mut self, relation: u32) {
        self.tables.remove(&relation);
    }

    /// Whether it is not its turn yet.
    pub(super) fn is_paused(&self, relation: u32) -> bool {
        self.is_paused_at(relation, Instant::now())
    }

    fn is_paused_at(&self, relation: u32, now: Instant) -> bool {
        self.tables
            .get(&relation)
            .is_some_and(|trouble| trouble.until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pq::{ErrorKind, PqError};

    #[test]
    fn a_table_is_tried_again_after_a_growing_pause() {
        let mut troubles = Troubles::default();
        let now = Instant::now();
        assert_eq!(troubles.note(7, now), PAUSE_MIN);
        assert!(troubles.is_paused_at(7, now) && !troubles.is_paused_at(8, now));
        assert!(!troubles.is_paused_at(7, now + PAUSE_MIN));
        for _ in 0..9 {
            troubles.note(7, now);
        }
        assert_eq!(troubles.note(7, now), PAUSE_MAX);
        troubles.clear(7);
        assert!(!troubles.is_paused_at(7, now));
        assert_eq!(troubles.note(7, now), PAUSE_MIN);
    }

    #[test]
    fn what_is_no_tables_fault_comes_back() {
        let take = |state: &str| {
            let error = PqError {
                sqlstate: Some(state.to_owned()),
                ..PqError::new(ErrorKind::Server, "x")
            };
            Troubles::default().take(7, "t", Error::postgres("x", error))
        };
        for state in ["42501", "XX001", "42883", "22P02", "XX000"] {
            assert!(take(state).is_ok(), "{state}");
        }
        for state in ["08006", "40001", "53200", "57P01", "28000", "58030"] {
            assert!(take(state).is_err(), "{state}");
        }
        assert!(Troubles::default().take(7, "t", Error::bug("x")).is_err());
    }
}
