//! How much WAL the slot keeps on the server's disk, and when that is too much: a slot that nobody confirms keeps WAL until the
//! disk is full, or, where a limit is set, until the slot is lost.

use walmirror_proto::Lsn;

use crate::error::Error;
use crate::pq::{Connection, quote_literal};

/// Without a limit on the server, this much is worth a warning.
const MUCH_BYTES: u64 = 1 << 30;

/// How far the server is, as SQL. A standby has no end of its own: how far it has replayed the primary's.
pub const WAL_END: &str = "CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
    ELSE pg_catalog.pg_current_wal_lsn() END";

/// What a slot keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retained {
    /// From its oldest WAL to the end.
    pub bytes: u64,
    /// How much may still be written until the slot is lost; negative: it may be lost at the next checkpoint. None: no limit.
    pub safe_bytes: Option<i64>,
    /// `max_slot_wal_keep_size`; None: no limit.
    pub limit_bytes: Option<u64>,
}

/// Why it is too much, and what to type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// For a person.
    pub text: String,
    /// The next command.
    pub next: &'static str,
}

/// How far the WAL is that a stream can bring: what is not on the disk is not sent. None: a standby, on which nothing commits.
pub fn flushed(connection: &mut Connection) -> Result<Option<Lsn>, Error> {
    let sql = "SELECT pg_catalog.pg_current_wal_flush_lsn() WHERE NOT pg_catalog.pg_is_in_recovery()";
    let results = connection
        .simple(sql)
        .map_err(|error| Error::postgres("cannot ask where the WAL ends", error))?;
    let text = results.first().and_then(|result| result.text(0, 0));
    Ok(text.and_then(|text| text.parse().ok()))
}

/// Asks what this slot keeps. None: there is no such slot, or it keeps nothing any more.
pub fn retained(connection: &mut Connection, slot: &str) -> Result<Option<Retained>, Error> {
    let sql = format!(
        "SELECT pg_catalog.pg_wal_lsn_diff({WAL_END}, restart_lsn)::bigint, safe_wal_size, \
         (SELECT setting::bigint * 1048576 FROM pg_catalog.pg_settings WHERE name = 'max_slot_wal_keep_size') \
         FROM pg_catalog.pg_replication_slots WHERE slot_name = {} AND restart_lsn IS NOT NULL",
        quote_literal(slot)
    );
    let results = connection
        .simple(&sql)
        .map_err(|error| Error::postgres(format!("cannot look at what the slot {slot:?} keeps"), error))?;
    let Some(row) = results.first().and_then(|result| result.rows().next()) else {
        return Ok(None);
    };
    let number = |column| row.parse::<i64>(column);
    Ok(number(0).map(|bytes| Retained {
        bytes: u64::try_from(bytes).unwrap_or(0),
        safe_bytes: number(1),
        limit_bytes: number(2).and_then(|limit| u64::try_from(limit).ok()),
    }))
}

impl Retained {
    /// Some: half of the limit is used up, or there is no limit and it is a lot.
    pub fn warning(&self) -> Option<Warning> {
        let kept = mebibytes(self.bytes);
        match self.limit_bytes {
            Some(limit) if self.bytes >= limit / 2 => Some(Warning {
                text: format!(
                    "the slot keeps {kept} of WAL; at max_slot_wal_keep_size = {} it is lost, and everything is mirrored anew",
                    mebibytes(limit)
                ),
                next: "walmirror status   # does the sink run? If it does and is slow: ALTER SYSTEM SET max_slot_wal_keep_size = '…'; SELECT pg_reload_conf();",
            }),
            None if self.bytes >= MUCH_BYTES => Some(Warning {
                text: format!("the slot keeps {kept} of WAL, and nothing limits it: the disk may fill up"),
                next: "ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'; SELECT pg_reload_conf();   -- what the disk can spare",
            }),
            _ => None,
        }
    }

    /// The figures for people.
    pub fn describe(&self) -> String {
        let limit = self.limit_bytes.map_or("no limit".to_owned(), |limit| {
            format!("limit {}", mebibytes(limit))
        });
        format!("{} kept, {limit} (max_slot_wal_keep_size)", mebibytes(self.bytes))
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retained(mebibytes: u64, limit: Option<u64>) -> Retained {
        Retained {
            bytes: mebibytes << 20,
            safe_bytes: None,
            limit_bytes: limit.map(|limit| limit << 20),
        }
    }

    #[test]
    fn half_of_the_limit_is_worth_a_warning() {
        assert_eq!(retained(31, Some(64)).warning(), None);
        let warning = retained(32, Some(64)).warning();
        assert!(
            warning.is_some_and(|warning| warning.text.contains("32 MiB") && warning.text.contains("64 MiB"))
        );
    }

    #[test]
    fn without_a_limit_a_gibibyte_is() {
        assert_eq!(retained(1023, None).warning(), None);
        assert!(
            retained(1024, None)
                .warning()
                .is_some_and(|warning| warning.next.contains("max_slot_wal_keep_size"))
        );
    }
}
