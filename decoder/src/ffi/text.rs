//! Text between the database encoding and UTF-8.

use std::borrow::Cow;
use std::ffi::{CStr, c_char};

use pgrx::pg_sys;

/// Text of the database as UTF-8 (`pg_server_to_any`). Bytes of a SQL_ASCII database are passed as they are.
pub fn to_utf8(bytes: &[u8]) -> Cow<'_, [u8]> {
    // SAFETY: reads the backend's constant database encoding.
    let encoding = unsafe { pg_sys::GetDatabaseEncoding() } as u32;
    if encoding == pg_sys::pg_enc::PG_UTF8 || encoding == pg_sys::pg_enc::PG_SQL_ASCII || bytes.is_ascii() {
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
        Cow::Owned(CStr::from_ptr(converted).to_bytes().to_vec())
    }
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
