//! AVX-512 micro-tiles with BF16 and VNNI dot products: six query rows against blocks of bf16 or int8 keys.

use std::arch::x86_64::*;

use super::tile::{MicroTile, Softmax};
use super::{MAX_BLOCK_KEYS, PAGE_KEYS};

/// Cubic for 2^f on [0, 1), relative error 7.5e-5: a fortieth of the rounding of a bf16 weight.
const EXP2: [f32; 4] = [0.078_024_51, 0.226_067_18, 0.695_833_54, 0.999_925_2];

/// bf16 queries, keys and values for `rows` (1 to 6) rows.
///
/// # Safety
/// The machine has the features; the pointers of `tile` hold for `rows` rows with bf16 queries, keys and values.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn micro_tile_bf16(rows: usize, tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match rows {
            1 => micro_tile::<1, false>(tile),
            2 => micro_tile::<2, false>(tile),
            3 => micro_tile::<3, false>(tile),
            4 => micro_tile::<4, false>(tile),
            5 => micro_tile::<5, false>(tile),
            _ => micro_tile::<6, false>(tile),
        }
    }
}

/// int8 queries and keys, bf16 values (see [`expand_values`]) for `rows` (1 to 6) rows.
///
/// # Safety
/// The machine has the features; the pointers of `tile` hold for `rows` rows with int8 queries and keys.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn micro_tile_int8(rows: usize, tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match rows {
            1 => micro_tile::<1, true>(tile),
            2 => micro_tile::<2, true>(tile),
            3 => micro_tile::<3, true>(tile),
            4 => micro_tile::<4, true>(tile),
            5 => micro_tile::<5, true>(tile),
            _ => micro_tile::<6, true>(tile),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn micro_tile<const ROWS: usize, const INT8: bool>(tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller; each call stays within the block's pages and the value width.
    unsafe {
        let mut page = 0;
        while page < tile.pages {
            let panels = (tile.pages - page).min(4);
            match (INT8, panels) {
                (false, 4) => scores_bf16::<ROWS, 4>(tile, page),
                (false, 3) => scores_bf16::<ROWS, 3>(tile, page),
                (false, 2) => scores_bf16::<ROWS, 2>(tile, page),
                (false, _) => scores_bf16::<ROWS, 1>(tile, page),
                (true, 4) => scores_int8::<ROWS, 4>(tile, page),
                (true, 3) => scores_int8::<ROWS, 3>(tile, page),
                (true, 2) => scores_int8::<ROWS, 2>(tile, page),
                (true, _) => scores_int8::<ROWS, 1>(tile, page),
            }
            page += panels;
        }
        tile.apply_mask::<ROWS>();
        let decay = softmax::<ROWS, INT8>(tile);
        let mut column = 0;
        while column < tile.value_dim {
            let panels = ((tile.value_dim - column) / PAGE_KEYS).min(4);
            match panels {
                4 => weighted_values::<ROWS, 4>(tile, &decay, column),
                3 => weighted_values::<ROWS, 3>(tile, &decay, column),
                2 => weighted_values::<ROWS, 2>(tile, &decay, column),
                _ => weighted_values::<ROWS, 1>(tile, &decay, column),
            }
            column += panels * PAGE_KEYS;
        }
    }
}

/// The bits of a vector of bf16 pairs as the dot product wants them.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes without invalid bit patterns.
    unsafe { std::mem::transmute(bits) }
}

/// Dot products of `ROWS` bf16 queries with the keys of `PANELS` pages from `page` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn scores_bf16<const ROWS: usize, const PANELS: usize>(tile: &MicroTile<'_>, page: usize) {
    // SAFETY: page `page + PANELS − 1` is in the block; a page is `[steps][16]` pairs, a query `steps` pairs.
    unsafe {
        let steps = tile.key_dim / 2;
        let keys = tile.keys.cast::<__m512i>().add(page * steps);
        let queries = tile.queries.cast::<i32>();
        let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
        for step in 0..steps {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(keys.add(panel * steps + step));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = pairs(_mm512_set1_epi32(queries.add(row * steps + step).read_unaligned()));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpbf16_ps(*sum, pairs(lanes), query);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + (page + panel) * PAGE_KEYS), *sum);
            }
        }
    }
}

/// Dot products of `ROWS` int8 queries with the keys of `PANELS` pages from `page` on, in units of the row's query
/// scale (the softmax multiplies by it).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn scores_int8<const ROWS: usize, const PANELS: usize>(tile: &MicroTile<'_>, page: usize) {
    // SAFETY: page `page + PANELS − 1` is in the block; a page is `[steps][16]` groups of four, a query `steps`
    // groups; there is one key scale for each key of the block.
    unsafe {
        let steps = tile.key_dim / 4;
        let keys = tile.keys.cast::<__m512i>().add(page * steps);
        let queries = tile.queries.cast::<i32>();
        let mut sums = [[_mm512_setzero_si512(); PANELS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            // Keys are stored with an offset of 128; starting here takes it out again.
            *sums = [_mm512_set1_epi32(*tile.query_offsets.add(row)); PANELS];
        }
        for step in 0..steps {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(keys.add(panel * steps + step));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = _mm512_set1_epi32(queries.add(row * steps + step).read_unaligned());
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpbusd_epi32(*sum, lanes, query);
                }
            }
        }
        for panel in 0..PANELS {
            let scales = _mm512_loadu_ps(tile.key_scales.add((page + panel) * PAGE_KEYS));
            for (row, sums) in sums.iter().enumerate() {
                let score = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[panel]), scales);
                _mm512_storeu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + (page + panel) * PAGE_KEYS), score);
            }
        }
    }
}

/// 2^x: the whole part goes to the exponent, a cubic gives the rest. −∞ gives 0, NaN gives NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn exp2(x: __m512) -> __m512 {
    // Round down, keep no fraction bits, raise nothing: the fraction of x in [0, 1).
    let fraction = _mm512_reduce_ps::<0x09>(x);
    let mut mantissa = _mm512_fmadd_ps(_mm512_set1_ps(EXP2[0]), fraction, _mm512_set1_ps(EXP2[1]));
    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(EXP2[2]));
    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(EXP2[3]));
    // scalef takes the floor of its exponent itself.
    _mm512_scalef_ps(mantissa, x)
}

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become bf16 weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn softmax<const ROWS: usize, const INT8: bool>(tile: &mut MicroTile<'_>) -> Softmax<ROWS> {
    // SAFETY: a row of scores and weights has `pages` vectors of 16; there are ROWS maxima, query scales and sums.
    unsafe {
        let mut result = Softmax::<ROWS>::default();
        let mut maxima = [0.0_f32; ROWS];
        for (row, maximum) in maxima.iter_mut().enumerate() {
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
            let scale = if INT8 { *tile.query_scales.add(row) } else { 1.0 };
            let before = *tile.maxima.add(row);
            *maximum = before.max(_mm512_reduce_max_ps(_mm512_max_ps(even, odd)) * scale);
            *tile.maxima.add(row) = *maximum;
            result.decay[row] = before - *maximum;
        }
        _mm512_store_ps(result.decay.as_mut_ptr(), exp2(_mm512_load_ps(result.decay.as_ptr())));
        for (row, maximum) in maxima.into_iter().enumerate() {
            let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
            let weights = tile.weights.add(row * MAX_BLOCK_KEYS);
            let maximum = _mm512_set1_ps(maximum);
            let scale = _mm512_set1_ps(if INT8 { *tile.query_scales.add(row) } else { 1.0 });
            let weight = |page: usize| {
                let score = _mm512_loadu_ps(scores.add(page * PAGE_KEYS));
                exp2(if INT8 { _mm512_fmsub_ps(score, scale, maximum) } else { _mm512_sub_ps(score, maximum) })
            };
            let total = tile.sums.add(row * PAGE_KEYS);
            let mut even = _mm512_mul_ps(_mm512_loadu_ps(total), _mm512_set1_ps(result.decay[row]));
            let mut odd = _mm512_setzero_ps();
            let mut page = 0;
            while page + 1 < tile.pages {
                let (low, high) = (weight(page), weight(page + 1));
                even = _mm512_add_ps(even, low);
                odd = _mm512_add_ps(odd, high);
                let packed: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(weights.add(page * PAGE_KEYS).cast(), packed);
                page += 2;
            }
            if page < tile.pages {
                let last = weight(page);
                even = _mm512_add_ps(even, last);
                let packed: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(last));
                _mm256_storeu_si256(weights.add(page * PAGE_KEYS).cast(), packed);
            }
            _mm512_storeu_ps(total, _mm512_add_ps(even, odd));
        }
        result
    }
}

/// `output = decay · output + weights · values` for `PANELS` · 16 value channels from `column` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn weighted_values<const ROWS: usize, const PANELS: usize>(
    tile: &MicroTile<'_>,
    decay: &Softmax<ROWS>,
    column: usize,
) {
    // SAFETY: values are `[pages · 8][value_dim]` pairs, output rows `value_dim` f32, and
    // `column + PANELS · 16 <= value_dim`; a row of weights has `pages · 8` pairs.
    unsafe {
        let values = tile.values.cast::<i32>().add(column);
        let weights = tile.weights.cast::<i32>();
        let output = tile.output.add(column);
        let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            let decay = _mm512_set1_ps(decay.decay[row]);
            for (panel, sum) in sums.iter_mut().enumerate() {
                let before = _mm512_loadu_ps(output.add(row * tile.value_dim + panel * PAGE_KEYS));
                *sum = _mm512_mul_ps(before, decay);
            }
        }
        for pair in 0..tile.pages * PAGE_KEYS / 2 {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(values.add(pair * tile.value_dim + panel * PAGE_KEYS).cast());
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = pairs(_mm512_set1_epi32(*weights.add(row * MAX_BLOCK_KEYS / 2 + pair)));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpbf16_ps(*sum, pairs(lanes), weight);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(output.add(row * tile.value_dim + panel * PAGE_KEYS), *sum);
            }
        }
    }
}

/// Expands int8 values `[pages · 8][value_dim][2]` with their scales `[pages · 16]` to bf16 in the same layout.
///
/// # Safety
/// The machine has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn expand_values(values: &[i8], scales: &[f32], value_dim: usize, output: &mut [u16]) {
    assert!(output.len() >= values.len() && value_dim.is_multiple_of(16));
    assert_eq!(values.len(), scales.len() * value_dim, "one scale for each value");
    for (pair, scales) in scales.chunks_exact(2).enumerate() {
        let start = pair * value_dim * 2;
        // SAFETY: `scales` has two f32, read as one 64-bit lane.
        let scales = unsafe { _mm512_castpd_ps(_mm512_set1_pd(scales.as_ptr().cast::<f64>().read_unaligned())) };
        for offset in (start..start + value_dim * 2).step_by(32) {
            // SAFETY: `offset + 32 <= values.len() <= output.len()`, as value_dim is a multiple of 16.
            unsafe {
                let low = _mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().add(offset).cast()));
                let high = _mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().add(offset + 16).cast()));
                let low = _mm512_mul_ps(_mm512_cvtepi32_ps(low), scales);
                let high = _mm512_mul_ps(_mm512_cvtepi32_ps(high), scales);
                let packed: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(output.as_mut_ptr().add(offset).cast(), packed);
            }
        }
    }
}
