//! The statement that looks for rows by their keys, and which of its errors say something about a key. Called by [`super::Lookup`].

use super::super::sql::Sql;
use super::ParsedKey;
use crate::pq::{ErrorKind, PqError, QueryResult};

/// A way to look for rows.
pub(super) struct Way {
    pub(super) from: String,
    pub(super) arrays: usize,
    /// What is asked for is compared as text, so it is no value that a type refuses.
    pub(super) takes_any_text: bool,
}

/// A statement that takes arrays.
#[derive(Clone)]
pub(super) struct Query {
    pub(super) statement: String,
    pub(super) arrays: usize,
    pub(super) takes_any_text: bool,
    /// It gives whole rows in binary, of no more than so many bytes, not the columns of their keys.
    pub(super) rows_up_to: Option<usize>,
    /// It has been run without any value, and that worked.
    pub(super) is_sound: bool,
}

impl Query {
    pub(super) fn new(way: &Way, columns: &str, rows_up_to: Option<usize>) -> Self {
        Self {
            statement: format!("SELECT {columns} {}", way.from),
            arrays: way.arrays,
            takes_any_text: way.takes_any_text,
            rows_up_to,
            is_sound: false,
        }
    }

    /// Whether the error is that of a value that was asked for, or of the row that has it, which cannot be read. A file that is damaged
    /// says nothing about which keys have a row; nor does a damaged row where all are rendered.
    pub(super) fn is_of_a_value(&self, error: &PqError) -> bool {
        let reads_its_row = self.rows_up_to.is_some() && !self.takes_any_text;
        let is_of_a_row =
            super::super::fill::is_too_large(error) || reads_its_row && super::super::fill::is_damaged(error);
        error.kind == ErrorKind::Server && (is_of_a_row || refuses_a_value(error, self.takes_any_text))
    }

    /// None: its rows have more bytes.
    pub(super) fn run(&self, sql: &mut Sql, keys: &[ParsedKey]) -> Result<Option<Vec<QueryResult>>, PqError> {
        let arrays: Vec<Vec<u8>> = (0..self.arrays)
            .map(|index| array(keys.iter().map(|(_, values)| values.get(index))))
            .collect();
        let params: Vec<Option<&[u8]>> = arrays.iter().map(|array| Some(array.as_slice())).collect();
        match self.rows_up_to {
            Some(most) => sql.connection.query_binary_up_to(&self.statement, &params, most),
            None => sql
                .connection
                .query(&self.statement, &params)
                .map(|result| Some(vec![result])),
        }
    }
}

/// Whether the server refused a value that was asked for. Input functions, and what they call, raise whatever they like, so this is every
/// error but those of the session or the machine, of rights, of locks, of snapshots, and of a label that does not fit. Where any text will
/// do, only bytes that are none are refused: all else says nothing about which keys have a row.
pub(super) fn refuses_a_value(error: &PqError, takes_any_text: bool) -> bool {
    let state = error.sqlstate.as_deref().unwrap_or("XX000");
    if takes_any_text {
        return ["22021", "22P05"].contains(&state);
    }
    let is_elsewhere = matches!(
        state.get(..2),
        Some("08" | "25" | "40" | "53" | "55" | "57" | "58" | "72" | "XX")
    );
    !is_elsewhere && state != "42501"
}

/// An array literal.
pub(super) fn array<'v>(values: impl Iterator<Item = Option<&'v Vec<u8>>>) -> Vec<u8> {
    let mut out = vec![b'{'];
    for (index, value) in values.enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.push(b'"');
        for &byte in value.map_or(&[][..], Vec::as_slice) {
            if matches!(byte, b'"' | b'\\') {
                out.push(b'\\');
            }
            out.push(byte);
        }
        out.push(b'"');
    }
    out.push(b'}');
    out
}
