//! Labels stay valid: checked when they are set, and again by the extension's event triggers after every DDL that could
//! break them. Drops are told to the stream here, everything else by those triggers.

use pgrx::pg_sys;

use crate::decode::ddl_message::DdlMessage;
use crate::error::Refusal;
use crate::ffi::hooks;
use crate::ffi::relation::{self, Rel};
use crate::label::Label;

mod validate;

pub use validate::{Check, check_table, claim, validate};

/// The label provider's check of `SECURITY LABEL FOR walmirror`, before the label is stored; `None` removes it. `table` is
/// `None` for objects that are no tables.
pub fn check_label(table: Option<pg_sys::Oid>, label: Option<&str>) -> Result<(), Refusal> {
    let Some(table) = table else {
        return Err(Refusal::object(
            "walmirror labels are for tables",
            "SECURITY LABEL FOR walmirror ON TABLE … IS '{\"mode\":\"mirror\"}'",
        ));
    };
    if let Some(label) = label {
        claim(table, &Label::parse(label)?, Check::Restoring)?;
    }
    // Decoders and sessions look again, in order with this transaction; partitions take their plan from their parent.
    for oid in relation::with_partitions(table) {
        relation::invalidate(oid);
    }
    Ok(())
}

/// `DROP INDEX CONCURRENTLY` begins. What it did before its end is not undone when the event trigger refuses it there, so that
/// it is refused here.
pub fn index_dropped_concurrently(index: pg_sys::Oid) -> Result<(), Refusal> {
    // A label may outlive the extension.
    if !relation::has_extension() {
        return Ok(());
    }
    let Some(labelled) = relation::labelled(relation::of_index(index)) else {
        return Ok(());
    };
    let Some(label) = relation::label_of(labelled) else {
        return Ok(());
    };
    would_break(Label::parse(&label).and_then(|label| validate(labelled, &label, Check::Without(index))))
}

/// Says that a refusal is about a label that was set before.
pub fn would_break(checked: Result<(), Refusal>) -> Result<(), Refusal> {
    checked.map_err(|refusal| Refusal {
        message: format!(
            "this would break the table's walmirror label: {}",
            refusal.message
        ),
        hint: format!(
            "{} Or take the table out first: SELECT walmirror.unmirror('…'); and mirror it again after the change.",
            refusal.hint
        ),
        ..refusal
    })
}

/// A table is about to be dropped: its keys have to go, or, for a partition, those of its rows.
pub fn table_dropped(oid: pg_sys::Oid) {
    if relation::label_of(oid).is_some() {
        hooks::write_ddl_message(&DdlMessage {
            oid: u32::from(oid),
            refresh: false,
            dropped: true,
            keep_keys: false,
        });
        return;
    }
    let Some(table) = Rel::open_historic(oid).filter(|table| table.is_table() && table.is_partition()) else {
        return;
    };
    let labelled = relation::ancestors(table.oid())
        .into_iter()
        .find(|ancestor| relation::label_of(*ancestor).is_some());
    if let Some(root) = labelled {
        hooks::write_ddl_message(&DdlMessage {
            oid: u32::from(root),
            refresh: true,
            dropped: false,
            keep_keys: false,
        });
    }
}
