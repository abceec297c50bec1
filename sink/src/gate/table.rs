//! A fixed-size map from key hash to the last transaction that changed the key. A key may be in one of two buckets. Where it is new, the
//! oldest changer of the older one is let go of, which is noted and raises the horizon above it, so that what was forgotten is known to
//! lie below the horizon.
//!
//! One young changer that is let go of has each chunk dropped that was read before it. With one bucket a key that happened after some 15,000
//! changed keys of the 262,144 that have room; with two it does after half of these.

use std::sync::Arc;

use super::evicted::Evicted;

/// One bucket is one cache line: a change costs two memory accesses.
const BUCKET_ENTRIES: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
struct Bucket([Entry; BUCKET_ENTRIES]);

/// `xid` 0 (InvalidTransactionId) marks a free entry.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    hash: u64,
    xid: u64,
}

impl Bucket {
    /// The smaller, the older its changers are, all in all.
    fn age(&self) -> u64 {
        self.0.iter().map(|entry| entry.xid / BUCKET_ENTRIES as u64).sum()
    }
}

#[derive(Debug)]
pub(super) struct ChangerTable {
    buckets: Vec<Bucket>,
    mask: usize,
    evicted: Arc<Evicted>,
}

impl ChangerTable {
    /// The changers take so many bytes, and the notes of those that were let go of as many.
    pub(super) fn new(memory_bytes: usize, horizon: u64) -> Self {
        let wanted = (memory_bytes / size_of::<Bucket>()).max(1);
        let count = if wanted.is_power_of_two() {
            wanted
        } else {
            wanted.next_power_of_two() / 2
        };
        Self {
            buckets: vec![Bucket::default(); count],
            mask: count - 1,
            evicted: Arc::new(Evicted::new(memory_bytes, horizon)),
        }
    }

    /// The changers that were let go of.
    pub(super) fn evicted(&self) -> &Arc<Evicted> {
        &self.evicted
    }

    #[inline]
    pub(super) fn get(&self, hash: u64) -> Option<u64> {
        self.places(hash)
            .into_iter()
            .filter_map(|place| self.buckets.get(place))
            .flat_map(|bucket| &bucket.0)
            .find(|entry| entry.hash == hash && entry.xid != 0)
            .map(|entry| entry.xid)
    }

    #[inline]
    pub(super) fn set(&mut self, hash: u64, xid: u64) {
        // The last changer replaces whatever stood there, even with a smaller id: ids are given out at the first write,
        // and the order of the stream is the order of the commits.
        for place in self.places(hash) {
            let bucket = self.buckets.get_mut(place);
            let entries = bucket.into_iter().flat_map(|bucket| &mut bucket.0);
            if let Some(entry) = entries
                .into_iter()
                .find(|entry| entry.hash == hash && entry.xid != 0)
            {
                entry.xid = xid;
                return;
            }
        }
        let [first, second] = self.places(hash);
        let age = |place: usize| self.buckets.get(place).map(Bucket::age);
        let place = if age(second) < age(first) { second } else { first };
        let bucket = self.buckets.get_mut(place);
        let Some(oldest) = bucket.and_then(|bucket| bucket.0.iter_mut().min_by_key(|entry| entry.xid)) else {
            return;
        };
        if oldest.xid != 0 {
            self.evicted.insert(oldest.xid);
        }
        *oldest = Entry { hash, xid };
    }

    /// The buckets that a key may be in.
    fn places(&self, hash: u64) -> [usize; 2] {
        [hash as usize & self.mask, (hash >> 32) as usize & self.mask]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        /// Against a map that forgets nothing: an answer is the last changer, and no answer means that the last changer,
        /// if there ever was one, lies below the horizon.
        #[test]
        fn forgets_only_below_the_horizon(changes in prop::collection::vec((0u64..60, 1u64..1_000), 0..400)) {
            let mut table = ChangerTable::new(256, 10);
            let mut all = HashMap::new();
            for (key, xid) in changes {
                let hash = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                table.set(hash, xid);
                all.insert(hash, xid);

                for (&hash, &last) in &all {
                    match table.get(hash) {
                        Some(xid) => prop_assert_eq!(xid, last),
                        None => prop_assert!(last < table.evicted().horizon() && table.evicted().contains(last)),
                    }
                }
            }
        }
    }

    /// The story: a chunk of a backfill is dropped where one changer was let go of that its snapshot does not see.
    #[test]
    fn nothing_new_is_let_go_of_while_there_is_room() {
        let mut table = ChangerTable::new(4 << 20, 0);
        let room = (4 << 20) / size_of::<Entry>() as u64;
        let hash = |key: u64| xxhash_rust::xxh3::xxh3_64(&key.to_le_bytes());
        // It is full of old ones.
        (0..2 * room).for_each(|key| table.set(hash(key), 1 + key / 100));
        let newest = 1_000_000;
        let fitted = (0..).find(|key| {
            table.set(hash(1 << 40 | key), newest);
            table.evicted().contains(newest)
        });
        let share = fitted.unwrap() as f64 / room as f64;
        assert!(share > 0.4, "{share}");
    }

    #[test]
    fn memory_is_what_was_asked_for() {
        assert_eq!(
            ChangerTable::new(1 << 20, 0).buckets.len() * size_of::<Bucket>(),
            1 << 20
        );
        assert_eq!(
            ChangerTable::new((1 << 20) + 5, 0).buckets.len() * size_of::<Bucket>(),
            1 << 20
        );
        assert_eq!(ChangerTable::new(0, 0).buckets.len(), 1);
    }

    /// Printed, not asserted: machines differ. About 5 ns here in a release build.
    #[test]
    fn a_change_costs_nanoseconds() {
        let mut table = ChangerTable::new(4 << 20, 0);
        let started = std::time::Instant::now();
        let changes = 1_000_000u64;
        for change in 0..changes {
            table.set(
                (change % 50_000).wrapping_mul(0x9E37_79B9_7F4A_7C15),
                1_000 + change / 7,
            );
        }
        println!("{:?} a change", started.elapsed() / changes as u32);
    }
}
