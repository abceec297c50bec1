//! Which types are sent how. Two forms of a value exist: its text (`column::text`) and, in tables with JSON values, its
//! JSON (`to_jsonb(column)`). Natively encoded types have one encoding for both.

use pgrx::pg_sys;
use walmirror_proto::pb::Encoding;

use super::Read;
use crate::ffi::catalog_types as catalog;
use crate::ffi::function::Function;
use crate::ffi::memory::Context;
use crate::ffi::session::Needs;

/// Which form of a value is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text,
    Json,
}

/// Whether the JSON of a type cannot be made from its text form.
pub fn json_differs(type_oid: pg_sys::Oid) -> bool {
    let base = catalog::base_type(type_oid);
    native(base).is_none()
}

/// How values of a type are read and encoded.
pub fn reading(type_oid: pg_sys::Oid, form: Form, context: Context) -> (Encoding, Read) {
    let base = catalog::base_type(type_oid);
    if let Some(encoding) = native(base) {
        return (encoding, native_read(base, context));
    }
    match form {
        Form::Text => (Encoding::Text, text_read(base, context)),
        Form::Json => json_read(type_oid, base, context),
    }
}

/// The type inside of this one, if there is any, whose JSON a function would make that a user wrote: a cast to json that
/// `to_jsonb` calls. Who owns the type writes it, and who reads the row would run it.
pub fn users_json(type_oid: pg_sys::Oid) -> Option<pg_sys::Oid> {
    if !catalog::is_structured_json(catalog::base_type(type_oid)) {
        // A plain string, which takes no cast.
        return None;
    }
    let is_plain = |base: &pg_sys::Oid| catalog::element_type(*base).is_none() && !catalog::is_row(*base);
    within(type_oid, parts)
        .into_iter()
        .filter(is_plain)
        .find(|base| catalog::has_users_json_cast(*base))
}

/// The row types whose columns are looked up when a value of this type is printed.
pub fn row_types(type_oid: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let with_bounds = |base| match catalog::bound_type(base) {
        Some(bound) => vec![bound],
        None => parts(base),
    };
    let mut rows = within(type_oid, with_bounds);
    rows.retain(|base| catalog::is_row(*base));
    rows
}

/// The types of an array's elements or of a row's columns.
fn parts(base: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    match catalog::element_type(base) {
        Some(element) => vec![element],
        None if catalog::is_row(base) => catalog::column_types(base),
        None => Vec::new(),
    }
}

/// A type and all that is within it, each as its base type and once: the columns of a row type may hold arrays of it.
fn within(type_oid: pg_sys::Oid, parts: impl Fn(pg_sys::Oid) -> Vec<pg_sys::Oid>) -> Vec<pg_sys::Oid> {
    let mut met = Vec::new();
    let mut open = vec![type_oid];
    while let Some(next) = open.pop() {
        let base = catalog::base_type(next);
        if !met.contains(&base) {
            met.push(base);
            open.extend(parts(base));
        }
    }
    met
}

/// Which settings the output of a type depends on. Rows may hold anything.
pub fn needs(type_oid: pg_sys::Oid) -> Needs {
    let mut base = catalog::base_type(type_oid);
    // Ranges over arrays of domains over arrays, and so on: each type was made of one that was there before, so there is an end.
    while let Some(inner) = catalog::element_type(base).or_else(|| catalog::bound_type(base)) {
        base = catalog::base_type(inner);
    }
    if catalog::is_row(base) || base == pg_sys::MONEYOID {
        Needs::Money
    } else if NAMES.contains(&u32::from(base)) {
        Needs::Names
    } else {
        Needs::Formats
    }
}

/// regproc, regprocedure, regoper, regoperator, regclass, regtype, regconfig, regdictionary, regcollation: their text is
/// qualified when search_path does not lead to the name.
const NAMES: [u32; 9] = [24, 2202, 2203, 2204, 2205, 2206, 3734, 3769, 4191];

/// The natively encoded types, whose text and JSON the reader of the stream makes.
fn native(base: pg_sys::Oid) -> Option<Encoding> {
    Some(match base {
        pg_sys::BOOLOID => Encoding::Bool,
        pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID => Encoding::Int,
        pg_sys::OIDOID => Encoding::Oid,
        pg_sys::FLOAT4OID => Encoding::Float4,
        pg_sys::FLOAT8OID => Encoding::Float8,
        pg_sys::NUMERICOID => Encoding::Numeric,
        pg_sys::DATEOID => Encoding::Date,
        pg_sys::TIMESTAMPOID => Encoding::Timestamp,
        pg_sys::TIMESTAMPTZOID => Encoding::Timestamptz,
        pg_sys::UUIDOID => Encoding::Uuid,
        pg_sys::BYTEAOID => Encoding::Bytea,
        pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::NAMEOID => Encoding::Text,
        _ => return None,
    })
}

fn native_read(base: pg_sys::Oid, context: Context) -> Read {
    match base {
        pg_sys::BOOLOID => Read::Bool,
        pg_sys::INT2OID => Read::Int2,
        pg_sys::INT4OID => Read::Int4,
        pg_sys::INT8OID => Read::Int8,
        pg_sys::OIDOID => Read::Oid,
        pg_sys::FLOAT4OID => Read::Float4,
        pg_sys::FLOAT8OID => Read::Float8,
        pg_sys::NUMERICOID => Read::Numeric(Function::lookup(catalog::output_function(base).0, context)),
        pg_sys::DATEOID => Read::Date,
        pg_sys::TIMESTAMPOID | pg_sys::TIMESTAMPTZOID => Read::Timestamp,
        pg_sys::UUIDOID => Read::Uuid,
        pg_sys::BYTEAOID => Read::Bytea,
        pg_sys::NAMEOID => Read::Name,
        _ => Read::Text,
    }
}

/// `column::text`: a cast if there is one to run inside the decoder, else the output function, as Postgres' I/O
/// conversion does.
fn text_read(base: pg_sys::Oid, context: Context) -> Read {
    if base == pg_sys::BPCHAROID {
        return Read::Blanked;
    }
    let (output, varlena) = catalog::output_function(base);
    match catalog::cast_to(pg_sys::TEXTOID, base) {
        catalog::Cast::Binary if varlena => Read::Text,
        catalog::Cast::Function(function) => Read::Cast {
            function: Function::lookup(function, context),
            varlena,
        },
        catalog::Cast::Binary | catalog::Cast::InputOutput => Read::Output {
            function: Function::lookup(output, context),
            varlena,
        },
    }
}

/// What `to_jsonb` makes of a column (json_categorize_type): arrays, rows, json and types with a cast to json keep their
/// structure, everything else is a string of the output function's text.
fn json_read(type_oid: pg_sys::Oid, base: pg_sys::Oid, context: Context) -> (Encoding, Read) {
    let (output, varlena) = catalog::output_function(base);
    if catalog::is_structured_json(base) {
        let out = Function::lookup(catalog::output_function(pg_sys::JSONBOID).0, context);
        return (
            Encoding::Jsonb,
            Read::Json {
                to_jsonb: Function::to_jsonb(type_oid, context),
                out,
                varlena,
            },
        );
    }
    if base == pg_sys::BPCHAROID {
        return (Encoding::Text, Read::Text);
    }
    (
        Encoding::Text,
        Read::Output {
            function: Function::lookup(output, context),
            varlena,
        },
    )
}
