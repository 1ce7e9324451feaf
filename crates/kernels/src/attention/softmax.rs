//! What the AVX-512 softmax steps share: the exponential, the row maximum and the weights.

use std::arch::x86_64::*;

use super::tile::MicroTile;
use super::{MAX_BLOCK_KEYS, PAGE_KEYS};

/// Cubic for 2^f on [0, 1), highest power first; relative error 7.5e-5, a fortieth of the rounding of a bf16 weight.
const EXP2: [f32; 4] = [0.078_024_51, 0.226_067_18, 0.695_833_54, 0.999_925_2];

/// 2^x: the whole part goes to the exponent, a cubic gives the rest. −∞ gives 0, NaN gives NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn exp2(x: __m512) -> __m512 {
    // Round down, keep no fraction bits, raise nothing: the fraction of x in [0, 1).
    let fraction = _mm512_reduce_ps::<0x09>(x);
    let mut mantissa = _mm512_fmadd_ps(_mm512_set1_ps(EXP2[0]), fraction, _mm512_set1_ps(EXP2[1]));
    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(EXP2[2]));
    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(EXP2[3]));
    // scalef takes the floor of its exponent itself.
    _mm512_scalef_ps(mantissa, x)
}

/// Largest score of row `row` of a micro-tile.
///
/// # Safety
/// The row has `tile.pages ≥ 1` vectors of scores.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn largest_score(tile: &MicroTile<'_>, row: usize) -> f32 {
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
        _mm512_reduce_max_ps(_mm512_max_ps(even, odd))
    }
}

/// Turns the scores of row `row` into bf16 weights relative to `maximum` and adds them to its sum, which shrinks by
/// `decay` first. With `FACTORS` a weight is multiplied by its key's factor after it was added.
///
/// # Safety
/// The row has `tile.pages` vectors of scores and room for as many of weights, a sum, and (with `FACTORS`) there is a
/// factor for each key of the pages.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn brain_weights<const FACTORS: bool>(tile: &MicroTile<'_>, row: usize, maximum: f32, decay: f32) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
        let weights = tile.weights.add(row * MAX_BLOCK_KEYS);
        let maximum = _mm512_set1_ps(maximum);
        let weight = |page: usize| exp2(_mm512_sub_ps(_mm512_loadu_ps(scores.add(page * PAGE_KEYS)), maximum));
        let factored = |weight: __m512, page: usize| {
            if FACTORS {
                _mm512_mul_ps(weight, _mm512_loadu_ps(tile.value_factors.add(page * PAGE_KEYS)))
            } else {
                weight
            }
        };
        let total = tile.sums.add(row * PAGE_KEYS);
        let mut even = _mm512_mul_ps(_mm512_loadu_ps(total), _mm512_set1_ps(decay));
        let mut odd = _mm512_setzero_ps();
        let mut page = 0;
        while page + 1 < tile.pages {
            let (low, high) = (weight(page), weight(page + 1));
            even = _mm512_add_ps(even, low);
            odd = _mm512_add_ps(odd, high);
            let (low, high) = (factored(low, page), factored(high, page + 1));
            let packed: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(weights.add(page * PAGE_KEYS).cast(), packed);
            page += 2;
        }
        if page < tile.pages {
            let last = weight(page);
            even = _mm512_add_ps(even, last);
            let packed: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(factored(last, page)));
            _mm256_storeu_si256(weights.add(page * PAGE_KEYS).cast(), packed);
        }
        _mm512_storeu_ps(total, _mm512_add_ps(even, odd));
    }
}
