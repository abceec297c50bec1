//! The row encoder: one row of a table, as its plan says, into a tuple of the stream.
//!
//! All four users call it: changes, SELECT captures, backfill and verify (by `walmirror.pack`). A value therefore looks
//! the same however it got to Redis.

use walmirror_proto::writer::TupleBuilder;

use crate::ffi::datum::Row;
use crate::ffi::failure::Failure;
use crate::ffi::value::{self, Outcome};
use crate::plan::Plan;

/// Which columns of a row to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Columns {
    All,
    /// Those of the key; the others as NULL.
    Key,
    /// Those of the key; the others as unchanged, that is, as not told.
    KeyOnly,
}

/// A row that cannot be encoded: which column, and why.
#[derive(Debug)]
pub struct EncodeError {
    /// Names the column and the cause, never a value (INVARIANT I8).
    pub reason: String,
}

/// Encodes `row`. Where it holds an unchanged TOASTed value and `old` holds the value itself (a key column, or any column
/// under REPLICA IDENTITY FULL), the old value is the new one.
pub fn encode(
    plan: &mut Plan,
    row: &Row,
    old: Option<&Row>,
    columns: Columns,
    out: &mut TupleBuilder,
) -> Result<(), EncodeError> {
    out.clear();
    for (field, column) in plan.fields.iter_mut().zip(&plan.relation.columns) {
        match columns {
            Columns::Key if !field.in_key => {
                out.null();
                continue;
            }
            Columns::KeyOnly if !field.in_key => {
                out.unchanged();
                continue;
            }
            _ => {}
        }
        let Some(raw) = row.get(field.position) else {
            out.null();
            continue;
        };
        let failed = |failure: Failure| EncodeError {
            reason: format!("column \"{}\": {}", column.name, failure.0),
        };
        if let Outcome::Unchanged = value::append(&mut field.read, raw, out).map_err(failed)? {
            let former = old.and_then(|old| old.get(field.position));
            match former
                .map(|raw| value::append(&mut field.read, raw, out))
                .transpose()
                .map_err(failed)?
            {
                Some(Outcome::Appended) => {}
                Some(Outcome::Unchanged) | None => out.unchanged(),
            }
        }
    }
    Ok(())
}
