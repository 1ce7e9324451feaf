//! AVX-512 BF16 micro-tiles (6 rows × 64 keys): bf16 queries, keys, weights and values, f32 sums.

use std::arch::x86_64::*;

use super::clusters_bf16::pairs;
use super::softmax::{BrainRow, exp2, largest_score};
use super::tile::MicroTile;
use super::{MAX_BLOCK_KEYS, PAGE_KEYS, pages_at_once};

/// bf16 queries, keys and values for `rows` (1 to 6) rows.
///
/// # Safety
/// The machine has the features; the pointers of `tile` hold for `rows` rows with bf16 queries, keys and values.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
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
        let decay = softmax::<ROWS>(tile);
        let mut column = 0;
        while column < tile.value_dim {
            let panels = ((tile.value_dim - column) / PAGE_KEYS).min(4);
            match panels {
                4 => weighted_values::<ROWS, 4, AHEAD>(tile, &decay, column),
                3 => weighted_values::<ROWS, 3, AHEAD>(tile, &decay, column),
                2 => weighted_values::<ROWS, 2, AHEAD>(tile, &decay, column),
                _ => weighted_values::<ROWS, 1, AHEAD>(tile, &decay, column),
            }
            column += panels * PAGE_KEYS;
        }
    }
}

/// Dot products of `ROWS` bf16 queries with the keys of `PANELS` pages from `page` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn scores<const ROWS: usize, const PANELS: usize, const AHEAD: bool>(tile: &MicroTile<'_>, page: usize) {
    // SAFETY: page `page + PANELS − 1` is in the block; a page is `[steps][16]` pairs, a query `steps` pairs.
    unsafe {
        let steps = tile.key_dim / 2;
        let keys = tile.keys.cast::<__m512i>().add(page * steps);
        let queries = tile.queries.cast::<i32>();
        let ahead = tile.ahead.unwrap_or_default();
        let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
        let add_products = |step: usize, sums: &mut [[__m512; PANELS]; ROWS]| {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                let source = keys.add(panel * steps + step);
                *lanes = _mm512_loadu_si512(source);
                if AHEAD {
                    ahead.fetch_key(keys.add(step * PANELS + panel));
                }
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
                _mm512_storeu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + (page + panel) * PAGE_KEYS), *sum);
            }
        }
    }
}

/// Factors by which the earlier sums of the rows shrink.
#[repr(align(64))]
struct Decay([f32; 16]);

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become bf16 weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn softmax<const ROWS: usize>(tile: &mut MicroTile<'_>) -> Decay {
    // SAFETY: a row of scores and weights has `pages` vectors of 16; there are ROWS maxima, query scales and sums.
    unsafe {
        let mut result = Decay([0.0; 16]);
        let mut maxima = [0.0_f32; ROWS];
        for (row, maximum) in maxima.iter_mut().enumerate() {
            let largest = largest_score(tile, row);
            let before = *tile.maxima.add(row);
            *maximum = before.max(largest);
            *tile.maxima.add(row) = *maximum;
            result.0[row] = before - *maximum;
        }
        _mm512_store_ps(result.0.as_mut_ptr(), exp2(_mm512_load_ps(result.0.as_ptr())));
        for (row, maximum) in maxima.into_iter().enumerate() {
            let row_of_scores = BrainRow {
                scores: tile.scores.add(row * MAX_BLOCK_KEYS),
                page_stride: PAGE_KEYS,
                weights: tile.weights.add(row * MAX_BLOCK_KEYS),
                pair_stride: 2 * PAGE_KEYS,
                pages: tile.pages,
                sum: tile.sums.add(row * PAGE_KEYS),
                factors: std::ptr::null(),
            };
            row_of_scores.weigh::<false>(maximum, result.0[row]);
        }
        result
    }
}

/// `output = decay · output + weights · values` for `PANELS` · 16 value channels from `column` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn weighted_values<const ROWS: usize, const PANELS: usize, const AHEAD: bool>(
    tile: &MicroTile<'_>,
    decay: &Decay,
    column: usize,
) {
    // SAFETY: values are `[pages · 8][value_dim]` pairs, output rows `value_dim` f32, and
    // `column + PANELS · 16 <= value_dim`; a row of weights has `pages · 8` pairs.
    unsafe {
        let pairs_of_keys = tile.pages * PAGE_KEYS / 2;
        let values = tile.values.cast::<i32>().add(column);
        let weights = tile.weights.cast::<i32>();
        let ahead = tile.ahead.unwrap_or_default();
        let lines = tile.values.cast::<i32>().add(pairs_of_keys * column);
        let output = tile.output.add(column);
        let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            let decay = _mm512_set1_ps(decay.0[row]);
            for (panel, sum) in sums.iter_mut().enumerate() {
                let before = _mm512_loadu_ps(output.add(row * tile.value_dim + panel * PAGE_KEYS));
                *sum = _mm512_mul_ps(before, decay);
            }
        }
        for pair in 0..pairs_of_keys {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                let source = values.add(pair * tile.value_dim + panel * PAGE_KEYS);
                *lanes = _mm512_loadu_si512(source.cast());
                if AHEAD {
                    ahead.fetch_value(lines.add((pair * PANELS + panel) * PAGE_KEYS));
                }
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
