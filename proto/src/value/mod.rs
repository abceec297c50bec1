//! Prints values byte for byte as Postgres does: `write_text` is `column::text` under DateStyle ISO, TimeZone UTC,
//! bytea_output hex and extra_float_digits 1; `write_json` is the text of `to_jsonb(column)`. This is the value contract
//! of the keys in Redis, so every difference from a server is a bug. Called for each value of each row: nothing here
//! allocates or goes through `format!`.

mod datetime;
mod float;
mod json;
mod number;
mod shortest;

pub use json::{JsonShape, write_json_string};

use crate::row::Datum;

impl Datum<'_> {
    /// Appends `column::text`. NULL and unchanged values have no text: nothing is appended, and the caller decides what
    /// their absence means.
    pub fn write_text(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Null | Self::Unchanged => {}
            Self::Bool(value) => out.extend_from_slice(if value { b"true" } else { b"false" }),
            Self::Int(value) => number::write_int(out, value),
            Self::Oid(value) => number::write_int(out, value),
            Self::Float4(value) => float::write_text(out, value.into(), float::Decimal::of_f32(value)),
            Self::Float8(value) => float::write_text(out, value, float::Decimal::of_f64(value)),
            Self::Numeric { scale, mantissa } => number::write_scaled(out, scale, mantissa),
            Self::NumericText(text) | Self::Text(text) | Self::Json(text) => out.extend_from_slice(text),
            Self::Date(days) => datetime::write_date(out, days),
            Self::Timestamp(micros) => datetime::write_timestamp(out, micros, b' ', b""),
            Self::Timestamptz(micros) => datetime::write_timestamp(out, micros, b' ', b"+00"),
            Self::Uuid(bytes) => write_uuid(out, bytes),
            Self::Bytea(bytes) => {
                out.extend_from_slice(b"\\x");
                write_hex(out, bytes);
            }
        }
    }

    /// Appends the text of `to_jsonb(column)`. NULL is `null`; an unchanged value, which has no JSON, is `null` too, and
    /// callers that must tell them apart look at it before.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Null | Self::Unchanged => out.extend_from_slice(b"null"),
            Self::Bool(_) | Self::Int(_) | Self::Numeric { .. } | Self::Json(_) => self.write_text(out),
            Self::Float4(value) => float::write_json(out, value.into(), float::Decimal::of_f32(value)),
            Self::Float8(value) => float::write_json(out, value, float::Decimal::of_f64(value)),
            // NaN and the infinities are strings; every other numeric begins with a digit or with a minus and a digit.
            Self::NumericText(text) if text.last().is_some_and(u8::is_ascii_digit) => {
                out.extend_from_slice(text)
            }
            Self::NumericText(text) | Self::Text(text) => write_json_string(out, text),
            Self::Timestamp(micros) => quoted(out, |out| datetime::write_timestamp(out, micros, b'T', b"")),
            Self::Timestamptz(micros) => {
                quoted(out, |out| datetime::write_timestamp(out, micros, b'T', b"+00:00"))
            }
            Self::Oid(_) | Self::Date(_) | Self::Uuid(_) => quoted(out, |out| self.write_text(out)),
            Self::Bytea(bytes) => quoted(out, |out| {
                out.extend_from_slice(b"\\\\x");
                write_hex(out, bytes);
            }),
        }
    }
}

/// A JSON string whose content needs no escapes.
fn quoted(out: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
    out.push(b'"');
    content(out);
    out.push(b'"');
}

fn write_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    out.reserve(bytes.len() * 2);
    out.extend(
        bytes
            .iter()
            .flat_map(|&byte| [hex_digit(byte >> 4), hex_digit(byte & 15)]),
    );
}

const fn hex_digit(value: u8) -> u8 {
    if value < 10 {
        b'0' + value
    } else {
        b'a' + value - 10
    }
}

fn write_uuid(out: &mut Vec<u8>, bytes: &[u8]) {
    for (i, &byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            out.push(b'-');
        }
        out.extend_from_slice(&[hex_digit(byte >> 4), hex_digit(byte & 15)]);
    }
}

#[cfg(test)]
mod tests;
