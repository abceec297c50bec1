//! A result of the server: status, values, error fields.

use std::ffi::c_int;
use std::ptr::NonNull;

use pq_sys as pq;
use pq_sys::ExecStatusType;

use super::owned;
use crate::pq::error::{ErrorKind, PqError};

/// A `PGresult`.
pub(in crate::pq) struct RawResult {
    raw: NonNull<pq::PGresult>,
}

// SAFETY: a PGresult is independent of its connection and is only read once libpq has returned it.
unsafe impl Send for RawResult {}
// SAFETY: all methods only read.
unsafe impl Sync for RawResult {}

impl RawResult {
    /// Takes a result that libpq gave, and that nobody else owns.
    pub(super) fn new(raw: NonNull<pq::PGresult>) -> Self {
        Self { raw }
    }

    pub fn status(&self) -> ExecStatusType {
        // SAFETY: the result is live.
        unsafe { pq::PQresultStatus(self.raw.as_ptr()) }
    }

    pub fn rows(&self) -> usize {
        // SAFETY: the result is live.
        usize::try_from(unsafe { pq::PQntuples(self.raw.as_ptr()) }).unwrap_or(0)
    }

    pub fn columns(&self) -> usize {
        // SAFETY: the result is live.
        usize::try_from(unsafe { pq::PQnfields(self.raw.as_ptr()) }).unwrap_or(0)
    }

    /// The value at row and column; None for NULL and for what is outside.
    pub fn value(&self, row: usize, column: usize) -> Option<&[u8]> {
        if row >= self.rows() || column >= self.columns() {
            return None;
        }
        let (row, column) = (c_int::try_from(row).ok()?, c_int::try_from(column).ok()?);
        let raw = self.raw.as_ptr();
        // SAFETY: row and column are inside the result.
        if unsafe { pq::PQgetisnull(raw, row, column) } == 1 {
            return None;
        }
        // SAFETY: as above; the value has PQgetlength bytes and lives as long as the result.
        unsafe {
            let length = usize::try_from(pq::PQgetlength(raw, row, column)).ok()?;
            Some(std::slice::from_raw_parts(
                pq::PQgetvalue(raw, row, column).cast::<u8>(),
                length,
            ))
        }
    }

    pub fn error(&self) -> PqError {
        // SAFETY: the result is live, and the codes are those of postgres_ext.h; a missing field gives NULL.
        let field = |code: u8| owned(unsafe { pq::PQresultErrorField(self.raw.as_ptr(), c_int::from(code)) });
        let sqlstate = field(b'C');
        // SAFETY: the result is live.
        let whole = || owned(unsafe { pq::PQresultErrorMessage(self.raw.as_ptr()) });
        PqError {
            // Without a SQLSTATE the text comes from libpq itself: the connection broke.
            kind: if sqlstate.is_some() {
                ErrorKind::Server
            } else {
                ErrorKind::Connection
            },
            sqlstate,
            severity: field(b'V').map(String::into_boxed_str),
            message: field(b'M')
                .or_else(whole)
                .unwrap_or_else(|| "no message".to_owned())
                .trim_end()
                .to_owned(),
            detail: field(b'D').map(String::into_boxed_str),
            hint: field(b'H').map(String::into_boxed_str),
            target: None,
        }
    }
}

impl Drop for RawResult {
    fn drop(&mut self) {
        // SAFETY: the pointer is live and nobody uses it after this.
        unsafe { pq::PQclear(self.raw.as_ptr()) }
    }
}
