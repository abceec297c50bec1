//! real and double precision as float4out, float8out and, by way of numeric, to_jsonb print them.

use super::number::{write_int, write_point, write_two, write_zeros};
use super::shortest::shortest;

/// A finite number other than zero without its sign, as the shortest digits × 10^exponent, and the type's layout.
pub(super) struct Decimal {
    digits: u64,
    exponent: i32,
    /// Numbers from 10^this on are printed with an exponent (FLT_DIG, DBL_DIG).
    precision: i32,
}

impl Decimal {
    pub(super) fn of_f64(value: f64) -> Self {
        let bits = value.to_bits();
        Self::new(bits & ((1 << 52) - 1), (bits >> 52 & 0x7FF) as i32, 52, 1075, 15)
    }

    pub(super) fn of_f32(value: f32) -> Self {
        let bits = value.to_bits();
        Self::new(
            u64::from(bits & ((1 << 23) - 1)),
            (bits >> 23 & 0xFF) as i32,
            23,
            150,
            6,
        )
    }

    /// From the fields of an IEEE 754 number. What it makes of zero, NaN and the infinities is not used.
    fn new(fraction: u64, biased: i32, fraction_bits: u32, bias: i32, precision: i32) -> Self {
        let (mantissa, exponent) = match biased {
            0 => (fraction.max(1), 1 - bias),
            _ => (fraction | 1 << fraction_bits, biased - bias),
        };
        let (digits, exponent) = match small_integer(mantissa, exponent, fraction_bits) {
            Some(integer) => (integer, 0),
            None => shortest(mantissa, exponent, fraction == 0 && biased > 1),
        };
        Self {
            digits,
            exponent,
            precision,
        }
        .trimmed()
    }

    /// Without trailing zeros.
    fn trimmed(mut self) -> Self {
        while self.digits.is_multiple_of(10) && self.digits != 0 {
            self.digits /= 10;
            self.exponent += 1;
        }
        self
    }
}

/// The value itself where it is an integer that the mantissa can hold: the shortest decimal is then its own.
fn small_integer(mantissa: u64, exponent: i32, fraction_bits: u32) -> Option<u64> {
    let shift = exponent
        .checked_neg()
        .and_then(|shift| u32::try_from(shift).ok())?;
    (shift <= fraction_bits && mantissa.trailing_zeros() >= shift).then(|| mantissa >> shift)
}

/// Appends `value`, whose digits are `decimal`, as `::text` does.
pub(super) fn write_text(out: &mut Vec<u8>, value: f64, decimal: Decimal) {
    if let Some(word) = word(value) {
        return out.extend_from_slice(word);
    }
    if value.is_sign_negative() {
        out.push(b'-');
    }
    if value == 0.0 {
        return out.push(b'0');
    }
    let mut buffer = itoa::Buffer::new();
    let digits = buffer.format(decimal.digits).as_bytes();
    let leading = decimal.exponent + digits.len() as i32 - 1;
    if (-4..decimal.precision).contains(&leading) {
        write_plain(out, digits, decimal.exponent);
    } else {
        write_scientific(out, digits, leading);
    }
}

/// Appends `value` as to_jsonb does: what `::text` prints goes through numeric, which has no exponents and no -0.
pub(super) fn write_json(out: &mut Vec<u8>, value: f64, decimal: Decimal) {
    if let Some(word) = word(value) {
        return super::quoted(out, |out| out.extend_from_slice(word));
    }
    if value == 0.0 {
        return out.push(b'0');
    }
    if value.is_sign_negative() {
        out.push(b'-');
    }
    let mut buffer = itoa::Buffer::new();
    write_plain(out, buffer.format(decimal.digits).as_bytes(), decimal.exponent);
}

fn word(value: f64) -> Option<&'static [u8]> {
    if value.is_finite() {
        None
    } else if value.is_nan() {
        Some(b"NaN")
    } else if value > 0.0 {
        Some(b"Infinity")
    } else {
        Some(b"-Infinity")
    }
}

fn write_plain(out: &mut Vec<u8>, digits: &[u8], exponent: i32) {
    match usize::try_from(exponent) {
        Ok(zeros) => {
            out.extend_from_slice(digits);
            write_zeros(out, zeros);
        }
        Err(_) => write_point(out, digits, exponent.unsigned_abs() as usize),
    }
}

/// 1e+15, 1.5e-07: the exponent has a sign and at least two digits.
fn write_scientific(out: &mut Vec<u8>, digits: &[u8], leading: i32) {
    let (first, fraction) = digits.split_at_checked(1).unwrap_or((digits, &[]));
    out.extend_from_slice(first);
    if !fraction.is_empty() {
        out.push(b'.');
        out.extend_from_slice(fraction);
    }
    out.push(b'e');
    out.push(if leading < 0 { b'-' } else { b'+' });
    match leading.unsigned_abs() {
        small @ 0..100 => write_two(out, small as u8),
        large => write_int(out, large),
    }
}
