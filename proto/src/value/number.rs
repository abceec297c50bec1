//! Integers and numerics as text.

/// Appends an integer.
#[inline]
pub(super) fn write_int(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Appends mantissa / 10^scale with exactly `scale` fraction digits, as numeric_out does.
pub(super) fn write_scaled(out: &mut Vec<u8>, scale: u32, mantissa: i64) {
    if mantissa < 0 {
        out.push(b'-');
    }
    let mut buffer = itoa::Buffer::new();
    write_point(
        out,
        buffer.format(mantissa.unsigned_abs()).as_bytes(),
        scale as usize,
    );
}

/// Appends digits / 10^scale with `scale` fraction digits.
pub(super) fn write_point(out: &mut Vec<u8>, digits: &[u8], scale: usize) {
    let whole = digits.len().saturating_sub(scale);
    let (whole, fraction) = digits.split_at_checked(whole).unwrap_or((digits, &[]));
    out.extend_from_slice(if whole.is_empty() { b"0" } else { whole });
    if scale > 0 {
        out.push(b'.');
        write_zeros(out, scale - fraction.len());
        out.extend_from_slice(fraction);
    }
}

/// Appends `count` zeros.
pub(super) fn write_zeros(out: &mut Vec<u8>, count: usize) {
    out.resize(out.len() + count, b'0');
}

/// Appends a number of at least `width` digits, with zeros in front.
pub(super) fn write_padded(out: &mut Vec<u8>, value: u64, width: usize) {
    let mut buffer = itoa::Buffer::new();
    let digits = buffer.format(value).as_bytes();
    write_zeros(out, width.saturating_sub(digits.len()));
    out.extend_from_slice(digits);
}

/// Appends a number below 100 as two digits.
#[inline]
pub(super) fn write_two(out: &mut Vec<u8>, value: u8) {
    out.extend_from_slice(&[b'0' + value / 10 % 10, b'0' + value % 10]);
}
