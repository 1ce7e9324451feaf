//! f32 micro-tiles: the kernel of f32 caches, and of every cache type on machines without BF16 dot products.

use super::lanes::Lanes;
use super::tile::{MicroTile, Softmax};
use super::{MAX_BLOCK_KEYS, PAGE_KEYS, fetch_ahead};

/// Scores, online softmax and weighted sum of values for `ROWS` query rows against one block.
///
/// # Safety
/// The instruction set of `L` is enabled in the caller; the pointers of `tile` are valid as [`MicroTile`] says, with
/// queries, keys and values in f32.
#[inline(always)]
pub(super) unsafe fn micro_tile<L: Lanes, const ROWS: usize, const AHEAD: bool>(tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut page = 0;
        while page < tile.pages {
            let panels = if tile.pages - page >= L::PANELS { L::PANELS } else { 1 };
            if panels == 4 {
                scores::<L, ROWS, 4, AHEAD>(tile, page)
            } else {
                scores::<L, ROWS, 1, AHEAD>(tile, page)
            }
            page += panels;
        }
        tile.apply_mask::<ROWS>();
        let decay = softmax::<L, ROWS>(tile);
        let mut column = 0;
        while column < tile.value_dim {
            let panels = if (tile.value_dim - column) / PAGE_KEYS >= L::PANELS { L::PANELS } else { 1 };
            if panels == 4 {
                weighted_values::<L, ROWS, 4, AHEAD>(tile, &decay, column)
            } else {
                weighted_values::<L, ROWS, 1, AHEAD>(tile, &decay, column)
            }
            column += panels * PAGE_KEYS;
        }
    }
}

/// Dot products of `ROWS` queries with the keys of `PANELS` pages from `page` on.
#[inline(always)]
unsafe fn scores<L: Lanes, const ROWS: usize, const PANELS: usize, const AHEAD: bool>(
    tile: &mut MicroTile<'_>,
    page: usize,
) {
    // SAFETY: page `page + PANELS − 1` is in the block; a page is `[key_dim][16]` f32; queries have `key_dim` f32.
    unsafe {
        let keys = tile.keys.cast::<f32>().add(page * tile.key_dim * PAGE_KEYS);
        let queries = tile.queries.cast::<f32>();
        let key_ahead = tile.ahead.map_or(0, |(keys, _)| keys);
        let mut sums = [[L::splat(0.0); PANELS]; ROWS];
        for channel in 0..tile.key_dim {
            let source = keys.add(channel * PAGE_KEYS);
            let keys: [L; PANELS] = std::array::from_fn(|panel| L::load(source.add(panel * tile.key_dim * PAGE_KEYS)));
            if AHEAD {
                (0..PANELS).for_each(|panel| fetch_ahead(source.add(panel * tile.key_dim * PAGE_KEYS), key_ahead));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = L::splat(*queries.add(row * tile.key_dim + channel));
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = query.mul_add(key, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sum) in sums.iter().enumerate() {
                sum.store(tile.scores.add(row * MAX_BLOCK_KEYS + (page + panel) * PAGE_KEYS));
            }
        }
    }
}

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become weights in place.
/// Returns the factor by which each row's earlier sums shrink.
#[inline(always)]
unsafe fn softmax<L: Lanes, const ROWS: usize>(tile: &mut MicroTile<'_>) -> Softmax<ROWS> {
    // SAFETY: a row of scores has `pages` vectors; `maxima` has ROWS and `sums` ROWS · 16 elements.
    unsafe {
        let mut decay = Softmax::default();
        for row in 0..ROWS {
            let scores = tile.scores.add(row * MAX_BLOCK_KEYS);
            let mut largest = L::load(scores);
            for page in 1..tile.pages {
                largest = L::load(scores.add(page * PAGE_KEYS)).max(largest);
            }
            let before = *tile.maxima.add(row);
            let maximum = before.max(largest.reduce_max());
            *tile.maxima.add(row) = maximum;
            decay.decay[row] = before - maximum;
            let mut sum = L::splat(0.0);
            for page in 0..tile.pages {
                let weight = L::load(scores.add(page * PAGE_KEYS)).sub(L::splat(maximum)).exp2();
                weight.store(scores.add(page * PAGE_KEYS));
                sum = sum.add(weight);
            }
            sum.store(tile.block_sums.add(row * PAGE_KEYS));
        }
        L::load(decay.decay.as_ptr()).exp2().store(decay.decay.as_mut_ptr());
        for row in 0..ROWS {
            let total = tile.sums.add(row * PAGE_KEYS);
            let block = L::load(tile.block_sums.add(row * PAGE_KEYS));
            L::load(total).mul_add(L::splat(decay.decay[row]), block).store(total);
        }
        decay
    }
}

/// `output = decay · output + weights · values` for `PANELS` · 16 value channels from `column` on.
#[inline(always)]
unsafe fn weighted_values<L: Lanes, const ROWS: usize, const PANELS: usize, const AHEAD: bool>(
    tile: &mut MicroTile<'_>,
    decay: &Softmax<ROWS>,
    column: usize,
) {
    // SAFETY: values are `[pages · 16][value_dim]` f32, output rows `value_dim` f32, and
    // `column + PANELS · 16 <= value_dim`.
    unsafe {
        let values = tile.values.cast::<f32>().add(column);
        let output = tile.output.add(column);
        let value_ahead = tile.ahead.map_or(0, |(_, values)| values);
        let mut sums: [[L; PANELS]; ROWS] = std::array::from_fn(|row| {
            std::array::from_fn(|panel| {
                L::load(output.add(row * tile.value_dim + panel * PAGE_KEYS)).mul(L::splat(decay.decay[row]))
            })
        });
        for key in 0..tile.pages * PAGE_KEYS {
            let source = values.add(key * tile.value_dim);
            let values: [L; PANELS] = std::array::from_fn(|panel| L::load(source.add(panel * PAGE_KEYS)));
            if AHEAD {
                (0..PANELS).for_each(|panel| fetch_ahead(source.add(panel * PAGE_KEYS), value_ahead));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = L::splat(*tile.scores.add(row * MAX_BLOCK_KEYS + key));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = weight.mul_add(value, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sum) in sums.iter().enumerate() {
                sum.store(output.add(row * tile.value_dim + panel * PAGE_KEYS));
            }
        }
    }
}
