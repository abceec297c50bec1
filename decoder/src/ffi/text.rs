//! Text between the database encoding and UTF-8.

use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char};

use pgrx::pg_sys;

use super::failure::{Failure, caught, out_of_memory};
use super::unguarded;

/// Whether text of the database is sent as it stands: it is UTF-8, or SQL_ASCII, which is bytes.
pub fn is_sent_plain() -> bool {
    // SAFETY: reads the backend's constant database encoding.
    let encoding = unsafe { unguarded::GetDatabaseEncoding() } as u32;
    encoding == pg_sys::pg_enc::PG_UTF8 || encoding == pg_sys::pg_enc::PG_SQL_ASCII
}

/// Whether the database is in UTF-8.
pub fn is_utf8() -> bool {
    // SAFETY: as above.
    unsafe { unguarded::GetDatabaseEncoding() as u32 == pg_sys::pg_enc::PG_UTF8 }
}

/// Text of a value as UTF-8. A character that UTF-8 has no equivalent for is the value's fault.
pub fn value_to_utf8(bytes: &[u8]) -> Result<Cow<'_, [u8]>, Failure> {
    if is_sent_plain() || bytes.is_ascii() {
        return Ok(Cow::Borrowed(bytes));
    }
    caught("its text in UTF-8", || to_utf8(bytes))
}

/// Text of the database as UTF-8 (`pg_server_to_any`); an ERROR if that is not possible.
fn to_utf8(bytes: &[u8]) -> Cow<'_, [u8]> {
    if is_sent_plain() || bytes.is_ascii() {
        return Cow::Borrowed(bytes);
    }
    let Ok(length) = i32::try_from(bytes.len()) else {
        return Cow::Borrowed(bytes);
    };
    // SAFETY: the pointer and the length describe `bytes`; the result is either the same pointer or a palloc'd,
    // NUL-terminated string in the current memory context.
    unsafe {
        let converted =
            pg_sys::pg_server_to_any(bytes.as_ptr().cast(), length, pg_sys::pg_enc::PG_UTF8 as i32);
        if converted.cast_const().cast() == bytes.as_ptr() {
            return Cow::Borrowed(bytes);
        }
        let text = CStr::from_ptr(converted).to_bytes();
        let mut copy = Vec::new();
        if copy.try_reserve_exact(text.len()).is_err() {
            out_of_memory(text.len());
        }
        copy.extend_from_slice(text);
        Cow::Owned(copy)
    }
}

/// Runs an SQL command that is given in UTF-8 (`SPI_execute`); an ERROR in it ends the statement.
pub fn run_utf8(command: &[u8]) {
    let Ok(command) = CString::new(command) else {
        return;
    };
    pgrx::Spi::connect_mut(|_| {
        // SAFETY: within an SPI connection. pg_any_to_server returns the same pointer or a palloc'd string, both
        // NUL-terminated.
        unsafe {
            let length = i32::try_from(command.as_bytes().len()).unwrap_or(i32::MAX);
            let command = pg_sys::pg_any_to_server(command.as_ptr(), length, pg_sys::pg_enc::PG_UTF8 as i32);
            pg_sys::SPI_execute(command, false, 0);
        }
    });
}

/// A C string of the database as a Rust string; `None` for NULL.
///
/// # Safety
/// `string` must be NULL or a NUL-terminated string that stays valid during the call.
pub unsafe fn string(string: *const c_char) -> Option<String> {
    if string.is_null() {
        return None;
    }
    // SAFETY: not NULL, and NUL-terminated by the caller's promise.
    let bytes = unsafe { CStr::from_ptr(string) }.to_bytes();
    Some(String::from_utf8_lossy(&to_utf8(bytes)).into_owned())
}
