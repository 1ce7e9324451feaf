//! One vector against rows of numbers: dot products for searches, weighted sums for what they find.

use crate::InstructionSet;
use crate::simd::{self, Operation, Simd};

/// The width of a row is a multiple of this, filled up with zeros, so that no kernel has a tail.
pub const ROW_MULTIPLE: usize = 16;

/// Rows `[rows, width]`, one behind the other; the width is that of the vector they meet.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit brain floats, widened as they are read.
    Bf16(&'a [u16]),
}

/// Writes the dot product of `vector` with each of the first `output.len()` rows.
///
/// A dot product does not depend on the other rows of the call, to the last bit.
///
/// # Panics
/// When the width is no multiple of [`ROW_MULTIPLE`], or there are fewer rows.
pub fn dot_rows(vector: &[f32], rows: Rows<'_>, output: &mut [f32]) {
    dots_at(InstructionSet::current(), Dots { vector, rows, chosen: None, output });
}

/// Writes the dot product of `vector` with each row that `chosen` names; the same bits as [`dot_rows`].
///
/// # Panics
/// When the width is no multiple of [`ROW_MULTIPLE`], a row does not exist, or `output` is shorter than `chosen`.
pub fn dot_chosen_rows(vector: &[f32], rows: Rows<'_>, chosen: &[u32], output: &mut [f32]) {
    dots_at(
        InstructionSet::current(),
        Dots { vector, rows, chosen: Some(chosen), output: &mut output[..chosen.len()] },
    );
}

/// `output += weight · row`
///
/// # Panics
/// When the lengths differ.
pub fn add_scaled(output: &mut [f32], weight: f32, row: &[f32]) {
    assert_eq!(output.len(), row.len(), "output and row have one length");
    simd::run(InstructionSet::current(), AddScaled { output, weight, row });
}

/// `output += Σ weights[row] · rows[row]`
///
/// # Panics
/// When the width (the length of `output`) is no multiple of [`ROW_MULTIPLE`], or there are fewer rows than weights.
pub fn add_weighted_rows(output: &mut [f32], weights: &[f32], rows: Rows<'_>) {
    weighted_rows_at(InstructionSet::current(), WeightedRows { output, weights, rows });
}

fn weighted_rows_at(level: InstructionSet, sums: WeightedRows<'_>) {
    assert!(sums.output.len().is_multiple_of(ROW_MULTIPLE), "a width that is no multiple of {ROW_MULTIPLE}");
    simd::run(level, sums);
}

fn dots_at(level: InstructionSet, dots: Dots<'_>) {
    assert!(dots.vector.len().is_multiple_of(ROW_MULTIPLE), "a width that is no multiple of {ROW_MULTIPLE}");
    simd::run(level, dots);
}

struct Dots<'a> {
    vector: &'a [f32],
    rows: Rows<'a>,
    chosen: Option<&'a [u32]>,
    output: &'a mut [f32],
}

impl Operation for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { vector, rows, chosen, output } = self;
        match (rows, chosen) {
            (Rows::F32(rows), None) => dots(simd, vector, rows, in_order, output),
            (Rows::F32(rows), Some(chosen)) => dots(simd, vector, rows, one_of(chosen), output),
            (Rows::Bf16(rows), None) => dots(simd, vector, rows, in_order, output),
            (Rows::Bf16(rows), Some(chosen)) => dots(simd, vector, rows, one_of(chosen), output),
        }
    }
}

#[inline(always)]
fn in_order(index: usize) -> usize {
    index
}

#[inline(always)]
fn one_of(chosen: &[u32]) -> impl Fn(usize) -> usize {
    #[inline(always)]
    |index| chosen[index] as usize
}

/// A number that rows are made of.
pub(crate) trait Element: Copy {
    fn load<S: Simd>(simd: S, values: &[Self]) -> S::Vector;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[f32]) -> S::Vector {
        simd.load(values)
    }
}

impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[u16]) -> S::Vector {
        simd.load_brain(values)
    }
}

#[inline(always)]
fn dots<S: Simd, E: Element>(simd: S, vector: &[f32], rows: &[E], row_of: impl Fn(usize) -> usize, output: &mut [f32]) {
    // In arrays, whose constant length needs no check in the inner loop.
    let (vector, rows) = (vector.as_chunks().0, rows.as_chunks().0);
    // Sixteen sums become numbers together.
    let mut done = 0;
    while S::LANES == ROW_MULTIPLE && output.len() - done > 8 {
        block::<S, E, 16>(simd, vector, rows, &row_of, done, output);
        done = output.len().min(done + 16);
    }
    while output.len() - done >= 8 {
        block::<S, E, 8>(simd, vector, rows, &row_of, done, output);
        done += 8;
    }
    match output.len() - done {
        0 => {}
        1 => block::<S, E, 1>(simd, vector, rows, &row_of, done, output),
        2..=4 => block::<S, E, 4>(simd, vector, rows, &row_of, done, output),
        _ => block::<S, E, 8>(simd, vector, rows, &row_of, done, output),
    }
}

/// `N` dot products from `output[first]` on. Several at a time hide the latency of the sums, so that where fewer are
/// left, repeating the last row costs less than taking them one by one.
#[inline(always)]
fn block<S: Simd, E: Element, const N: usize>(
    simd: S,
    vector: &[[f32; ROW_MULTIPLE]],
    rows: &[[E; ROW_MULTIPLE]],
    row_of: &impl Fn(usize) -> usize,
    first: usize,
    output: &mut [f32],
) {
    let (width, last) = (vector.len(), output.len() - 1);
    let mut of_block = [&rows[..0]; N];
    for n in 0..N {
        of_block[n] = &rows[row_of((first + n).min(last)) * width..][..width];
    }
    let mut sums = [simd.splat(0.0); N];
    for step in 0..width {
        for lane in (0..ROW_MULTIPLE).step_by(S::LANES) {
            let part = simd.load(&vector[step][lane..]);
            for n in 0..N {
                sums[n] = simd.mul_add(part, E::load(simd, &of_block[n][step][lane..]), sums[n]);
            }
        }
    }
    let sums = simd.reduce_add_each(&sums);
    match output[first..].first_chunk_mut::<N>() {
        // Of a length that is known, this is a store.
        Some(output) => *output = sums,
        None => output[first..].iter_mut().zip(sums).for_each(|(output, sum)| *output = sum),
    }
}

struct AddScaled<'a> {
    output: &'a mut [f32],
    weight: f32,
    row: &'a [f32],
}

impl Operation for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let weight = simd.splat(self.weight);
        simd::zip_in_place(
            simd,
            self.output,
            self.row,
            #[inline(always)]
            |sum, value| simd.mul_add(weight, value, sum),
        );
    }
}

struct WeightedRows<'a> {
    output: &'a mut [f32],
    weights: &'a [f32],
    rows: Rows<'a>,
}

impl Operation for WeightedRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        match self.rows {
            Rows::F32(rows) => add_rows(simd, self.output, self.weights, rows),
            Rows::Bf16(rows) => add_rows(simd, self.output, self.weights, rows),
        }
    }
}

#[inline(always)]
fn add_rows<S: Simd, E: Element>(simd: S, output: &mut [f32], weights: &[f32], rows: &[E]) {
    let width = output.len() / ROW_MULTIPLE;
    let (output, rows) = (output.as_chunks_mut::<ROW_MULTIPLE>().0, rows.as_chunks().0);
    let mut first = 0;
    while first < width {
        // As many columns as leave registers for the row: the sums of a column wait for each other.
        let columns = if S::LANES == 16 && width - first >= 8 {
            columns::<S, E, 8>(simd, output, weights, rows, first)
        } else if width - first >= 4 {
            columns::<S, E, 4>(simd, output, weights, rows, first)
        } else {
            columns::<S, E, 1>(simd, output, weights, rows, first)
        };
        first += columns;
    }
}

/// Adds to `N` · 16 channels from `output[first]` on; returns `N`.
#[inline(always)]
fn columns<S: Simd, E: Element, const N: usize>(
    simd: S,
    output: &mut [[f32; ROW_MULTIPLE]],
    weights: &[f32],
    rows: &[[E; ROW_MULTIPLE]],
    first: usize,
) -> usize {
    let width = output.len();
    for lane in (0..ROW_MULTIPLE).step_by(S::LANES) {
        let mut sums = [simd.splat(0.0); N];
        for n in 0..N {
            sums[n] = simd.load(&output[first + n][lane..]);
        }
        for (index, &weight) in weights.iter().enumerate() {
            let row = &rows[index * width + first..][..N];
            let weight = simd.splat(weight);
            for n in 0..N {
                sums[n] = simd.mul_add(weight, E::load(simd, &row[n][lane..]), sums[n]);
            }
        }
        for n in 0..N {
            simd.store(sums[n], &mut output[first + n][lane..]);
        }
    }
    N
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use iceformer_testing::compare::assert_close;
    use iceformer_testing::random::Random;

    use super::*;
    use crate::elementwise::levels;

    #[test]
    fn dot_products_of_every_count_and_width() {
        let mut random = Random::new(1);
        for level in levels() {
            for width in [0, 16, 32, 48, 64, 128, 256] {
                for count in 0..=20 {
                    let vector = random.normals(width, 1.0);
                    let wide = random.normals(width * 20, 1.0);
                    let narrow: Vec<u16> = wide.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
                    let widened: Vec<f32> = narrow.iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect();
                    let chosen: Vec<u32> = (0..count).map(|_| random.below(20) as u32).collect();
                    for (rows, values) in [(Rows::F32(&wide), &wide), (Rows::Bf16(&narrow), &widened)] {
                        let terms = |row: usize| {
                            let row = &values[row * width..][..width];
                            vector.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b))
                        };
                        let what = format!("{level:?}, {count} rows of {width}");
                        let mut all = vec![f32::NAN; count];
                        dots_at(level, Dots { vector: &vector, rows, chosen: None, output: &mut all });
                        for (row, &product) in all.iter().enumerate() {
                            let error = (f64::from(product) - terms(row).sum::<f64>()).abs();
                            // Relative to what is summed: a sum may cancel.
                            assert!(error <= 1e-6 * terms(row).map(f64::abs).sum::<f64>(), "{what}: {error}");
                        }
                        let mut some = vec![f32::NAN; count];
                        dots_at(level, Dots { vector: &vector, rows, chosen: Some(&chosen), output: &mut some });
                        for (&row, some) in chosen.iter().zip(some) {
                            if let Some(all) = all.get(row as usize) {
                                assert!(some == *all, "{what}: row {row} differs when chosen");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn weighted_sums_of_every_length() {
        for level in levels() {
            for length in 0..=70 {
                let mut random = Random::new(length as u64);
                let (start, row) = (random.normals(length, 1.0), random.normals(length, 1.0));
                let expected: Vec<f64> =
                    start.iter().zip(&row).map(|(&a, &b)| f64::from(a) + 0.3_f32 as f64 * f64::from(b)).collect();
                let mut output = start;
                simd::run(level, AddScaled { output: &mut output, weight: 0.3, row: &row });
                assert_close(&output, &expected, 1e-6, format!("{level:?}, {length}"));
            }
        }
    }

    #[test]
    fn weighted_rows_of_every_count_and_width() {
        let mut random = Random::new(2);
        for level in levels() {
            for width in [0, 16, 48, 64, 80, 128, 192, 256] {
                for count in 0..=20 {
                    let (start, weights) = (random.normals(width, 1.0), random.normals(count, 1.0));
                    let wide = random.normals(width * 20, 1.0);
                    let narrow: Vec<u16> = wide.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
                    let widened: Vec<f32> = narrow.iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect();
                    for (rows, values) in [(Rows::F32(&wide), &wide), (Rows::Bf16(&narrow), &widened)] {
                        let expected: Vec<f64> = (0..width)
                            .map(|column| {
                                let terms = weights
                                    .iter()
                                    .enumerate()
                                    .map(|(row, &weight)| f64::from(weight) * f64::from(values[row * width + column]));
                                f64::from(start[column]) + terms.sum::<f64>()
                            })
                            .collect();
                        let mut output = start.clone();
                        weighted_rows_at(level, WeightedRows { output: &mut output, weights: &weights, rows });
                        assert_close(&output, &expected, 3e-6, format!("{level:?}, {count} rows of {width}"));
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "no multiple of 16")]
    fn odd_width_is_refused() {
        dot_rows(&[0.0; 7], Rows::F32(&[0.0; 7]), &mut [0.0]);
    }
}
