//! What is known of a cluster of keys and values beside them: means, variances and the farthest key.

use super::{KeyBlock, VALUE_DIM_MULTIPLE};
use crate::InstructionSet;
use crate::rows::ROW_MULTIPLE;
use crate::simd::{self, Operation, Simd};

/// Rows whose distances become numbers together.
const TOGETHER: usize = 16;
/// Sums of a mean that do not wait for one another.
const SUMS: usize = 4;
/// Channels of values at a time.
const LANES: usize = VALUE_DIM_MULTIPLE;

/// Mean, channel variances and farthest key (less the mean) of some keys, each `[width]`.
#[derive(Default)]
pub struct KeyMoments {
    /// Their mean.
    pub mean: Vec<f32>,
    /// Mean square of what they differ by from it, channel by channel.
    pub variance: Vec<f32>,
    /// The one at the greatest distance from the mean, the first of several, less the mean. Zeros where no distance is a
    /// number above zero.
    pub farthest: Vec<f32>,
}

impl KeyMoments {
    /// Takes the moments of the rows `members` of `keys` `[keys][width]`; mean and variances of none are NaN.
    ///
    /// # Panics
    /// When `width` is no multiple of [`ROW_MULTIPLE`], or there is no such row.
    pub fn take(&mut self, members: &[u32], keys: &[f32], width: usize) {
        self.take_at(InstructionSet::current(), members, keys, width);
    }

    fn take_at(&mut self, level: InstructionSet, members: &[u32], keys: &[f32], width: usize) {
        assert!(width.is_multiple_of(ROW_MULTIPLE), "a width that is no multiple of {ROW_MULTIPLE}");
        for moment in [&mut self.mean, &mut self.variance, &mut self.farthest] {
            moment.resize(width, 0.0);
        }
        let farthest = simd::run(level, TakeKeys { moments: self, members, keys, width });
        let Some(farthest) = farthest else {
            self.farthest.fill(0.0);
            return;
        };
        let key = &keys[farthest as usize * width..][..width];
        for ((farthest, value), mean) in self.farthest.iter_mut().zip(key).zip(&self.mean) {
            *farthest = value - mean;
        }
    }
}

struct TakeKeys<'a> {
    moments: &'a mut KeyMoments,
    members: &'a [u32],
    keys: &'a [f32],
    width: usize,
}

impl Operation for TakeKeys<'_> {
    /// The row that is farthest from the mean.
    type Output = Option<u32>;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> Option<u32> {
        let Self { moments, members, keys, width } = self;
        let share = simd.splat(1.0 / members.len() as f32);
        for column in (0..width).step_by(S::LANES) {
            let mut sums = [simd.splat(0.0); SUMS];
            for members in members.chunks(SUMS) {
                for (sum, member) in sums.iter_mut().zip(members) {
                    *sum = simd.add(*sum, simd.load(&keys[*member as usize * width + column..]));
                }
            }
            let sum = simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]));
            simd.store(simd.mul(share, sum), &mut moments.mean[column..]);
        }

        moments.variance.fill(0.0);
        let (mut farthest, mut most) = (None, 0.0);
        for members in members.chunks(TOGETHER) {
            let mut distances = [simd.splat(0.0); TOGETHER];
            for column in (0..width).step_by(S::LANES) {
                let mean = simd.load(&moments.mean[column..]);
                // Sums of the even and of the odd rows apart: twice as many additions that do not wait for one another.
                let mut squares = [simd.load(&moments.variance[column..]), simd.splat(0.0)];
                for (place, member) in members.iter().enumerate() {
                    let deviation = simd.sub(simd.load(&keys[*member as usize * width + column..]), mean);
                    squares[place % 2] = simd.mul_add(deviation, deviation, squares[place % 2]);
                    distances[place] = simd.mul_add(deviation, deviation, distances[place]);
                }
                simd.store(simd.add(squares[0], squares[1]), &mut moments.variance[column..]);
            }
            let distances = simd.reduce_add_each(&distances);
            for (member, distance) in members.iter().zip(distances) {
                if distance > most {
                    (farthest, most) = (Some(*member), distance);
                }
            }
        }
        simd::map_in_place(
            simd,
            &mut moments.variance,
            #[inline(always)]
            |variance| simd.mul(share, variance),
        );
        farthest
    }
}

/// Writes the mean of the values of `block`, of padded width `value_dim`, to `mean` `[value_dim]`, and returns the sum of the
/// squares of their norms. The mean of no values is NaN.
///
/// # Panics
/// When the width is no multiple of [`VALUE_DIM_MULTIPLE`].
pub fn value_moments(block: KeyBlock<'_>, mean: &mut [f32]) -> f32 {
    value_moments_at(InstructionSet::current(), block, mean)
}

fn value_moments_at(level: InstructionSet, block: KeyBlock<'_>, mean: &mut [f32]) -> f32 {
    assert!(mean.len().is_multiple_of(VALUE_DIM_MULTIPLE), "values of width {}", mean.len());
    simd::run(level, TakeValues { block, mean })
}

struct TakeValues<'a> {
    block: KeyBlock<'a>,
    mean: &'a mut [f32],
}

impl Operation for TakeValues<'_> {
    type Output = f32;

    /// Plain loops over sixteen channels, which the compiler turns into the vectors of the caller's instruction set.
    #[inline(always)]
    fn eval<S: Simd>(self, _: S) -> f32 {
        let Self { block, mean } = self;
        let width = mean.len();
        match block {
            KeyBlock::F32 { values, .. } => sum_pairs(
                values.len() / width / 2,
                mean,
                #[inline(always)]
                |pair, column| {
                    [0, 1].map(
                        #[inline(always)]
                        |row| lanes(values, (2 * pair + row) * width + column),
                    )
                },
            ),
            KeyBlock::Bf16 { values, .. } => sum_pairs(
                values.len() / width / 2,
                mean,
                #[inline(always)]
                |pair, column| {
                    let source: [u16; 2 * LANES] = lanes(values, 2 * (pair * width + column));
                    separated(
                        source,
                        #[inline(always)]
                        |bits, _| f32::from_bits(u32::from(bits) << 16),
                    )
                },
            ),
            KeyBlock::Int8 { values, value_scales, .. } => sum_pairs(
                values.len() / width / 2,
                mean,
                #[inline(always)]
                |pair, column| {
                    let source: [i8; 2 * LANES] = lanes(values, 2 * (pair * width + column));
                    let scales = [value_scales[2 * pair], value_scales[2 * pair + 1]];
                    separated(
                        source,
                        #[inline(always)]
                        |integer, row| f32::from(integer) * scales[row],
                    )
                },
            ),
        }
    }
}

/// `N` numbers from `values[first]` on.
#[inline(always)]
fn lanes<T: Copy, const N: usize>(values: &[T], first: usize) -> [T; N] {
    *values[first..].first_chunk().expect("whole pages")
}

/// The numbers of two values that stand in turns, each by `convert`, which is told whose it is.
#[inline(always)]
fn separated<T: Copy>(pairs: [T; 2 * LANES], convert: impl Fn(T, usize) -> f32) -> [[f32; LANES]; 2] {
    let mut values = [[0.0; LANES]; 2];
    for lane in 0..LANES {
        values[0][lane] = convert(pairs[2 * lane], 0);
        values[1][lane] = convert(pairs[2 * lane + 1], 1);
    }
    values
}

/// Writes the mean of `2 · pairs` values to `mean`; `load` gives [`LANES`] channels of a pair of them, from a column on.
/// Returns the sum of all squares.
#[inline(always)]
fn sum_pairs(pairs: usize, mean: &mut [f32], load: impl Fn(usize, usize) -> [[f32; LANES]; 2]) -> f32 {
    let share = 1.0 / (2 * pairs) as f32;
    let mut squares = [0.0; LANES];
    for (part, mean) in mean.chunks_exact_mut(LANES).enumerate() {
        let mut sums = [0.0; LANES];
        for pair in 0..pairs {
            let [one, other] = load(pair, part * LANES);
            for lane in 0..LANES {
                sums[lane] += one[lane] + other[lane];
                squares[lane] += one[lane] * one[lane] + other[lane] * other[lane];
            }
        }
        mean.iter_mut().zip(sums).for_each(|(mean, sum)| *mean = share * sum);
    }
    squares.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::PAGE_KEYS;
    use crate::elementwise::levels;

    #[test]
    fn moments_of_keys_are_those_of_f64() {
        for level in levels() {
            let mut moments = KeyMoments::default();
            for (width, count) in [(16, 1), (32, 2), (64, 63), (64, 64), (80, 17), (128, 64)] {
                let keys: Vec<f32> = (0..100 * width).map(|at| ((at * 37 % 1009) as f32 - 300.0) / 50.0).collect();
                let members: Vec<u32> = (0..count).map(|member| (member * 29 + 5) % 100).collect();
                moments.take_at(level, &members, &keys, width);
                let value = |member: &u32, channel: usize| f64::from(keys[*member as usize * width + channel]);
                let share = 1.0 / f64::from(count);
                let mean = |channel| share * members.iter().map(|member| value(member, channel)).sum::<f64>();
                let deviation = |member: &u32, channel: usize| value(member, channel) - mean(channel);
                let distance = |member: &u32| (0..width).map(|channel| deviation(member, channel).powi(2)).sum::<f64>();
                let distances: Vec<f64> = members.iter().map(distance).collect();
                let most = distances.iter().fold(0.0_f64, |most, distance| most.max(*distance));
                let farthest = distances.iter().position(|distance| *distance == most).unwrap();
                for channel in 0..width {
                    let variance = share * members.iter().map(|member| deviation(member, channel).powi(2)).sum::<f64>();
                    let farthest = deviation(&members[farthest], channel);
                    let moments = [&moments.mean, &moments.variance, &moments.farthest].map(|moment| moment[channel]);
                    for (found, expected) in moments.into_iter().zip([mean(channel), variance, farthest]) {
                        let error = (f64::from(found) - expected).abs();
                        assert!(error < 2e-4, "{level:?}, {count} of width {width}: {found} for {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn keys_that_are_alike_or_no_numbers_have_no_farthest() {
        for level in levels() {
            let mut moments = KeyMoments::default();
            for value in [0.0, f32::NAN, f32::INFINITY] {
                moments.farthest = vec![5.0; 16];
                moments.take_at(level, &[0, 2, 3], &[value; 4 * 16], 16);
                assert_eq!(moments.farthest, [0.0; 16], "{level:?}, {value}");
                assert_eq!(moments.variance[3].is_nan(), value != 0.0, "{level:?}, {value}");
            }
        }
    }

    #[test]
    fn moments_of_values_are_those_of_f64() {
        let pages = 3;
        let keys = pages * PAGE_KEYS;
        for level in levels() {
            for width in [16, 48, 64] {
                let integer = |key: usize, channel: usize| ((key * 31 + channel * 7) % 255) as i32 - 127;
                let scales: Vec<f32> = (0..keys).map(|key| 0.01 + key as f32 / 500.0).collect();
                let pair = |at: usize| (at / (2 * width) * 2 + at % 2, at / 2 % width);
                let (whole, narrow): (Vec<f32>, Vec<u16>) = (0..keys * width)
                    .map(|at| (integer(at / width, at % width) as f32, pair(at)))
                    .map(|(whole, (key, channel))| (whole, crate::brain_bits(integer(key, channel) as f32)))
                    .unzip();
                let integers: Vec<i8> =
                    (0..keys * width).map(pair).map(|(key, channel)| integer(key, channel) as i8).collect();
                let blocks = [
                    KeyBlock::F32 { keys: &[], values: &whole },
                    KeyBlock::Bf16 { keys: &[], values: &narrow },
                    KeyBlock::Int8 { keys: &[], key_scales: &[], values: &integers, value_scales: &scales },
                ];
                for (kind, block) in blocks.into_iter().enumerate() {
                    let value = |key: usize, channel: usize| {
                        f64::from(integer(key, channel)) * if kind == 2 { f64::from(scales[key]) } else { 1.0 }
                    };
                    let mut mean = vec![9.0; width];
                    let squares = f64::from(value_moments_at(level, block, &mut mean));
                    let mut expected_squares = 0.0;
                    for (channel, mean) in mean.into_iter().enumerate() {
                        let expected = (0..keys).map(|key| value(key, channel)).sum::<f64>() / keys as f64;
                        assert!((f64::from(mean) - expected).abs() < 1e-4, "{level:?}, kind {kind}, width {width}");
                        expected_squares += (0..keys).map(|key| value(key, channel).powi(2)).sum::<f64>();
                    }
                    assert!((squares / expected_squares - 1.0).abs() < 1e-5, "{level:?}, kind {kind}, width {width}");
                }
            }
        }
    }
}
