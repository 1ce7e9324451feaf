//! Rounding to integers without a library call.

/// `value` rounded to the nearest integer, ties to even. For |value| < 2²²; beyond, or for NaN, some integer.
///
/// `f32::round_ties_even` is a function call where the target's baseline lacks a rounding instruction; adding 1.5 · 2²³
/// leaves the integer in the low bits of the sum, in code that vectorises everywhere.
#[inline]
pub fn nearest_integer(value: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (value + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

#[cfg(test)]
mod tests {
    use super::nearest_integer;

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
