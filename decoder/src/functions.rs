//! The SQL functions that are written in Rust; sql/ declares them, beside those written in SQL.

use pgrx::pg_sys;
use pgrx::prelude::*;
use prost::Message;

use crate::ddl;
use crate::ffi::memory::Context;
use crate::ffi::relation::{self, Rel};
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

/// `walmirror.check_label(oid)`: raises an error if the table has a label that no longer fits it. The event triggers call
/// it after DDL.
#[pg_extern]
fn check_label(table: pg_sys::Oid) {
    let Some(label) = relation::label_of(table) else { return };
    if let Err(mut refusal) = Label::parse(&label).and_then(|label| ddl::validate(table, &label)) {
        refusal.message = format!("this would break the table's walmirror label: {}", refusal.message);
        refusal.hint = format!("{} Or take the table out first: SELECT walmirror.unmirror('…'); and mirror it again after the change.", refusal.hint);
        refusal.raise();
    }
    for oid in relation::with_partitions(table) {
        relation::invalidate(oid);
    }
}
