//! f32 micro-tiles (6 rows × 4 vectors with AVX-512, 2 with AVX2): the kernel of f32 caches, and of every cache type
//! on machines without (fast) BF16 or VNNI dot products.

use super::tile::MicroTile;
use super::{MAX_BLOCK_KEYS, PAGE_KEYS, widened};
use crate::simd::exponential::exp2;
use crate::simd::{Operation, Simd, map_in_place};
use crate::softmax::soft_cap;

/// Runs the rows of a micro-tile against its block.
///
/// The caller that builds one promises what [`MicroTile`] says of its pointers, for `rows` (1 to 6) rows with queries in
/// f32, and keys and values in bf16 where they are `brain` floats, else in f32.
pub(super) struct FloatMicroTile<'tile, 'mask> {
    pub tile: &'tile mut MicroTile<'mask>,
    pub rows: usize,
    pub brain: bool,
}

impl Operation for FloatMicroTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        // SAFETY: promised by whoever built `self`.
        unsafe {
            match (self.brain, self.tile.ahead.is_some()) {
                (false, false) => micro_tile_rows::<S, false, false>(simd, self.rows, self.tile),
                (false, true) => micro_tile_rows::<S, false, true>(simd, self.rows, self.tile),
                (true, false) => micro_tile_rows::<S, true, false>(simd, self.rows, self.tile),
                (true, true) => micro_tile_rows::<S, true, true>(simd, self.rows, self.tile),
            }
        }
    }
}

#[inline(always)]
unsafe fn micro_tile_rows<S: Simd, const BRAIN: bool, const AHEAD: bool>(
    simd: S,
    rows: usize,
    tile: &mut MicroTile<'_>,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match rows {
            1 => micro_tile::<S, 1, BRAIN, AHEAD>(simd, tile),
            2 => micro_tile::<S, 2, BRAIN, AHEAD>(simd, tile),
            3 => micro_tile::<S, 3, BRAIN, AHEAD>(simd, tile),
            4 => micro_tile::<S, 4, BRAIN, AHEAD>(simd, tile),
            5 => micro_tile::<S, 5, BRAIN, AHEAD>(simd, tile),
            _ => micro_tile::<S, 6, BRAIN, AHEAD>(simd, tile),
        }
    }
}

/// The vector at `source`.
#[inline(always)]
unsafe fn load<S: Simd>(simd: S, source: *const f32) -> S::Vector {
    // SAFETY: the caller promises `LANES` readable f32.
    simd.load(unsafe { std::slice::from_raw_parts(source, S::LANES) })
}

/// Writes `vector` at `target`.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(simd: S, vector: S::Vector, target: *mut f32) {
    // SAFETY: the caller promises `LANES` writable f32.
    simd.store(vector, unsafe { std::slice::from_raw_parts_mut(target, S::LANES) });
}

/// Vectors of sums for each row: they and the row's operand fill the registers.
const fn wide<S: Simd>() -> usize {
    if S::LANES == 16 { 4 } else { PAGE_KEYS / S::LANES }
}

/// As [`wide`], where the operands are pairs of brain floats, of which two vectors come at a time.
const fn wide_pairs<S: Simd>(rows: usize) -> usize {
    if rows <= 4 { wide::<S>() } else { wide::<S>() / 2 }
}

/// Scores, online softmax and weighted sum of values for `ROWS` query rows against one block.
#[inline(always)]
unsafe fn micro_tile<S: Simd, const ROWS: usize, const BRAIN: bool, const AHEAD: bool>(
    simd: S,
    tile: &mut MicroTile<'_>,
) {
    // SAFETY: forwarded from the caller; each call stays within the block's pages and the value width, which are whole
    // numbers of 16 and so of `LANES`.
    unsafe {
        let keys = tile.pages * PAGE_KEYS;
        let mut key = 0;
        while BRAIN && key < keys {
            widened::scores::<S, ROWS, AHEAD>(simd, tile, key);
            key += S::LANES;
        }
        while key < keys {
            let vectors = wide::<S>().min((keys - key) / S::LANES);
            match vectors {
                4 => scores::<S, ROWS, 4, AHEAD>(simd, tile, key),
                2 | 3 => scores::<S, ROWS, 2, AHEAD>(simd, tile, key),
                _ => scores::<S, ROWS, 1, AHEAD>(simd, tile, key),
            }
            key += if vectors == 3 { 2 } else { vectors } * S::LANES;
        }
        if tile.soft_cap != 0.0 {
            for row in 0..ROWS {
                for key in (0..keys).step_by(S::LANES) {
                    let place = tile.scores.add(row * MAX_BLOCK_KEYS + key);
                    store(simd, soft_cap(simd, load(simd, place), tile.soft_cap), place);
                }
            }
        }
        tile.apply_mask::<ROWS>();
        let decay = softmax::<S, ROWS>(simd, tile);
        let mut column = 0;
        while BRAIN && column < tile.value_dim {
            let vectors = wide_pairs::<S>(ROWS).min((tile.value_dim - column) / S::LANES);
            match vectors {
                4 => widened::weighted_values::<S, ROWS, 4, AHEAD>(simd, tile, &decay, column),
                2 | 3 => widened::weighted_values::<S, ROWS, 2, AHEAD>(simd, tile, &decay, column),
                _ => widened::weighted_values::<S, ROWS, 1, AHEAD>(simd, tile, &decay, column),
            }
            column += if vectors == 3 { 2 } else { vectors } * S::LANES;
        }
        while column < tile.value_dim {
            let vectors = wide::<S>().min((tile.value_dim - column) / S::LANES);
            match vectors {
                4 => weighted_values::<S, ROWS, 4, AHEAD>(simd, tile, &decay, column),
                2 | 3 => weighted_values::<S, ROWS, 2, AHEAD>(simd, tile, &decay, column),
                _ => weighted_values::<S, ROWS, 1, AHEAD>(simd, tile, &decay, column),
            }
            column += if vectors == 3 { 2 } else { vectors } * S::LANES;
        }
    }
}

/// Dot products of `ROWS` queries with `VECTORS · LANES` keys from `key` on.
#[inline(always)]
unsafe fn scores<S: Simd, const ROWS: usize, const VECTORS: usize, const AHEAD: bool>(
    simd: S,
    tile: &mut MicroTile<'_>,
    key: usize,
) {
    // SAFETY: the keys are in the block; a page is `[key_dim][16]` f32; queries have `key_dim` f32.
    unsafe {
        // Start of each vector of keys in its page.
        let sources: [*const f32; VECTORS] = std::array::from_fn(
            #[inline(always)]
            |vector| {
                let key = key + vector * S::LANES;
                tile.keys.cast::<f32>().add(key / PAGE_KEYS * PAGE_KEYS * tile.key_dim + key % PAGE_KEYS)
            },
        );
        let queries = tile.queries.cast::<f32>();
        let ahead = tile.ahead.unwrap_or_default();
        let asked = ahead.key_page(key / PAGE_KEYS);
        let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
        for channel in 0..tile.key_dim {
            // By index: a walk over the array of addresses was not unrolled, and passed the keys through memory.
            let mut keys = [simd.splat(0.0); VECTORS];
            for vector in 0..VECTORS {
                keys[vector] = load(simd, sources[vector].add(channel * PAGE_KEYS));
                if AHEAD {
                    ahead.fetch(asked, 4 * (channel * VECTORS + vector) * S::LANES);
                }
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = simd.splat(*queries.add(row * tile.key_dim + channel));
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = simd.mul_add(query, key, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                store(simd, *sum, tile.scores.add(row * MAX_BLOCK_KEYS + key + vector * S::LANES));
            }
        }
    }
}

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become weights in place.
/// Returns the factor by which each row's earlier sums shrink.
#[inline(always)]
unsafe fn softmax<S: Simd, const ROWS: usize>(simd: S, tile: &mut MicroTile<'_>) -> [f32; ROWS] {
    // SAFETY: a row of scores has `pages · 16` elements; `maxima` has ROWS and `sums` ROWS · 16.
    unsafe {
        let keys = tile.pages * PAGE_KEYS;
        let (mut maxima, mut decays) = ([0.0_f32; ROWS], [0.0_f32; ROWS]);
        for (row, (maximum, decay)) in maxima.iter_mut().zip(&mut decays).enumerate() {
            let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
            let mut largest = load(simd, scores);
            for key in (S::LANES..keys).step_by(S::LANES) {
                largest = simd.max(load(simd, scores.add(key)), largest);
            }
            let before = *tile.maxima.add(row);
            *maximum = before.max(simd.reduce_max(largest));
            *tile.maxima.add(row) = *maximum;
            *decay = before - *maximum;
        }
        // The factors of all rows in one vector: apart they would wait for one another.
        map_in_place(
            simd,
            &mut decays,
            #[inline(always)]
            |difference| exp2(simd, difference),
        );
        for (row, (maximum, decay)) in maxima.into_iter().zip(decays).enumerate() {
            let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
            let maximum = simd.splat(maximum);
            let total = tile.sums.add(row * PAGE_KEYS);
            let mut sum = simd.mul(load(simd, total), simd.splat(decay));
            for key in (0..keys).step_by(S::LANES) {
                let weight = exp2(simd, simd.sub(load(simd, scores.add(key)), maximum));
                store(simd, weight, scores.add(key));
                sum = simd.add(sum, weight);
            }
            store(simd, sum, total);
        }
        decays
    }
}

/// `decay · output` in `VECTORS · LANES` value channels from `column` on.
///
/// # Safety
/// The output of `tile` has `ROWS` rows, and `column + VECTORS · LANES <= value_dim`.
#[inline(always)]
pub(super) unsafe fn decayed_output<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    tile: &MicroTile<'_>,
    decay: &[f32; ROWS],
    column: usize,
) -> [[S::Vector; VECTORS]; ROWS] {
    let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
    for ((row, sums), decay) in sums.iter_mut().enumerate().zip(decay) {
        for (vector, sum) in sums.iter_mut().enumerate() {
            // SAFETY: forwarded from the caller.
            let before = unsafe { load(simd, tile.output.add(row * tile.value_dim + column + vector * S::LANES)) };
            *sum = simd.mul(before, simd.splat(*decay));
        }
    }
    sums
}

/// Writes `sums` to the output, in the value channels from `column` on.
///
/// # Safety
/// As for [`decayed_output`].
#[inline(always)]
pub(super) unsafe fn store_output<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    tile: &MicroTile<'_>,
    sums: [[S::Vector; VECTORS]; ROWS],
    column: usize,
) {
    for (row, sums) in sums.into_iter().enumerate() {
        for (vector, sum) in sums.into_iter().enumerate() {
            // SAFETY: forwarded from the caller.
            unsafe { store(simd, sum, tile.output.add(row * tile.value_dim + column + vector * S::LANES)) };
        }
    }
}

/// `output = decay · output + weights · values` for `VECTORS · LANES` value channels from `column` on.
#[inline(always)]
unsafe fn weighted_values<S: Simd, const ROWS: usize, const VECTORS: usize, const AHEAD: bool>(
    simd: S,
    tile: &mut MicroTile<'_>,
    decay: &[f32; ROWS],
    column: usize,
) {
    // SAFETY: values are `[pages · 16][value_dim]` f32, output rows `value_dim` f32, and
    // `column + VECTORS · LANES <= value_dim`.
    unsafe {
        let keys = tile.pages * PAGE_KEYS;
        let values = tile.values.cast::<f32>().add(column);
        let ahead = tile.ahead.unwrap_or_default();
        let asked = ahead.value_page(0).wrapping_add(4 * keys * column);
        let mut sums = decayed_output::<S, ROWS, VECTORS>(simd, tile, decay, column);
        for key in 0..keys {
            let source = values.add(key * tile.value_dim);
            let mut values = [simd.splat(0.0); VECTORS];
            for (vector, values) in values.iter_mut().enumerate() {
                *values = load(simd, source.add(vector * S::LANES));
                if AHEAD {
                    ahead.fetch(asked, 4 * (key * VECTORS + vector) * S::LANES);
                }
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = simd.splat(*tile.scores.add(row * MAX_BLOCK_KEYS + key));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = simd.mul_add(weight, value, *sum);
                }
            }
        }
        store_output(simd, tile, sums, column);
    }
}
