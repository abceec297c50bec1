//! The shortest decimal that reads back as the same float, by the Ryu algorithm, in the variant that Postgres uses: the
//! ends of the rounding interval do not count as inside it (Postgres does not trust every reader to round ties to even).
//! No crate offers this variant, and in rare cases it prints a digit more or another digit.

include!(concat!(env!("OUT_DIR"), "/powers_of_five.rs"));

/// The decimal digits × 10^exponent nearest to mantissa × 2^exponent among the shortest that lie strictly between the
/// midpoints to its neighbours. `lower_is_close`: the neighbour below is only half as far as the one above, because the
/// mantissa is the least of its binary exponent.
pub(super) fn shortest(mantissa: u64, exponent: i32, lower_is_close: bool) -> (u64, i32) {
    // The interval in quarters of a unit, so that its ends are whole.
    let exponent = exponent - 2;
    let low_step = if lower_is_close { 1 } else { 2 };
    let (low, value, high) = (4 * mantissa - low_step, 4 * mantissa, 4 * mantissa + 2);

    let mut interval = if exponent >= 0 {
        whole(low, value, high, exponent.unsigned_abs())
    } else {
        fractional(low, value, high, exponent)
    };
    let removed = interval.shorten();
    (interval.rounded(), interval.exponent + removed)
}

/// The interval in units of 10^exponent, rounded down, and whether that lost anything.
struct Interval {
    low: u64,
    value: u64,
    high: u64,
    exponent: i32,
    /// `value` is exact but for `last_digit`.
    value_is_exact: bool,
    /// The digit that was removed last.
    last_digit: u64,
}

/// 2^exponent ≥ 1: divides by a power of ten that leaves all digits that matter.
fn whole(low: u64, value: u64, high: u64, exponent: u32) -> Interval {
    // floor(log10(2^exponent)), less one so that one digit more is there to round by.
    let q = ((exponent * 78_913) >> 18).saturating_sub(u32::from(exponent > 3));
    let shift = INVERSE_BITS + pow5_bits(q) - 1 + q - exponent;
    let factor = POW5_INVERSE.get(q as usize).copied().unwrap_or_default();
    let scale = |n: u64| mul_shift(n, factor, shift);
    // Only small powers of five can divide numbers of 55 bits.
    let divides = |n: u64| q <= 21 && multiple_of_pow5(n, q);
    Interval {
        low: scale(low),
        value: scale(value),
        // An exact upper end is outside of the interval.
        high: scale(high) - u64::from(divides(high)),
        exponent: q as i32,
        value_is_exact: divides(value),
        last_digit: 0,
    }
}

/// 2^exponent < 1: multiplies by a power of five.
fn fractional(low: u64, value: u64, high: u64, exponent: i32) -> Interval {
    let negative = exponent.unsigned_abs();
    // floor(log10(5^-exponent)), less one.
    let q = ((negative * 732_923) >> 20).saturating_sub(u32::from(negative > 1));
    let i = negative - q;
    let shift = q + POW5_TABLE_BITS - pow5_bits(i);
    let factor = POW5.get(i as usize).copied().unwrap_or_default();
    let scale = |n: u64| mul_shift(n, factor, shift);
    let divides = |n: u64| q < 64 && n.trailing_zeros() >= q;
    Interval {
        low: scale(low),
        value: scale(value),
        high: scale(high) - u64::from(divides(high)),
        exponent: q as i32 + exponent,
        value_is_exact: divides(value),
        last_digit: 0,
    }
}

impl Interval {
    /// Removes digits as long as a decimal of fewer digits lies inside; returns how many.
    fn shorten(&mut self) -> i32 {
        let mut removed = 0;
        while self.high / 10 > self.low / 10 {
            self.value_is_exact &= self.last_digit == 0;
            self.last_digit = self.value % 10;
            self.low /= 10;
            self.value /= 10;
            self.high /= 10;
            removed += 1;
        }
        removed
    }

    /// The decimal nearest to the value; a tie goes to the even one, and the lower end is never taken.
    fn rounded(&self) -> u64 {
        let tie = self.value_is_exact && self.last_digit == 5;
        let round_up = if tie {
            self.value % 2 == 1
        } else {
            self.last_digit >= 5
        };
        self.value + u64::from(round_up || self.value == self.low)
    }
}

/// Fraction bits of the entries of POW5_INVERSE beyond those of the power.
const INVERSE_BITS: u32 = 122;
/// Bits of the entries of POW5.
const POW5_TABLE_BITS: u32 = 121;

/// Bits of 5^n, for n up to 3528.
fn pow5_bits(n: u32) -> u32 {
    ((n * 1_217_359) >> 19) + 1
}

/// n × factor / 2^shift, rounded down; shift is above 64.
fn mul_shift(n: u64, factor: u128, shift: u32) -> u64 {
    let low = u128::from(n) * u128::from(factor as u64);
    let high = u128::from(n) * (factor >> 64);
    ((low >> 64) + high)
        .checked_shr(shift.saturating_sub(64))
        .unwrap_or(0) as u64
}

fn multiple_of_pow5(mut n: u64, mut power: u32) -> bool {
    while power > 0 && n.is_multiple_of(5) {
        n /= 5;
        power -= 1;
    }
    power == 0
}
