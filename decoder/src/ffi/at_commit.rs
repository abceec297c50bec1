//! Tables whose labels are looked at when the transaction ends.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::ddl;

thread_local! {
    static TABLES: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Has a table looked at by [`ddl::transaction_ends`] before this transaction commits or is prepared.
pub fn look_at(table: pg_sys::Oid) {
    if !REGISTERED.replace(true) {
        // SAFETY: the callback is a function of this library, which is never unloaded.
        unsafe { pg_sys::RegisterXactCallback(Some(ends), std::ptr::null_mut()) }
    }
    TABLES.with_borrow_mut(|tables| {
        let table = u32::from(table);
        if !tables.contains(&table) {
            tables.push(table);
        }
    });
}

/// Whether that will be done.
pub fn will_look_at(table: pg_sys::Oid) -> bool {
    TABLES.with_borrow(|tables| tables.contains(&u32::from(table)))
}

/// Before the commit an error still ends the transaction, as one of a deferred constraint does; after it none may be raised.
#[pg_guard]
unsafe extern "C-unwind" fn ends(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    let tables = TABLES.take();
    if event != pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT && event != pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE
    {
        return;
    }
    for table in tables {
        if let Err(refusal) = ddl::transaction_ends(pg_sys::Oid::from(table)) {
            refusal.raise();
        }
    }
}
