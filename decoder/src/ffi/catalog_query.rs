//! Queries of the catalogs as they are now, whatever the caller's snapshot and search_path are.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};

use pgrx::{FromDatum, Spi, pg_sys};

use super::session;

/// Runs a query that returns one `bytea`, with parameters of type oid, InvalidOid as NULL. It sees all that has committed and all that
/// this transaction did: what checks a table often has waited for it, so that the snapshot of its statement is older than
/// what it waited for. Unqualified names are those of pg_catalog.
pub fn rows(sql: &str, oids: &[pg_sys::Oid]) -> Result<Vec<Vec<u8>>, String> {
    let sql = CString::new(sql).map_err(|error| error.to_string())?;
    run(oids, |arguments| {
        // SAFETY: within an SPI connection, as `run` calls it; arrays and strings live during the call.
        unsafe {
            pg_sys::SPI_execute_with_args(
                sql.as_ptr(),
                arguments.count,
                arguments.types.as_mut_ptr(),
                arguments.values.as_mut_ptr(),
                arguments.nulls.as_ptr(),
                true,
                0,
            )
        }
    })
}

/// The same with a plan that is made once a session: for what the event triggers ask of all tables that somebody makes or alters, be
/// they mirrored or not.
pub fn rows_by_plan(sql: &'static CStr, oids: &[pg_sys::Oid]) -> Result<Vec<Vec<u8>>, String> {
    thread_local! {
        static PLANS: RefCell<Vec<(&'static CStr, pg_sys::SPIPlanPtr)>> = const { RefCell::new(Vec::new()) };
    }
    run(oids, |arguments| {
        let known = PLANS.with_borrow(|plans| {
            let plan = plans.iter().find(|(other, _)| *other == sql);
            plan.map(|(_, plan)| *plan)
        });
        // SAFETY: as in `rows`. A plan that is kept lives as long as the session, and Postgres makes it anew where something changed.
        unsafe {
            let plan = known.unwrap_or_else(|| {
                let plan = pg_sys::SPI_prepare_cursor(
                    sql.as_ptr(),
                    arguments.count,
                    arguments.types.as_mut_ptr(),
                    pg_sys::CURSOR_OPT_GENERIC_PLAN as c_int,
                );
                if !plan.is_null() && pg_sys::SPI_keepplan(plan) == 0 {
                    PLANS.with_borrow_mut(|plans| plans.push((sql, plan)));
                }
                plan
            });
            if plan.is_null() {
                return pg_sys::SPI_result;
            }
            pg_sys::SPI_execute_plan(
                plan,
                arguments.values.as_mut_ptr(),
                arguments.nulls.as_ptr(),
                true,
                0,
            )
        }
    })
}

/// The arguments of a query: as many items in each.
struct Arguments {
    count: c_int,
    types: Vec<pg_sys::Oid>,
    values: Vec<pg_sys::Datum>,
    nulls: Vec<c_char>,
}

/// Has `execute` run a query, read-only, in a snapshot of its own; it returns the status.
fn run(oids: &[pg_sys::Oid], execute: impl FnOnce(&mut Arguments) -> c_int) -> Result<Vec<Vec<u8>>, String> {
    let mut arguments = Arguments {
        count: c_int::try_from(oids.len()).map_err(|error| error.to_string())?,
        types: vec![pg_sys::OIDOID; oids.len()],
        values: oids.iter().map(|&oid| oid.into()).collect(),
        nulls: oids
            .iter()
            .map(|&oid| if oid == pg_sys::InvalidOid { b'n' } else { b' ' } as c_char)
            .collect(),
    };
    let _path = session::CatalogPath::enter();
    Spi::connect(|_| {
        // SAFETY: within an SPI connection. The snapshot is popped where it was pushed; after an ERROR the end of the
        // (sub)transaction does that. A read-only query runs in the active snapshot, while others would take one of
        // the transaction.
        let status = unsafe {
            pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
            let status = execute(&mut arguments);
            pg_sys::PopActiveSnapshot();
            status
        };
        if status != pg_sys::SPI_OK_SELECT as c_int {
            return Err(format!("a query of the catalogs returned {status}"));
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
