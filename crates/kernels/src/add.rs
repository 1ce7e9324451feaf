//! Sums: residual connections and biases.

use crate::elementwise::row_groups;
use crate::simd::{self, Operation, Simd};
use crate::{InstructionSet, ThreadTeam};

/// `output += input`; both have one length. Parallel when that pays.
///
/// # Panics
/// When the lengths differ.
pub fn add(output: &mut [f32], input: &[f32], team: &ThreadTeam) {
    assert_eq!(output.len(), input.len(), "output and input have one length");
    row_groups(output, 1, team, |first, part| {
        let input = &input[first..][..part.len()];
        add_at(InstructionSet::current(), part, input);
    });
}

/// Adds `bias` to each row of `output`, `[rows, bias.len()]`. Parallel over rows when that pays.
///
/// # Panics
/// When `output` is no whole number of rows.
pub fn add_bias_rows(output: &mut [f32], bias: &[f32], team: &ThreadTeam) {
    row_groups(output, bias.len(), team, |_, rows| add_at(InstructionSet::current(), rows, bias));
}

/// Adds `input` to each of the rows of its length.
pub(crate) fn add_at(level: InstructionSet, rows: &mut [f32], input: &[f32]) {
    if !input.is_empty() {
        simd::run(level, Add { rows, input });
    }
}

struct Add<'a> {
    rows: &'a mut [f32],
    input: &'a [f32],
}

impl Operation for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.input.len()) {
            simd::zip_in_place(
                simd,
                row,
                self.input,
                #[inline(always)]
                |a, b| simd.add(a, b),
            );
        }
    }
}
