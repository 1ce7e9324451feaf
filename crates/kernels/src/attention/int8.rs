//! AVX-512 VNNI micro-tiles (6 rows × 64 keys): int8 queries and keys, int16 weights, int8 values.
//!
//! Weights relative to the largest of their row *and block* are rounded to 15 bits, finer than bf16 would, and the
//! scales of the values are folded into them first; so values stay the integers they are stored as, and a block's sum
//! is exact in 32 bits: 512 keys · 32767 · 127 < 2³¹. Where values are of very different sizes the largest product of
//! weight and scale of each row takes the place of the block's, lest a large value that a row does not see leave it
//! without digits.

use std::arch::x86_64::*;

use super::ahead;
use super::passes::{Pass, WeightedValues, WideValues, bytes_of_pair, pass_over_values};
use super::softmax::{decay, exp2, lanes, largest_scores};
use super::tile::{MicroTile, NOTHING_SEEN};
use super::value_scales::{LEAST, WEIGHT_STEPS};
use super::{FEW_ROWS, MAX_BLOCK_KEYS, PAGE_KEYS, PAGE_PAIRS, pages_at_once};

// Takes int8 queries, keys and values.
ahead::enter_micro_tile!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn micro_tile<const ROWS: usize, const AHEAD: u8>(tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller; each call stays within the block's pages and the value width.
    unsafe {
        let mut largest = [_mm512_set1_ps(f32::NEG_INFINITY); ROWS];
        let mut page = 0;
        while page < tile.pages {
            let panels = (tile.pages - page).min(pages_at_once(ROWS));
            match panels {
                4 => scores::<ROWS, 4, AHEAD>(tile, page, &mut largest),
                3 => scores::<ROWS, 3, AHEAD>(tile, page, &mut largest),
                2 => scores::<ROWS, 2, AHEAD>(tile, page, &mut largest),
                _ => scores::<ROWS, 1, AHEAD>(tile, page, &mut largest),
            }
            page += panels;
        }
        // What is masked does not count.
        if tile.mask.is_some() {
            tile.apply_mask::<ROWS>();
            largest = std::array::from_fn(|row| largest_scores(tile, row));
        }
        let mut softmax = Softmax::<ROWS, AHEAD>::begin(tile, largest);
        if !softmax.is_interleaved {
            softmax.weigh_all(tile);
        }
        pass_over_values(tile, &mut softmax);
        softmax.end(tile);
    }
}

/// Dot products of `ROWS` queries with the keys of `PANELS` pages from `page` on, in units of the row's query scale
/// (the softmax multiplies by it).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn scores<const ROWS: usize, const PANELS: usize, const AHEAD: u8>(
    tile: &MicroTile<'_>,
    page: usize,
    largest: &mut [__m512; ROWS],
) {
    // SAFETY: page `page + PANELS − 1` is in the block; a page is `[steps][16]` groups of four, a query `steps`
    // groups; there is one key scale for each key of the block.
    unsafe {
        let steps = tile.key_dim / 4;
        let keys = tile.keys.cast::<__m512i>().add(page * steps);
        let queries = tile.queries.cast::<i32>();
        let asks = tile.ahead.unwrap_or_default();
        let asked = asks.key_page(page);
        let mut sums = [[_mm512_setzero_si512(); PANELS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            // Keys are stored with an offset of 128; starting here takes it out again.
            *sums = [_mm512_set1_epi32(*tile.query_offsets.add(row)); PANELS];
        }
        let add_products = |step: usize, sums: &mut [[__m512i; PANELS]; ROWS]| {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(keys.add(panel * steps + step));
                ahead::fetch_to::<AHEAD>(asked, 64 * (step * PANELS + panel));
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
                largest[row] = _mm512_max_ps(largest[row], score);
                _mm512_storeu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + (page + panel) * PAGE_KEYS), score);
            }
        }
    }
}

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become int16 weights, relative to the largest of the
/// row in this block, times the values' scales.
struct Softmax<const ROWS: usize, const AHEAD: u8> {
    /// Factor on the earlier sums and output of each row.
    earlier: [f32; 16],
    /// Factor on the block's weights.
    block: [f32; 16],
    /// Factor on the block's weighted values.
    values: [f32; 16],
    /// Largest logit of each row in the block.
    maxima: [f32; 16],
    /// Sum of each row's weights, by lane.
    sums: [__m512; ROWS],
    /// Whether weights are made page by page as their values are read, not all before.
    is_interleaved: bool,
}

impl<const ROWS: usize, const AHEAD: u8> Softmax<ROWS, AHEAD> {
    /// `largest` holds the largest scores of each row in any of its lanes.
    ///
    /// # Safety
    /// A row of scores and weights of `tile` has `pages` vectors of 16; there are ROWS maxima, query scales and sums, and one
    /// value factor for each key of the block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn begin(tile: &mut MicroTile<'_>, largest: [__m512; ROWS]) -> Self {
        // SAFETY: forwarded from the caller.
        unsafe {
            let mut maxima = [NOTHING_SEEN; 16];
            for (row, (maximum, largest)) in maxima.iter_mut().zip(largest).enumerate() {
                *maximum = NOTHING_SEEN.max(_mm512_reduce_max_ps(largest) * *tile.query_scales.add(row));
            }
            let rows = u16::MAX >> (16 - ROWS);
            let largest = _mm512_loadu_ps(maxima.as_ptr());
            let before = _mm512_mask_loadu_ps(largest, rows, tile.maxima);
            let after = _mm512_max_ps(before, largest);
            _mm512_mask_storeu_ps(tile.maxima, rows, after);
            let (earlier, block) = (decay(before, after), decay(largest, after));
            Self {
                earlier: lanes(earlier),
                block: lanes(block),
                values: lanes(_mm512_mul_ps(block, _mm512_set1_ps(tile.value_step))),
                maxima,
                sums: [_mm512_setzero_ps(); ROWS],
                is_interleaved: ROWS <= FEW_ROWS && tile.values_are_even,
            }
        }
    }

    /// Makes the weights of row `row` for the keys of `page`. Returns them as they add to the row's sum.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin).
    #[inline(always)]
    unsafe fn weigh(&self, tile: &MicroTile<'_>, row: usize, page: usize) -> __m512 {
        // SAFETY: forwarded from the caller.
        unsafe {
            let at = row * MAX_BLOCK_KEYS + page * PAGE_KEYS;
            let scale = _mm512_set1_ps(*tile.query_scales.add(row));
            let score = _mm512_loadu_ps(tile.scores.add(at));
            let weight = exp2(_mm512_fmsub_ps(score, scale, _mm512_set1_ps(self.maxima[row])));
            let scaled = _mm512_mul_ps(weight, _mm512_loadu_ps(tile.value_factors.add(page * PAGE_KEYS)));
            let integers = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled));
            _mm256_storeu_si256(tile.weights.add(at).cast(), integers);
            weight
        }
    }

    /// Makes all weights, before any value is read.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn weigh_all(&mut self, tile: &MicroTile<'_>) {
        // SAFETY: forwarded from the caller.
        unsafe {
            for row in 0..ROWS {
                let mut sum = _mm512_setzero_ps();
                for page in 0..tile.pages {
                    sum = _mm512_add_ps(sum, self.weigh(tile, row, page));
                }
                self.sums[row] = sum;
                if !tile.values_are_even {
                    self.values[row] *= round_to_own_largest(tile, row, _mm512_set1_ps(self.maxima[row]));
                }
            }
        }
    }

    /// Adds the weights to the sums of the rows.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn end(&self, tile: &mut MicroTile<'_>) {
        for (row, sum) in self.sums.iter().enumerate() {
            // SAFETY: forwarded from the caller.
            unsafe {
                let total = tile.sums.add(row * PAGE_KEYS);
                let earlier = _mm512_mul_ps(_mm512_loadu_ps(total), _mm512_set1_ps(self.earlier[row]));
                _mm512_storeu_ps(total, _mm512_fmadd_ps(*sum, _mm512_set1_ps(self.block[row]), earlier));
            }
        }
    }
}

/// Makes the weights of row `row` once more, rounded in relation to the largest product of weight and scale of the row
/// itself; its scores are lost. Returns what the row's steps are worth in those of the block. `maximum` is the row's
/// largest logit in the block, in each lane.
///
/// # Safety
/// As [`Softmax::weigh_all`], which calls it.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn round_to_own_largest(tile: &MicroTile<'_>, row: usize, maximum: __m512) -> f32 {
    // SAFETY: forwarded from the caller.
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

/// Four panels for all rows: for two rows values would be widened twice.
pub(super) const WIDE: WideValues = WideValues { pages: 4, by_rows: false };

impl<const ROWS: usize, const AHEAD: u8> WeightedValues<ROWS> for Softmax<ROWS, AHEAD> {
    const WIDE: WideValues = WIDE;

    #[inline]
    unsafe fn add<const NOW: usize, const PANELS: usize>(&mut self, tile: &MicroTile<'_>, pass: Pass) {
        // SAFETY: forwarded from the caller.
        unsafe { weighted_values::<ROWS, NOW, PANELS, AHEAD>(tile, self, &pass) }
    }
}

/// `output = earlier · output + block · (weights · values)` for the pages, `NOW` rows and `PANELS` · 16 value
/// channels of `pass`.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn weighted_values<const ROWS: usize, const NOW: usize, const PANELS: usize, const AHEAD: u8>(
    tile: &MicroTile<'_>,
    softmax: &mut Softmax<ROWS, AHEAD>,
    pass: &Pass,
) {
    // SAFETY: values are `[pages · 8][value_dim]` pairs of i8, output rows `value_dim` f32, and
    // `column + PANELS · 16 <= value_dim`, `first_row + NOW <= ROWS`; a row of weights has `pages · 8` pairs, made in the
    // first pass over a page at the latest. What `Softmax::begin` asks for holds.
    unsafe {
        let Pass { ref pages, column, first_row } = *pass;
        let weighs = softmax.is_interleaved && column == 0 && first_row == 0;
        let values = tile.values.add(2 * column);
        let weights = tile.weights.cast::<i32>().add(first_row * MAX_BLOCK_KEYS / 2);
        let asks = tile.ahead.unwrap_or_default();
        let output = tile.output.add(first_row * tile.value_dim + column);
        let mut sums = [[_mm512_setzero_si512(); PANELS]; NOW];
        if weighs && pages.start == 0 {
            (0..ROWS).for_each(|row| softmax.sums[row] = softmax.weigh(tile, row, 0));
        }
        // More than a few rows have their weights already, and go on to the end.
        let step = if ROWS <= FEW_ROWS { 1 } else { pages.len() };
        for page in pages.clone().step_by(step) {
            // A page early, so that no product waits for its weights.
            if weighs && page + 1 < tile.pages {
                for row in 0..ROWS {
                    softmax.sums[row] = _mm512_add_ps(softmax.sums[row], softmax.weigh(tile, row, page + 1));
                }
            }
            if column == 0 && first_row == 0 {
                (page..page + step).for_each(|page| asks.fetch_scales::<AHEAD>(page));
            }
            let asked = asks.value_line(pass, page, (NOW, ROWS), (PANELS * PAGE_KEYS, tile.value_dim), 1);
            let first_pair = page * PAGE_PAIRS;
            let bytes = const { bytes_of_pair(2 * PANELS * PAGE_KEYS, NOW, ROWS) };
            let asked = asked.wrapping_sub(first_pair * bytes);
            // A number of steps that the compiler knows would make it unroll the loop and spill sums.
            for pair in first_pair..(first_pair + step * PAGE_PAIRS).min(pages.end * PAGE_PAIRS) {
                (0..bytes).step_by(64).for_each(|byte| ahead::fetch_to::<AHEAD>(asked, pair * bytes + byte));
                let mut lanes = [_mm512_setzero_si512(); PANELS];
                for (panel, lanes) in lanes.iter_mut().enumerate() {
                    let bytes = values.add(2 * (pair * tile.value_dim + panel * PAGE_KEYS));
                    *lanes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes.cast()));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let weight = _mm512_set1_epi32(*weights.add(row * MAX_BLOCK_KEYS / 2 + pair));
                    for (sum, lanes) in sums.iter_mut().zip(lanes) {
                        *sum = _mm512_dpwssd_epi32(*sum, lanes, weight);
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let earlier = _mm512_set1_ps(if pages.start == 0 { softmax.earlier[first_row + row] } else { 1.0 });
            let block = _mm512_set1_ps(softmax.values[first_row + row]);
            for (panel, sum) in sums.iter().enumerate() {
                let target = output.add(row * tile.value_dim + panel * PAGE_KEYS);
                let before = _mm512_mul_ps(_mm512_loadu_ps(target), earlier);
                _mm512_storeu_ps(target, _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), block, before));
            }
        }
    }
}
