//! Which transactions the table of changers has let go of, one bit each, for so many ids as fit; the oldest ids make room and
//! then count as let go of. What is not known to be over can so be told from what was applied and forgotten.

const WORD: u64 = u64::BITS as u64;

#[derive(Debug)]
pub(super) struct Evicted {
    /// A ring: the bit of an id is in word `id / 64 % words.len()`.
    words: Vec<u64>,
    /// Every id below counts as let go of. A multiple of 64.
    base: u64,
}

impl Evicted {
    /// Everything below `start` was let go of.
    pub(super) fn new(memory_bytes: usize, start: u64) -> Self {
        let mut evicted = Self {
            words: vec![0; (memory_bytes / size_of::<u64>()).max(1)],
            base: start - start % WORD,
        };
        (evicted.base..start).for_each(|xid| evicted.insert(xid));
        evicted
    }

    pub(super) fn contains(&self, xid: u64) -> bool {
        if xid < self.base || xid >= self.end() {
            return xid < self.base;
        }
        let word = self.words.get(self.place(xid)).copied().unwrap_or(u64::MAX);
        word & bit(xid) != 0
    }

    pub(super) fn insert(&mut self, xid: u64) {
        if xid < self.base {
            return;
        }
        if xid >= self.end() {
            self.move_to(xid);
        }
        let place = self.place(xid);
        if let Some(word) = self.words.get_mut(place) {
            *word |= bit(xid);
        }
    }

    /// Makes this id the last that has a bit.
    fn move_to(&mut self, xid: u64) {
        let length = self.words.len() as u64;
        let base = (xid / WORD + 1 - length) * WORD;
        let moved = (base - self.base) / WORD;
        for word in 0..moved.min(length) {
            let place = self.place(self.base + word * WORD);
            if let Some(word) = self.words.get_mut(place) {
                *word = 0;
            }
        }
        self.base = base;
    }

    fn end(&self) -> u64 {
        self.base.saturating_add(self.words.len() as u64 * WORD)
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
            let mut evicted = Evicted::new(24, start);
            let mut all = BTreeSet::new();
            let mut at = start;
            for (ahead, back) in steps {
                at += ahead;
                let xid = at.saturating_sub(back);
                evicted.insert(xid);
                all.insert(xid);
                for xid in 0..at + 300 {
                    let is_old = xid < start || xid < evicted.base;
                    prop_assert_eq!(evicted.contains(xid), is_old || all.contains(&xid), "{}", xid);
                }
                prop_assert!(evicted.base <= start.max(at));
            }
        }
    }

    #[test]
    fn an_id_far_ahead_makes_room() {
        let mut evicted = Evicted::new(0, 5);
        evicted.insert(1 << 60);
        assert!(evicted.contains(1 << 60) && !evicted.contains((1 << 60) + 1) && evicted.contains(7));
    }
}
