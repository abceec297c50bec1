//! Queries of the catalogs as they are now, whatever the caller's snapshot and search_path are.

use std::ffi::{CString, c_char, c_int};

use pgrx::{FromDatum, Spi, pg_sys};

use super::session;

/// Runs a query that returns one `bytea`, with parameters of type oid, InvalidOid as NULL. It sees all that has committed and all that
/// this transaction did: what checks a table often has waited for it, so that the snapshot of its statement is older than
/// what it waited for. Unqualified names are those of pg_catalog.
pub fn rows(sql: &str, oids: &[pg_sys::Oid]) -> Result<Vec<Vec<u8>>, String> {
    let sql = CString::new(sql).map_err(|error| error.to_string())?;
    let count = c_int::try_from(oids.len()).map_err(|error| error.to_string())?;
    let mut types = vec![pg_sys::OIDOID; oids.len()];
    let mut values: Vec<pg_sys::Datum> = oids.iter().map(|&oid| oid.into()).collect();
    let nulls: Vec<c_char> = oids
        .iter()
        .map(|&oid| if oid == pg_sys::InvalidOid { b'n' } else { b' ' } as c_char)
        .collect();
    let _path = session::CatalogPath::enter();
    Spi::connect(|_| {
        // SAFETY: within an SPI connection. The snapshot is popped where it was pushed; after an ERROR the end of the
        // (sub)transaction does that. A read-only query runs in the active snapshot, while others would take one of
        // the transaction. Arrays and strings live during the call, each of `count` items.
        let status = unsafe {
            pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
            let status = pg_sys::SPI_execute_with_args(
                sql.as_ptr(),
                count,
                types.as_mut_ptr(),
                values.as_mut_ptr(),
                nulls.as_ptr(),
                true,
                0,
            );
            pg_sys::PopActiveSnapshot();
            status
        };
        if status != pg_sys::SPI_OK_SELECT as c_int {
            return Err(format!("SPI_execute_with_args returned {status}"));
        }
        // SAFETY: after a SELECT SPI_tuptable holds `numvals` rows, and lives as long as the connection; the one column is of the type
        // that it is read as.
        unsafe {
            let table = pg_sys::SPI_tuptable;
            let count = usize::try_from((*table).numvals).map_err(|error| error.to_string())?;
            let rows = (0..count).map(|at| {
                let mut is_null = false;
                let value = pg_sys::SPI_getbinval(*(*table).vals.add(at), (*table).tupdesc, 1, &mut is_null);
                Vec::<u8>::from_datum(value, is_null).unwrap_or_default()
            });
            Ok(rows.collect())
        }
    })
}
