//! AVX2 and FMA: eight lanes.

use std::arch::x86_64::*;

use super::{Operation, Simd};
use crate::InstructionSet;

/// Proof that the processor has AVX2 and FMA: only [`Avx2::new`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

const LANES: usize = 8;

/// A mask of the first `count` lanes for the masked loads and stores.
const MASKS: [i32; 2 * LANES] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// Calls an intrinsic that needs no more than the features an [`Avx2`] proves.
macro_rules! intrinsic {
    ($($call:tt)*) => {
        // SAFETY: an `Avx2` exists only where AVX2 and FMA were detected, and the call touches no memory.
        unsafe { $($call)* }
    };
}

impl Avx2 {
    #[inline(always)]
    pub(crate) fn new() -> Option<Self> {
        (InstructionSet::detected_once() >= InstructionSet::Avx2).then_some(Self(()))
    }

    /// Runs `operation` compiled with AVX2 and FMA.
    #[inline(always)]
    pub(crate) fn enter<O: Operation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "avx2,fma")]
        fn body<O: Operation>(simd: Avx2, operation: O) -> O::Output {
            operation.eval(simd)
        }
        // SAFETY: `self` proves the features.
        unsafe { body(self, operation) }
    }

    #[inline(always)]
    fn mask(self, count: usize) -> __m256i {
        assert!(count < LANES, "fewer values than lanes");
        // SAFETY: `MASKS` has 2·LANES elements, and LANES are read from `LANES - count` on, with `count < LANES`.
        unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(LANES - count).cast()) }
    }
}

impl Simd for Avx2 {
    type Vector = __m256;
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        intrinsic!(_mm256_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> __m256 {
        assert!(values.len() >= LANES, "a full vector");
        // SAFETY: the slice has at least LANES values.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn load_part(self, values: &[f32], fill: f32) -> __m256 {
        let mask = self.mask(values.len());
        // SAFETY: the mask has one lane for each value of the slice; lanes outside it are not read.
        let loaded = unsafe { _mm256_maskload_ps(values.as_ptr(), mask) };
        intrinsic!(_mm256_blendv_ps(_mm256_set1_ps(fill), loaded, _mm256_castsi256_ps(mask)))
    }

    #[inline(always)]
    fn load_brain(self, values: &[u16]) -> __m256 {
        assert!(values.len() >= LANES, "a full vector");
        // SAFETY: the slice has at least LANES values.
        let values = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
        intrinsic!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(values))))
    }

    #[inline(always)]
    fn load_brain_pairs(self, values: &[u16]) -> (__m256, __m256) {
        assert!(values.len() >= 2 * LANES, "a full vector of pairs");
        // SAFETY: the slice has at least 2 · LANES values.
        let pairs = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
        let high = intrinsic!(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
        intrinsic!((_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(high)))
    }

    #[inline(always)]
    fn store(self, vector: __m256, values: &mut [f32]) {
        assert!(values.len() >= LANES, "a full vector");
        // SAFETY: the slice has at least LANES places.
        unsafe { _mm256_storeu_ps(values.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn store_part(self, vector: __m256, values: &mut [f32]) {
        let mask = self.mask(values.len());
        // SAFETY: the mask has one lane for each place of the slice; nothing outside it is written.
        unsafe { _mm256_maskstore_ps(values.as_mut_ptr(), mask, vector) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        intrinsic!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn at_most(self, a: __m256, limit: __m256, then: __m256, otherwise: __m256) -> __m256 {
        intrinsic!(_mm256_blendv_ps(otherwise, then, _mm256_cmp_ps::<_CMP_LE_OQ>(a, limit)))
    }

    #[inline(always)]
    fn below(self, a: __m256, limit: __m256) -> u32 {
        intrinsic!(_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, limit))) as u32
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, a: __m256, n: __m256, lowest: __m256) -> __m256 {
        // In two steps, since 2^n itself may be no f32; the first step is exact.
        intrinsic! {
            let wanted = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLT_UQ>(n, lowest));
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            let second = _mm256_and_si256(second, wanted);
            _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))
        }
    }

    #[inline(always)]
    fn reduce_add(self, a: __m256) -> f32 {
        intrinsic! {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        intrinsic!(largest_lane(a))
    }
}

/// Largest lane; a NaN may be passed over.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn largest_lane(vector: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(vector), _mm256_extractf128_ps::<1>(vector));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}
