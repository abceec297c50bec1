//! One value read from a tuple and appended to the row that is being encoded.

use walmirror_proto::writer::TupleBuilder;

use super::datum::{Raw, Row, Varlena};
use super::failure::{self, Failure};
use super::text;
use crate::plan::Read;

/// Redis refuses longer strings (`proto-max-bulk-len`).
const MAX_VALUE_BYTES: usize = 512 << 20;

/// One write of the output plugin and one bytea of `walmirror.pack` stay below 1 GB, as each allocation of Postgres does. What
/// is left is for the records before the row in its frame (`batch_bytes`: 16 MB at most), and for its keys.
const MAX_ROW_BYTES: usize = 960 << 20;

/// A row that has grown to this has room made before a value is copied: where Rust finds no memory by itself, the process ends.
pub const LARGE_BYTES: usize = 64 << 10;

/// What became of a value.
pub enum Outcome {
    /// It was appended.
    Appended,
    /// It is an unchanged TOASTed value; nothing was appended.
    Unchanged,
}

/// Appends a value to `out` as its plan says. `raw` must be of the type that `read` was planned for, which holds when it
/// comes from a tuple of the relation that the plan was built from. Results of functions live in the current memory
/// context.
#[inline]
pub fn append(read: &mut Read, raw: Raw, out: &mut TupleBuilder) -> Result<Outcome, Failure> {
    match read {
        Read::Bool => out.bool(raw.word() as u8 != 0),
        Read::Int2 => out.int(i64::from(raw.word() as i16)),
        Read::Int4 | Read::Date => out.int(i64::from(raw.word() as i32)),
        Read::Int8 | Read::Timestamp => out.int(raw.word() as i64),
        Read::Oid => out.oid(raw.word() as u32),
        Read::Float4 => out.float4(f32::from_bits(raw.word() as u32)),
        Read::Float8 => out.float8(f64::from_bits(raw.word() as u64)),
        // SAFETY: uuid is 16 bytes, by reference.
        Read::Uuid => out.text(unsafe { raw.fixed(16) }),
        Read::Name => {
            // SAFETY: name is NAMEDATALEN bytes, by reference, padded with NULs.
            let padded = unsafe { raw.fixed(pgrx::pg_sys::NAMEDATALEN as usize) };
            let end = padded.iter().position(|&byte| byte == 0).unwrap_or(padded.len());
            append_text(out, padded.get(..end).unwrap_or_default())?;
        }
        Read::Numeric(output) => {
            let Some(bytes) = plain(raw)? else {
                return Ok(Outcome::Unchanged);
            };
            match decimal(bytes) {
                Some((scale, mantissa)) => out.numeric(scale, mantissa),
                // SAFETY: numeric_out is an output function.
                None => out.numeric_text(unsafe { output.call_cstring(raw) }?),
            }
        }
        Read::Bytea => {
            let Some(bytes) = plain(raw)? else {
                return Ok(Outcome::Unchanged);
            };
            // Redis holds it as hex, of twice the length.
            if bytes.len() > MAX_VALUE_BYTES / 2 {
                return Err(too_long(bytes.len().saturating_mul(2)));
            }
            fits(out, bytes.len())?;
            out.text(bytes);
        }
        Read::Text => {
            let Some(bytes) = plain(raw)? else {
                return Ok(Outcome::Unchanged);
            };
            append_text(out, bytes)?;
        }
        Read::Blanked => {
            let Some(bytes) = plain(raw)? else {
                return Ok(Outcome::Unchanged);
            };
            let end = bytes
                .iter()
                .rposition(|&byte| byte != b' ')
                .map_or(0, |last| last + 1);
            append_text(out, bytes.get(..end).unwrap_or_default())?;
        }
        Read::Output { function, varlena } => {
            let Some(raw) = argument(raw, *varlena)? else {
                return Ok(Outcome::Unchanged);
            };
            // SAFETY: the plan made it from the type's output function.
            let bytes = unsafe { function.call_cstring(raw) }?;
            append_text(out, bytes)?;
        }
        Read::Cast { function, varlena } => {
            let Some(raw) = argument(raw, *varlena)? else {
                return Ok(Outcome::Unchanged);
            };
            // SAFETY: the plan made it from a cast function to text.
            let bytes = unsafe { function.call_text(raw) }?;
            append_text(out, bytes)?;
        }
        Read::Json {
            to_jsonb,
            out: output,
            varlena,
        } => {
            let Some(raw) = argument(raw, *varlena)? else {
                return Ok(Outcome::Unchanged);
            };
            let json = to_jsonb.call(raw)?;
            // SAFETY: jsonb_out is an output function, and to_jsonb returned a jsonb.
            let bytes = unsafe { output.call_cstring(json) }?;
            append_text(out, bytes)?;
        }
    }
    Ok(Outcome::Appended)
}

/// Whether the value of a column stands in the TOAST table.
pub fn is_toasted(read: &Read, row: &Row, column: usize) -> bool {
    let varlena = match read {
        Read::Numeric(_) | Read::Bytea | Read::Text | Read::Blanked => true,
        Read::Output { varlena, .. } | Read::Cast { varlena, .. } | Read::Json { varlena, .. } => *varlena,
        _ => false,
    };
    varlena && row.get(column).is_some_and(is_unchanged)
}

/// Fetches a value that [`is_toasted`] into the current memory context, for rows that a query read: its snapshot keeps the
/// chunks. `false` if the value is larger than `max_bytes`, and then it is not fetched.
pub fn fetch_toasted(read: &Read, row: &mut Row, column: usize, max_bytes: usize) -> bool {
    if !is_toasted(read, row, column) {
        return true;
    }
    let Some(raw) = row.get(column) else {
        return true;
    };
    // SAFETY: an on-disk TOAST pointer of a row that the query's snapshot sees.
    unsafe {
        if pgrx::pg_sys::toast_raw_datum_size(raw.datum()) > max_bytes {
            return false;
        }
        let fetched = pgrx::pg_sys::pg_detoast_datum_packed(raw.datum().cast_mut_ptr());
        row.set(column, Raw::from(pgrx::pg_sys::Datum::from(fetched)));
    }
    true
}

/// Whether a value is an unchanged TOASTed one. Only for varlena types.
fn is_unchanged(raw: Raw) -> bool {
    // SAFETY: the caller asks for varlenas only, and the tuple outlives the call.
    matches!(unsafe { raw.varlena() }, Varlena::Unchanged)
}

/// The plain bytes of a varlena; `None` if it is unchanged.
fn plain<'a>(raw: Raw) -> Result<Option<&'a [u8]>, Failure> {
    // SAFETY: the caller asks for varlenas only, and uses the bytes while the tuple and the memory context live.
    Ok(match unsafe { raw.varlena() } {
        Varlena::Inline(bytes) => Some(bytes),
        // SAFETY: the same; it is packed.
        Varlena::Packed => Some(failure::caught_unpacking(|| unsafe { raw.detoast() })?),
        Varlena::Unchanged => None,
    })
}

/// A value of a varlena type as a function may have it; `None` if it is unchanged. What is packed is made plain here and not in the function,
/// whose errors may be about other things than this value.
fn argument(raw: Raw, varlena: bool) -> Result<Option<Raw>, Failure> {
    if !varlena {
        return Ok(Some(raw));
    }
    // SAFETY: it is a varlena, and the tuple and the memory context outlive the call.
    Ok(match unsafe { raw.varlena() } {
        Varlena::Inline(_) => Some(raw),
        // SAFETY: the same; it is packed.
        Varlena::Packed => Some(failure::caught_unpacking(|| unsafe { raw.detoasted() })?),
        Varlena::Unchanged => None,
    })
}

/// Appends text of the database, in UTF-8.
#[inline]
fn append_text(out: &mut TupleBuilder, bytes: &[u8]) -> Result<(), Failure> {
    let text = text::value_to_utf8(bytes)?;
    fits(out, text.len())?;
    out.text(&text);
    Ok(())
}

/// Whether a value is short enough, for Redis and for what it travels in; and makes room for a large one.
#[inline]
fn fits(out: &mut TupleBuilder, bytes: usize) -> Result<(), Failure> {
    let row = out.text_bytes() + bytes;
    if bytes > MAX_VALUE_BYTES {
        return Err(too_long(bytes));
    }
    if row > MAX_ROW_BYTES {
        return Err(Failure(format!(
            "with it the row has {row} bytes, and PostgreSQL passes on less than 1 GB at once"
        )));
    }
    if row >= LARGE_BYTES && out.try_reserve_text(bytes).is_err() {
        failure::out_of_memory(bytes);
    }
    Ok(())
}

#[cold]
fn too_long(bytes: usize) -> Failure {
    Failure(format!(
        "a value of {bytes} bytes is over Redis's limit of 512 MB"
    ))
}

/// A numeric as (digits after the point, value times 10^that), from its on-disk form (utils/adt/numeric.c). `None` for
/// NaN, the infinities, and what has more than 18 digits.
fn decimal(bytes: &[u8]) -> Option<(u32, i64)> {
    let word = |at: usize| Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let header = word(0)?;
    let (negative, scale, weight, digits) = match header & 0xC000 {
        0xC000 => return None,
        0x8000 => {
            let magnitude = i32::from(header & 0x3F);
            let weight = if header & 0x40 == 0 {
                magnitude
            } else {
                magnitude - 64
            };
            (
                header & 0x2000 != 0,
                u32::from((header & 0x1F80) >> 7),
                weight,
                bytes.get(2..)?,
            )
        }
        sign => (
            sign == 0x4000,
            u32::from(header & 0x3FFF),
            i32::from(word(2)? as i16),
            bytes.get(4..)?,
        ),
    };
    let groups = digits.len() / 2;
    if groups > 5 || scale > 18 {
        return None;
    }
    let mut value: i128 = 0;
    for digit in digits.chunks_exact(2) {
        value = value * 10_000 + i128::from(u16::from_le_bytes([*digit.first()?, *digit.get(1)?]));
    }
    // The digit groups end 4 * (groups - 1 - weight) places behind the point.
    let exponent = i32::try_from(scale).ok()? - 4 * (i32::try_from(groups).ok()? - 1 - weight);
    if value != 0 {
        let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
        value = if exponent >= 0 {
            value.checked_mul(power)?
        } else {
            value / power
        };
    }
    let value = i64::try_from(if negative { -value } else { value }).ok()?;
    (value.unsigned_abs() < 1_000_000_000_000_000_000).then_some((scale, value))
}
