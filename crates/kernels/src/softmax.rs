//! Exponentials and softmax of rows.

use crate::InstructionSet;
use crate::simd::exponential::{exp, polynomial, weight};
use crate::simd::{self, Operation, Simd};

/// Replaces each value by its exponential, within 2 units in the last place, and 0 instead of a subnormal number.
pub fn exp_in_place(values: &mut [f32]) {
    exp_at(InstructionSet::current(), values);
}

/// `ln Σ e^value` in nats; −∞ for no values and where all are −∞, NaN with a NaN or +∞.
pub fn log_sum_exp(values: &[f32]) -> f32 {
    log_sum_exp_at(InstructionSet::current(), values)
}

/// Replaces logits by their softmax and returns their log-sum-exp in nats. Where all logits are −∞ the result is zero
/// everywhere, and the log-sum-exp −∞; with a NaN or +∞ it is NaN everywhere. A weight below 2⁻¹⁰⁰ of the largest is 0.
pub fn softmax_in_place(logits: &mut [f32]) -> f32 {
    softmax_at(InstructionSet::current(), logits)
}

/// Replaces each value `x` by `limit · tanh(x / limit)`: soft-capping of logits, as in Gemma 2
/// ([arXiv 2408.00118](https://arxiv.org/abs/2408.00118), §2). Within 5·10⁻⁷ of the result, so that a limit far
/// above all values changes nothing; NaN at NaN.
pub fn soft_cap_in_place(values: &mut [f32], limit: f32) {
    soft_cap_at(InstructionSet::current(), values, limit);
}

pub(crate) fn soft_cap_at(level: InstructionSet, values: &mut [f32], limit: f32) {
    simd::run(level, SoftCap { values, limit });
}

pub(crate) fn exp_at(level: InstructionSet, values: &mut [f32]) {
    simd::run(level, Exp { values });
}

pub(crate) fn log_sum_exp_at(level: InstructionSet, values: &[f32]) -> f32 {
    simd::run(level, LogSumExp { values })
}

pub(crate) fn softmax_at(level: InstructionSet, logits: &mut [f32]) -> f32 {
    simd::run(level, Softmax { logits })
}

/// `P` in tanh y = y + y³ · P(y²) for y² up to 0.4, within 5·10⁻⁹ of tanh y: least squares, with weights for the largest
/// relative error.
const TANH: [f32; 5] = [-0.333_332_78, 0.133_313_28, -0.053_729_23, 0.020_601_988, -0.005_660_77];

/// `limit · tanh(x / limit)`
#[inline(always)]
pub(crate) fn soft_cap<S: Simd>(simd: S, x: S::Vector, limit: f32) -> S::Vector {
    let y = simd.mul(x, simd.splat(1.0 / limit));
    let square = simd.mul(y, y);
    // tanh y = y + y³ · P(y²) near 0, where the form below loses the digits of a small difference.
    let bend = simd.mul(square, polynomial(simd, square, TANH));
    let near = simd.mul_add(x, bend, x);
    // tanh y = 1 − 2 / (e^2y + 1), which neither end overflows.
    let power = exp(simd, simd.add(y, y));
    let part = simd.div(simd.splat(2.0 * limit), simd.add(power, simd.splat(1.0)));
    simd.at_most(square, simd.splat(0.39), near, simd.sub(simd.splat(limit), part))
}

struct SoftCap<'a> {
    values: &'a mut [f32],
    limit: f32,
}

impl Operation for SoftCap<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let limit = self.limit;
        simd::map_in_place(
            simd,
            self.values,
            #[inline(always)]
            |x| soft_cap(simd, x, limit),
        );
    }
}

struct Exp<'a> {
    values: &'a mut [f32],
}

impl Operation for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        simd::map_in_place(
            simd,
            self.values,
            #[inline(always)]
            |x| exp(simd, x),
        );
    }
}

/// The largest value, or 0 where that is −∞: what is subtracted before exponentials are taken.
#[inline(always)]
fn shift_of<S: Simd>(simd: S, values: &[f32]) -> f32 {
    let mut largest = simd.splat(f32::NEG_INFINITY);
    let mut chunks = values.chunks_exact(S::LANES);
    for chunk in &mut chunks {
        largest = simd.max(simd.load(chunk), largest);
    }
    if !chunks.remainder().is_empty() {
        largest = simd.max(simd.load_part(chunks.remainder(), f32::NEG_INFINITY), largest);
    }
    let largest = simd.reduce_max(largest);
    if largest == f32::NEG_INFINITY { 0.0 } else { largest }
}

struct LogSumExp<'a> {
    values: &'a [f32],
}

impl Operation for LogSumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let shift = shift_of(simd, self.values);
        let vector = simd.splat(shift);
        let sum = simd::sum_of(
            simd,
            self.values,
            f32::NEG_INFINITY,
            #[inline(always)]
            |x| exp(simd, simd.sub(x, vector)),
        );
        (f64::from(shift) + sum.ln()) as f32
    }
}

struct Softmax<'a> {
    logits: &'a mut [f32],
}

impl Operation for Softmax<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let shift = shift_of(simd, self.logits);
        let vector = simd.splat(shift);
        simd::map_in_place(
            simd,
            self.logits,
            #[inline(always)]
            |x| weight(simd, simd.sub(x, vector)),
        );
        let sum = simd::sum_of(
            simd,
            self.logits,
            0.0,
            #[inline(always)]
            |x| x,
        );
        if sum != 0.0 {
            let factor = simd.splat((1.0 / sum) as f32);
            simd::map_in_place(
                simd,
                self.logits,
                #[inline(always)]
                |x| simd.mul(x, factor),
            );
        }
        (f64::from(shift) + sum.ln()) as f32
    }
}
