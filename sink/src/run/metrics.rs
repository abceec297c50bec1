//! Counters of a process: what came in, what went out, what was left out and why. Read by log lines and `/metrics`.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    (
        $(#[$of:meta])* $group:ident {
            $($(#[$doc:meta])* $name:ident,)*
        }
        $(by reason {
            $($(#[$part_doc:meta])* $part:ident: $parts:ident,)*
        })?
    ) => {
        $(#[$of])*
        #[derive(Debug, Default)]
        pub struct $group {
            $($(#[$doc])* pub $name: AtomicU64,)*
            $($($(#[$part_doc])* pub $part: $parts,)*)?
        }

        impl $group {
            /// The names and values.
            pub fn read(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }

        $(impl $group {
            /// The names of what is counted by reason, with the reasons and their values.
            pub fn read_by_reason(&self) -> Vec<(&'static str, Vec<(&'static str, u64)>)> {
                vec![$((stringify!($part), self.$part.read()),)*]
            }
        })?
    };
}

counters! {
    /// Rows that a SELECT read and that were not written.
    CapturesDropped {
        /// No such table is mirrored or cached (any more).
        unknown_table,
        /// The table was another one, by its columns or its label, when the row was read.
        other_version,
        /// A key column is NULL.
        no_key,
        /// The row could not be encoded.
        not_encoded,
        /// A newer change of the key, or of the whole table, stands.
        changed,
        /// The gate does not know any more whether there was one.
        forgotten,
        /// A value is longer than Redis takes.
        too_large,
    }
}

counters! {
    /// Rows of the stream that had nothing to do.
    RowsSkipped {
        /// An earlier session wrote them: the stream begins again before the position of Redis.
        already_applied,
        /// The table is no longer mirrored.
        forgotten_table,
    }
}

counters! {
    /// Chunks of a backfill that were not written; it reads them again if they are still wanted.
    ChunksDropped {
        /// The backfill of the table began anew, or is over, or a chunk in front of this one was dropped.
        outdated,
        /// Read before or after the table changed, seen from where the stream is.
        other_version,
        /// The gate has let go of a transaction that its snapshot does not see: the stretch is read again.
        forgotten,
    }
}

counters! {
    /// Counters; they only rise.
    Metrics {
        /// Bytes of frames read from the stream.
        bytes,
        /// Rows of the stream.
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
        /// Rows that a backfill read and a newer change made obsolete.
        read_changed,
        /// Rows that a backfill read and that have to be read again.
        read_forgotten,
        /// Keys removed because they have no row.
        keys_removed,
    }
    by reason {
        /// Rows that a SELECT read and that were not written.
        captures_dropped: CapturesDropped,
        /// Rows of the stream that had nothing to do.
        rows_skipped: RowsSkipped,
        /// Chunks of a backfill that were not written.
        chunks_dropped: ChunksDropped,
    }
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    if count > 0 {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}
