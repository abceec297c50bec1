//! Which transactions the table of changers has let go of, one bit each, for so many ids as fit; the oldest ids make room and
//! then count as let go of. What is not known to be over can so be told from what was applied and forgotten.
//!
//! The planner writes it. Workers look at it before they read; what they see may be a moment old, and the gate decides.

use std::sync::atomic::{AtomicU64, Ordering};

use super::snapshot::Snapshot;

const WORD: u64 = u64::BITS as u64;

/// What a gate has forgotten.
#[derive(Debug)]
pub struct Evicted {
    /// A ring: the bit of an id is in word `id / 64 % words.len()`.
    words: Vec<AtomicU64>,
    /// Every id below counts as let go of. A multiple of 64.
    base: AtomicU64,
    /// All that was let go of is below.
    horizon: AtomicU64,
}

impl Evicted {
    /// Everything below `start` was let go of.
    pub(super) fn new(memory_bytes: usize, start: u64) -> Self {
        let mut words = Vec::new();
        words.resize_with((memory_bytes / size_of::<u64>()).max(1), AtomicU64::default);
        let base = start - start % WORD;
        let evicted = Self {
            words,
            base: AtomicU64::new(base),
            horizon: AtomicU64::new(start),
        };
        (base..start).for_each(|xid| evicted.insert(xid));
        evicted
    }

    /// A changer that the gate does not remember and that may be invisible to the snapshot. The last of them is just below the horizon.
    pub fn hidden_from(&self, snapshot: &Snapshot) -> Option<u64> {
        let mut in_progress = snapshot.in_progress().iter().copied();
        in_progress
            .find(|&xid| self.contains(xid))
            .or((snapshot.xmax < self.horizon()).then_some(snapshot.xmax))
    }

    pub(super) fn horizon(&self) -> u64 {
        self.horizon.load(Ordering::Acquire)
    }

    pub(super) fn contains(&self, xid: u64) -> bool {
        let base = self.base();
        if xid < base || xid >= self.end() {
            return xid < base;
        }
        let word = self.words.get(self.place(xid));
        word.is_none_or(|word| word.load(Ordering::Relaxed) & bit(xid) != 0)
    }

    pub(super) fn insert(&self, xid: u64) {
        self.horizon.fetch_max(xid.saturating_add(1), Ordering::AcqRel);
        if xid < self.base() {
            return;
        }
        if xid >= self.end() {
            self.move_to(xid);
        }
        if let Some(word) = self.words.get(self.place(xid)) {
            word.fetch_or(bit(xid), Ordering::Relaxed);
        }
    }

    /// Makes this id the last that has a bit.
    fn move_to(&self, xid: u64) {
        let (length, before) = (self.words.len() as u64, self.base());
        let base = (xid / WORD + 1 - length) * WORD;
        let moved = (base - before) / WORD;
        // First, so that nobody takes a bit that is cleared for that of an id that was not let go of.
        self.base.store(base, Ordering::Release);
        for word in 0..moved.min(length) {
            if let Some(word) = self.words.get(self.place(before + word * WORD)) {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    fn base(&self) -> u64 {
        self.base.load(Ordering::Acquire)
    }

    fn end(&self) -> u64 {
        self.base().saturating_add(self.words.len() as u64 * WORD)
    }

    fn place(&self, xid: u64) -> usize {
        (xid / WORD % self.words.len() as u64) as usize
    }
}

fn bit(xid: u64) -> u64 {
    1 << (xid % WORD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// Against a set: what was inserted is always contained, and nothing else is from the base on.
        #[test]
        fn holds_what_was_inserted(start in 0u64..300, steps in prop::collection::vec((0u64..400, 0u64..200), 0..60)) {
            let evicted = Evicted::new(24, start);
            let mut all = BTreeSet::new();
            let mut at = start;
            for (ahead, back) in steps {
                at += ahead;
                let xid = at.saturating_sub(back);
                evicted.insert(xid);
                all.insert(xid);
                for xid in 0..at + 300 {
                    let is_old = xid < start || xid < evicted.base();
                    prop_assert_eq!(evicted.contains(xid), is_old || all.contains(&xid), "{}", xid);
                }
                prop_assert!(evicted.base() <= start.max(at));
            }
        }
    }

    #[test]
    fn an_id_far_ahead_makes_room() {
        let evicted = Evicted::new(0, 5);
        evicted.insert(1 << 60);
        assert!(evicted.contains(1 << 60) && !evicted.contains((1 << 60) + 1) && evicted.contains(7));
    }
}
