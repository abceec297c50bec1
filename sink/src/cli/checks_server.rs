//! Checks of the server and of the role: version, settings, library, extension, rights.

use super::checks::{Check, Outcome, from_error, value};
use super::connect_replication;
use crate::config::Conninfo;
use crate::pq::{Connection, PqError, message_grant, quote_identifier};
use crate::replication::{self, settings, slot::PLUGIN};

pub fn server(connection: &mut Connection) -> Check {
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
    } else if forgets_ddl(version) {
        Outcome::Warn(
            format!(
                "{text}: this minor release may decode what follows DDL as if that had not been. A table that is written to while it gets a label \
                 may be left out of the stream, until walmirror begins a new session"
            ),
            "apt-get install --only-upgrade postgresql   # 14.18, 15.13, 16.9, 17.5 or later".into(),
        )
    } else {
        Outcome::Ok(text)
    };
    Check {
        name: "server",
        outcome,
    }
}

/// Whether transactions that run while another one changes a catalog are decoded with what was cached of the catalog before (mended in
/// May 2025: invalidations are handed on to them).
fn forgets_ddl(version: i32) -> bool {
    matches!(version, 140_000..140_018 | 150_000..150_013 | 160_000..160_009 | 170_000..170_005)
}

pub fn wal_level(connection: &mut Connection) -> Result<Outcome, PqError> {
    let level = value(connection, "SELECT pg_catalog.current_setting('wal_level')")?;
    Ok(match level.as_str() {
        "logical" => Outcome::Ok(level),
        _ => Outcome::Fail(
            format!("wal_level is {level}, but has to be logical"),
            "ALTER SYSTEM SET wal_level = logical;   -- then restart Postgres".into(),
        ),
    })
}

pub fn preloaded(connection: &mut Connection) -> Result<Outcome, PqError> {
    let list = settings::preloaded(connection)?;
    Ok(if settings::is_preloaded(&list) {
        Outcome::Ok(format!("shared_preload_libraries = {list}"))
    } else {
        Outcome::Fail(settings::not_preloaded(&list), settings::preload_command(&list))
    })
}

pub fn extension(connection: &mut Connection) -> Result<Outcome, PqError> {
    let database = connection.target().database;
    let installed = value(
        connection,
        "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'walmirror'",
    )?;
    if !installed.is_empty() {
        let own = env!("CARGO_PKG_VERSION");
        let found = format!("walmirror {installed} in the database {database}");
        return Ok(if installed == own {
            Outcome::Ok(found)
        } else {
            // What they say to each other has a version of its own, so this may well do.
            Outcome::Note(format!("{found}, and this program is {own}"), None)
        });
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
            connection.target().create_extension(),
        )
    })
}

/// Since the fix of CVE-2026-6471 a server loads only plugins that this list names. Older minors have no such list.
pub fn plugin_list(connection: &mut Connection) -> Result<Outcome, PqError> {
    let result = connection.query(
        "SELECT pg_catalog.current_setting('output_plugin_libraries', true)",
        &[],
    )?;
    let Some(list) = result.text(0, 0) else {
        return Ok(Outcome::Ok("this server allows every plugin".into()));
    };
    Ok(if settings::names(list).iter().any(|name| name == PLUGIN) {
        Outcome::Ok(list.to_owned())
    } else {
        Outcome::Fail(
            format!("walmirror is not in output_plugin_libraries ({list})"),
            format!(
                "ALTER SYSTEM SET output_plugin_libraries = {}; SELECT pg_reload_conf();",
                settings::with_walmirror(list)
            ),
        )
    })
}

pub fn replication_right(connection: &mut Connection) -> Result<Outcome, PqError> {
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

/// Everybody has it by default. Backfills and whoever waits write markers.
pub fn message_right(connection: &mut Connection) -> Result<Outcome, PqError> {
    let sql = "SELECT current_user, pg_catalog.bool_and(pg_catalog.has_function_privilege(oid, 'EXECUTE')) \
               FROM pg_catalog.pg_proc WHERE proname = 'pg_logical_emit_message'";
    let result = connection.query(sql, &[])?;
    let role = result.text(0, 0).unwrap_or_default();
    Ok(if result.text(0, 1) == Some("t") {
        Outcome::Ok(format!("the role {role} may write messages into the WAL"))
    } else {
        Outcome::Fail(
            format!("the role {role} may not call pg_logical_emit_message, which every backfill does"),
            message_grant(&quote_identifier(role)),
        )
    })
}

/// A right and a pg_hba.conf line are two things: only a real replication connection shows that both are there.
pub fn replication_connection(conninfo: &Conninfo) -> Check {
    let name = "replication connection";
    let connect = || {
        let mut connection = connect_replication(conninfo.expose())?;
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

/// Where streams share the name that COMMIT waits for, it returns when any of them has what it wrote.
pub fn synchronous_standbys(connection: &mut Connection) -> Result<Outcome, PqError> {
    let sql = "SELECT min(s.application_name), count(*), string_agg(coalesce(r.slot_name, 'of process ' || s.pid), ', ' ORDER BY r.slot_name) \
               FROM pg_catalog.pg_stat_replication s LEFT JOIN pg_catalog.pg_replication_slots r ON r.active_pid = s.pid \
               WHERE s.sync_priority > 0 GROUP BY lower(s.application_name) HAVING count(*) > 1 AND bool_or(r.plugin = $1) ORDER BY 1";
    let result = connection.query(sql, &[Some(PLUGIN.as_bytes())])?;
    let Some(row) = result.rows().next() else {
        let hidden = "SELECT count(*) FROM pg_catalog.pg_stat_replication WHERE sync_priority IS NULL";
        return Ok(if value(connection, hidden)? == "0" {
            Outcome::Ok("no stream of walmirror shares its name with another".into())
        } else {
            let role = quote_identifier(&connection.target().user);
            Outcome::Note(
                "cannot be looked at: the role does not see the streams of others".into(),
                Some(format!("GRANT pg_read_all_stats TO {role};")),
            )
        });
    };
    let text = |column| row.text(column).unwrap_or_default();
    Ok(Outcome::Warn(
        format!(
            "{} have the application name {}: the slots {}. A COMMIT that waits for it (synchronous_standby_names) returns when one of them \
             has the row",
            text(1),
            text(0),
            text(2)
        ),
        "walmirror run --postgres '… application_name=<another>' …   # and that one in synchronous_standby_names".into(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minor_releases_that_forget_ddl_are_known() {
        for version in [140_017, 150_000, 160_008, 170_004] {
            assert!(forgets_ddl(version), "{version}");
        }
        for version in [140_018, 150_020, 160_009, 170_005, 180_000] {
            assert!(!forgets_ddl(version), "{version}");
        }
    }
}
