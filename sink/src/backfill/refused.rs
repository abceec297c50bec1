//! Pending keys that the gate has refused because it does not know who changed them. They would be refused again for as long as a
//! transaction that it has forgotten stays open, which may be days: until the snapshots see it they are tried now and then only.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64;

use super::chunk::REFUSED_MAX;
use super::sql::Sql;
use super::worker::Context;
use crate::error::Error;

/// After so long they are tried all the same: meanwhile the gate may have met another change of them. Twice as long after each attempt.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The keys, by a hash. Those that are too many, or share one with another, are only read too often, or somewhat later.
#[derive(Debug)]
pub(super) struct Refused {
    keys: HashSet<u64>,
    until: Instant,
    pause: Duration,
}

impl Default for Refused {
    fn default() -> Self {
        Self {
            keys: HashSet::new(),
            until: Instant::now(),
            pause: PAUSE_MIN,
        }
    }
}

impl Refused {
    /// Before each pass: whether they have their turn again.
    pub(super) fn look(&mut self, context: &Context, sql: &mut Sql) -> Result<(), Error> {
        if self.keys.is_empty() {
            self.pause = PAUSE_MIN;
            return Ok(());
        }
        let snapshot = sql.begin()?;
        sql.end()?;
        self.decide(!context.backfill.is_useless(&snapshot), Instant::now());
        Ok(())
    }

    fn decide(&mut self, sees_all: bool, now: Instant) {
        if sees_all || now >= self.until {
            self.keys.clear();
        }
    }

    /// Whether a key is left alone for now.
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.keys.contains(&xxh3_64(key))
    }

    /// Behind a pass: these were refused in it.
    pub(super) fn add(&mut self, keys: &[u64]) {
        self.add_at(keys, Instant::now());
    }

    fn add_at(&mut self, keys: &[u64], now: Instant) {
        if !keys.is_empty() && self.keys.is_empty() {
            self.until = now + self.pause;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
        }
        let free = REFUSED_MAX.saturating_sub(self.keys.len());
        self.keys.extend(keys.iter().take(free));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_keys_are_tried_less_and_less_often_until_all_is_visible() {
        let (mut refused, mut now) = (Refused::default(), Instant::now());
        for attempt in 0..9 {
            refused.add_at(&[xxh3_64(b"t:1")], now);
            assert!(refused.contains(b"t:1") && !refused.contains(b"t:2"));
            // Others that come later do not put it off.
            refused.add_at(&[xxh3_64(b"t:3")], now + PAUSE_MIN);
            let pause = (PAUSE_MIN * (1 << attempt)).min(PAUSE_MAX);
            refused.decide(false, now + pause - Duration::from_millis(1));
            assert!(refused.contains(b"t:1"));
            now += pause;
            refused.decide(false, now);
            assert!(!refused.contains(b"t:1"));
        }
        refused.add_at(&[xxh3_64(b"t:1")], now);
        refused.decide(true, now);
        assert!(!refused.contains(b"t:1"));
    }
}
