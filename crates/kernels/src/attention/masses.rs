//! The masses of the clusters of one row, and the errors that estimates of them make.

use crate::InstructionSet;
use crate::simd::exponential::weight;
use crate::simd::{self, Operation, Simd};

/// Replaces the logarithms of masses of one row by masses relative to `e^reference`, times `factor`; returns their sum.
pub fn masses_in_place(log_masses: &mut [f32], reference: f32, factor: f32) -> f32 {
    simd::run(InstructionSet::current(), Masses { log_masses, reference, factor })
}

struct Masses<'a> {
    log_masses: &'a mut [f32],
    reference: f32,
    factor: f32,
}

impl Operation for Masses<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let (reference, factor) = (simd.splat(self.reference), simd.splat(self.factor));
        simd::map_in_place(
            simd,
            self.log_masses,
            #[inline(always)]
            |value| simd.mul(factor, weight(simd, simd.sub(value, reference))),
        );
        simd::sum_of(
            simd,
            self.log_masses,
            0.0,
            #[inline(always)]
            |value| value,
        ) as f32
    }
}

/// Largest of `values`; −∞ of none. A NaN may be passed over.
pub fn largest(values: &[f32]) -> f32 {
    simd::run(InstructionSet::current(), Largest { values })
}

struct Largest<'a> {
    values: &'a [f32],
}

impl Operation for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let mut largest = simd.splat(f32::NEG_INFINITY);
        let mut chunks = self.values.chunks_exact(S::LANES);
        for chunk in &mut chunks {
            largest = simd.max(simd.load(chunk), largest);
        }
        chunks.remainder().iter().copied().fold(simd.reduce_max(largest), f32::max)
    }
}

/// `errors += factor · masses² · uncertainties`, all of one length: what each cluster of a row adds to the square of
/// the row's error.
///
/// # Panics
/// When the lengths differ.
pub fn add_squared_errors(masses: &[f32], uncertainties: &[f32], factor: f32, errors: &mut [f32]) {
    assert!(masses.len() == errors.len() && uncertainties.len() == errors.len(), "one error for each mass");
    simd::run(InstructionSet::current(), AddSquaredErrors { masses, uncertainties, factor, errors });
}

struct AddSquaredErrors<'a> {
    masses: &'a [f32],
    uncertainties: &'a [f32],
    factor: f32,
    errors: &'a mut [f32],
}

impl Operation for AddSquaredErrors<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let factor = simd.splat(self.factor);
        let whole = self.errors.len() / S::LANES * S::LANES;
        for place in (0..whole).step_by(S::LANES) {
            let mass = simd.load(&self.masses[place..]);
            let square = simd.mul(simd.mul(mass, mass), simd.load(&self.uncertainties[place..]));
            let errors = &mut self.errors[place..];
            simd.store(simd.mul_add(factor, square, simd.load(errors)), errors);
        }
        for place in whole..self.errors.len() {
            self.errors[place] += self.factor * self.masses[place] * self.masses[place] * self.uncertainties[place];
        }
    }
}

/// `Σ masses² · uncertainties`: the square of a row's error, less a factor.
///
/// # Panics
/// When the lengths differ.
pub fn sum_of_squared_errors(masses: &[f32], uncertainties: &[f32]) -> f32 {
    assert_eq!(masses.len(), uncertainties.len(), "one uncertainty for each mass");
    simd::run(InstructionSet::current(), SumOfSquaredErrors { masses, uncertainties })
}

struct SumOfSquaredErrors<'a> {
    masses: &'a [f32],
    uncertainties: &'a [f32],
}

impl Operation for SumOfSquaredErrors<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let mut sum = simd.splat(0.0);
        let whole = self.masses.len() / S::LANES * S::LANES;
        for place in (0..whole).step_by(S::LANES) {
            let mass = simd.load(&self.masses[place..]);
            sum = simd.mul_add(simd.mul(mass, mass), simd.load(&self.uncertainties[place..]), sum);
        }
        let rest = self.masses[whole..].iter().zip(&self.uncertainties[whole..]);
        simd.reduce_add(sum) + rest.map(|(mass, uncertainty)| mass * mass * uncertainty).sum::<f32>()
    }
}

/// For each limit the sum of those `values` that are at most the limit.
pub fn sums_up_to(values: &[f32], limits: [f32; 8]) -> [f32; 8] {
    simd::run(InstructionSet::current(), SumsUpTo { values, limits })
}

struct SumsUpTo<'a> {
    values: &'a [f32],
    limits: [f32; 8],
}

impl Operation for SumsUpTo<'_> {
    type Output = [f32; 8];

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> [f32; 8] {
        let mut sums = [simd.splat(0.0); 8];
        let mut chunks = self.values.chunks_exact(S::LANES);
        for chunk in &mut chunks {
            let values = simd.load(chunk);
            for (sum, limit) in sums.iter_mut().zip(self.limits) {
                *sum = simd.add(*sum, simd.at_most(values, simd.splat(limit), values, simd.splat(0.0)));
            }
        }
        let mut totals = [0.0; 8];
        for ((total, sum), limit) in totals.iter_mut().zip(sums).zip(self.limits) {
            let rest: f32 = chunks.remainder().iter().filter(|value| **value <= limit).sum();
            *total = simd.reduce_add(sum) + rest;
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masses_and_their_errors() {
        let mut row: Vec<f32> = (0..37).map(|index| index as f32 * 0.1).collect();
        let highest = largest(&row);
        assert!((highest - 3.6).abs() < 1e-6);
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
        let sum = masses_in_place(&mut row, highest, 64.0);
        let expected: f64 = (0..37).map(|index| 64.0 * (f64::from(index) * 0.1 - 3.6).exp()).sum();
        assert!((f64::from(sum) / expected - 1.0).abs() < 1e-5);
        assert!((row[36] - 64.0).abs() < 1e-4);
        let error = sum_of_squared_errors(&row, &[0.5; 37]);
        assert!(
            (f64::from(error) / row.iter().map(|mass| 0.5 * f64::from(*mass).powi(2)).sum::<f64>() - 1.0).abs() < 1e-5
        );
        let mut errors = vec![1.0; 37];
        add_squared_errors(&row, &[0.5; 37], 0.25, &mut errors);
        assert!((errors[36] - (1.0 + 64.0 * 64.0 * 0.125)).abs() < 1e-2);
        let sums = sums_up_to(&[1.0; 37], [0.5, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, f32::INFINITY]);
        assert_eq!(sums, [0.0, 37.0, 37.0, 0.0, 0.0, 0.0, 0.0, 37.0]);
        assert_eq!(sums_up_to(&[f32::NAN, 3.0], [f32::INFINITY; 8]), [3.0; 8], "no number is at most a limit");
        let mut poisoned = vec![f32::NAN; 20];
        assert!(masses_in_place(&mut poisoned, 0.0, 1.0).is_nan());
    }
}
