//! Keys that two templates could make, and that are those of the more specific one: said to who sets the label of either.

use pgrx::pg_sys::{self, panic::ErrorReport};
use pgrx::prelude::*;

use super::name_of;
use crate::error::Refusal;

/// So many tables are named, where a label takes keys from more.
pub(super) const TOLD: usize = 5;

/// Two tables, each with its key template, of which the more specific one takes keys that the other could make. That is no error: many
/// tables that share a beginning never have a row of that kind.
pub(super) struct Taken {
    pub(super) by: (pg_sys::Oid, String),
    pub(super) from: (pg_sys::Oid, String),
}

impl Taken {
    /// Says so to who sets the label.
    pub(super) fn tell(&self) -> Result<(), Refusal> {
        let ((by, key), (from, theirs)) = (&self.by, &self.from);
        let (by, from) = (name_of(*by)?, name_of(*from)?);
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
            format!(
                "key template \"{key}\" of table \"{by}\" takes keys that \"{theirs}\" of table \"{from}\" could make: \
                 a row of \"{from}\" with such a key is not mirrored"
            ),
            "walmirror",
        )
        .set_hint(format!(
            "If table \"{from}\" has such rows (walmirror status lists them), choose a key with another prefix for one of the two: \
             key => 'schema.table:{{id}}'."
        ))
        .report(PgLogLevel::NOTICE);
        Ok(())
    }
}
