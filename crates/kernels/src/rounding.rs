//! Rounding without library calls, in code that vectorises.

/// `value` rounded to the nearest integer, ties to even. For |value| < 2²²; beyond, or for NaN, some integer.
///
/// `f32::round_ties_even` is a function call where the target's baseline lacks a rounding instruction; adding 1.5 · 2²³
/// leaves the integer in the low bits of the sum, in code that vectorises everywhere.
#[inline]
pub fn nearest_integer(value: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (value + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

/// Bits of `value` as a brain float, rounded to nearest, ties to even; a NaN stays one.
///
/// The same bits as `half::bf16::from_f32` gives, without its branches.
#[inline]
pub fn brain_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet_nan } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{brain_bits, nearest_integer};

    #[test]
    fn brain_bits_are_those_of_the_library() {
        // Every upper half with lower halves around the tie, infinities and NaNs among them.
        for upper in 0..=u32::from(u16::MAX) {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(upper << 16 | lower);
                assert_eq!(brain_bits(value), bf16::from_f32(value).to_bits(), "{:#x}", value.to_bits());
            }
        }
    }

    #[test]
    fn rounds_ties_to_even() {
        for (value, expected) in
            [(0.0, 0), (0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (126.6, 127), (-127.0, -127), (127.49, 127)]
        {
            assert_eq!(nearest_integer(value), expected, "{value}");
        }
        let _: i32 = nearest_integer(f32::NAN);
    }
}
