//! The checks of `doctor` that concern both sides: does somebody stream, and do the slot and Redis fit together.

use super::checks::{Check, Outcome};
use super::checks_redis::connect;
use crate::config::{Conninfo, RedisUrl, SlotName};
use crate::error::Error;
use crate::pq::{Connection, connect_failed};
use crate::replication::{SlotInfo, slot_info};
use crate::run::{Outlook, outlook};

/// Runs them. What cannot be asked was told by the checks of one side.
pub fn mirror(conninfo: &Conninfo, redis: Option<&RedisUrl>, slot: &SlotName) -> Result<Vec<Check>, Error> {
    let mut sql = Connection::connect(conninfo.expose(), &[]).map_err(connect_failed)?;
    let mut checks = Vec::new();
    if let Some(info) = slot_info(&mut sql, slot.as_str())? {
        checks.push(Check {
            name: "sink",
            outcome: sink(slot, &info),
        });
    }
    if let Some(url) = redis {
        let outlook = outlook(conninfo, &mut connect(url)?, slot.as_str())?;
        checks.push(Check {
            name: "slot and Redis",
            outcome: fit(slot, outlook),
        });
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
