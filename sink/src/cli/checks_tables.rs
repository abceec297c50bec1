//! Checks of the mirrored tables: may they be read, and whole.

use super::checks::{Outcome, value};
use crate::backfill::{Catalog, Misfit};
use crate::config::Conninfo;
use crate::error::Error;
use crate::pq::{Connection, PqError, quote_identifier};

const NO_EXTENSION: &str = "needs the extension";

fn has_extension(connection: &mut Connection) -> Result<bool, PqError> {
    Ok(!value(
        connection,
        "SELECT 1 FROM pg_catalog.pg_extension WHERE extname = 'walmirror'",
    )?
    .is_empty())
}

/// Whether every label fits its table: DDL may have passed while event triggers were off.
pub fn labels(connection: &mut Connection) -> Result<Outcome, Error> {
    let failed = |error| Error::postgres("cannot look for the extension", error);
    if !has_extension(connection).map_err(failed)? {
        return Ok(Outcome::Note(NO_EXTENSION.into(), None));
    }
    let misfits = Catalog::read_from(connection)?.misfits;
    let errors: Vec<Error> = misfits.iter().map(Misfit::error).collect();
    let Some(first) = errors.first() else {
        return Ok(Outcome::Ok("every label fits its table".into()));
    };
    let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
    Ok(Outcome::Fail(
        text.join("; "),
        first.next_command().unwrap_or_default().to_owned(),
    ))
}

/// The key templates of the mirrored tables; none where they cannot be asked for, which another check says.
pub fn templates(conninfo: &Conninfo) -> Vec<String> {
    let Ok(mut connection) = Connection::connect(conninfo.expose(), &[]) else {
        return Vec::new();
    };
    let result = connection.query("SELECT DISTINCT key FROM walmirror.mirrors ORDER BY 1", &[]);
    let Ok(result) = result else {
        return Vec::new();
    };
    result
        .rows()
        .filter_map(|row| row.text(0).map(str::to_owned))
        .collect()
}

/// A backfill reads as this role: policies would hide rows from it.
pub fn row_security(connection: &mut Connection) -> Result<Outcome, PqError> {
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

/// Whether this role may read every mirrored table.
pub fn tables(connection: &mut Connection) -> Result<Outcome, PqError> {
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
