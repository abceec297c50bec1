//! The columns of row types, as the functions that print rows need them (`record_out`, `to_jsonb`).
//!
//! These functions ask the cache of types (typcache.c) for them, and where that does not know them it locks the row type's relation: behind
//! whoever alters the type. What is known needs no lock, so whoever must not wait sees to that first.

use std::ffi::c_int;

use pgrx::pg_sys;

use super::catalog_types;
use super::relation::Rel;

/// Has the cache of types know the columns of a row type without any lock, as of the snapshot in force
/// (`load_typcache_tupdesc` with `RelationIdGetRelation`). For decoding callbacks, which open all relations in that way: the
/// transaction that holds the lock may wait for this stream, or be the one whose changes are decoded.
pub fn know(row: pg_sys::Oid) {
    // One that was dropped while event triggers were off may still be in a plan, and an ERROR would come again at each attempt.
    if !catalog_types::is_row(row) {
        return;
    }
    let entry = entry(row);
    // SAFETY: entries of this cache are never freed. The descriptor of an open relation is counted (RelationBuildTupleDesc), and the cache
    // gives its reference back when it is told that the relation has changed (InvalidateCompositeTypeCacheEntry).
    unsafe {
        if !(*entry).tupDesc.is_null() {
            return;
        }
        let Some(relation) = Rel::open_historic((*entry).typrelid) else {
            return;
        };
        let descriptor = relation.descriptor().raw();
        (*descriptor).tdrefcount += 1;
        (*entry).tupDesc = descriptor;
        (*entry).tupDesc_identifier = next_identifier();
    }
}

/// The same under the lock, as Postgres does it, where that is to be had at once. `false` where it is not.
pub fn know_at_once(row: pg_sys::Oid) -> bool {
    let entry = entry(row);
    // SAFETY: as above, within a transaction. An ERROR leaves the lock to the end of the transaction.
    unsafe {
        if !(*entry).tupDesc.is_null() {
            return true;
        }
        let Some(_locked) = Rel::open_at_once((*entry).typrelid) else {
            return false;
        };
        pg_sys::lookup_type_cache(row, pg_sys::TYPECACHE_TUPDESC as c_int);
        true
    }
}

/// What the cache of types holds of a row type.
fn entry(row: pg_sys::Oid) -> *mut pg_sys::TypeCacheEntry {
    // SAFETY: syscache look-ups; an ERROR for a type that does not exist.
    unsafe { pg_sys::lookup_type_cache(row, 0) }
}

/// A number that tells this descriptor from every other (`tupDesc_identifier`). Postgres counts from 1.
fn next_identifier() -> u64 {
    static mut LAST: u64 = 1 << 63;
    // SAFETY: a variable of this single-threaded backend.
    unsafe {
        LAST = LAST.wrapping_add(1);
        LAST
    }
}
