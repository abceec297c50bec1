//! The checks of `doctor` and `init` on the Postgres side. Each looks at one thing and gives one line.

use std::fmt;

use crate::config::{Conninfo, SlotName};
use crate::error::Error;
use crate::pq::{Connection, PqError, connect_failed, quote_identifier};
use crate::replication::{self, SlotInfo, slot::PLUGIN};

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Ok(String),
    /// Works, but somebody should know; with the next command, if there is one.
    Note(String, Option<String>),
    /// Does not work; with the next command.
    Fail(String, String),
}

/// One line of `doctor`.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// What was found.
    pub outcome: Outcome,
}

impl Check {
    pub fn failed(&self) -> bool {
        matches!(self.outcome, Outcome::Fail(..))
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, text, next) = match &self.outcome {
            Outcome::Ok(text) => ("ok  ", text, None),
            Outcome::Note(text, next) => ("note", text, next.as_ref()),
            Outcome::Fail(text, next) => ("FAIL", text, Some(next)),
        };
        write!(f, "{word}  {:<24} {text}", self.name)?;
        match next {
            Some(next) => write!(f, "\n      next: {next}"),
            None => Ok(()),
        }
    }
}

/// What an error of a connection attempt looks like as a check.
pub fn from_error(name: &'static str, error: &Error) -> Check {
    let next = error
        .next_command()
        .unwrap_or("walmirror doctor --help")
        .to_owned();
    Check {
        name,
        outcome: Outcome::Fail(error.to_string(), next),
    }
}

/// Connects, and runs every check in the order in which a person would repair.
pub fn postgres(conninfo: &Conninfo, slot: &SlotName) -> Result<Vec<Check>, Error> {
    let mut connection = Connection::connect(conninfo.expose(), &[]).map_err(connect_failed)?;
    let mut checks = vec![server(&mut connection)];
    type Step = fn(&mut Connection) -> Result<Outcome, PqError>;
    let steps: [(&'static str, Step); 6] = [
        ("wal_level", wal_level),
        ("preloaded library", preloaded),
        ("extension", extension),
        ("output_plugin_libraries", plugin_list),
        ("replication right", replication_right),
        ("row security", row_security),
    ];
    for (name, step) in steps {
        checks.push(run(name, &mut connection, step));
    }
    checks.push(replication_connection(conninfo));
    let info = replication::slot_info(&mut connection, slot)?;
    let database = connection.target().database;
    checks.push(Check {
        name: "slot",
        outcome: slot_outcome(slot, info.as_ref(), &database),
    });
    checks.push(run("free slots and senders", &mut connection, |connection| {
        free(connection, info.as_ref())
    }));
    checks.push(run("mirrored tables", &mut connection, tables));
    Ok(checks)
}

fn run(
    name: &'static str,
    connection: &mut Connection,
    step: impl FnOnce(&mut Connection) -> Result<Outcome, PqError>,
) -> Check {
    let outcome = step(connection).unwrap_or_else(|error| {
        let next = match error.sqlstate.as_deref() {
            Some("42501") => format!(
                "GRANT pg_read_all_settings TO {};",
                quote_identifier(&connection.target().user)
            ),
            _ => "walmirror doctor --log-level debug".to_owned(),
        };
        Outcome::Note(format!("cannot be looked at: {error}"), Some(next))
    });
    Check { name, outcome }
}

/// The first value of the first row, as text; empty for NULL.
fn value(connection: &mut Connection, sql: &str) -> Result<String, PqError> {
    Ok(connection
        .query(sql, &[])?
        .text(0, 0)
        .unwrap_or_default()
        .to_owned())
}

fn server(connection: &mut Connection) -> Check {
    let (version, target) = (connection.server_version(), connection.target());
    let text = format!("Postgres {}.{} at {target}", version / 10_000, version % 10_000);
    let outcome = if version < 140_000 {
        Outcome::Fail(
            format!("{text}: too old"),
            "pg_upgradecluster   # walmirror needs Postgres 14 or later".into(),
        )
    } else if value(connection, "SELECT pg_catalog.pg_is_in_recovery()").as_deref() == Ok("t") {
        Outcome::Fail(
            format!("{text} is a standby"),
            "walmirror doctor --postgres '… target_session_attrs=read-write'".into(),
        )
    } else {
        Outcome::Ok(text)
    };
    Check {
        name: "server",
        outcome,
    }
}

fn wal_level(connection: &mut Connection) -> Result<Outcome, PqError> {
    let level = value(connection, "SELECT pg_catalog.current_setting('wal_level')")?;
    Ok(match level.as_str() {
        "logical" => Outcome::Ok(level),
        _ => Outcome::Fail(
            format!("wal_level is {level}, but has to be logical"),
            "ALTER SYSTEM SET wal_level = logical;   -- then restart Postgres".into(),
        ),
    })
}

fn preloaded(connection: &mut Connection) -> Result<Outcome, PqError> {
    let list = value(
        connection,
        "SELECT pg_catalog.current_setting('shared_preload_libraries')",
    )?;
    Ok(
        if names(&list)
            .iter()
            .any(|name| name == PLUGIN || name.ends_with("/walmirror") || name.ends_with("/walmirror.so"))
        {
            Outcome::Ok(format!("shared_preload_libraries = {list}"))
        } else {
            Outcome::Fail(
                format!(
                    "walmirror is not in shared_preload_libraries ({})",
                    if list.is_empty() { "empty" } else { &list }
                ),
                format!(
                    "ALTER SYSTEM SET shared_preload_libraries = {};   -- then restart Postgres",
                    with_walmirror(&list)
                ),
            )
        },
    )
}

fn extension(connection: &mut Connection) -> Result<Outcome, PqError> {
    let database = connection.target().database;
    let installed = value(
        connection,
        "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'walmirror'",
    )?;
    if !installed.is_empty() {
        return Ok(Outcome::Ok(format!(
            "walmirror {installed} in the database {database}"
        )));
    }
    let available = value(
        connection,
        "SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = 'walmirror'",
    )?;
    Ok(if available.is_empty() {
        Outcome::Fail(
            "this server has no extension walmirror".into(),
            "make install PG_CONFIG=…   # as root, on the server".into(),
        )
    } else {
        Outcome::Fail(
            format!("the database {database} has no extension walmirror"),
            format!("psql \"{}\" -c 'CREATE EXTENSION walmirror'", connection.target()),
        )
    })
}

/// Since the fix of CVE-2026-6471 a server loads only plugins that this list names. Older minors have no such list.
fn plugin_list(connection: &mut Connection) -> Result<Outcome, PqError> {
    let result = connection.query(
        "SELECT pg_catalog.current_setting('output_plugin_libraries', true)",
        &[],
    )?;
    let Some(list) = result.text(0, 0) else {
        return Ok(Outcome::Ok("this server allows every plugin".into()));
    };
    Ok(if names(list).iter().any(|name| name == PLUGIN) {
        Outcome::Ok(list.to_owned())
    } else {
        Outcome::Fail(
            format!("walmirror is not in output_plugin_libraries ({list})"),
            format!(
                "ALTER SYSTEM SET output_plugin_libraries = {}; SELECT pg_reload_conf();",
                with_walmirror(list)
            ),
        )
    })
}

fn replication_right(connection: &mut Connection) -> Result<Outcome, PqError> {
    let sql =
        "SELECT rolname, rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user";
    let result = connection.query(sql, &[])?;
    let role = result.text(0, 0).unwrap_or_default();
    Ok(if result.text(0, 1) == Some("t") {
        Outcome::Ok(format!("the role {role} has REPLICATION"))
    } else {
        Outcome::Fail(
            format!("the role {role} has no REPLICATION right"),
            format!("ALTER ROLE {} REPLICATION;", quote_identifier(role)),
        )
    })
}

/// A right and a pg_hba.conf line are two things: only a real replication connection shows that both are there.
fn replication_connection(conninfo: &Conninfo) -> Check {
    let name = "replication connection";
    let connect = || {
        let mut connection =
            Connection::connect(conninfo.expose(), &[("replication", "database")]).map_err(connect_failed)?;
        replication::identify_system(&mut connection)
    };
    match connect() {
        Ok(system) => Check {
            name,
            outcome: Outcome::Ok(format!(
                "system {}, timeline {}, WAL at {}",
                system.system_id, system.timeline, system.xlogpos
            )),
        },
        Err(error) => from_error(name, &error),
    }
}

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
        (_, _, Some("unreserved")) => Outcome::Note(
            format!("the slot {slot} is about to lose its WAL (wal_status unreserved)"),
            Some("SHOW max_slot_wal_keep_size;".into()),
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
            Outcome::Ok(format!(
                "{slot}: confirmed {at}, WAL {}{user}",
                status.unwrap_or("?")
            ))
        }
    }
}

fn free(connection: &mut Connection, slot: Option<&SlotInfo>) -> Result<Outcome, PqError> {
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

const NO_EXTENSION: &str = "needs the extension";

fn has_extension(connection: &mut Connection) -> Result<bool, PqError> {
    Ok(!value(
        connection,
        "SELECT 1 FROM pg_catalog.pg_extension WHERE extname = 'walmirror'",
    )?
    .is_empty())
}

/// A backfill reads as this role: policies would hide rows from it.
fn row_security(connection: &mut Connection) -> Result<Outcome, PqError> {
    if !has_extension(connection)? {
        return Ok(Outcome::Note(NO_EXTENSION.into(), None));
    }
    let sql = "SELECT m.relation, current_user FROM walmirror.mirrors m, LATERAL (SELECT m.oid UNION SELECT walmirror.leaves(m.oid)) l(oid) \
               WHERE pg_catalog.row_security_active(l.oid) LIMIT 1";
    let result = connection.query(sql, &[])?;
    Ok(match (result.text(0, 0), result.text(0, 1)) {
        (Some(table), Some(role)) => Outcome::Fail(
            format!("row security hides rows of {table} from the role {role}"),
            format!("ALTER ROLE {} BYPASSRLS;", quote_identifier(role)),
        ),
        _ => Outcome::Ok("no policy hides rows of a mirrored table".into()),
    })
}

fn tables(connection: &mut Connection) -> Result<Outcome, PqError> {
    if !has_extension(connection)? {
        return Ok(Outcome::Note(NO_EXTENSION.into(), None));
    }
    let sql = "SELECT m.relation, m.mode, m.key, current_user, pg_catalog.has_table_privilege(m.oid, 'SELECT') \
               FROM walmirror.mirrors m ORDER BY m.relation::text";
    let result = connection.query(sql, &[])?;
    if let Some(row) = result.rows().find(|row| row.text(4) != Some("t")) {
        let (table, role) = (row.text(0).unwrap_or_default(), row.text(3).unwrap_or_default());
        return Ok(Outcome::Fail(
            format!("the role {role} may not read {table}, so that it cannot be backfilled"),
            format!("GRANT SELECT ON {table} TO {};", quote_identifier(role)),
        ));
    }
    let list: Vec<String> = result
        .rows()
        .map(|row| {
            format!(
                "{} ({})",
                row.text(0).unwrap_or_default(),
                row.text(2).unwrap_or_default()
            )
        })
        .collect();
    Ok(if list.is_empty() {
        Outcome::Note(
            "none yet".into(),
            Some("SELECT walmirror.mirror('your_table');".into()),
        )
    } else {
        Outcome::Ok(format!("{}: {}", list.len(), list.join(", ")))
    })
}

/// The names of a list setting.
fn names(list: &str) -> Vec<String> {
    list.split(',')
        .map(|name| name.trim().trim_matches('"').to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// The list with walmirror at its end, as ALTER SYSTEM takes it: one word each, not one string with commas.
fn with_walmirror(list: &str) -> String {
    let plain = |name: &String| {
        name.bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let mut names: Vec<String> = names(list)
        .into_iter()
        .map(|name| if plain(&name) { name } else { format!("'{name}'") })
        .collect();
    names.push(PLUGIN.to_owned());
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_extended_and_never_replaced() {
        assert_eq!(
            with_walmirror("pgoutput, test_decoding"),
            "pgoutput, test_decoding, walmirror"
        );
        assert_eq!(with_walmirror(""), "walmirror");
        assert_eq!(with_walmirror("\"Odd-Name\", x"), "'Odd-Name', x, walmirror");
    }

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
        assert!(matches!(slot_outcome(&slot, None, "db"), Outcome::Note(..)));
    }
}
