//! Results of statements: rows of values as bytes, read in the memory that libpq received them into.

use super::ffi::RawResult;

/// The result of a statement.
pub struct QueryResult {
    raw: RawResult,
}

impl QueryResult {
    pub(super) fn new(raw: RawResult) -> Self {
        Self { raw }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.raw.rows()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value at this row and column; None for NULL, and for what is outside the result.
    pub fn get(&self, row: usize, column: usize) -> Option<&[u8]> {
        self.raw.value(row, column)
    }

    /// The same as text; None also where it is no UTF-8.
    pub fn text(&self, row: usize, column: usize) -> Option<&str> {
        self.get(row, column)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// The rows, in order.
    pub fn rows(&self) -> Rows<'_> {
        Rows {
            result: self,
            next: 0,
        }
    }
}

/// Iterates over the rows of a [`QueryResult`].
pub struct Rows<'a> {
    result: &'a QueryResult,
    next: usize,
}

impl<'a> Iterator for Rows<'a> {
    type Item = Row<'a>;

    fn next(&mut self) -> Option<Row<'a>> {
        let row = self.next;
        self.next += 1;
        (row < self.result.len()).then_some(Row {
            result: self.result,
            row,
        })
    }
}

/// One row.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    result: &'a QueryResult,
    row: usize,
}

impl<'a> Row<'a> {
    /// The value of a column, counted from 0; None for NULL.
    pub fn get(&self, column: usize) -> Option<&'a [u8]> {
        self.result.get(self.row, column)
    }

    /// The same as text.
    pub fn text(&self, column: usize) -> Option<&'a str> {
        self.result.text(self.row, column)
    }

    /// The value parsed from its text; None for NULL and where it does not parse.
    pub fn parse<T: std::str::FromStr>(&self, column: usize) -> Option<T> {
        self.text(column)?.parse().ok()
    }
}
