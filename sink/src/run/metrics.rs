//! Counters of a process: what came in, what went out, what was left out. Read by log lines and `status`.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters; they only rise.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        impl Metrics {
            /// The names and values.
            pub fn read(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Bytes of frames read from the stream.
    bytes,
    /// Rows of the stream that were planned.
    rows,
    /// Transactions that were applied.
    transactions,
    /// Batches that were applied (EXECs).
    batches,
    /// Commands sent inside of them.
    commands,
    /// Rows without a key, because a key column is NULL.
    rows_without_key,
    /// Rows that the decoder could not encode.
    errors,
    /// Rows that are not mirrored because they cannot be.
    rejected,
    /// Tables that were emptied.
    truncates,
    /// Rows that SQL read and the gate admitted.
    read_admitted,
    /// Rows that SQL read and a newer change made obsolete.
    read_changed,
    /// Rows that SQL read and that have to be read again.
    read_forgotten,
    /// Keys removed because they have no row.
    keys_removed,
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    if count > 0 {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}
