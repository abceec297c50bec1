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
/// bytea_output hex, extra_float_digits 1, and search_path pg_catalog where names are printed. The former settings come
/// back when it is dropped.
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
    /// The GUC nest level that search_path was set in.
    nest_level: Option<c_int>,
}

/// Which of the settings matter for the rows of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// None: no column is read by a function.
    Nothing,
    /// The formats of dates, intervals and the like.
    Formats,
    /// Also search_path: a column holds names of relations, types or functions (regclass and its kin).
    Names,
}

impl TextSession {
    /// Puts the settings of the value contract in force, as far as they are needed.
    pub fn enter(needs: Needs) -> Option<Self> {
        match needs {
            Needs::Nothing => None,
            Needs::Formats => Some(Self::formats()),
            Needs::Names => Some(Self::formats().names()),
        }
    }

    /// search_path has caches behind it, so it is set as SET LOCAL would.
    fn names(mut self) -> Self {
        // SAFETY: within a transaction, as all decoding and every query is; the nest level is ended by `drop`, or by the
        // end of the transaction.
        unsafe {
            self.nest_level = Some(pg_sys::NewGUCNestLevel());
            pg_sys::set_config_option(
                c"search_path".as_ptr(),
                c"pg_catalog".as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_SAVE,
                true,
                0,
                false,
            );
        }
        self
    }

    fn formats() -> Self {
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
                nest_level: None,
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
            if let Some(level) = self.nest_level {
                pg_sys::AtEOXact_GUC(true, level);
            }
        }
    }
}
