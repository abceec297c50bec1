//! What the catalogs say of types.

use pgrx::pg_sys;

/// How Postgres casts one type to another.
pub enum Cast {
    /// The bytes are the same.
    Binary,
    /// By a function that is written in C.
    Function(pg_sys::Oid),
    /// By output and input function.
    InputOutput,
}

/// The type under a domain; the type itself if it is none (`getBaseType`).
pub fn base_type(type_oid: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::getBaseType(type_oid) }
}

/// The output function of a type, and whether values are varlenas (`getTypeOutputInfo`).
pub fn output_function(type_oid: pg_sys::Oid) -> (pg_sys::Oid, bool) {
    let mut function = pg_sys::InvalidOid;
    let mut varlena = false;
    // SAFETY: a syscache look-up that fills both variables in, or raises an error for a type that does not exist.
    unsafe { pg_sys::getTypeOutputInfo(type_oid, &mut function, &mut varlena) };
    (function, varlena)
}

/// The cast from `source` to `target` that an explicit `::` uses (`find_coercion_pathway`).
///
/// Functions in other languages than C count as none: they cannot run under a historic snapshot.
pub fn cast_to(target: pg_sys::Oid, source: pg_sys::Oid) -> Cast {
    use pg_sys::CoercionPathType as Path;
    let mut function = pg_sys::InvalidOid;
    // SAFETY: syscache look-ups that set `function` when the path is a function.
    let path = unsafe {
        pg_sys::find_coercion_pathway(
            target,
            source,
            pg_sys::CoercionContext::COERCION_EXPLICIT,
            &mut function,
        )
    };
    match path {
        Path::COERCION_PATH_RELABELTYPE => Cast::Binary,
        Path::COERCION_PATH_FUNC if is_c_function(function) => Cast::Function(function),
        _ => Cast::InputOutput,
    }
}

/// The element type of an array type (`get_element_type`).
pub fn element_type(base: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: a syscache look-up.
    let element = unsafe { pg_sys::get_element_type(base) };
    (element != pg_sys::InvalidOid).then_some(element)
}

/// The type of the bounds of a range or multirange (`get_range_subtype`, `get_multirange_range`).
pub fn bound_type(base: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: syscache look-ups; InvalidOid for what is no multirange, or no range.
    let bound = unsafe {
        let range = pg_sys::get_multirange_range(base);
        pg_sys::get_range_subtype(if range == pg_sys::InvalidOid { base } else { range })
    };
    (bound != pg_sys::InvalidOid).then_some(bound)
}

/// The types of a row type's columns (`pg_attribute`). It takes no lock.
pub fn column_types(row: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    // SAFETY: syscache look-ups; the tuple is released below, and its form is read in between. A dropped column has no type.
    unsafe {
        let relation = pg_sys::get_typ_typrelid(row);
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::RELOID as i32,
            pg_sys::Datum::from(relation),
        );
        if tuple.is_null() {
            return Vec::new();
        }
        let columns = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).relnatts;
        pg_sys::ReleaseSysCache(tuple);
        (1..=columns)
            .map(|number| pg_sys::get_atttype(relation, number))
            .filter(|column| *column != pg_sys::InvalidOid)
            .collect()
    }
}

/// A type's name with its schema (`format_type_be_qualified`).
pub fn name(type_oid: pg_sys::Oid) -> String {
    // SAFETY: a syscache look-up; returns a palloc'd C string.
    unsafe { super::text::string(pg_sys::format_type_be_qualified(type_oid)) }.unwrap_or_default()
}

/// Whether values of a type are rows (`type_is_rowtype`).
pub fn is_row(base: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::type_is_rowtype(base) }
}

/// Whether `to_jsonb` gives the type's values a structure (arrays, rows, json, a cast to json), rather than a string of
/// their text.
pub fn is_structured_json(base: pg_sys::Oid) -> bool {
    if element_type(base).is_some()
        || is_row(base)
        || base == pg_sys::JSONOID
        || base == pg_sys::JSONBOID
        || base == pg_sys::RECORDARRAYOID
    {
        return true;
    }
    u32::from(base) >= pg_sys::FirstNormalObjectId
        && matches!(cast_to(pg_sys::JSONOID, base), Cast::Function(_))
}

/// Whether `to_jsonb` would call a function that is not written in C for a value of this type, within an array or a row
/// (json_categorize_type; jsonb_categorize_type before PostgreSQL 17).
pub fn has_users_json_cast(base: pg_sys::Oid) -> bool {
    if u32::from(base) < pg_sys::FirstNormalObjectId {
        return false;
    }
    let mut function = pg_sys::InvalidOid;
    // SAFETY: syscache look-ups that set `function` when the path is a function.
    let path = unsafe {
        pg_sys::find_coercion_pathway(
            pg_sys::JSONOID,
            base,
            pg_sys::CoercionContext::COERCION_EXPLICIT,
            &mut function,
        )
    };
    path == pg_sys::CoercionPathType::COERCION_PATH_FUNC && !is_c_function(function)
}

/// Whether a function is built in or written in C.
pub(super) fn is_c_function(function: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up; the tuple is released below, and its form is read in between.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::PROCOID as i32,
            pg_sys::Datum::from(function),
        );
        if tuple.is_null() {
            return false;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>();
        let language = u32::from((*form).prolang);
        pg_sys::ReleaseSysCache(tuple);
        language == INTERNAL_LANGUAGE || language == C_LANGUAGE
    }
}

/// pg_language.dat: functions linked into the server, and functions in loaded libraries.
const INTERNAL_LANGUAGE: u32 = 12;
const C_LANGUAGE: u32 = 13;
