//! Queries as 8-bit integers.

use crate::InstructionSet;
use crate::rounding::nearest_integer;
use crate::simd::{self, Operation, Simd};

/// Running maxima and sums.
const LANES: usize = 16;

/// The largest absolute value; NaN where one is no number or infinite. Sizes are ordered as their bits are, with infinity
/// and what is no number above all others. Sixteen running maxima, so that the loop runs in vectors.
#[inline(always)]
fn largest_size(values: &[f32]) -> f32 {
    let mut maxima = [0_i32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks.iter().map(<[f32; LANES]>::as_slice).chain([rest]) {
        for (largest, value) in maxima.iter_mut().zip(chunk) {
            *largest = (*largest).max(value.abs().to_bits() as i32);
        }
    }
    let largest = f32::from_bits(maxima.into_iter().fold(0, i32::max) as u32);
    if largest.is_finite() { largest } else { f32::NAN }
}

/// Writes `query` to `integers`, scaled so that its largest number becomes 127. Returns the size of a step and the sum of
/// the integers. A NaN or ∞ makes the step NaN, so that the row's scores are NaN and not quietly wrong.
pub(super) fn quantise(level: InstructionSet, query: &[f32], integers: &mut [i8]) -> (f32, i32) {
    assert!(integers.len() >= query.len(), "room for {} integers", query.len());
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx512 {
        // SAFETY: a level is only in use when this machine has it; there are as many integers as numbers.
        return unsafe { quantise_avx512(query, integers.as_mut_ptr()) };
    }
    simd::run(level, Quantise { query, integers })
}

/// As [`Quantise`], in a quarter of its time: the compiler keeps the sums of its loops in memory.
///
/// # Safety
/// The machine has AVX-512 F, BW and VL; `integers` is writable for as many bytes as there are numbers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn quantise_avx512(query: &[f32], integers: *mut i8) -> (f32, i32) {
    use std::arch::x86_64::*;
    let load = |first: usize| {
        let mask = (u32::MAX >> (32 - (query.len() - first).min(LANES))) as __mmask16;
        // SAFETY: the mask holds the load within the query.
        (mask, unsafe { _mm512_maskz_loadu_ps(mask, query.as_ptr().add(first)) })
    };
    let mut sizes = _mm512_setzero_si512();
    for first in (0..query.len()).step_by(LANES) {
        let (_, values) = load(first);
        sizes = _mm512_max_epi32(sizes, _mm512_castps_si512(_mm512_abs_ps(values)));
    }
    let largest = f32::from_bits(_mm512_reduce_max_epi32(sizes) as u32);
    let largest = if largest.is_finite() { largest } else { f32::NAN };
    let inverse = _mm512_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
    let mut sums = _mm512_setzero_si512();
    for first in (0..query.len()).step_by(LANES) {
        let (mask, values) = load(first);
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        let scaled = _mm512_mul_ps(values, inverse);
        let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(scaled, scaled);
        let rounded = _mm512_maskz_cvt_roundps_epi32::<NEAREST>(number, scaled);
        sums = _mm512_add_epi32(sums, rounded);
        // SAFETY: the mask holds the store within the integers.
        unsafe { _mm512_mask_cvtepi32_storeu_epi8(integers.add(first).cast(), mask, rounded) };
    }
    (largest / 127.0, _mm512_reduce_add_epi32(sums))
}

struct Quantise<'a> {
    query: &'a [f32],
    integers: &'a mut [i8],
}

impl Operation for Quantise<'_> {
    type Output = (f32, i32);

    /// Plain loops over sixteen lanes, which the compiler turns into the vectors of the caller's instruction set.
    #[inline(always)]
    fn eval<S: Simd>(self, _: S) -> (f32, i32) {
        let whole = self.query.len() / LANES * LANES;
        let (query, rest) = self.query.split_at(whole);
        let (integers, rest_integers) = self.integers.split_at_mut(whole);
        let largest = largest_size(self.query);
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let mut sums = [0_i32; LANES];
        let mut round = |values: &[f32], integers: &mut [i8]| {
            for ((value, target), sum) in values.iter().zip(integers).zip(&mut sums) {
                let integer = nearest_integer(value * inverse) as i8;
                *target = integer;
                *sum += i32::from(integer);
            }
        };
        for (values, integers) in query.chunks_exact(LANES).zip(integers.chunks_exact_mut(LANES)) {
            round(values, integers);
        }
        round(rest, rest_integers);
        (largest / 127.0, sums.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elementwise::levels;

    #[test]
    fn the_largest_number_is_127_and_what_is_none_shows() {
        for level in levels() {
            for width in 1..70_usize {
                let query: Vec<f32> = (0..width).map(|channel| (channel as f32 - 20.5) * 0.3).collect();
                let mut integers = vec![7; width + 2];
                let (step, sum) = quantise(level, &query, &mut integers);
                let largest = query.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                assert_eq!(step, largest / 127.0, "{level:?}, {width}");
                for (value, integer) in query.iter().zip(&integers) {
                    assert!((value - f32::from(*integer) * step).abs() <= 0.501 * step, "{level:?}, {width}");
                }
                let mut plain = vec![7; width + 2];
                assert_eq!(simd::run(level, Quantise { query: &query, integers: &mut plain }), (step, sum));
                assert_eq!(plain, integers, "{level:?}, {width}");
                assert_eq!(sum, integers[..width].iter().map(|integer| i32::from(*integer)).sum::<i32>());
                assert_eq!(integers[width..], [7, 7], "{level:?}, {width}");
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut query = query.clone();
                    query[width / 2] = bad;
                    assert!(quantise(level, &query, &mut integers).0.is_nan(), "{level:?}, {width}, {bad}");
                }
            }
            assert_eq!(quantise(level, &[0.0; 20], &mut [1; 20]), (0.0, 0));
        }
    }
}
