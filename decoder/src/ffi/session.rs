//! The settings under which values become text.

use std::ffi::c_int;

use pgrx::pg_sys;

unsafe extern "C" {
    // utils/varlena.c; pgrx has no binding for it.
    #[link_name = "bytea_output"]
    static mut BYTEA_OUTPUT: c_int;
}

const BYTEA_OUTPUT_HEX: c_int = 1;

/// Output functions run under the value contract while this lives: DateStyle ISO, TimeZone UTC, IntervalStyle postgres,
/// bytea_output hex, extra_float_digits 1. The former settings come back when it is dropped.
///
/// The variables behind the GUCs are set directly, as the output functions read them: a GUC nest level for every row
/// would cost more than the row.
pub struct TextSession {
    date_style: c_int,
    date_order: c_int,
    interval_style: c_int,
    float_digits: c_int,
    bytea_output: c_int,
    timezone: *mut pg_sys::pg_tz,
}

impl TextSession {
    /// Puts the settings of the value contract in force.
    pub fn enter() -> Self {
        // SAFETY: these are plain variables of this single-threaded backend. pg_tzset("UTC") returns a pointer that stays
        // valid for the life of the backend (pgtz.c caches zones for ever).
        unsafe {
            let saved = Self {
                date_style: pg_sys::DateStyle,
                date_order: pg_sys::DateOrder,
                interval_style: pg_sys::IntervalStyle,
                float_digits: pg_sys::extra_float_digits,
                bytea_output: BYTEA_OUTPUT,
                timezone: pg_sys::session_timezone,
            };
            let utc = pg_sys::pg_tzset(c"UTC".as_ptr());
            pg_sys::DateStyle = pg_sys::USE_ISO_DATES as c_int;
            pg_sys::DateOrder = pg_sys::DATEORDER_MDY as c_int;
            pg_sys::IntervalStyle = pg_sys::INTSTYLE_POSTGRES as c_int;
            pg_sys::extra_float_digits = 1;
            BYTEA_OUTPUT = BYTEA_OUTPUT_HEX;
            if !utc.is_null() {
                pg_sys::session_timezone = utc;
            }
            saved
        }
    }
}

impl Drop for TextSession {
    fn drop(&mut self) {
        // SAFETY: as in `enter`; the values are those that stood there before.
        unsafe {
            pg_sys::DateStyle = self.date_style;
            pg_sys::DateOrder = self.date_order;
            pg_sys::IntervalStyle = self.interval_style;
            pg_sys::extra_float_digits = self.float_digits;
            BYTEA_OUTPUT = self.bytea_output;
            pg_sys::session_timezone = self.timezone;
        }
    }
}
