//! The labels of all tables, and the lock under which keys are given out.

use std::ffi::CStr;

use pgrx::pg_sys;
use xxhash_rust::xxh3::xxh3_64;

use super::relation::PROVIDER;
use super::text;

/// Waits until every other transaction that may give out keys of this form has ended, and has later ones wait for this one
/// (`LockDatabaseObject`). Two forms of one hash only wait for each other without need.
pub fn lock_keys(form: &str) {
    let hash = (xxh3_64(form.as_bytes()) >> 32) as u32;
    // SAFETY: within a transaction, as labels are set in one; the lock goes with it. Rows of pg_seclabel have no oid, so nobody
    // else locks objects of that catalog.
    unsafe {
        pg_sys::LockDatabaseObject(
            pg_sys::SecLabelRelationId,
            pg_sys::Oid::from(hash),
            0,
            pg_sys::ExclusiveLock as pg_sys::LOCKMODE,
        );
    }
}

/// The labels of all tables, those that were committed after the snapshot of this transaction too.
pub fn all() -> Vec<(pg_sys::Oid, String)> {
    let mut labels = Vec::new();
    // SAFETY: a catalog scan within a transaction; without a snapshot it takes one that sees all that has committed
    // (GetCatalogSnapshot). A row of pg_seclabel has COLUMNS columns, none of them NULL, of the types that they are read as;
    // heap_deform_tuple fills as many in. After an ERROR Postgres ends scan and lock by itself (resource owner).
    unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let catalog = pg_sys::table_open(pg_sys::SecLabelRelationId, lock);
        let scan = pg_sys::systable_beginscan(
            catalog,
            pg_sys::InvalidOid,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        loop {
            let row = pg_sys::systable_getnext(scan);
            if row.is_null() {
                break;
            }
            let mut values = [pg_sys::Datum::null(); COLUMNS];
            let mut nulls = [false; COLUMNS];
            pg_sys::heap_deform_tuple(row, (*catalog).rd_att, values.as_mut_ptr(), nulls.as_mut_ptr());
            let [table, class, sub_id, provider, label] = values;
            let is_label = class.value() == u32::from(pg_sys::RelationRelationId) as usize
                && sub_id.value() as i32 == 0
                && CStr::from_ptr(pg_sys::text_to_cstring(provider.cast_mut_ptr())) == PROVIDER;
            if is_label && let Some(label) = text::string(pg_sys::text_to_cstring(label.cast_mut_ptr())) {
                labels.push((pg_sys::Oid::from(table.value() as u32), label));
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(catalog, lock);
    }
    labels
}

/// pg_seclabel.h: objoid, classoid, objsubid, provider, label.
const COLUMNS: usize = 5;
