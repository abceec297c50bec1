//! Computes, at build time, the two tables of src/value/shortest.rs: 128-bit approximations of 5^i and of 1/5^i, with the
//! precision that the Ryu paper proves sufficient for f64. Computing them is shorter than printing 668 constants, and
//! leaves no constant that could be mistyped.
// A build script may stop with a panic; the crate it builds may not.
#![allow(clippy::indexing_slicing)]

/// A natural number of at most 1,280 bits, least significant limb first.
type Big = [u32; 40];

/// Bits of 5^i that the table keeps.
const POW5_BITS: u32 = 121;
/// Bits of 2^k / 5^i that the table keeps, and one more.
const INV_BITS: u32 = 122;

/// The Rust source of both tables.
pub fn source() -> String {
    let mut pow5 = String::new();
    let mut inverse = String::new();
    let mut power: Big = [0; 40];
    power[0] = 1;
    for i in 0..342 {
        let bits = bit_length(&power);
        if i < 326 {
            let entry = if bits > POW5_BITS {
                low_u128(&shift_right(&power, bits - POW5_BITS))
            } else {
                low_u128(&power) << (POW5_BITS - bits)
            };
            pow5.push_str(&format!("    {entry:#x},\n"));
        }
        let entry = low_u128(&power_of_two_over(bits - 1 + INV_BITS, &power)) + 1;
        inverse.push_str(&format!("    {entry:#x},\n"));
        times_five(&mut power);
    }
    format!(
        "/// 5^i, its highest {POW5_BITS} bits.\nstatic POW5: [u128; 326] = [\n{pow5}];\n\n\
         /// 2^(bits(5^i) - 1 + {INV_BITS}) / 5^i, rounded up.\nstatic POW5_INVERSE: [u128; 342] = [\n{inverse}];\n"
    )
}

fn bit_length(n: &Big) -> u32 {
    let top = n.iter().rposition(|&limb| limb != 0).map_or(0, |at| at + 1);
    let unused = n[..top].last().map_or(0, |limb| limb.leading_zeros());
    top as u32 * 32 - unused
}

fn low_u128(n: &Big) -> u128 {
    n.iter()
        .take(4)
        .rev()
        .fold(0, |sum, &limb| sum << 32 | u128::from(limb))
}

fn times_five(n: &mut Big) {
    let mut carry = 0u64;
    for limb in n.iter_mut() {
        let product = u64::from(*limb) * 5 + carry;
        *limb = product as u32;
        carry = product >> 32;
    }
}

fn shift_right(n: &Big, bits: u32) -> Big {
    let mut out = [0; 40];
    let (limbs, bits) = ((bits / 32) as usize, bits % 32);
    for (i, slot) in out.iter_mut().enumerate() {
        let low = n.get(i + limbs).copied().unwrap_or(0);
        let high = n.get(i + limbs + 1).copied().unwrap_or(0);
        *slot = ((u64::from(high) << 32 | u64::from(low)) >> bits) as u32;
    }
    out
}

/// floor(2^exponent / divisor), by schoolbook division one bit at a time.
fn power_of_two_over(exponent: u32, divisor: &Big) -> Big {
    let mut quotient = [0; 40];
    let mut rest: Big = [0; 40];
    for bit in (0..=exponent).rev() {
        double(&mut rest);
        if bit == exponent {
            rest[0] |= 1;
        }
        if !less(&rest, divisor) {
            subtract(&mut rest, divisor);
            quotient[(bit / 32) as usize] |= 1 << (bit % 32);
        }
    }
    quotient
}

fn double(n: &mut Big) {
    let mut carry = 0;
    for limb in n.iter_mut() {
        let next = *limb >> 31;
        *limb = *limb << 1 | carry;
        carry = next;
    }
}

fn less(a: &Big, b: &Big) -> bool {
    a.iter().rev().lt(b.iter().rev())
}

fn subtract(a: &mut Big, b: &Big) {
    let mut borrow = 0i64;
    for (x, y) in a.iter_mut().zip(b) {
        let difference = i64::from(*x) - i64::from(*y) - borrow;
        *x = difference as u32;
        borrow = i64::from(difference < 0);
    }
}
