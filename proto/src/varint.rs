//! Protobuf varints and zigzag: what both the writer and the field reader are made of.

/// The longest varint.
pub(crate) const MAX_LEN: usize = 10;

/// Bytes that `value` takes as a varint, 1 to 10.
pub(crate) const fn len(value: u64) -> usize {
    // ceil(significant bits / 7) without a division, where zero counts as one bit.
    (((value | 1).ilog2() * 9 + 73) / 64) as usize
}

/// Appends `value`.
#[inline]
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes one varint off the front of `bytes`; None when it does not end, or does not fit 64 bits.
#[inline]
pub(crate) fn take(bytes: &mut &[u8]) -> Option<u64> {
    let (&first, mut rest) = bytes.split_first()?;
    let mut value = u64::from(first & 0x7F);
    let (mut byte, mut shift) = (first, 7);
    while byte >= 0x80 {
        (byte, rest) = rest.split_first().map(|(&byte, rest)| (byte, rest))?;
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7F) << shift;
        shift += 7;
    }
    *bytes = rest;
    Some(value)
}

/// The sint64 form: small negative numbers stay short.
pub(crate) const fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

/// The inverse of [`zigzag`].
pub(crate) const fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_varint_of_more_than_64_bits_is_refused() {
        assert_eq!(take(&mut [0xFF; 9].as_slice()), None);
        assert_eq!(
            take(&mut [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01].as_slice()),
            Some(u64::MAX)
        );
        assert_eq!(
            take(&mut [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x02].as_slice()),
            None
        );
        assert_eq!(take(&mut [0x80; 11].as_slice()), None);
        assert_eq!(take(&mut [].as_slice()), None);
    }

    proptest! {
        #[test]
        fn every_value_returns_and_has_the_length_foretold(bits in 0u32..=64, value: u64) {
            let value = value.checked_shr(bits).unwrap_or(0);
            let mut out = Vec::new();
            put(&mut out, value);
            prop_assert_eq!(out.len(), len(value));
            let mut rest = out.as_slice();
            prop_assert_eq!(take(&mut rest), Some(value));
            prop_assert!(rest.is_empty());
            prop_assert_eq!(unzigzag(zigzag(value as i64)), value as i64);
        }
    }
}
