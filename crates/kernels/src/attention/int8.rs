//! AVX-512 VNNI micro-tiles (6 rows × 64 keys): int8 queries and keys, int16 weights, int8 values.
//!
//! Weights relative to the largest of their row *and block* are rounded to 15 bits, finer than bf16 would, and the
//! scales of the values are folded into them first; so values stay the integers they are stored as, and a block's sum
//! is exact in 32 bits: 512 keys · 32767 · 127 < 2³¹. Where values are of very different sizes the largest product of
//! weight and scale of each row takes the place of the block's, lest a large value that a row does not see leave it
//! without digits.

use std::arch::x86_64::*;

use super::softmax::{exp2, largest_score};
use super::tile::{MicroTile, NOTHING_SEEN, WEIGHT_STEPS};
use super::{MAX_BLOCK_KEYS, PAGE_KEYS, pages_at_once};

const _: () = assert!(MAX_BLOCK_KEYS * WEIGHT_STEPS as usize * 127 < 1 << 31);

/// How many times as large as another the largest value of a block may be: a 512th of it is then the step of a weight.
const MOST_UNEVEN: f32 = 64.0;
/// What is no more than this counts as nothing: the steps of a weight in it would be infinitely many.
const LEAST: f32 = 1e-34;

const _: () = assert!(WEIGHT_STEPS / LEAST < f32::INFINITY);

/// Writes to `factors` the share of each scale in the largest, in steps of a weight. Returns what one step of a weighted
/// value is worth, and whether the scales are of much the same size. Both slices are `[pages · 16]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn scale_values(scales: &[f32], factors: &mut [f32]) -> (f32, bool) {
    let scales = scales.as_chunks::<PAGE_KEYS>().0;
    let (mut largest, mut smallest) = (_mm512_setzero_si512(), _mm512_set1_epi32(-1));
    for scales in scales {
        // SAFETY: sixteen f32.
        let bits = unsafe { _mm512_loadu_si512(scales.as_ptr().cast()) };
        // Sizes are ordered as their bits are, with ∞ and what is no number above all others. A scale of zero, which is that
        // of a value of zeros or of none at all, is above them too once its bits are one less.
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
        smallest = _mm512_min_epu32(smallest, _mm512_sub_epi32(bits, _mm512_set1_epi32(1)));
    }
    let largest = f32::from_bits(_mm512_reduce_max_epi32(largest) as u32);
    // A NaN or ∞ among the scales must show in every row's output.
    let largest = if largest.is_finite() { largest } else { f32::NAN };
    let smallest = _mm512_reduce_min_epu32(smallest);
    let is_even = smallest >= f32::INFINITY.to_bits() || f32::from_bits(smallest + 1) * MOST_UNEVEN >= largest;
    let inverse = _mm512_set1_ps(if largest > LEAST { WEIGHT_STEPS / largest } else { 0.0 });
    for (factors, scales) in factors.as_chunks_mut::<PAGE_KEYS>().0.iter_mut().zip(scales) {
        // SAFETY: sixteen f32 each.
        unsafe { _mm512_storeu_ps(factors.as_mut_ptr(), _mm512_mul_ps(_mm512_loadu_ps(scales.as_ptr()), inverse)) }
    }
    (largest / WEIGHT_STEPS, is_even)
}

/// Runs `rows` (1 to 6) rows.
///
/// # Safety
/// The machine has the features; the pointers of `tile` hold for `rows` rows with int8 queries, keys and values.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn micro_tile_rows(rows: usize, tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match (rows, tile.ahead.is_some()) {
            (1, true) => micro_tile::<1, true>(tile),
            (2, true) => micro_tile::<2, true>(tile),
            (3, true) => micro_tile::<3, true>(tile),
            (4, true) => micro_tile::<4, true>(tile),
            (5, true) => micro_tile::<5, true>(tile),
            (_, true) => micro_tile::<6, true>(tile),
            (1, false) => micro_tile::<1, false>(tile),
            (2, false) => micro_tile::<2, false>(tile),
            (3, false) => micro_tile::<3, false>(tile),
            (4, false) => micro_tile::<4, false>(tile),
            (5, false) => micro_tile::<5, false>(tile),
            (_, false) => micro_tile::<6, false>(tile),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn micro_tile<const ROWS: usize, const AHEAD: bool>(tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller; each call stays within the block's pages and the value width.
    unsafe {
        let mut page = 0;
        while page < tile.pages {
            let panels = (tile.pages - page).min(pages_at_once(ROWS));
            match panels {
                4 => scores::<ROWS, 4, AHEAD>(tile, page),
                3 => scores::<ROWS, 3, AHEAD>(tile, page),
                2 => scores::<ROWS, 2, AHEAD>(tile, page),
                _ => scores::<ROWS, 1, AHEAD>(tile, page),
            }
            page += panels;
        }
        tile.apply_mask::<ROWS>();
        let factors = softmax::<ROWS>(tile);
        let mut column = 0;
        while column < tile.value_dim {
            let panels = ((tile.value_dim - column) / PAGE_KEYS).min(4);
            match panels {
                4 => weighted_values::<ROWS, 4, AHEAD>(tile, &factors, column),
                3 => weighted_values::<ROWS, 3, AHEAD>(tile, &factors, column),
                2 => weighted_values::<ROWS, 2, AHEAD>(tile, &factors, column),
                _ => weighted_values::<ROWS, 1, AHEAD>(tile, &factors, column),
            }
            column += panels * PAGE_KEYS;
        }
    }
}

/// Dot products of `ROWS` queries with the keys of `PANELS` pages from `page` on, in units of the row's query scale
/// (the softmax multiplies by it).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn scores<const ROWS: usize, const PANELS: usize, const AHEAD: bool>(tile: &MicroTile<'_>, page: usize) {
    // SAFETY: page `page + PANELS − 1` is in the block; a page is `[steps][16]` groups of four, a query `steps`
    // groups; there is one key scale for each key of the block.
    unsafe {
        let steps = tile.key_dim / 4;
        let keys = tile.keys.cast::<__m512i>().add(page * steps);
        let queries = tile.queries.cast::<i32>();
        let ahead = tile.ahead.unwrap_or_default();
        let mut sums = [[_mm512_setzero_si512(); PANELS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            // Keys are stored with an offset of 128; starting here takes it out again.
            *sums = [_mm512_set1_epi32(*tile.query_offsets.add(row)); PANELS];
        }
        let add_products = |step: usize, sums: &mut [[__m512i; PANELS]; ROWS]| {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                let source = keys.add(panel * steps + step);
                *lanes = _mm512_loadu_si512(source);
                if AHEAD {
                    ahead.fetch_key(keys.add(step * PANELS + panel));
                }
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = _mm512_set1_epi32(queries.add(row * steps + step).read_unaligned());
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpbusd_epi32(*sum, lanes, query);
                }
            }
        };
        let mut step = 0;
        // Few sums: those of odd steps apart, lest each product wait for the one before.
        if ROWS * PANELS <= 4 {
            let mut odd = [[_mm512_setzero_si512(); PANELS]; ROWS];
            while step + 1 < steps {
                add_products(step, &mut sums);
                add_products(step + 1, &mut odd);
                step += 2;
            }
            for (sum, odd) in sums.as_flattened_mut().iter_mut().zip(odd.as_flattened()) {
                *sum = _mm512_add_epi32(*sum, *odd);
            }
        }
        while step < steps {
            add_products(step, &mut sums);
            step += 1;
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

/// How a block's sums join the earlier ones of each row.
#[repr(align(64))]
struct Factors {
    /// Factor on the earlier sums.
    earlier: [f32; 16],
    /// Factor on the block's.
    block: [f32; 16],
}

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become int16 weights, relative to the largest
/// of the row in this block, times the values' scales.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn softmax<const ROWS: usize>(tile: &mut MicroTile<'_>) -> Factors {
    // SAFETY: a row of scores and weights has `pages` vectors of 16; there are ROWS maxima, query scales and sums, and
    // one value factor for each key of the block.
    unsafe {
        let mut factors = Factors { earlier: [0.0; 16], block: [0.0; 16] };
        let mut maxima = [0.0_f32; ROWS];
        for (row, maximum) in maxima.iter_mut().enumerate() {
            *maximum = NOTHING_SEEN.max(largest_score(tile, row) * *tile.query_scales.add(row));
            let before = *tile.maxima.add(row);
            let after = before.max(*maximum);
            *tile.maxima.add(row) = after;
            factors.earlier[row] = before - after;
            factors.block[row] = *maximum - after;
        }
        _mm512_store_ps(factors.earlier.as_mut_ptr(), exp2(_mm512_load_ps(factors.earlier.as_ptr())));
        _mm512_store_ps(factors.block.as_mut_ptr(), exp2(_mm512_load_ps(factors.block.as_ptr())));
        for (row, maximum) in maxima.into_iter().enumerate() {
            let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
            let weights = tile.weights.add(row * MAX_BLOCK_KEYS);
            let maximum = _mm512_set1_ps(maximum);
            let scale = _mm512_set1_ps(*tile.query_scales.add(row));
            let mut sum = _mm512_setzero_ps();
            for page in 0..tile.pages {
                let score = _mm512_loadu_ps(scores.add(page * PAGE_KEYS));
                let weight = exp2(_mm512_fmsub_ps(score, scale, maximum));
                sum = _mm512_add_ps(sum, weight);
                let scaled = _mm512_mul_ps(weight, _mm512_loadu_ps(tile.value_factors.add(page * PAGE_KEYS)));
                let integers = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled));
                _mm256_storeu_si256(weights.add(page * PAGE_KEYS).cast(), integers);
            }
            let step = match tile.values_are_even {
                true => tile.value_step,
                false => tile.value_step * round_to_own_largest(tile, row, maximum),
            };
            let total = tile.sums.add(row * PAGE_KEYS);
            let earlier = _mm512_mul_ps(_mm512_loadu_ps(total), _mm512_set1_ps(factors.earlier[row]));
            _mm512_storeu_ps(total, _mm512_fmadd_ps(sum, _mm512_set1_ps(factors.block[row]), earlier));
            factors.block[row] *= step;
        }
        factors
    }
}

/// Makes the weights of row `row` once more, rounded in relation to the largest product of weight and scale of the row
/// itself; its scores are lost. Returns what the row's steps are worth in those of the block. `maximum` is the row's
/// largest logit in the block, in each lane.
///
/// # Safety
/// As [`softmax`], which calls it.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn round_to_own_largest(tile: &MicroTile<'_>, row: usize, maximum: __m512) -> f32 {
    // SAFETY: as in `softmax`.
    unsafe {
        let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
        let weights = tile.weights.add(row * MAX_BLOCK_KEYS);
        let scale = _mm512_set1_ps(*tile.query_scales.add(row));
        let mut largest = _mm512_setzero_ps();
        for page in 0..tile.pages {
            let weight = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores.add(page * PAGE_KEYS)), scale, maximum));
            let scaled = _mm512_mul_ps(weight, _mm512_loadu_ps(tile.value_factors.add(page * PAGE_KEYS)));
            largest = _mm512_max_ps(scaled, largest);
            _mm512_storeu_ps(scores.add(page * PAGE_KEYS), scaled);
        }
        let largest = _mm512_reduce_max_ps(largest);
        // Next to nothing stays what it is in the block's steps; what is no number stays so by the block's step.
        if !(largest > LEAST && largest < f32::INFINITY) {
            return 1.0;
        }
        let factor = _mm512_set1_ps(WEIGHT_STEPS / largest);
        for page in 0..tile.pages {
            let scaled = _mm512_mul_ps(_mm512_loadu_ps(scores.add(page * PAGE_KEYS)), factor);
            let integers = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled));
            _mm256_storeu_si256(weights.add(page * PAGE_KEYS).cast(), integers);
        }
        largest / WEIGHT_STEPS
    }
}

/// `output = earlier · output + block · (weights · values)` for `PANELS` · 16 value channels from `column` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn weighted_values<const ROWS: usize, const PANELS: usize, const AHEAD: bool>(
    tile: &MicroTile<'_>,
    factors: &Factors,
    column: usize,
) {
    // SAFETY: values are `[pages · 8][value_dim]` pairs of i8, output rows `value_dim` f32, and
    // `column + PANELS · 16 <= value_dim`; a row of weights has `pages · 8` pairs.
    unsafe {
        let pairs_of_keys = tile.pages * PAGE_KEYS / 2;
        let values = tile.values.add(2 * column);
        let weights = tile.weights.cast::<i32>();
        let ahead = tile.ahead.unwrap_or_default();
        let lines = tile.values.add(2 * pairs_of_keys * column);
        let output = tile.output.add(column);
        let mut sums = [[_mm512_setzero_si512(); PANELS]; ROWS];
        for pair in 0..pairs_of_keys {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                let bytes = values.add(2 * (pair * tile.value_dim + panel * PAGE_KEYS));
                *lanes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes.cast()));
                if AHEAD && panel % 2 == 0 {
                    ahead.fetch_value(lines.add(2 * (pair * PANELS + panel) * PAGE_KEYS));
                }
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = _mm512_set1_epi32(*weights.add(row * MAX_BLOCK_KEYS / 2 + pair));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpwssd_epi32(*sum, lanes, weight);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let earlier = _mm512_set1_ps(factors.earlier[row]);
            let block = _mm512_set1_ps(factors.block[row]);
            for (panel, sum) in sums.iter().enumerate() {
                let target = output.add(row * tile.value_dim + panel * PAGE_KEYS);
                let before = _mm512_mul_ps(_mm512_loadu_ps(target), earlier);
                _mm512_storeu_ps(target, _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), block, before));
            }
        }
    }
}
