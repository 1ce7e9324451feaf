//! The products of an f32 micro-tile with a bf16 block that is read where it lies: each vector is widened in registers.
//!
//! For few rows that is quicker than expanding the block first, and than the bf16 dot products of a processor on which
//! these are slow.

use super::float::{decayed_output, store, store_output};
use super::tile::MicroTile;
use super::{MAX_BLOCK_KEYS, PAGE_KEYS};
use crate::simd::Simd;

/// The numbers at `source`: `LANES` pairs of brain floats.
#[inline(always)]
unsafe fn load_pairs<S: Simd>(simd: S, source: *const u16) -> (S::Vector, S::Vector) {
    // SAFETY: the caller promises 2 · `LANES` readable brain floats.
    simd.load_brain_pairs(unsafe { std::slice::from_raw_parts(source, 2 * S::LANES) })
}

/// Dot products of `ROWS` queries with the `LANES` keys from `key` on.
///
/// # Safety
/// The pointers of `tile` hold for `ROWS` rows of f32 queries and for bf16 keys; `key` is the first lane of a vector of the
/// block.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, const ROWS: usize, const AHEAD: bool>(
    simd: S,
    tile: &mut MicroTile<'_>,
    key: usize,
) {
    // SAFETY: the keys are in the block; a page is `[key_dim / 2][16]` pairs; queries have `key_dim` f32.
    unsafe {
        let source = tile.keys.cast::<u16>().add(key / PAGE_KEYS * PAGE_KEYS * tile.key_dim + 2 * (key % PAGE_KEYS));
        let queries = tile.queries.cast::<f32>();
        let ahead = tile.ahead.unwrap_or_default();
        let asked = ahead.key_page(key / PAGE_KEYS);
        // Sums of the even and of the odd channels apart: twice as many additions that do not wait for one another.
        let mut sums = [[simd.splat(0.0); 2]; ROWS];
        for pair in 0..tile.key_dim / 2 {
            let source = source.add(2 * PAGE_KEYS * pair);
            let (even, odd) = load_pairs(simd, source);
            if AHEAD {
                ahead.fetch(asked, 64 * pair);
            }
            for (row, [even_sum, odd_sum]) in sums.iter_mut().enumerate() {
                let query = queries.add(row * tile.key_dim + 2 * pair);
                *even_sum = simd.mul_add(simd.splat(*query), even, *even_sum);
                *odd_sum = simd.mul_add(simd.splat(*query.add(1)), odd, *odd_sum);
            }
        }
        for (row, [even, odd]) in sums.into_iter().enumerate() {
            store(simd, simd.add(even, odd), tile.scores.add(row * MAX_BLOCK_KEYS + key));
        }
    }
}

/// `output = decay · output + weights · values` for `VECTORS · LANES` value channels from `column` on.
///
/// # Safety
/// The pointers of `tile` hold for `ROWS` rows and for bf16 values; `column + VECTORS · LANES <= value_dim`.
#[inline(always)]
pub(super) unsafe fn weighted_values<S: Simd, const ROWS: usize, const VECTORS: usize, const AHEAD: bool>(
    simd: S,
    tile: &mut MicroTile<'_>,
    decay: &[f32; ROWS],
    column: usize,
) {
    // SAFETY: values are `[pages · 8][value_dim]` pairs, output rows `value_dim` f32; a row of scores has `pages · 16`.
    unsafe {
        let pairs_of_keys = tile.pages * PAGE_KEYS / 2;
        let values = tile.values.cast::<u16>().add(2 * column);
        let ahead = tile.ahead.unwrap_or_default();
        let asked = ahead.value_page(0).wrapping_add(4 * pairs_of_keys * column);
        let mut sums = decayed_output::<S, ROWS, VECTORS>(simd, tile, decay, column);
        for pair in 0..pairs_of_keys {
            let source = values.add(2 * pair * tile.value_dim);
            let mut values = [(simd.splat(0.0), simd.splat(0.0)); VECTORS];
            for (vector, values) in values.iter_mut().enumerate() {
                *values = load_pairs(simd, source.add(2 * vector * S::LANES));
                if AHEAD {
                    ahead.fetch(asked, 4 * (pair * VECTORS + vector) * S::LANES);
                }
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weights = tile.scores.add(row * MAX_BLOCK_KEYS + 2 * pair);
                let (even_weight, odd_weight) = (simd.splat(*weights), simd.splat(*weights.add(1)));
                for (sum, (even, odd)) in sums.iter_mut().zip(values) {
                    *sum = simd.mul_add(even_weight, even, *sum);
                    *sum = simd.mul_add(odd_weight, odd, *sum);
                }
            }
        }
        store_output(simd, tile, sums, column);
    }
}
