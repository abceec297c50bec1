//! What capture did and why it did nothing, counted in shared memory: `walmirror.capture_stats`.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::ffi::shared;

/// One counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    RowsSeen,
    RowsEmitted,
    SkippedRecent,
    SkippedMaxRows,
    SkippedMaxBytes,
    SkippedWrote,
    SkippedRowLock,
    SkippedExplain,
    SkippedParallel,
    SkippedFailed,
    MessagesEmitted,
    BytesEmitted,
}

/// Every counter with its name and meaning, in the order of the enum.
pub const COUNTERS: [(Counter, &str, &str); 12] = [
    (
        Counter::RowsSeen,
        "rows_seen",
        "rows that scans of cached tables returned",
    ),
    (Counter::RowsEmitted, "rows_emitted", "rows written to the WAL"),
    (
        Counter::SkippedRecent,
        "skipped_recent",
        "rows captured within walmirror.capture_interval already",
    ),
    (
        Counter::SkippedMaxRows,
        "skipped_max_rows",
        "scans that went on beyond walmirror.capture_max_rows",
    ),
    (
        Counter::SkippedMaxBytes,
        "skipped_max_bytes",
        "rows larger than walmirror.capture_max_bytes",
    ),
    (
        Counter::SkippedWrote,
        "skipped_wrote",
        "queries in transactions that had written",
    ),
    (
        Counter::SkippedRowLock,
        "skipped_row_lock",
        "queries with FOR UPDATE or FOR SHARE",
    ),
    (
        Counter::SkippedExplain,
        "skipped_explain",
        "queries run by EXPLAIN ANALYZE",
    ),
    (
        Counter::SkippedParallel,
        "skipped_parallel",
        "scans in parallel workers, and rows of a leader that need a subtransaction",
    ),
    (
        Counter::SkippedFailed,
        "skipped_failed",
        "rows that could not be encoded",
    ),
    (
        Counter::MessagesEmitted,
        "messages_emitted",
        "logical messages written to the WAL",
    ),
    (Counter::BytesEmitted, "bytes_emitted", "bytes of those messages"),
];

/// Adds to a counter; without shared memory nothing is counted.
pub fn add(counter: Counter, count: u64) {
    if let Some(value) = shared::own_counters().get(counter as usize) {
        value.fetch_add(count, Ordering::Relaxed);
    }
}

/// The value of a counter.
pub fn get(counter: Counter) -> u64 {
    shared::all_counters()
        .filter_map(|counters| counters.get(counter as usize))
        .map(|value: &AtomicU64| value.load(Ordering::Relaxed))
        .sum()
}
