//! Checks of the replication slot.

use super::checks::Outcome;
use crate::config::SlotName;
use crate::pq::{Connection, PqError, Target};
use crate::replication::{Retained, SlotInfo, slot::PLUGIN};
use crate::shell::double_quoted;

/// Whether the slot can be streamed from by walmirror; shared by `init`.
pub fn slot_outcome(slot: &SlotName, info: Option<&SlotInfo>, database: &str) -> Outcome {
    let drop = format!("SELECT pg_drop_replication_slot('{slot}');");
    let Some(info) = info else {
        return Outcome::Note(
            format!("no slot {slot} yet: `run` makes it"),
            Some(format!("walmirror init --slot {slot}")),
        );
    };
    match (
        info.plugin.as_deref(),
        info.database.as_deref(),
        info.wal_status.as_deref(),
    ) {
        (None, ..) => Outcome::Fail(
            format!("the slot {slot} is a physical one"),
            "walmirror init --slot another_name".into(),
        ),
        (Some(plugin), ..) if plugin != PLUGIN => Outcome::Fail(
            format!("the slot {slot} belongs to the plugin {plugin}"),
            "walmirror init --slot another_name".into(),
        ),
        (_, Some(other), _) if other != database => Outcome::Fail(
            format!("the slot {slot} decodes the database {other}, not {database}"),
            "walmirror init --slot another_name".into(),
        ),
        (_, _, Some("lost")) => Outcome::Fail(
            format!(
                "the WAL that the slot {slot} needs is gone (wal_status lost); drop it, and `run` resyncs"
            ),
            drop,
        ),
        (_, _, Some("unreserved")) => Outcome::Warn(
            format!("the slot {slot} is about to lose its WAL (wal_status unreserved)"),
            "SHOW max_slot_wal_keep_size;".into(),
        ),
        (_, _, status) => {
            let at = info
                .confirmed_flush_lsn
                .map(|lsn| lsn.to_string())
                .unwrap_or_default();
            let user = info
                .active_pid
                .map(|pid| format!(", in use by process {pid}"))
                .unwrap_or_default();
            let state = format!("{slot}: confirmed {at}, WAL {}{user}", status.unwrap_or("?"));
            let database = Target {
                database: database.to_owned(),
                ..Target::default()
            };
            let connection = double_quoted(&format!("{database} replication=database"));
            match info.failover {
                None => Outcome::Ok(state),
                Some(true) => Outcome::Ok(format!("{state}, failover slot")),
                Some(false) => Outcome::Note(
                    format!(
                        "{state}; no failover slot: after a promotion it is gone, and the mirror is made anew"
                    ),
                    Some(format!(
                        "psql {connection} -c 'ALTER_REPLICATION_SLOT {slot} (FAILOVER)'   # while no sink runs"
                    )),
                ),
            }
        }
    }
}

/// Whether the slot keeps more WAL than is good for the disk.
pub fn retained_outcome(retained: Option<&Retained>) -> Outcome {
    let Some(retained) = retained else {
        return Outcome::Ok("no slot that keeps any".into());
    };
    match retained.warning() {
        Some(warning) => Outcome::Warn(warning.text, warning.next.into()),
        None => Outcome::Ok(retained.describe()),
    }
}

pub fn free(connection: &mut Connection, slot: Option<&SlotInfo>) -> Result<Outcome, PqError> {
    let sql = "SELECT current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_catalog.pg_replication_slots), \
               current_setting('max_wal_senders')::int - (SELECT count(*) FROM pg_catalog.pg_stat_replication)";
    let result = connection.query(sql, &[])?;
    let row = result.rows().next();
    let number = |column| row.and_then(|row| row.parse::<i64>(column)).unwrap_or(0);
    let (slots, senders) = (number(0), number(1));
    let fail = |what: &str| {
        Outcome::Fail(
            format!("no free {what}"),
            format!("ALTER SYSTEM SET {what} = 20;   -- then restart Postgres"),
        )
    };
    Ok(if slots <= 0 && slot.is_none() {
        fail("max_replication_slots")
    } else if senders <= 0 && !slot.is_some_and(|slot| slot.active) {
        fail("max_wal_senders")
    } else {
        Outcome::Ok(format!("{slots} slots and {senders} senders free"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_of_somebody_else_is_refused() {
        let slot = SlotName::default();
        let info = |plugin: &str, database: &str, status: &str| SlotInfo {
            plugin: Some(plugin.into()),
            database: Some(database.into()),
            confirmed_flush_lsn: None,
            restart_lsn: None,
            active: false,
            active_pid: None,
            wal_status: Some(status.into()),
            failover: None,
        };
        let outcome = |info: &SlotInfo| slot_outcome(&slot, Some(info), "db");
        assert!(matches!(
            outcome(&info("walmirror", "db", "reserved")),
            Outcome::Ok(_)
        ));
        assert!(matches!(
            outcome(&info("pgoutput", "db", "reserved")),
            Outcome::Fail(..)
        ));
        assert!(matches!(
            outcome(&info("walmirror", "other", "reserved")),
            Outcome::Fail(..)
        ));
        assert!(matches!(
            outcome(&info("walmirror", "db", "lost")),
            Outcome::Fail(..)
        ));
        assert!(matches!(
            outcome(&info("walmirror", "db", "unreserved")),
            Outcome::Warn(..)
        ));
        assert!(matches!(slot_outcome(&slot, None, "db"), Outcome::Note(..)));
    }
}
