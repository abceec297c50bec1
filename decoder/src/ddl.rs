//! Labels stay valid: checked when they are set, and again by the extension's event triggers after every DDL that could
//! break them. Drops are told to the stream here, everything else by those triggers.

use pgrx::pg_sys;

use crate::decode::ddl_message::DdlMessage;
use crate::error::Refusal;
use crate::ffi::at_commit;
use crate::ffi::hooks;
use crate::ffi::relation::{self, Rel};
use crate::ffi::text;
use crate::label::{self, Label};

mod validate;

pub use validate::{Check, check_table};
use validate::{claim, validate};

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
        let parsed = Label::parse(label)?;
        if !text::is_utf8() && label::escapes_beyond_ascii(label) {
            return Err(Refusal::invalid(
                "invalid walmirror label: it holds a \\u escape of a character beyond ASCII, and this database is not in UTF8",
                "Write the character itself: SELECT walmirror.mirror('table', key => …) makes the label.",
            ));
        }
        claim(table, &parsed, Check::Restoring)?;
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

/// The table was changed, and has a label. One that lost something before that is looked at when the transaction ends.
pub fn changed(table: pg_sys::Oid, check: Check) -> Result<(), Refusal> {
    match relation::label_of(table) {
        Some(label) if !at_commit::will_look_at(table) => {
            would_break(Label::parse(&label).and_then(|label| validate(table, &label, check)))
        }
        _ => Ok(()),
    }
}

/// A table lost an index, a constraint or a column, and may get another, or go itself, before its transaction ends: as when
/// `pg_restore --clean --single-transaction` takes apart what it makes anew. So what does not fit now is looked at again then.
pub fn part_dropped(table: pg_sys::Oid) {
    let Some(label) = relation::label_of(table) else {
        return;
    };
    if Label::parse(&label)
        .and_then(|label| validate(table, &label, Check::Strict))
        .is_err()
    {
        at_commit::look_at(table);
    }
}

/// The transaction ends in which [`part_dropped`] found that a label does not fit. What the table's rows went through without a unique
/// key, or without their old rows in the WAL, is not for a stream to tell, so that the table is compared anew.
pub fn transaction_ends(table: pg_sys::Oid) -> Result<(), Refusal> {
    // It may have gone in this transaction.
    if !relation::has_extension() {
        return Ok(());
    }
    let Some(label) = relation::label_of(table) else {
        return Ok(());
    };
    would_break(Label::parse(&label).and_then(|label| validate(table, &label, Check::Strict)))?;
    hooks::write_ddl_message(&DdlMessage {
        oid: u32::from(table),
        refresh: true,
        dropped: false,
        keep_keys: false,
    });
    Ok(())
}

/// Says that a refusal is about a label that was set before.
fn would_break(checked: Result<(), Refusal>) -> Result<(), Refusal> {
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
