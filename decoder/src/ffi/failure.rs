//! Errors that say something about one value, caught where the value is read.

use std::cell::Cell;
use std::ffi::c_int;
use std::panic::AssertUnwindSafe;

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};

use super::{session, unguarded};
use crate::error::Refusal;

/// Why a value cannot be encoded. Never the value, or a part of it (INVARIANT I8): the messages of type functions quote
/// what they were given, so that only the SQLSTATE is told.
pub struct Failure(pub String);

/// Runs what only reads one value. An ERROR in it is caught, unless it is the session's own (a cancel, a shutdown, memory):
/// that goes on its way.
pub fn caught<T>(what: &str, read: impl FnOnce() -> T) -> Result<T, Failure> {
    caught_if(concerns_value, what, read)
}

/// The same for what decompresses a value that was read already. No table and no catalog is read by that, so that it is this value which is
/// corrupt (XX001), or was compressed in a way that this server cannot undo (0A000).
pub fn caught_unpacking<T>(read: impl FnOnce() -> T) -> Result<T, Failure> {
    let concerns = |code| code == PgSqlErrorCode::ERRCODE_DATA_CORRUPTED || concerns_value(code);
    caught_if(concerns, "its stored form cannot be read", read)
}

fn caught_if<T>(
    concerns: impl Fn(PgSqlErrorCode) -> bool + std::panic::RefUnwindSafe,
    what: &str,
    read: impl FnOnce() -> T,
) -> Result<T, Failure> {
    let user = User::current();
    let owned = AssertUnwindSafe(Owned::begin());
    let owned = &owned;
    let read = AssertUnwindSafe(read);
    PgTryBuilder::new(move || {
        let read = read;
        Ok((read.0)())
    })
    .catch_others(|error| {
        owned.release();
        match error {
            CaughtError::PostgresError(report) | CaughtError::ErrorReport(report)
                if concerns(report.sql_error_code()) =>
            {
                user.restore();
                session::end_inner_settings();
                Err(Failure(format!("{what}: {}", condition(report.sql_error_code()))))
            }
            other => other.rethrow(),
        }
    })
    .execute()
}

/// While this lives, what is pinned or referenced is of the value: an ERROR leaves it to the end of a (sub)transaction, which may be
/// many rows away.
struct Owned {
    owner: Cell<pg_sys::ResourceOwner>,
    outer: pg_sys::ResourceOwner,
}

/// The resource owner of the next value; NULL if there is none yet. One serves value after value until an ERROR, as functions give
/// back what they take before they return.
static mut SPARE: pg_sys::ResourceOwner = std::ptr::null_mut();

impl Owned {
    fn begin() -> Self {
        // SAFETY: variables of this single-threaded backend. The owner has no parent, so that it lives until it is deleted here.
        unsafe {
            let mut owner = SPARE;
            SPARE = std::ptr::null_mut();
            if owner.is_null() {
                owner = pg_sys::ResourceOwnerCreate(std::ptr::null_mut(), c"walmirror value".as_ptr());
            }
            let outer = pg_sys::CurrentResourceOwner;
            pg_sys::CurrentResourceOwner = owner;
            Self {
                owner: Cell::new(owner),
                outer,
            }
        }
    }

    /// Gives back what an ERROR left behind, in the order of AbortSubTransaction.
    #[cold]
    fn release(&self) {
        use pg_sys::ResourceReleasePhase as Phase;
        let owner = self.owner.replace(std::ptr::null_mut());
        // SAFETY: nothing above a type's function holds locks of these kinds, as they are held for moments. The owner is not the
        // current one any more, and empty when it is deleted.
        unsafe {
            pg_sys::LWLockReleaseAll();
            pg_sys::UnlockBuffers();
            pg_sys::CurrentResourceOwner = self.outer;
            if owner.is_null() {
                return;
            }
            for phase in [
                Phase::RESOURCE_RELEASE_BEFORE_LOCKS,
                Phase::RESOURCE_RELEASE_LOCKS,
                Phase::RESOURCE_RELEASE_AFTER_LOCKS,
            ] {
                pg_sys::ResourceOwnerRelease(owner, phase, false, false);
            }
            pg_sys::ResourceOwnerDelete(owner);
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: as in `begin`. An ERROR that goes on its way comes by as an unwind.
        unsafe {
            pg_sys::CurrentResourceOwner = self.outer;
            if self.owner.get().is_null() {
                return;
            }
            if SPARE.is_null() {
                SPARE = self.owner.get();
            } else {
                // That of a value which was read within this one.
                self.release();
            }
        }
    }
}

/// Whose rights the session has. Postgres becomes the owner of a SECURITY DEFINER function before the function begins, and an ERROR
/// leaves it so to the end of a (sub)transaction (`fmgr_security_definer`).
#[derive(Clone, Copy)]
struct User {
    id: pg_sys::Oid,
    security_context: c_int,
}

impl User {
    fn current() -> Self {
        let (mut id, mut security_context) = (pg_sys::InvalidOid, 0);
        // SAFETY: fills both in from variables of this backend.
        unsafe { unguarded::GetUserIdAndSecContext(&mut id, &mut security_context) }
        Self { id, security_context }
    }

    fn restore(self) {
        // SAFETY: these were in force before, as AbortSubTransaction restores them.
        unsafe { pg_sys::SetUserIdAndSecContext(self.id, self.security_context) }
    }
}

/// Ends the statement because there is no memory for a value or a message, as palloc() would.
#[cold]
pub fn out_of_memory(bytes: usize) -> ! {
    Refusal::new(
        PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
        format!("walmirror: no memory for {bytes} bytes"),
        "Nothing is lost: the stream goes on from there when there is more.",
    )
    .raise()
}

/// Whether an error says something about the value, not about the session. Classes 57 (operator intervention), 53
/// (insufficient resources) and 58 (system error) are the session's, and so are a lock that is not to be had (55P03), as on a row type
/// that somebody alters, and data that is corrupt (XX001, XX002). XX000 is
/// what functions raise that name no code, and what asks for more memory than a value may have. Class 40 says that the
/// transaction in progress whose changes are decoded was rolled back meanwhile, for which Postgres waits
/// (ReorderBufferProcessTXN).
fn concerns_value(code: PgSqlErrorCode) -> bool {
    match class(code) {
        ['5', '7' | '3' | '8'] | ['4', '0'] => false,
        ['5', '5'] => code != PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
        ['X', 'X'] => code == PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
        _ => true,
    }
}

/// Class 57: a cancel, a timeout, a shutdown.
pub fn is_operator_intervention(code: PgSqlErrorCode) -> bool {
    class(code) == ['5', '7']
}

/// An SQLSTATE and its name in the manual (Appendix A): `22P05 untranslatable_character`.
fn condition(code: PgSqlErrorCode) -> String {
    let state: String = (0..5).map(|at| character(code, at)).collect();
    let name = format!("{code:?}").trim_start_matches("ERRCODE_").to_lowercase();
    format!("{state} {name}")
}

fn class(code: PgSqlErrorCode) -> [char; 2] {
    [character(code, 0), character(code, 1)]
}

/// One character of an SQLSTATE. MAKE_SQLSTATE packs six bits a character, the first in the lowest.
fn character(code: PgSqlErrorCode, at: u32) -> char {
    let bits = (code as i32 >> (6 * at)) & 0x3F;
    char::from(u8::try_from(bits + i32::from(b'0')).unwrap_or(b'0'))
}
