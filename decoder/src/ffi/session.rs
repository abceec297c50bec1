//! The settings under which values become text, and what an ERROR that is caught leaves behind of settings.

use std::ffi::{CStr, c_char, c_int};

use pgrx::pg_sys;

use super::unguarded;

unsafe extern "C" {
    // utils/varlena.c; pgrx has no binding for it.
    #[link_name = "bytea_output"]
    static mut BYTEA_OUTPUT: c_int;
    // utils/pg_locale.h; the value of lc_monetary.
    #[link_name = "locale_monetary"]
    static mut LOCALE_MONETARY: *const c_char;
}

const BYTEA_OUTPUT_HEX: c_int = 1;

/// Output functions run under the value contract while this lives: DateStyle ISO, TimeZone UTC, IntervalStyle postgres,
/// bytea_output hex, extra_float_digits 1, quote_all_identifiers off, and, where they matter, search_path pg_catalog and
/// lc_monetary C. The former settings come back when it is dropped.
///
/// The variables behind the GUCs are set directly, as the output functions read them: a GUC nest level for every row
/// would cost more than the row.
pub struct TextSession {
    before: Formats,
    /// A GUC nest level of its own, and that of the session around this one.
    nest_level: c_int,
    outer_level: c_int,
    /// Whether settings were set in it: search_path and lc_monetary.
    sets: bool,
}

/// The GUC nest level of the innermost session; 0 if there is none.
static mut NEST_LEVEL: c_int = 0;

/// The variables that are set directly.
#[derive(Clone, Copy)]
struct Formats {
    date_style: c_int,
    date_order: c_int,
    interval_style: c_int,
    float_digits: c_int,
    bytea_output: c_int,
    quote_all_identifiers: bool,
    timezone: *mut pg_sys::pg_tz,
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
    /// Also lc_monetary: a column holds amounts of money.
    Money,
}

impl TextSession {
    /// Puts the settings of the value contract in force, as far as they are needed.
    pub fn enter(needs: Needs) -> Option<Self> {
        match needs {
            Needs::Nothing => None,
            Needs::Formats => Some(Self::formats()),
            Needs::Names => Some(Self::formats().set(c"search_path", c"pg_catalog")),
            Needs::Money => {
                let names = Self::formats().set(c"search_path", c"pg_catalog");
                if has_money_of_c() {
                    return Some(names);
                }
                Some(names.set(c"lc_monetary", c"C"))
            }
        }
    }

    /// For settings that have caches behind them.
    fn set(mut self, name: &CStr, value: &CStr) -> Self {
        self.sets = true;
        set_local(name, value);
        self
    }

    fn formats() -> Self {
        let before = Formats::now();
        Formats::contract().set();
        // SAFETY: as in `set`. A plain variable of this single-threaded backend.
        unsafe {
            let outer_level = NEST_LEVEL;
            NEST_LEVEL = unguarded::NewGUCNestLevel();
            Self {
                before,
                nest_level: NEST_LEVEL,
                outer_level,
                sets: false,
            }
        }
    }
}

/// Ends what functions set that an ERROR ended, where a value is read: the SET clauses of a function are in force before it begins,
/// and what was set before is left to the end of a (sub)transaction (`fmgr_security_definer`).
#[cold]
pub fn end_inner_settings() {
    // SAFETY: a session lives, so that its nest level is open; settings of the levels in it are set back, as AbortSubTransaction
    // does it.
    unsafe {
        if NEST_LEVEL == 0 {
            return;
        }
        pg_sys::AtEOXact_GUC(false, NEST_LEVEL + 1);
    }
    Formats::contract().set();
}

impl Formats {
    /// Those of the value contract.
    fn contract() -> Self {
        // SAFETY: pg_tzset("UTC") returns a pointer that stays valid for the life of the backend (pgtz.c caches zones for ever);
        // session_timezone is a plain variable.
        let timezone = unsafe {
            let utc = pg_sys::pg_tzset(c"UTC".as_ptr());
            if utc.is_null() {
                pg_sys::session_timezone
            } else {
                utc
            }
        };
        Self {
            date_style: pg_sys::USE_ISO_DATES as c_int,
            date_order: pg_sys::DATEORDER_MDY as c_int,
            interval_style: pg_sys::INTSTYLE_POSTGRES as c_int,
            float_digits: 1,
            bytea_output: BYTEA_OUTPUT_HEX,
            quote_all_identifiers: false,
            timezone,
        }
    }

    fn now() -> Self {
        // SAFETY: plain variables of this single-threaded backend.
        unsafe {
            Self {
                date_style: pg_sys::DateStyle,
                date_order: pg_sys::DateOrder,
                interval_style: pg_sys::IntervalStyle,
                float_digits: pg_sys::extra_float_digits,
                bytea_output: BYTEA_OUTPUT,
                quote_all_identifiers: pg_sys::quote_all_identifiers,
                timezone: pg_sys::session_timezone,
            }
        }
    }

    fn set(self) {
        // SAFETY: as in `now`; the values are those that stood there once, or those of the value contract.
        unsafe {
            pg_sys::DateStyle = self.date_style;
            pg_sys::DateOrder = self.date_order;
            pg_sys::IntervalStyle = self.interval_style;
            pg_sys::extra_float_digits = self.float_digits;
            BYTEA_OUTPUT = self.bytea_output;
            pg_sys::quote_all_identifiers = self.quote_all_identifiers;
            pg_sys::session_timezone = self.timezone;
        }
    }
}

/// Whether amounts of money are printed as in the locale C already.
fn has_money_of_c() -> bool {
    // SAFETY: a variable of this single-threaded backend: NULL or a C string.
    unsafe {
        let locale = LOCALE_MONETARY;
        !locale.is_null() && [c"C", c"POSIX"].contains(&CStr::from_ptr(locale))
    }
}

/// Sets a setting to the end of the current GUC nest level, as the SET clause of a function does.
fn set_local(name: &CStr, value: &CStr) {
    // SAFETY: within a transaction, as all decoding and every query is, and in a nest level that the caller began; it is ended by
    // the caller's `drop`, or by the end of the transaction.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
}

/// While this lives, nothing is found by its name alone but what Postgres brought along.
pub struct CatalogPath {
    nest_level: c_int,
}

impl CatalogPath {
    /// Sets search_path.
    pub fn enter() -> Self {
        // SAFETY: within a transaction; the nest level is ended by `drop`, or by the end of the transaction.
        let nest_level = unsafe { pg_sys::NewGUCNestLevel() };
        let path = Self { nest_level };
        set_local(c"search_path", c"pg_catalog, pg_temp");
        path
    }
}

impl Drop for CatalogPath {
    fn drop(&mut self) {
        // SAFETY: ends the nest level that `enter` began.
        unsafe { pg_sys::AtEOXact_GUC(true, self.nest_level) }
    }
}

impl Drop for TextSession {
    fn drop(&mut self) {
        self.before.set();
        // SAFETY: ends the nest level of this session. Where nothing is set back, that raises no error.
        unsafe {
            NEST_LEVEL = self.outer_level;
            if self.sets {
                pg_sys::AtEOXact_GUC(true, self.nest_level);
            } else {
                unguarded::AtEOXact_GUC(true, self.nest_level);
            }
        }
    }
}
