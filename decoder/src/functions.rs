//! The SQL functions that are written in Rust; sql/ declares them, beside those written in SQL.

use pgrx::pg_sys;
use pgrx::prelude::*;
use prost::Message;

use crate::capture::stats;
use crate::ddl::{self, Check};
use crate::decode::ddl_message::DdlMessage;
use crate::error::Refusal;
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

/// `walmirror.set_label(oid, bytea)`: checks all that could be wrong, then runs `SECURITY LABEL FOR walmirror`. The label is
/// in UTF-8, whatever the encoding of the database.
#[pg_extern]
fn set_label(table: pg_sys::Oid, label: &[u8]) {
    let label = String::from_utf8_lossy(label);
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
/// after DDL.
#[pg_extern]
fn check_label(table: pg_sys::Oid, added: bool) {
    let check = if added { Check::Adding } else { Check::Restoring };
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

/// `walmirror.invalidate(oid)`: every session, and every decoder at this point of the WAL, looks at the table and its partitions anew.
#[pg_extern]
fn invalidate(table: pg_sys::Oid) {
    for oid in relation::with_partitions(table) {
        relation::invalidate(oid);
    }
}

/// `walmirror.announce(oid, boolean, boolean)`: tells the decoders, in order with this transaction, that a table was changed, as only
/// its owner can. So `pg_logical_emit_message` is not needed for it, with which anybody could say so of any table.
#[pg_extern]
fn announce(table: pg_sys::Oid, refresh: bool, keep_keys: bool) {
    if !relation::is_owned(table) {
        Refusal::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("must be owner of the table with oid {}", u32::from(table)),
            "Become a role that owns the table, or a member of it.",
        )
        .raise();
    }
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
