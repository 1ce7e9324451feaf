//! AVX-512 BF16 micro-tiles (6 rows × 64 keys): bf16 queries, keys, weights and values, f32 sums.

use std::arch::x86_64::*;
use std::ops::Range;

use super::ahead;
use super::clusters_bf16::pairs;
use super::passes::{Pass, WeightedValues, WideValues, bytes_of_pair, pass_over_values};
use super::softmax::{BrainRow, decay, lanes, largest_scores};
use super::tile::{MicroTile, NOTHING_SEEN};
use super::{FEW_ROWS, MAX_BLOCK_KEYS, PAGE_KEYS, PAGE_PAIRS, pages_at_once};

// Takes bf16 queries, keys and values.
ahead::enter_micro_tile!("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
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
        if ROWS > FEW_ROWS {
            softmax.weigh(tile, 0..tile.pages);
        }
        pass_over_values(tile, &mut softmax);
    }
}

/// Dot products of `ROWS` bf16 queries with the keys of `PANELS` pages from `page` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn scores<const ROWS: usize, const PANELS: usize, const AHEAD: u8>(
    tile: &MicroTile<'_>,
    page: usize,
    largest: &mut [__m512; ROWS],
) {
    // SAFETY: page `page + PANELS − 1` is in the block; a page is `[steps][16]` pairs, a query `steps` pairs.
    unsafe {
        let steps = tile.key_dim / 2;
        let keys = tile.keys.cast::<__m512i>().add(page * steps);
        let queries = tile.queries.cast::<i32>();
        let asks = tile.ahead.unwrap_or_default();
        let asked = asks.key_page(page);
        let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
        let add_products = |step: usize, sums: &mut [[__m512; PANELS]; ROWS]| {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(keys.add(panel * steps + step));
                ahead::fetch_to::<AHEAD>(asked, 64 * (step * PANELS + panel));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = pairs(_mm512_set1_epi32(queries.add(row * steps + step).read_unaligned()));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpbf16_ps(*sum, pairs(lanes), query);
                }
            }
        };
        let mut step = 0;
        // Few sums: those of odd steps apart, lest each product wait for the one before.
        if ROWS * PANELS <= 4 {
            let mut odd = [[_mm512_setzero_ps(); PANELS]; ROWS];
            while step + 1 < steps {
                add_products(step, &mut sums);
                add_products(step + 1, &mut odd);
                step += 2;
            }
            for (sum, odd) in sums.as_flattened_mut().iter_mut().zip(odd.as_flattened()) {
                *sum = _mm512_add_ps(*sum, *odd);
            }
        }
        while step < steps {
            add_products(step, &mut sums);
            step += 1;
        }
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sum) in sums.iter().enumerate() {
                largest[row] = _mm512_max_ps(largest[row], *sum);
                _mm512_storeu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + (page + panel) * PAGE_KEYS), *sum);
            }
        }
    }
}

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become bf16 weights.
struct Softmax<const ROWS: usize, const AHEAD: u8> {
    /// Factor by which the earlier sums of each row shrink.
    decay: [f32; 16],
    /// Largest score of each row so far.
    maxima: [f32; 16],
}

impl<const ROWS: usize, const AHEAD: u8> Softmax<ROWS, AHEAD> {
    /// `largest` holds the largest scores of each row in any of its lanes.
    ///
    /// # Safety
    /// A row of scores and weights of `tile` has `pages` vectors of 16; there are ROWS maxima and sums.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn begin(tile: &mut MicroTile<'_>, largest: [__m512; ROWS]) -> Self {
        // SAFETY: forwarded from the caller.
        unsafe {
            let mut maxima = [NOTHING_SEEN; 16];
            for (maximum, largest) in maxima.iter_mut().zip(largest) {
                *maximum = _mm512_reduce_max_ps(largest);
            }
            let rows = u16::MAX >> (16 - ROWS);
            let largest = _mm512_loadu_ps(maxima.as_ptr());
            let before = _mm512_mask_loadu_ps(largest, rows, tile.maxima);
            // What is no number counts as nothing seen: the weights of its row show it.
            let after = _mm512_max_ps(largest, before);
            _mm512_mask_storeu_ps(tile.maxima, rows, after);
            Self { decay: lanes(decay(before, after)), maxima: lanes(after) }
        }
    }

    /// Makes the weights of all rows for the keys of `pages`, the first of which is an even one, and adds them to the rows'
    /// sums, which shrink with the block's first page.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin).
    #[inline(always)]
    unsafe fn weigh(&self, tile: &MicroTile<'_>, pages: Range<usize>) {
        for (row, maximum) in self.maxima.iter().enumerate().take(ROWS) {
            // SAFETY: forwarded from the caller.
            unsafe {
                let at = row * MAX_BLOCK_KEYS + pages.start * PAGE_KEYS;
                let row_of_scores = BrainRow {
                    scores: tile.scores.add(at),
                    page_stride: PAGE_KEYS,
                    weights: tile.weights.add(at),
                    pair_stride: 2 * PAGE_KEYS,
                    pages: pages.len(),
                    sum: tile.sums.add(row * PAGE_KEYS),
                    factors: std::ptr::null(),
                };
                row_of_scores.weigh::<false>(*maximum, if pages.start == 0 { self.decay[row] } else { 1.0 });
            }
        }
    }
}

/// Two rows at a time, in the order of memory.
pub(super) const WIDE: WideValues = WideValues { pages: 2, by_rows: true };

impl<const ROWS: usize, const AHEAD: u8> WeightedValues<ROWS> for Softmax<ROWS, AHEAD> {
    const WIDE: WideValues = WIDE;

    #[inline]
    unsafe fn add<const NOW: usize, const PANELS: usize>(&mut self, tile: &MicroTile<'_>, pass: Pass) {
        // SAFETY: forwarded from the caller.
        unsafe { weighted_values::<ROWS, NOW, PANELS, AHEAD>(tile, self, &pass) }
    }
}

/// `output = decay · output + weights · values` for the pages, `NOW` rows and `PANELS` · 16 value
/// channels of `pass`.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn weighted_values<const ROWS: usize, const NOW: usize, const PANELS: usize, const AHEAD: u8>(
    tile: &MicroTile<'_>,
    softmax: &Softmax<ROWS, AHEAD>,
    pass: &Pass,
) {
    // SAFETY: values are `[pages · 8][value_dim]` pairs, output rows `value_dim` f32, and
    // `column + PANELS · 16 <= value_dim`, `first_row + NOW <= ROWS`; a row of weights has `pages · 8` pairs, made in the
    // first pass over a page at the latest. What `Softmax::begin` asks for holds.
    unsafe {
        let Pass { ref pages, column, first_row } = *pass;
        let weighs = ROWS <= FEW_ROWS && column == 0 && first_row == 0;
        let values = tile.values.cast::<i32>().add(column);
        let weights = tile.weights.cast::<i32>().add(first_row * MAX_BLOCK_KEYS / 2);
        let asks = tile.ahead.unwrap_or_default();
        let output = tile.output.add(first_row * tile.value_dim + column);
        let mut sums = [[_mm512_setzero_ps(); PANELS]; NOW];
        for (row, sums) in sums.iter_mut().enumerate() {
            let decay = _mm512_set1_ps(if pages.start == 0 { softmax.decay[first_row + row] } else { 1.0 });
            for (panel, sum) in sums.iter_mut().enumerate() {
                let before = _mm512_loadu_ps(output.add(row * tile.value_dim + panel * PAGE_KEYS));
                *sum = _mm512_mul_ps(before, decay);
            }
        }
        if weighs && pages.start == 0 {
            softmax.weigh(tile, 0..tile.pages.min(2));
        }
        // More than a few rows have their weights already, and go on to the end.
        let step = if ROWS <= FEW_ROWS { 1 } else { pages.len() };
        for page in pages.clone().step_by(step) {
            // Two pages early, so that no product waits for its weights.
            if weighs && page % 2 == 0 && page + 2 < tile.pages {
                softmax.weigh(tile, page + 2..tile.pages.min(page + 4));
            }
            let asked = asks.value_line(pass, page, (NOW, ROWS), (PANELS * PAGE_KEYS, tile.value_dim), 2);
            let first_pair = page * PAGE_PAIRS;
            let bytes = const { bytes_of_pair(4 * PANELS * PAGE_KEYS, NOW, ROWS) };
            let asked = asked.wrapping_sub(first_pair * bytes);
            // A number of steps that the compiler knows would make it unroll the loop and spill sums.
            for pair in first_pair..(first_pair + step * PAGE_PAIRS).min(pages.end * PAGE_PAIRS) {
                (0..bytes).step_by(64).for_each(|byte| ahead::fetch_to::<AHEAD>(asked, pair * bytes + byte));
                let mut lanes = [_mm512_setzero_si512(); PANELS];
                for (panel, lanes) in lanes.iter_mut().enumerate() {
                    let source = values.add(pair * tile.value_dim + panel * PAGE_KEYS);
                    *lanes = _mm512_loadu_si512(source.cast());
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let weight = pairs(_mm512_set1_epi32(*weights.add(row * MAX_BLOCK_KEYS / 2 + pair)));
                    for (sum, lanes) in sums.iter_mut().zip(lanes) {
                        *sum = _mm512_dpbf16_ps(*sum, pairs(lanes), weight);
                    }
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

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use crate::attention::{AttentionTile, KeyBlock, PAGE_KEYS, TileShape};
    use crate::{InstructionSet, brain_bits};

    /// A processor with slow dot products does not choose them by itself.
    #[test]
    fn bf16_products_agree_with_f32() {
        let level = InstructionSet::Avx512Bf16;
        if InstructionSet::detected() < level {
            return;
        }
        let mut random = Random::new(17);
        for (key_dim, value_dim) in [(4, 16), (36, 48), (64, 64), (128, 80)] {
            for rows in 1..=13 {
                for pages in [1, 2, 3, 5, 16, 31, 32] {
                    let keys = pages * PAGE_KEYS;
                    let mut bits = |width: usize| -> Vec<u16> {
                        random.normals(keys * width, 1.0).into_iter().map(brain_bits).collect()
                    };
                    let (key_bits, value_bits) = (bits(key_dim), bits(value_dim));
                    let block = KeyBlock::Bf16 { keys: &key_bits, values: &value_bits };
                    let queries = random.normals(rows * key_dim, 1.0);
                    let run = |is_brain: bool| {
                        let mut tile = AttentionTile::default();
                        tile.begin(level, TileShape { rows, key_dim, value_dim }, block);
                        if is_brain {
                            tile.multiply_brain_floats();
                        }
                        for (row, query) in queries.chunks_exact(key_dim).enumerate() {
                            tile.set_row(row, query, 0.2, (row % 3, keys - row));
                        }
                        tile.accumulate(0, block, Some(block));
                        let mut output = vec![0.0; (value_dim + 1) * rows];
                        for (row, output) in output.chunks_exact_mut(value_dim + 1).enumerate() {
                            let (sum, output) = output.split_first_mut().expect("a place for the sum");
                            tile.finish_row(row, output);
                            *sum = tile.log_sum_exp(row);
                        }
                        output
                    };
                    for (brain, float) in run(true).into_iter().zip(run(false)) {
                        let what = format!("{rows} rows, {pages} pages, widths {key_dim} and {value_dim}");
                        assert!((brain - float).abs() < 0.03, "{what}: {brain} and {float}");
                    }
                }
            }
        }
    }
}
