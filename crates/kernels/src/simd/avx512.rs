//! AVX-512 F: sixteen lanes.

use std::arch::x86_64::*;

use super::{Operation, Simd};
use crate::InstructionSet;

/// Proof that the processor has AVX-512 F, BW, DQ and VL: only [`Avx512::new`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

const LANES: usize = 16;

/// Calls an intrinsic that needs no more than the features an [`Avx512`] proves.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: an `Avx512` exists only where AVX-512 was detected, and the call touches no memory.
        unsafe { $call }
    };
}

impl Avx512 {
    #[inline(always)]
    pub(crate) fn new() -> Option<Self> {
        (InstructionSet::detected_once() >= InstructionSet::Avx512).then_some(Self(()))
    }

    /// Runs `operation` compiled with AVX-512.
    #[inline(always)]
    pub(crate) fn enter<O: Operation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn body<O: Operation>(simd: Avx512, operation: O) -> O::Output {
            operation.eval(simd)
        }
        // SAFETY: `self` proves the features.
        unsafe { body(self, operation) }
    }

    /// Sums of the first two and of the last two quarters of `a`, then of `b`.
    #[inline(always)]
    fn add_halves(self, a: __m512, b: __m512) -> __m512 {
        intrinsic! {
            _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
        }
    }

    #[inline(always)]
    fn mask(self, count: usize) -> __mmask16 {
        assert!(count < LANES, "fewer values than lanes");
        (1 << count) - 1
    }
}

impl Simd for Avx512 {
    type Vector = __m512;
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> __m512 {
        assert!(values.len() >= LANES, "a full vector");
        // SAFETY: the slice has at least LANES values.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn load_part(self, values: &[f32], fill: f32) -> __m512 {
        let mask = self.mask(values.len());
        // SAFETY: the mask has one lane for each value of the slice; lanes outside it are not read.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, values.as_ptr()) }
    }

    #[inline(always)]
    fn load_brain(self, values: &[u16]) -> __m512 {
        assert!(values.len() >= LANES, "a full vector");
        // SAFETY: the slice has at least LANES values.
        let values = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values))))
    }

    #[inline(always)]
    fn load_brain_pairs(self, values: &[u16]) -> (__m512, __m512) {
        assert!(values.len() >= 2 * LANES, "a full vector of pairs");
        // SAFETY: the slice has at least 2 · LANES values.
        let pairs = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
        let high = intrinsic!(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
        intrinsic!((_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high)))
    }

    #[inline(always)]
    fn store(self, vector: __m512, values: &mut [f32]) {
        assert!(values.len() >= LANES, "a full vector");
        // SAFETY: the slice has at least LANES places.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn store_part(self, vector: __m512, values: &mut [f32]) {
        let mask = self.mask(values.len());
        // SAFETY: the mask has one lane for each place of the slice; nothing outside it is written.
        unsafe { _mm512_mask_storeu_ps(values.as_mut_ptr(), mask, vector) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn at_most(self, a: __m512, limit: __m512, then: __m512, otherwise: __m512) -> __m512 {
        intrinsic!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, limit), otherwise, then))
    }

    #[inline(always)]
    fn below(self, a: __m512, limit: __m512) -> u32 {
        u32::from(intrinsic!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, limit)))
    }

    #[inline(always)]
    fn store_places(self, bits: u32, first: u32, places: &mut [u32]) -> usize {
        assert!(places.len() >= LANES, "a full vector");
        let lanes = intrinsic!(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        let bits = bits as __mmask16;
        let chosen = intrinsic!(_mm512_maskz_compress_epi32(bits, lanes));
        let chosen = intrinsic!(_mm512_add_epi32(chosen, _mm512_set1_epi32(first as i32)));
        // SAFETY: the slice has at least LANES places.
        unsafe { _mm512_storeu_si512(places.as_mut_ptr().cast(), chosen) };
        bits.count_ones() as usize
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, a: __m512, n: __m512, lowest: __m512) -> __m512 {
        // A NaN is below nothing.
        intrinsic!(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(n, lowest), a, n))
    }

    #[inline(always)]
    fn split_exponent(self, x: __m512) -> (__m512, __m512) {
        // Round down, keep no fraction bits, raise nothing; the scaling takes the floor of its exponent itself.
        (intrinsic!(_mm512_reduce_ps::<0x09>(x)), x)
    }

    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(a))
    }

    #[inline(always)]
    fn reduce_add_each<const N: usize>(self, some: &[__m512; N]) -> [f32; N] {
        // Each step adds halves of what it has of two vectors and lays them side by side: 45 instructions instead of eleven
        // for each sum. (Loops, as closures would be compiled without the instructions.)
        let mut vectors = [self.splat(0.0); LANES];
        vectors[..N].copy_from_slice(some);
        let mut pairs = [vectors[0]; 8];
        for (pair, vectors) in pairs.iter_mut().zip(vectors.as_chunks::<2>().0) {
            let [a, b] = *vectors;
            *pair = intrinsic!(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        }
        let mut fours = [vectors[0]; 4];
        for (four, pairs) in fours.iter_mut().zip(pairs.as_chunks::<2>().0) {
            *four = intrinsic! {{
                let (a, b) = (_mm512_castps_pd(pairs[0]), _mm512_castps_pd(pairs[1]));
                _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
            }};
        }
        let [a, b, c, d] = fours;
        let mut sums = [0.0; LANES];
        self.store(self.add_halves(self.add_halves(a, b), self.add_halves(c, d)), &mut sums);
        std::array::from_fn(
            #[inline(always)]
            |index| sums[index],
        )
    }

    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(a))
    }
}
