//! Activations of the feed-forward layer.

use crate::elementwise::row_groups;
use crate::simd::exponential::{erfc_of_positive, exp};
use crate::simd::{self, Operation, Simd};
use crate::{InstructionSet, ThreadTeam};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^−x)`, also called swish ([Elfwing et al. 2017](https://arxiv.org/abs/1702.03118)).
    Silu,
    /// `x · Φ(x)` with the exact normal distribution ([Hendrycks and Gimpel 2016](https://arxiv.org/abs/1606.08415)).
    Gelu,
    /// GELU by its hyperbolic tangent approximation, `gelu_pytorch_tanh` in model configurations.
    GeluTanh,
}

impl Activation {
    /// Replaces each value by its activation. Parallel when that pays.
    pub fn apply(self, values: &mut [f32], team: &ThreadTeam) {
        row_groups(values, 1, team, |_, part| self.apply_at(InstructionSet::current(), part));
    }

    pub(crate) fn apply_at(self, level: InstructionSet, values: &mut [f32]) {
        simd::run(level, Apply { activation: self, values });
    }

    #[inline(always)]
    fn vector<S: Simd>(self, simd: S, x: S::Vector) -> S::Vector {
        match self {
            Self::Silu => times_sigmoid(simd, x, x),
            Self::Gelu => gelu(simd, x),
            Self::GeluTanh => {
                // (1 + tanh y) / 2 = sigmoid(2 y), without the cancellation of 1 + tanh at negative y.
                const DOUBLE_SQRT_2_OVER_PI: f32 = 1.595_769;
                let cubic = simd.mul(simd.mul(x, x), simd.splat(0.044_715 * DOUBLE_SQRT_2_OVER_PI));
                let y = simd.mul(x, simd.add(cubic, simd.splat(DOUBLE_SQRT_2_OVER_PI)));
                times_sigmoid(simd, x, y)
            }
        }
    }
}

/// `gate[i] = silu(gate[i]) · up[i]`; both have one length. Parallel when that pays.
///
/// # Panics
/// When the lengths differ.
pub fn silu_multiply(gate: &mut [f32], up: &[f32], team: &ThreadTeam) {
    assert_eq!(gate.len(), up.len(), "gate and up have one length");
    row_groups(gate, 1, team, |first, part| {
        let up = &up[first..][..part.len()];
        silu_multiply_at(InstructionSet::current(), part, up);
    });
}

/// `output[r, i] = silu(joined[r, i]) · joined[r, width + i]` for the joined result of gate and up layers,
/// `[rows, 2 · width]`; `output` is `[rows, width]`. Parallel over rows when that pays.
///
/// # Panics
/// When a slice has another length than its shape takes.
pub fn silu_multiply_joined(joined: &[f32], width: usize, output: &mut [f32], team: &ThreadTeam) {
    assert_eq!(joined.len(), 2 * output.len(), "gate and up for each output");
    row_groups(output, width, team, |first, rows| {
        let joined = joined[first * 2 * width..].chunks_exact(2 * width);
        for (output, joined) in rows.chunks_exact_mut(width).zip(joined) {
            let (gate, up) = joined.split_at(width);
            output.copy_from_slice(gate);
            silu_multiply_at(InstructionSet::current(), output, up);
        }
    });
}

pub(crate) fn silu_multiply_at(level: InstructionSet, gate: &mut [f32], up: &[f32]) {
    simd::run(level, SiluMultiply { gate, up });
}

/// `x / (1 + e^−y)`
#[inline(always)]
fn times_sigmoid<S: Simd>(simd: S, x: S::Vector, y: S::Vector) -> S::Vector {
    let minus_y = simd.sub(simd.splat(0.0), y);
    simd.div(x, simd.add(simd.splat(1.0), exp(simd, minus_y)))
}

/// `x · Φ(x)`: with `tail = |x|/2 · erfc(|x|/√2)` it is `−tail` for negative x and `x − tail` for positive.
#[inline(always)]
fn gelu<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    let zero = simd.splat(0.0);
    // From 15 on the tail is zero; without the limit it were ∞ · 0 at infinity.
    let magnitude = simd.min(simd.splat(15.0), simd.max(simd.sub(zero, x), x));
    let erfc = erfc_of_positive(simd, simd.mul(magnitude, simd.splat(std::f32::consts::FRAC_1_SQRT_2)));
    let tail = simd.mul(simd.mul(magnitude, simd.splat(0.5)), erfc);
    simd.sub(simd.max(zero, x), tail)
}

struct Apply<'a> {
    activation: Activation,
    values: &'a mut [f32],
}

impl Operation for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        simd::map_in_place(
            simd,
            self.values,
            #[inline(always)]
            |x| self.activation.vector(simd, x),
        );
    }
}

struct SiluMultiply<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Operation for SiluMultiply<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        simd::zip_in_place(
            simd,
            self.gate,
            self.up,
            #[inline(always)]
            |gate, up| simd.mul(times_sigmoid(simd, gate, gate), up),
        );
    }
}
