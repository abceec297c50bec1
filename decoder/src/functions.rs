//! The SQL functions that are written in Rust; sql/ declares them, beside those written in SQL.

use std::ffi::CStr;

use pgrx::pg_sys;
use pgrx::prelude::*;
use prost::Message;

use crate::capture::stats;
use crate::ddl::{self, Check};
use crate::decode::ddl_message::DdlMessage;
use crate::error::Refusal;
use crate::ffi::catalog_query;
use crate::ffi::hooks;
use crate::ffi::memory::Context;
use crate::ffi::relation::{self, Rel};
use crate::ffi::text;
use crate::label::Label;
use crate::plan::Plan;

/// `walmirror.relation(oid) RETURNS bytea`: the definition of a labelled table as the stream would carry it now (a
/// Relation message with index 0); NULL if neither it nor a table that it is a partition of has a label.
#[pg_extern]
fn relation(table: pg_sys::Oid) -> Option<Vec<u8>> {
    let table = Rel::open(table)?;
    match Plan::build(&table, false, Context::top()) {
        Ok(Some(plan)) => {
            let bytes = plan.relation.encode_to_vec();
            plan.release();
            Some(bytes)
        }
        Ok(None) => None,
        Err(refusal) => refusal.raise(),
    }
}

/// `walmirror.root(oid)`: the labelled table that the rows of a table appear under. It sees labels that were committed after the
/// snapshot of its transaction, as DDL does.
#[pg_extern]
fn root(table: pg_sys::Oid) -> Option<pg_sys::Oid> {
    relation::labelled(table)
}

/// `walmirror.tables_of_type(oid)`: the labelled tables with a column of a type, or of one that is made of it, and those that are OF it.
#[pg_extern]
fn tables_of_type(of: pg_sys::Oid) -> SetOfIterator<'static, pg_sys::Oid> {
    let tables = tables(
        c"WITH RECURSIVE types(oid) AS (
             SELECT $1
             UNION
             SELECT CASE WHEN d.classid = 'pg_type'::regclass THEN d.objid ELSE (SELECT c.reltype FROM pg_class c WHERE c.oid = d.objid) END
             FROM types s JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid = s.oid
             WHERE d.classid IN ('pg_type'::regclass, 'pg_class'::regclass)
         )
         SELECT DISTINCT oidsend(c.oid)
         FROM types s JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid = s.oid AND d.classid = 'pg_class'::regclass
         JOIN pg_class c ON c.oid = d.objid AND c.relkind IN ('r', 'p')",
        of,
    );
    let mut roots: Vec<_> = tables.into_iter().filter_map(relation::labelled).collect();
    roots.sort_unstable_by_key(|oid| oid.to_u32());
    roots.dedup();
    SetOfIterator::new(roots)
}

/// `walmirror.heirs(oid)`: a table, those that inherit its columns and are no partitions, and partitions of it that have a label of
/// their own, as none may.
#[pg_extern]
fn heirs(table: pg_sys::Oid) -> SetOfIterator<'static, pg_sys::Oid> {
    // Most tables have none, and to ask for them takes as long as to create a table.
    if !relation::has_kin(table) {
        return SetOfIterator::new(vec![table]);
    }
    SetOfIterator::new(tables(
        c"WITH RECURSIVE heirs(oid) AS (
             SELECT $1
             UNION
             SELECT i.inhrelid FROM heirs h JOIN pg_inherits i ON i.inhparent = h.oid
             JOIN pg_class c ON c.oid = i.inhrelid AND NOT c.relispartition
         )
         SELECT oidsend(h.oid) FROM heirs h
         UNION
         SELECT oidsend(l.objoid) FROM pg_seclabel l JOIN pg_class c ON c.oid = l.objoid AND c.relispartition
         WHERE l.provider = 'walmirror' AND l.classoid = 'pg_class'::regclass AND l.objsubid = 0
           AND EXISTS (SELECT 1 FROM pg_class t WHERE t.oid = $1 AND (t.relkind = 'p' OR t.relispartition))
           AND $1 IN (SELECT a.relid::oid FROM pg_partition_ancestors(CASE WHEN c.relispartition THEN l.objoid::regclass END) a)",
        table,
    ))
}

/// The oids that a query of the catalogs finds, as they are now, in the order that it gives.
fn tables(sql: &'static CStr, about: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let rows = catalog_query::rows_by_plan(sql, &[about])
        .unwrap_or_else(|error| error!("walmirror could not read the catalogs: {error}"));
    let oid = |row: Vec<u8>| row.try_into().ok().map(u32::from_be_bytes);
    rows.into_iter().filter_map(oid).map(pg_sys::Oid::from).collect()
}

/// `walmirror.row_type(oid)`: the type of the rows of a table.
#[pg_extern]
fn row_type(table: pg_sys::Oid) -> pg_sys::Oid {
    relation::row_type(table)
}

/// `walmirror.is_partitioned(oid)`: whether a table has partitions. Takes no lock.
#[pg_extern]
fn is_partitioned(table: pg_sys::Oid) -> bool {
    relation::is_partitioned(table)
}

/// `walmirror.set_label(oid, bytea)`: checks all that could be wrong, then runs `SECURITY LABEL FOR walmirror`. The label is
/// in UTF-8, whatever the encoding of the database.
#[pg_extern]
fn set_label(table: pg_sys::Oid, label: &[u8]) {
    let label = String::from_utf8_lossy(label);
    // Before it is locked: nobody else may have others wait, or have Postgres end an autovacuum that is in the way.
    require_owner(table);
    // Whoever changes the table is waited for, as by SECURITY LABEL, and does not come in between.
    relation::lock_to_label(table);
    let checked = require_preload()
        .and_then(|()| Label::parse(&label))
        // The other labels are looked at by SECURITY LABEL, when the table is locked.
        .and_then(|parsed| ddl::check_table(table, &parsed, Check::Strict));
    if let Err(refusal) = checked {
        refusal.raise();
    }
    let statement = Spi::get_one_with_args::<Vec<u8>>(
        "SELECT pg_catalog.convert_to(pg_catalog.format('SECURITY LABEL FOR walmirror ON TABLE %s IS %L',
            $1::pg_catalog.regclass, pg_catalog.convert_from($2, 'UTF8')), 'UTF8')",
        &[table.into(), label.as_bytes().into()],
    );
    match statement {
        Ok(Some(statement)) => text::run_utf8(&statement),
        Ok(None) => error!("walmirror could not set the label"),
        Err(error) => error!("walmirror could not set the label: {error}"),
    }
    let virtual_columns: Vec<String> = Rel::open(table)
        .map(|table| table.columns())
        .unwrap_or_default()
        .into_iter()
        .filter(|column| column.is_virtual)
        .map(|column| column.name)
        .collect();
    if !virtual_columns.is_empty() {
        notice!(
            "virtual generated columns are not mirrored, as no row holds them: {}",
            virtual_columns.join(", ")
        );
    }
}

/// Drops of mirrored tables are noticed only by sessions that have loaded the library, which has to be all of them.
fn require_preload() -> Result<(), Refusal> {
    if hooks::is_preloaded() {
        return Ok(());
    }
    Err(Refusal::object(
        "walmirror is not in shared_preload_libraries",
        "Add walmirror to shared_preload_libraries in postgresql.conf and restart PostgreSQL: ALTER SYSTEM SET shared_preload_libraries = 'walmirror';",
    ))
}

/// `walmirror.check_label(oid, boolean)`: raises an error if the table has a label that no longer fits it. The event triggers call it
/// after DDL; this one and the next three are for the extension's owner, as whom they run.
#[pg_extern]
fn check_label(table: pg_sys::Oid, added: bool) {
    let check = if added { Check::Adding } else { Check::Altered };
    if let Err(refusal) = ddl::changed(table, check) {
        refusal.raise();
    }
    invalidate(table);
}

/// `walmirror.check_at_commit(oid)`: the same for a table that lost something, which may come again before the transaction ends.
#[pg_extern]
fn check_at_commit(table: pg_sys::Oid) {
    ddl::part_dropped(table);
    invalidate(table);
}

/// `walmirror.invalidate(oid)`: every session, and every decoder at this point of the WAL, looks at a labelled table and its partitions
/// anew.
#[pg_extern]
fn invalidate(table: pg_sys::Oid) {
    relation::require_writable(c"walmirror.invalidate()");
    if relation::label_of(table).is_some() {
        // Nobody locks them: one may be dropped meanwhile.
        for oid in relation::with_partitions(table) {
            if relation::exists(oid) {
                relation::invalidate(oid);
            }
        }
    }
}

/// `walmirror.announce_ddl(oid, boolean)`: tells the decoders, in order with this transaction, that a table was changed.
#[pg_extern]
fn announce_ddl(table: pg_sys::Oid, refresh: bool) {
    tell(table, refresh, false);
}

/// `walmirror.announce(oid, boolean, boolean)`: the same for everybody, as far as the table is theirs. So `pg_logical_emit_message` is
/// not needed for it, with which anybody could say so of any table.
#[pg_extern]
fn announce(table: pg_sys::Oid, refresh: bool, keep_keys: bool) {
    require_owner(table);
    tell(table, refresh, keep_keys);
}

fn require_owner(table: pg_sys::Oid) {
    if !relation::is_owned(table) {
        let name = Rel::open_historic(table).map(|table| table.name());
        Refusal::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("must be owner of table {}", name.unwrap_or_default()),
            "Become a role that owns the table, or a member of it.",
        )
        .raise();
    }
}

fn tell(table: pg_sys::Oid, refresh: bool, keep_keys: bool) {
    relation::require_writable(c"walmirror.announce()");
    hooks::write_ddl_message(&DdlMessage {
        oid: u32::from(table),
        refresh,
        dropped: false,
        keep_keys,
    });
}

/// `walmirror.capture_counters()`: what stands behind the view `walmirror.capture_stats`.
#[pg_extern]
fn capture_counters()
-> TableIterator<'static, (name!(counter, String), name!(value, i64), name!(meaning, String))> {
    TableIterator::new(stats::COUNTERS.into_iter().map(|(counter, name, meaning)| {
        (
            name.to_owned(),
            i64::try_from(stats::get(counter)).unwrap_or(i64::MAX),
            meaning.to_owned(),
        )
    }))
}
