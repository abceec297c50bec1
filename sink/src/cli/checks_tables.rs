//! Checks of the mirrored tables: may they be read, and whole. `backfill` asks that, too, before it waits for one.

use std::collections::BTreeSet;

use super::checks::{Outcome, value};
use super::connect_postgres;
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
    let Catalog { misfits, locked, .. } = Catalog::read_from(connection)?;
    let errors: Vec<Error> = misfits.iter().map(Misfit::error).collect();
    let Some(first) = errors.first() else {
        if let Some((_, table)) = locked.first() {
            let what = format!("the table {table} is locked, so its label could not be looked at");
            let next = "SELECT pid, relation::regclass, mode, granted FROM pg_locks WHERE mode = 'AccessExclusiveLock';";
            return Ok(Outcome::Note(what, Some(next.into())));
        }
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
    let Ok(mut connection) = connect_postgres(conninfo.expose()) else {
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

/// What a role may not read of the mirrored tables: they, or their partitions.
#[derive(Debug, Default)]
pub struct Unreadable {
    /// As SQL writes it.
    role: String,
    /// Mirrored table, table that cannot be read, its schema if that may not be used either, whether SELECT is missing.
    tables: Vec<(u32, String, Option<String>, bool)>,
}

impl Unreadable {
    /// Leaves out what belongs to other mirrored tables.
    pub fn of(mut self, is_meant: impl Fn(u32) -> bool) -> Self {
        self.tables.retain(|(mirrored, ..)| is_meant(*mirrored));
        self
    }

    /// What is wrong and what helps, if something is wrong.
    pub fn told(&self) -> Option<(String, String)> {
        let role = &self.role;
        let names: BTreeSet<&str> = self.tables.iter().map(|(_, name, ..)| name.as_str()).collect();
        let schemas: BTreeSet<&str> = self
            .tables
            .iter()
            .filter_map(|(_, _, schema, _)| schema.as_deref())
            .collect();
        let lacking = self.tables.iter().filter(|(.., lacks_select)| *lacks_select);
        let lacking: BTreeSet<&str> = lacking.map(|(_, name, ..)| name.as_str()).collect();
        let mut grants = Vec::new();
        for (right, objects) in [("USAGE ON SCHEMA", schemas), ("SELECT ON", lacking)] {
            if !objects.is_empty() {
                let objects: Vec<&str> = objects.into_iter().collect();
                grants.push(format!("GRANT {right} {} TO {role};", objects.join(", ")));
            }
        }
        let list: Vec<&str> = names.into_iter().collect();
        (!list.is_empty()).then(|| {
            let what = format!(
                "the role {role} may not read {}, so that what is mirrored of it cannot be filled",
                list.join(", ")
            );
            (what, grants.join(" "))
        })
    }
}

/// Asks for this role, or for that of the connection. A row that is read again is looked for in the mirrored table itself, the others
/// are read in its partitions. Keys are looked for as values of their columns' types, wherever those are.
pub fn unreadable(connection: &mut Connection, role: Option<&str>) -> Result<Unreadable, PqError> {
    let sql = "WITH RECURSIVE role (role) AS (SELECT coalesce($1::name, current_user)), \
               kinds (mirrored, oid) AS (SELECT m.oid, a.atttypid FROM walmirror.mirrors m JOIN pg_catalog.pg_attribute a \
                   ON a.attrelid = m.oid AND pg_catalog.strpos(m.key, '{' || a.attname || '}') > 0 \
                   UNION SELECT k.mirrored, t.typbasetype FROM kinds k JOIN pg_catalog.pg_type t ON t.oid = k.oid WHERE t.typtype = 'd') \
               SELECT m.oid, pg_catalog.format('%I.%I', n.nspname, c.relname), \
               CASE WHEN NOT pg_catalog.has_schema_privilege(r.role, n.oid, 'USAGE') THEN pg_catalog.quote_ident(n.nspname) END, \
               NOT s.is_given, pg_catalog.quote_ident(r.role) \
               FROM role r, walmirror.mirrors m, \
               LATERAL (SELECT m.oid UNION SELECT walmirror.leaves(m.oid)) l(oid) \
               JOIN pg_catalog.pg_class c ON c.oid = l.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, \
               LATERAL (SELECT pg_catalog.has_table_privilege(r.role, c.oid, 'SELECT') OR NOT EXISTS ( \
                   SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
                   AND NOT pg_catalog.has_column_privilege(r.role, c.oid, a.attnum, 'SELECT'))) s(is_given) \
               WHERE NOT s.is_given OR NOT pg_catalog.has_schema_privilege(r.role, n.oid, 'USAGE') \
               UNION ALL SELECT k.mirrored, pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.quote_ident(s.nspname), \
               false, pg_catalog.quote_ident(r.role) \
               FROM role r, kinds k JOIN pg_catalog.pg_type t ON t.oid = k.oid JOIN pg_catalog.pg_namespace s ON s.oid = t.typnamespace \
               JOIN pg_catalog.pg_class c ON c.oid = k.mirrored JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
               WHERE t.typtype <> 'd' AND NOT pg_catalog.has_schema_privilege(r.role, s.oid, 'USAGE')";
    let result = connection.query(sql, &[role.map(str::as_bytes)])?;
    let mut found = Unreadable::default();
    for row in result.rows() {
        found.role = row.text(4).unwrap_or_default().to_owned();
        found.tables.push((
            row.parse(0).unwrap_or(0),
            row.text(1).unwrap_or_default().to_owned(),
            row.text(2).map(str::to_owned),
            row.text(3) == Some("t"),
        ));
    }
    Ok(found)
}

/// Whether this role may read every mirrored table.
pub fn tables(connection: &mut Connection) -> Result<Outcome, PqError> {
    if !has_extension(connection)? {
        return Ok(Outcome::Note(NO_EXTENSION.into(), None));
    }
    if let Some((what, next)) = unreadable(connection, None)?.told() {
        return Ok(Outcome::Fail(what, next));
    }
    let sql = "SELECT m.relation, m.key FROM walmirror.mirrors m ORDER BY m.relation::text";
    let result = connection.query(sql, &[])?;
    let list: Vec<String> = result
        .rows()
        .map(|row| {
            format!(
                "{} ({})",
                row.text(0).unwrap_or_default(),
                row.text(1).unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_missing_is_one_line() {
        let found = Unreadable {
            role: "w".into(),
            tables: vec![
                (1, "a.t".into(), Some("a".into()), false),
                (1, "a.t_1".into(), Some("a".into()), true),
                (2, "b.u".into(), None, true),
            ],
        };
        let (what, next) = found.told().unwrap_or_default();
        assert!(what.contains("may not read a.t, a.t_1, b.u,"), "{what}");
        assert_eq!(
            next,
            "GRANT USAGE ON SCHEMA a TO w; GRANT SELECT ON a.t_1, b.u TO w;"
        );
        let (what, next) = found.of(|mirrored| mirrored == 2).told().unwrap_or_default();
        assert!(what.contains("may not read b.u,"), "{what}");
        assert_eq!(next, "GRANT SELECT ON b.u TO w;");
        assert_eq!(Unreadable::default().told(), None);
    }
}
