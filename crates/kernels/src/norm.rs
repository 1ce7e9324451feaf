//! Root-mean-square norm ([Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467)).

use crate::elementwise::row_groups;
use crate::simd::{self, Operation, Simd};
use crate::{InstructionSet, ThreadTeam};

/// `output = input / √(mean(input²) + epsilon) · weight` for one row; all slices have one length.
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm(input: &[f32], weight: &[f32], epsilon: f32, output: &mut [f32]) {
    output.copy_from_slice(input);
    rms_norm_at(InstructionSet::current(), output, weight, epsilon);
}

/// [`rms_norm`] of each row: `input` and `output` are `[rows, weight.len()]`. Parallel over rows when that pays.
///
/// # Panics
/// When the lengths differ or are no whole number of rows.
pub fn rms_norm_rows(input: &[f32], weight: &[f32], epsilon: f32, output: &mut [f32], team: &ThreadTeam) {
    assert_eq!(input.len(), output.len(), "input and output have one shape");
    let width = weight.len();
    row_groups(output, width, team, |first, rows| {
        rows.copy_from_slice(&input[first * width..][..rows.len()]);
        rms_norm_at(InstructionSet::current(), rows, weight, epsilon);
    });
}

/// [`rms_norm_rows`] in place: `data` is `[rows, weight.len()]`. With `[tokens, heads, head_dim]` and a weight of
/// `head_dim` it is the query and key norm of Qwen3.
///
/// # Panics
/// When `data` is no whole number of rows.
pub fn rms_norm_in_place(data: &mut [f32], weight: &[f32], epsilon: f32, team: &ThreadTeam) {
    row_groups(data, weight.len(), team, |_, rows| rms_norm_at(InstructionSet::current(), rows, weight, epsilon));
}

pub(crate) fn rms_norm_at(level: InstructionSet, rows: &mut [f32], weight: &[f32], epsilon: f32) {
    simd::run(level, RmsNorm { rows, weight, epsilon });
}

struct RmsNorm<'a> {
    rows: &'a mut [f32],
    weight: &'a [f32],
    epsilon: f32,
}

impl Operation for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.weight.len()) {
            let squares = simd::sum_of(
                simd,
                row,
                0.0,
                #[inline(always)]
                |x| simd.mul(x, x),
            );
            let scale = 1.0 / (squares / row.len() as f64 + f64::from(self.epsilon)).sqrt();
            let scale = simd.splat(scale as f32);
            simd::zip_in_place(
                simd,
                row,
                self.weight,
                #[inline(always)]
                |x, weight| simd.mul(simd.mul(x, scale), weight),
            );
        }
    }
}
