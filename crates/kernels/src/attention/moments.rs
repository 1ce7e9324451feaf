//! What is known of a cluster of keys and values beside them: means, variances and the farthest key.

use super::VALUE_DIM_MULTIPLE;
use crate::InstructionSet;
use crate::rows::ROW_MULTIPLE;
use crate::simd::{self, Operation, Simd};

/// Rows whose distances become numbers together.
const TOGETHER: usize = 16;
/// Sums of a mean that do not wait for one another.
const SUMS: usize = 4;

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

/// Writes the mean of `values` `[keys][width]` to `mean` `[width]`, and returns the sum of the squares of their norms. The
/// mean of no values is NaN.
///
/// # Panics
/// When the width is no multiple of [`VALUE_DIM_MULTIPLE`], or there are no whole values.
pub fn value_moments(values: &[f32], mean: &mut [f32]) -> f32 {
    value_moments_at(InstructionSet::current(), values, mean)
}

fn value_moments_at(level: InstructionSet, values: &[f32], mean: &mut [f32]) -> f32 {
    assert!(mean.len().is_multiple_of(VALUE_DIM_MULTIPLE), "values of width {}", mean.len());
    assert!(values.len().is_multiple_of(mean.len()), "whole values of width {}", mean.len());
    simd::run(level, TakeValues { values, mean })
}

struct TakeValues<'a> {
    values: &'a [f32],
    mean: &'a mut [f32],
}

impl Operation for TakeValues<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let Self { values, mean } = self;
        let width = mean.len();
        let share = simd.splat(1.0 / (values.len() / width) as f32);
        let mut squares = [simd.splat(0.0); SUMS];
        for column in (0..width).step_by(S::LANES) {
            let mut sums = [simd.splat(0.0); SUMS];
            for rows in values.chunks(SUMS * width) {
                for (row, (sum, squares)) in rows.chunks_exact(width).zip(sums.iter_mut().zip(&mut squares)) {
                    let value = simd.load(&row[column..]);
                    *sum = simd.add(*sum, value);
                    *squares = simd.mul_add(value, value, *squares);
                }
            }
            let sum = simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]));
            simd.store(simd.mul(share, sum), &mut mean[column..]);
        }
        let [a, b, c, d] = squares;
        simd.reduce_add(simd.add(simd.add(a, b), simd.add(c, d)))
    }
}

/// Adds to `moments` `[key_dim][value_dim]`, padded, `share` times the products of what the rows `members` of `keys`
/// `[keys][width]` differ by from their `mean` `[width]` with their `values` `[members][value_dim]`, summed over the members.
/// As the former add up to nothing, the mean of the values makes no difference.
///
/// # Panics
/// When `key_dim` is above `width`, `value_dim` no multiple of [`VALUE_DIM_MULTIPLE`], there is no such row, or there are not
/// as many values as members.
pub fn add_cross_moments(members: &[u32], keys: &[f32], mean: &[f32], values: &[f32], share: f32, moments: &mut [f32]) {
    let level = InstructionSet::current();
    add_cross_moments_at(level, CrossMoments { members, keys, mean, values, share, moments });
}

fn add_cross_moments_at(level: InstructionSet, moments: CrossMoments<'_>) {
    let value_dim = moments.values.len() / moments.members.len().max(1);
    assert_eq!(value_dim * moments.members.len(), moments.values.len(), "as many values as members");
    assert!(value_dim.is_multiple_of(VALUE_DIM_MULTIPLE), "values of width {value_dim}");
    assert!(moments.moments.len() <= moments.mean.len() * value_dim, "no more channels than keys have");
    simd::run(level, moments);
}

struct CrossMoments<'a> {
    members: &'a [u32],
    keys: &'a [f32],
    mean: &'a [f32],
    values: &'a [f32],
    share: f32,
    moments: &'a mut [f32],
}

/// Channels of keys at a time.
const CHANNELS: usize = 4;

impl Operation for CrossMoments<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, simd: S) {
        let Some(value_dim) = self.values.len().checked_div(self.members.len()) else { return };
        for channel in (0..self.moments.len() / value_dim).step_by(CHANNELS) {
            let mut column = 0;
            while column < value_dim {
                if value_dim - column >= 2 * S::LANES {
                    self.columns::<S, 2>(simd, value_dim, channel, column);
                    column += 2 * S::LANES;
                } else {
                    self.columns::<S, 1>(simd, value_dim, channel, column);
                    column += S::LANES;
                }
            }
        }
    }
}

impl CrossMoments<'_> {
    #[inline(always)]
    fn columns<S: Simd, const VECTORS: usize>(&mut self, simd: S, value_dim: usize, channel: usize, column: usize) {
        let width = self.mean.len();
        let mean = &self.mean[channel..][..CHANNELS];
        let mut sums = [[simd.splat(0.0); VECTORS]; CHANNELS];
        for (member, value) in self.members.iter().zip(self.values.chunks_exact(value_dim)) {
            let key = &self.keys[*member as usize * width + channel..][..CHANNELS];
            let values: [_; VECTORS] = std::array::from_fn(|vector| simd.load(&value[column + vector * S::LANES..]));
            for (sums, (key, mean)) in sums.iter_mut().zip(key.iter().zip(mean)) {
                let deviation = simd.splat(key - mean);
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = simd.mul_add(deviation, value, *sum);
                }
            }
        }
        let share = simd.splat(self.share);
        for (sums, moments) in sums.iter().zip(self.moments[channel * value_dim..].chunks_exact_mut(value_dim)) {
            for (vector, sum) in sums.iter().enumerate() {
                let target = &mut moments[column + vector * S::LANES..];
                simd.store(simd.mul_add(share, *sum, simd.load(target)), target);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        for level in levels() {
            for (width, keys) in [(16, 1), (16, 64), (48, 7), (64, 64), (128, 3)] {
                let values: Vec<f32> = (0..keys * width).map(|at| ((at * 31 % 509) as f32 - 200.0) / 50.0).collect();
                let wide = |key: usize, channel: usize| f64::from(values[key * width + channel]);
                let mut mean = vec![9.0; width];
                let squares = f64::from(value_moments_at(level, &values, &mut mean));
                for (channel, mean) in mean.into_iter().enumerate() {
                    let expected = (0..keys).map(|key| wide(key, channel)).sum::<f64>() / keys as f64;
                    assert!((f64::from(mean) - expected).abs() < 1e-4, "{level:?}, {keys} of width {width}");
                }
                let expected: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
                assert!((squares / expected - 1.0).abs() < 1e-5, "{level:?}, {keys} of width {width}");
            }
        }
    }

    #[test]
    fn cross_moments_are_those_of_f64() {
        for level in levels() {
            for (width, key_dim, value_dim, count) in
                [(16, 4, 16, 1), (16, 16, 48, 5), (64, 64, 64, 64), (80, 72, 16, 7), (128, 128, 128, 64)]
            {
                let number = |at: usize| ((at * 37 % 1009) as f32 - 500.0) / 250.0;
                let keys: Vec<f32> = (0..100 * width).map(number).collect();
                let values: Vec<f32> = (0..count * value_dim).map(|at| number(at * 11 + 3)).collect();
                let members: Vec<u32> = (0..count).map(|member| (member as u32 * 29 + 5) % 100).collect();
                let mean: Vec<f32> = (0..width).map(|channel| number(channel * 7)).collect();
                let mut moments: Vec<f32> = (0..key_dim * value_dim).map(number).collect();
                let before = moments.clone();
                let cross_moments = CrossMoments {
                    members: &members,
                    keys: &keys,
                    mean: &mean,
                    values: &values,
                    share: 0.25,
                    moments: &mut moments,
                };
                add_cross_moments_at(level, cross_moments);
                for (at, found) in moments.into_iter().enumerate() {
                    let (channel, column) = (at / value_dim, at % value_dim);
                    let products = members.iter().enumerate().map(|(row, member)| {
                        let deviation = f64::from(keys[*member as usize * width + channel]) - f64::from(mean[channel]);
                        deviation * f64::from(values[row * value_dim + column])
                    });
                    let expected = f64::from(before[at]) + 0.25 * products.sum::<f64>();
                    assert!(
                        (f64::from(found) - expected).abs() < 1e-4,
                        "{level:?}, {count} of {key_dim} × {value_dim}"
                    );
                }
            }
        }
    }
}
