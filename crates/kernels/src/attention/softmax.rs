//! What the AVX-512 softmax steps share: the exponential, the row maximum and the weights.

use std::arch::x86_64::*;

use super::tile::MicroTile;
use super::{MAX_BLOCK_KEYS, PAGE_KEYS};
use crate::simd::exponential::LOWEST_WEIGHT;

/// Cubic for 2^f on [0, 1), highest power first; relative error 7.5e-5, a fortieth of the rounding of a bf16 weight.
pub(super) const EXP2: [f32; 4] = [0.078_024_51, 0.226_067_18, 0.695_833_54, 0.999_925_2];

/// 2^x: the whole part goes to the exponent, a cubic gives the rest. Below 2^[`LOWEST_WEIGHT`] it is 0; NaN gives NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn exp2(x: __m512) -> __m512 {
    // Round down, keep no fraction bits, raise nothing: the fraction of x in [0, 1).
    let fraction = _mm512_reduce_ps::<0x09>(x);
    let mut mantissa = _mm512_fmadd_ps(_mm512_set1_ps(EXP2[0]), fraction, _mm512_set1_ps(EXP2[1]));
    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(EXP2[2]));
    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(EXP2[3]));
    let wanted = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LOWEST_WEIGHT));
    // scalef takes the floor of its exponent itself.
    _mm512_maskz_scalef_ps(wanted, mantissa, x)
}

/// Factor from weights relative to 2^`before` to those relative to 2^`after`: one where both are the same, to which the cubic
/// only comes near. Otherwise what was seen first would shrink a little with each block that follows.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn decay(before: __m512, after: __m512) -> __m512 {
    let same = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(before, after);
    _mm512_mask_blend_ps(same, exp2(_mm512_sub_ps(before, after)), _mm512_set1_ps(1.0))
}

/// The lanes of `vector`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lanes(vector: __m512) -> [f32; 16] {
    let mut lanes = [0.0; 16];
    // SAFETY: sixteen f32.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), vector) };
    lanes
}

/// Largest scores of row `row` of a micro-tile, by lane.
///
/// # Safety
/// The row has `tile.pages ≥ 1` vectors of scores.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn largest_scores(tile: &MicroTile<'_>, row: usize) -> __m512 {
    // SAFETY: forwarded from the caller.
    unsafe {
        let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
        let mut even = _mm512_loadu_ps(scores);
        let mut odd = even;
        let mut page = 1;
        while page + 1 < tile.pages {
            even = _mm512_max_ps(even, _mm512_loadu_ps(scores.add(page * PAGE_KEYS)));
            odd = _mm512_max_ps(odd, _mm512_loadu_ps(scores.add((page + 1) * PAGE_KEYS)));
            page += 2;
        }
        if page < tile.pages {
            even = _mm512_max_ps(even, _mm512_loadu_ps(scores.add(page * PAGE_KEYS)));
        }
        _mm512_max_ps(even, odd)
    }
}

/// A row on its way from scores to bf16 weights.
pub(super) struct BrainRow {
    /// Scores of the first page; those of the next `page_stride` further.
    pub scores: *const f32,
    pub page_stride: usize,
    /// Weights of the first two pages; those of the next two `pair_stride` further. Room for whole pairs of pages.
    pub weights: *mut u16,
    pub pair_stride: usize,
    pub pages: usize,
    /// Sum of the weights by lane, so far.
    pub sum: *mut f32,
    /// Factor of each key on its weight, with `FACTORS`.
    pub factors: *const f32,
}

impl BrainRow {
    /// Turns the scores into weights relative to `maximum` and adds them to the sum, which shrinks by `decay` first.
    /// With `FACTORS` a weight is multiplied by its key's factor after it was added.
    ///
    /// # Safety
    /// The pointers hold for `pages` pages.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn weigh<const FACTORS: bool>(&self, maximum: f32, decay: f32) {
        // SAFETY: forwarded from the caller.
        unsafe {
            let maximum = _mm512_set1_ps(maximum);
            let weight = |page: usize, sum: &mut __m512| {
                let score = _mm512_loadu_ps(self.scores.add(page * self.page_stride));
                let weight = exp2(_mm512_sub_ps(score, maximum));
                *sum = _mm512_add_ps(*sum, weight);
                if FACTORS {
                    _mm512_mul_ps(weight, _mm512_loadu_ps(self.factors.add(page * PAGE_KEYS)))
                } else {
                    weight
                }
            };
            let mut even = _mm512_mul_ps(_mm512_loadu_ps(self.sum), _mm512_set1_ps(decay));
            let mut odd = _mm512_setzero_ps();
            for page in (0..self.pages).step_by(2) {
                let low = weight(page, &mut even);
                // What stands beside a last single page is never read.
                let high = if page + 1 < self.pages { weight(page + 1, &mut odd) } else { low };
                let packed: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(self.weights.add(page / 2 * self.pair_stride).cast(), packed);
            }
            _mm512_storeu_ps(self.sum, _mm512_add_ps(even, odd));
        }
    }
}
