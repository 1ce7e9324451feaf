//! What the AVX-512 softmax steps share: the exponential and the row maximum.

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
