//! Replication slots: making one, looking at one, and saying what to do when the server refuses.
//!
//! Everything here goes through the simple query protocol, because a replication connection knows no other; the
//! functions therefore work on both kinds of connection, but for `create_slot` and `identify_system`, which are
//! replication commands.

use walmirror_proto::lsn::Lsn;

use crate::error::Error;
use crate::pq::{Connection, QueryResult, quote_identifier, quote_literal};

/// The name of walmirror's output plugin.
pub const PLUGIN: &str = "walmirror";

/// A row of pg_replication_slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The output plugin; None for a physical slot.
    pub plugin: Option<String>,
    /// The database that the slot decodes.
    pub database: Option<String>,
    /// Everything before this is confirmed: a stream never starts earlier.
    pub confirmed_flush_lsn: Option<Lsn>,
    /// The oldest WAL that the slot keeps; None when it keeps none any more.
    pub restart_lsn: Option<Lsn>,
    /// Whether somebody streams from it.
    pub active: bool,
    /// The process that serves who streams from it.
    pub active_pid: Option<i32>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Whether standbys keep a copy of it that can be used after a promotion; None before Postgres 17, which has no such slots.
    pub failover: Option<bool>,
}

/// What IDENTIFY_SYSTEM says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemInfo {
    /// The identity of the cluster, the same on its standbys.
    pub system_id: String,
    /// The timeline; a failover to a standby raises it.
    pub timeline: u32,
    /// How far the WAL is flushed.
    pub xlogpos: Lsn,
    /// The database of the connection.
    pub database: Option<String>,
}

/// The first version that has failover slots.
const FAILOVER_SINCE: i32 = 170_000;

/// Makes a logical slot, and returns its consistent point: every transaction that commits after it is in the stream.
///
/// Refuses where walmirror is not preloaded. Waits for all transactions that run at this moment. A temporary slot lives as
/// long as the connection; one that stays is a failover slot where the server knows what that is.
pub fn create_slot(
    connection: &mut Connection,
    slot: &str,
    plugin: &str,
    temporary: bool,
) -> Result<Lsn, Error> {
    let (kind, options) = if temporary {
        (" TEMPORARY", "NOEXPORT_SNAPSHOT")
    } else if connection.server_version() >= FAILOVER_SINCE {
        ("", "(SNAPSHOT 'nothing', FAILOVER)")
    } else {
        ("", "NOEXPORT_SNAPSHOT")
    };
    let command = format!(
        "CREATE_REPLICATION_SLOT {}{kind} LOGICAL {} {options}",
        quote_identifier(slot),
        quote_identifier(plugin)
    );
    let what = || format!("cannot create the slot {slot:?}");
    if plugin == PLUGIN {
        super::settings::require_preload(connection)?;
    }
    let results = connection
        .simple(&command)
        .map_err(|error| explain(Error::postgres(what(), error), slot, &connection.target().user))?;
    results
        .first()
        .and_then(|result| lsn(result, 1))
        .ok_or_else(|| Error::answer(what()))
}

/// Drops a slot that nobody uses.
pub fn drop_slot(connection: &mut Connection, slot: &str) -> Result<(), Error> {
    let sql = format!(
        "SELECT pg_catalog.pg_drop_replication_slot({})",
        quote_literal(slot)
    );
    connection.simple(&sql).map(drop).map_err(|error| {
        explain(
            Error::postgres(format!("cannot drop the slot {slot:?}"), error),
            slot,
            &connection.target().user,
        )
    })
}

/// Looks at a slot; None when there is none of this name.
pub fn slot_info(connection: &mut Connection, slot: &str) -> Result<Option<SlotInfo>, Error> {
    let failover = if connection.server_version() >= FAILOVER_SINCE {
        "failover"
    } else {
        "NULL"
    };
    let sql = format!(
        "SELECT plugin, database, confirmed_flush_lsn, restart_lsn, active, active_pid, wal_status, {failover} \
         FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
        quote_literal(slot)
    );
    let results = connection
        .simple(&sql)
        .map_err(|error| Error::postgres(format!("cannot look at the slot {slot:?}"), error))?;
    let Some(result) = results.first().filter(|result| !result.is_empty()) else {
        return Ok(None);
    };
    let text = |column| result.text(0, column).map(str::to_owned);
    Ok(Some(SlotInfo {
        plugin: text(0),
        database: text(1),
        confirmed_flush_lsn: lsn(result, 2),
        restart_lsn: lsn(result, 3),
        active: result.text(0, 4) == Some("t"),
        active_pid: result.text(0, 5).and_then(|text| text.parse().ok()),
        wal_status: text(6),
        failover: result.text(0, 7).map(|text| text == "t"),
    }))
}

/// Says which slots of walmirror's the database has, to be put behind the news that there is none of the name that was given: it may be a
/// slip. Empty where there are none, or nobody tells.
pub fn slots_there(connection: &mut Connection) -> String {
    let sql = format!(
        "SELECT pg_catalog.string_agg(slot_name, ', ') FROM (SELECT slot_name FROM pg_catalog.pg_replication_slots \
         WHERE plugin = {} AND database = pg_catalog.current_database() AND NOT temporary ORDER BY 1 LIMIT 5) AS there",
        quote_literal(PLUGIN)
    );
    let results = connection.simple(&sql).unwrap_or_default();
    let names = results.first().and_then(|result| result.text(0, 0));
    names.map_or_else(String::new, |names| {
        format!("; walmirror's slots of this database: {names}")
    })
}

/// Asks which cluster this is, and how far its WAL is.
pub fn identify_system(connection: &mut Connection) -> Result<SystemInfo, Error> {
    let results = connection
        .simple("IDENTIFY_SYSTEM")
        .map_err(|error| Error::postgres("cannot ask Postgres for its system identifier", error))?;
    let parse = |result: &QueryResult| {
        Some(SystemInfo {
            system_id: result.text(0, 0)?.to_owned(),
            timeline: result.text(0, 1)?.parse().ok()?,
            xlogpos: lsn(result, 2)?,
            database: result.text(0, 3).map(str::to_owned),
        })
    };
    results
        .first()
        .and_then(parse)
        .ok_or_else(|| Error::answer("cannot ask Postgres for its system identifier"))
}

fn lsn(result: &QueryResult, column: usize) -> Option<Lsn> {
    result.text(0, column)?.parse().ok()
}

/// Adds the next command to an error that a slot met, on a connection of this role.
pub(crate) fn explain(error: Error, slot: &str, role: &str) -> Error {
    let Error::Postgres(_, source) = &error else {
        return error;
    };
    let message = source.message.as_str();
    let command = match source.sqlstate.as_deref() {
        // CVE-2026-6471: since then a plugin has to be listed.
        _ if message.contains("may not be used as an output plugin") => {
            "ALTER SYSTEM SET output_plugin_libraries = pgoutput, test_decoding, walmirror; SELECT pg_reload_conf();".to_owned()
        }
        _ if message.contains("shared_preload_libraries") => {
            "ALTER SYSTEM SET shared_preload_libraries = walmirror;   -- then restart Postgres".to_owned()
        }
        _ if error.is_wal_removed() => {
            format!("SELECT pg_drop_replication_slot({});   -- the next `run` makes it anew", quote_literal(slot))
        }
        Some("58P01") => format!("make install   # {PLUGIN}.so is not where this server looks for libraries"),
        Some("42704") => format!("walmirror init --slot {slot}"),
        Some("42710") => format!("walmirror status --slot {slot}"),
        Some("55006") => format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = {};", quote_literal(slot)),
        Some("53400") => "SELECT slot_name, active FROM pg_replication_slots;   -- drop one, or raise max_replication_slots".to_owned(),
        Some("42501") => format!("ALTER ROLE {} REPLICATION;", quote_identifier(role)),
        Some("55000") if message.contains("wal_level") => {
            "ALTER SYSTEM SET wal_level = logical;   -- then restart Postgres".to_owned()
        }
        _ => return error,
    };
    error.next(command)
}
