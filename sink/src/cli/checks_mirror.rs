//! The checks of `doctor` that concern both sides: does somebody stream, do the slot and Redis fit together, is everything filled.

use super::checks::{Check, Outcome};
use super::checks_redis::connect;
use super::connect_postgres;
use crate::backfill::Cursor;
use crate::config::{Conninfo, RedisUrl, SlotName};
use crate::error::Error;
use crate::plan::RedisKeys;
use crate::pq::Connection;
use crate::progress::Progress;
use crate::redis::read_stored;
use crate::replication::{SlotInfo, slot_info};
use crate::run::{Outlook, outlook};

/// Runs them. What cannot be asked was told by the checks of one side.
pub fn mirror(conninfo: &Conninfo, redis: Option<&RedisUrl>, slot: &SlotName) -> Result<Vec<Check>, Error> {
    let mut sql = connect_postgres(conninfo.expose())?;
    let mut checks = Vec::new();
    if let Some(info) = slot_info(&mut sql, slot.as_str())? {
        checks.push(Check {
            name: "sink",
            outcome: sink(slot, &info),
        });
    }
    if let Some(url) = redis {
        let mut redis = connect(url)?;
        let outlook = outlook(conninfo, &mut redis, slot.as_str())?;
        let goes_on = outlook == Outlook::GoesOn;
        checks.push(Check {
            name: "slot and Redis",
            outcome: fit(slot, outlook),
        });
        // Else they are to be filled, all of them.
        if goes_on {
            let progress = read_stored(&mut redis, &RedisKeys::new(slot.as_str()))?.progress;
            checks.push(Check {
                name: "filled tables",
                outcome: filled(slot, &mut sql, &progress.unwrap_or_default())?,
            });
        }
    }
    Ok(checks)
}

fn sink(slot: &SlotName, info: &SlotInfo) -> Outcome {
    match info.active_pid {
        Some(pid) => Outcome::Ok(format!("one streams, served by process {pid}")),
        None => Outcome::Warn(
            format!(
                "nobody streams from the slot {slot}, so that it keeps WAL: no sink runs, or it cannot go on (its log tells why)"
            ),
            format!("walmirror run --slot {slot} …"),
        ),
    }
}

/// Whether Redis has every row that was there before its table was mirrored.
fn filled(slot: &SlotName, sql: &mut Connection, progress: &Progress) -> Result<Outcome, Error> {
    let result = sql
        .query(
            "SELECT oid, relation FROM walmirror.mirrors WHERE mode = 'mirror' ORDER BY relation::text",
            &[],
        )
        .map_err(|error| Error::postgres("cannot list the mirrored tables", error))?;
    let is_done = |oid| {
        let cursor = progress.cursor(oid).and_then(Cursor::parse);
        cursor.is_some_and(|cursor| cursor.is_done())
    };
    let due: Vec<&str> = result
        .rows()
        .filter(|row| row.parse(0).is_none_or(|oid| !is_done(oid)))
        .filter_map(|row| row.text(1))
        .collect();
    Ok(if due.is_empty() {
        Outcome::Ok("all of them".into())
    } else {
        Outcome::Warn(
            format!("{} not filled yet: {}", due.len(), due.join(", ")),
            format!(
                "walmirror status --slot {slot}   # how far they are; the sink's log tells what stops it"
            ),
        )
    })
}

fn fit(slot: &SlotName, outlook: Outlook) -> Outcome {
    match outlook {
        Outlook::GoesOn => Outcome::Ok("they fit together".into()),
        Outlook::First => Outcome::Ok("neither is there yet: `run` begins with a backfill".into()),
        Outlook::Gap(why) => Outcome::Warn(
            format!("they do not fit together: {why}; the next session mirrors every table anew"),
            format!(
                "walmirror run --slot {slot} …   # --on-gap resync, the default, does it; --on-gap fail refuses"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_and_a_slot_that_nobody_reads_are_worth_a_warning() {
        let slot = SlotName::default();
        assert!(matches!(
            fit(&slot, Outlook::Gap("it was emptied".into())),
            Outcome::Warn(text, _) if text.contains("it was emptied") && text.contains("anew")
        ));
        assert!(matches!(fit(&slot, Outlook::GoesOn), Outcome::Ok(_)));
        assert!(matches!(fit(&slot, Outlook::First), Outcome::Ok(_)));
    }
}
