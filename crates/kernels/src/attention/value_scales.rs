//! The scales of a block's int8 values as factors on the weights of its keys.

use super::MAX_BLOCK_KEYS;
use crate::InstructionSet;
use crate::simd::{self, Operation, Simd};

/// Largest int16 weight.
pub(super) const WEIGHT_STEPS: f32 = 32_767.0;

const _: () = assert!(MAX_BLOCK_KEYS * WEIGHT_STEPS as usize * 127 < 1 << 31);

/// How many times as large as another the largest value of a block may be: a 512th of it is then the step of a weight.
const MOST_UNEVEN: f32 = 64.0;
/// What is no more than this counts as nothing: the steps of a weight in it would be infinitely many.
pub(super) const LEAST: f32 = 1e-34;

const _: () = assert!(WEIGHT_STEPS / LEAST < f32::INFINITY);

/// Writes to `factors` the share of each scale in the largest, in steps of a weight. Returns what one step of a weighted
/// value is worth, and whether the scales are of much the same size. Both slices are `[pages · 16]`.
pub(super) fn scale_values(level: InstructionSet, scales: &[f32], factors: &mut [f32]) -> (f32, bool) {
    simd::run(level, ScaleValues { scales, factors })
}

struct ScaleValues<'a> {
    scales: &'a [f32],
    factors: &'a mut [f32],
}

impl Operation for ScaleValues<'_> {
    type Output = (f32, bool);

    /// Plain loops, which the compiler turns into the vectors of the caller's instruction set. (Of sixteen running maxima it
    /// keeps some in memory: decoding took 9 % longer.)
    #[inline(always)]
    fn eval<S: Simd>(self, _: S) -> (f32, bool) {
        // Sizes are ordered as their bits are, with ∞ and what is no number above all others. A scale of zero, which is that of
        // a value of zeros or of none at all, is above them too once its bits are one less.
        let (mut most, mut smallest) = (0_i32, u32::MAX);
        for scale in self.scales {
            most = most.max(scale.abs().to_bits() as i32);
            smallest = smallest.min(scale.to_bits().wrapping_sub(1));
        }
        let largest = f32::from_bits(most as u32);
        // A NaN or ∞ among the scales must show in every row's output.
        let largest = if largest.is_finite() { largest } else { f32::NAN };
        let is_even = smallest >= f32::INFINITY.to_bits() || f32::from_bits(smallest + 1) * MOST_UNEVEN >= largest;
        let inverse = if largest > LEAST { WEIGHT_STEPS / largest } else { 0.0 };
        for (factor, scale) in self.factors.iter_mut().zip(self.scales) {
            *factor = scale * inverse;
        }
        (largest / WEIGHT_STEPS, is_even)
    }
}
