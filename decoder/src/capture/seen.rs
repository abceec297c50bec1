//! The recently-captured table: which rows were captured within the last `walmirror.capture_interval`.
//!
//! A fixed number of slots in shared memory, four to a bucket. Backends race for them without locks: the worst outcome
//! is a row captured twice, or once less within one interval.

use std::sync::atomic::{AtomicU64, Ordering};

const BUCKET: usize = 4;
/// A slot holds a tag of the row in its upper bits and the time of its capture in the lower ones, in [`TICK_MS`].
const TIME_BITS: u32 = 28;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;
const TICK_MS: u64 = 4;

/// Whether the row with this hash was captured less than `interval_ms` before `now_ms`. If not, it is from now on.
pub fn check_and_mark(slots: &[AtomicU64], row: u64, now_ms: u64, interval_ms: u64) -> bool {
    let now = (now_ms / TICK_MS) & TIME_MASK;
    let tag = tag(row);
    let Some(bucket) = bucket(slots, row) else {
        return false;
    };
    let age = |slot: u64| now.wrapping_sub(slot & TIME_MASK) & TIME_MASK;
    let mut oldest: Option<(&AtomicU64, u64)> = None;
    for slot in bucket {
        let held = slot.load(Ordering::Relaxed);
        if held >> TIME_BITS == tag {
            if age(held) * TICK_MS < interval_ms {
                return true;
            }
            oldest = Some((slot, u64::MAX));
            break;
        }
        let age = if held == 0 { u64::MAX - 1 } else { age(held) };
        if oldest.is_none_or(|(_, oldest)| age > oldest) {
            oldest = Some((slot, age));
        }
    }
    if let Some((slot, _)) = oldest {
        slot.store(tag << TIME_BITS | now, Ordering::Relaxed);
    }
    false
}

/// The row with this hash, which was marked at `now_ms`, was not captured after all.
pub fn unmark(slots: &[AtomicU64], row: u64, now_ms: u64) {
    let marked = tag(row) << TIME_BITS | (now_ms / TICK_MS) & TIME_MASK;
    for slot in bucket(slots, row).unwrap_or_default() {
        // Not if somebody else has captured it meanwhile.
        let _ = slot.compare_exchange(marked, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

fn bucket(slots: &[AtomicU64], row: u64) -> Option<&[AtomicU64]> {
    let start = (row as usize).checked_rem(slots.len() / BUCKET)? * BUCKET;
    slots.get(start..start + BUCKET)
}

fn tag(row: u64) -> u64 {
    // Zero marks a free slot, so no tag is zero.
    (row >> TIME_BITS) | 1
}

/// A hash of a row version: database, table and physical place.
pub fn row_hash(database: u32, table: u32, block: u32, offset: u16) -> u64 {
    let table = (u64::from(database) << 32 | u64::from(table)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let place = (u64::from(block) << 16 | u64::from(offset)).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
    let mixed = table ^ place.rotate_left(29);
    (mixed ^ (mixed >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(slots: usize) -> Vec<AtomicU64> {
        (0..slots).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn a_row_is_recent_for_one_interval() {
        let slots = table(64);
        let row = row_hash(1, 2, 3, 4);
        assert!(!check_and_mark(&slots, row, 10_000, 1000));
        assert!(check_and_mark(&slots, row, 10_500, 1000));
        assert!(check_and_mark(&slots, row, 10_900, 1000));
        assert!(!check_and_mark(&slots, row, 11_100, 1000));
        assert!(check_and_mark(&slots, row, 11_200, 1000));
    }

    #[test]
    fn a_row_that_was_not_captured_after_all_is_not_recent() {
        let slots = table(64);
        let row = row_hash(1, 2, 3, 4);
        assert!(!check_and_mark(&slots, row, 10_000, 1000));
        unmark(&slots, row, 10_000);
        assert!(!check_and_mark(&slots, row, 10_100, 1000));
        // The mark is another's.
        unmark(&slots, row, 10_000);
        assert!(check_and_mark(&slots, row, 10_200, 1000));
    }

    #[test]
    fn a_full_bucket_forgets_its_oldest_row() {
        let slots = table(BUCKET);
        let rows: Vec<u64> = (1..=5).map(|block| row_hash(1, 2, block, 1)).collect();
        for (at, row) in rows.iter().enumerate() {
            assert!(!check_and_mark(&slots, *row, 10_000 + 100 * at as u64, 5000));
        }
        assert!(check_and_mark(&slots, rows[4], 10_600, 5000));
        assert!(check_and_mark(&slots, rows[1], 10_600, 5000));
        assert!(!check_and_mark(&slots, rows[0], 10_600, 5000));
    }

    #[test]
    fn row_versions_of_one_table_have_different_hashes() {
        let mut hashes: Vec<u64> = (0..1000)
            .flat_map(|block| (1..50).map(move |offset| row_hash(5, 16384, block, offset) >> TIME_BITS))
            .collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert!(hashes.len() > 48_900, "{}", hashes.len());
    }
}
