//! A fixed-size map from key hash to the last transaction that changed the key. A full bucket lets go of its oldest
//! changer, notes that, and raises the horizon above it, so that what was forgotten is known to lie below the horizon.

use std::sync::Arc;

use super::evicted::Evicted;

/// One bucket is one cache line: a change costs one memory access.
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
        let bucket = self.buckets.get(hash as usize & self.mask)?;
        bucket
            .0
            .iter()
            .find(|entry| entry.hash == hash && entry.xid != 0)
            .map(|entry| entry.xid)
    }

    #[inline]
    pub(super) fn set(&mut self, hash: u64, xid: u64) {
        let Some(bucket) = self.buckets.get_mut(hash as usize & self.mask) else {
            return;
        };
        let Bucket([first, rest @ ..]) = bucket;
        // The last changer replaces whatever stood there, even with a smaller id: ids are given out at the first write,
        // and the order of the stream is the order of the commits.
        let mut slot = first;
        if slot.hash != hash {
            for entry in rest {
                if entry.hash == hash {
                    slot = entry;
                    break;
                }
                if entry.xid < slot.xid {
                    slot = entry;
                }
            }
        }
        if slot.hash != hash && slot.xid != 0 {
            self.evicted.insert(slot.xid);
        }
        *slot = Entry { hash, xid };
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
