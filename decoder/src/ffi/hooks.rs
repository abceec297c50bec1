//! What Postgres calls besides the output plugin: `_PG_init`, relation cache invalidations, the label provider, drops.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::relation::PROVIDER;
use super::{executor, flusher, settings, shared, text, user_code};
use crate::decode::ddl_message::{self, DdlMessage};
use crate::{ddl, tables};

/// Called when the library is loaded, at server start or by the first use in a session.
///
/// # Safety
/// Called by Postgres, once a process.
#[pg_guard]
pub unsafe extern "C-unwind" fn _PG_init() {
    // SAFETY: hooks are plain variables that extensions chain in _PG_init; the provider's name is a constant.
    unsafe {
        PRELOADED.store(
            pg_sys::process_shared_preload_libraries_in_progress,
            Ordering::Relaxed,
        );
        pg_sys::register_label_provider(PROVIDER.as_ptr(), Some(check_label));
        NEXT_OBJECT_ACCESS = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(object_access);
    }
    // An error is for a person: pgrx would put a backtrace into its DETAIL when the server's environment asks for one.
    for variable in ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"] {
        // SAFETY: the postmaster and backends have one thread.
        unsafe { std::env::remove_var(variable) };
    }
    user_code::hook();
    settings::define(is_preloaded());
    if is_preloaded() {
        shared::request();
        executor::hook();
        flusher::register();
    } else {
        log!(
            "walmirror is not in shared_preload_libraries: SELECT capture is off, and drops of mirrored tables go unnoticed"
        );
    }
}

/// Whether the postmaster loaded the library at its start; every backend inherits the answer.
static PRELOADED: AtomicBool = AtomicBool::new(false);

/// Whether the library stands in `shared_preload_libraries`.
pub fn is_preloaded() -> bool {
    PRELOADED.load(Ordering::Relaxed)
}

/// Has the relation cache tell of changed tables, and the cache of casts of those: a cast to json may forbid a plan, and no
/// table changes with it. Once a process, as such callbacks cannot be taken back.
pub fn register_callbacks() {
    thread_local! {
        static REGISTERED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if !REGISTERED.replace(true) {
        // SAFETY: the callbacks are functions of this library, which is never unloaded.
        unsafe {
            pg_sys::CacheRegisterRelcacheCallback(Some(relcache_changed), pg_sys::Datum::null());
            pg_sys::CacheRegisterSyscacheCallback(
                pg_sys::SysCacheIdentifier::CASTSOURCETARGET as c_int,
                Some(casts_changed),
                pg_sys::Datum::null(),
            );
        }
    }
}

unsafe extern "C-unwind" fn relcache_changed(_argument: pg_sys::Datum, table: pg_sys::Oid) {
    tables::invalidate((table != pg_sys::InvalidOid).then(|| u32::from(table)));
}

unsafe extern "C-unwind" fn casts_changed(_argument: pg_sys::Datum, _cache: c_int, _hash: u32) {
    tables::invalidate(None);
}

#[pg_guard]
unsafe extern "C-unwind" fn check_label(object: *const pg_sys::ObjectAddress, label: *const c_char) {
    // SAFETY: ExecSecLabelStmt passes a valid address, and a C string or NULL.
    let (object, label) = unsafe { (*object, text::string(label)) };
    let is_table = object.classId == pg_sys::RelationRelationId && object.objectSubId == 0;
    if let Err(refusal) = ddl::check_label(is_table.then_some(object.objectId), label.as_deref()) {
        refusal.raise();
    }
}

static mut NEXT_OBJECT_ACCESS: pg_sys::object_access_hook_type = None;

/// Unguarded, with nothing to drop: an ERROR of the next hook jumps over it as over C.
unsafe extern "C-unwind" fn object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub_id: c_int,
    argument: *mut c_void,
) {
    // SAFETY: written once, in _PG_init; the next hook gets the arguments as they came.
    unsafe {
        if let Some(next) = NEXT_OBJECT_ACCESS {
            next(access, class, object, sub_id, argument);
        }
        if access == pg_sys::ObjectAccessType::OAT_DROP && class == pg_sys::RelationRelationId && sub_id == 0
        {
            let flags = argument.cast::<pg_sys::ObjectAccessDrop>();
            let concurrently =
                !flags.is_null() && (*flags).dropflags & pg_sys::PERFORM_DELETION_CONCURRENTLY as c_int != 0;
            relation_dropped(object, concurrently);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn relation_dropped(relation: pg_sys::Oid, concurrently: bool) {
    if !concurrently {
        ddl::table_dropped(relation);
    } else if let Err(refusal) = ddl::index_dropped_concurrently(relation) {
        refusal.raise();
    }
}

/// Writes a transactional logical message (`LogLogicalMessage`): decoders meet it where this transaction does its change.
pub fn write_ddl_message(message: &DdlMessage) {
    let Ok(content) = serde_json::to_vec(message) else {
        return;
    };
    let Ok(prefix) = std::ffi::CString::new(ddl_message::PREFIX) else {
        return;
    };
    log_message(&prefix, &content, true);
}

/// Writes a logical message (`LogLogicalMessage`); returns where it ends in the WAL.
pub fn log_message(prefix: &CStr, content: &[u8], transactional: bool) -> u64 {
    // SAFETY: the declarations below match replication/message.h of the version that is compiled for; the guard turns an
    // ERROR into an unwind as for pgrx's own bindings.
    unsafe {
        pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| {
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            let lsn = LogLogicalMessage(
                prefix.as_ptr(),
                content.as_ptr().cast(),
                content.len(),
                transactional,
                false,
            );
            #[cfg(not(any(feature = "pg17", feature = "pg18")))]
            let lsn = LogLogicalMessage(
                prefix.as_ptr(),
                content.as_ptr().cast(),
                content.len(),
                transactional,
            );
            lsn
        })
    }
}

unsafe extern "C-unwind" {
    // pgrx has no binding for it.
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
        flush: bool,
    ) -> pg_sys::XLogRecPtr;
    #[cfg(not(any(feature = "pg17", feature = "pg18")))]
    fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
    ) -> pg_sys::XLogRecPtr;
}
