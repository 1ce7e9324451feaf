//! AMX tiles (up to 32 rows × 32 keys a product): bf16 or int8 scores, bf16 weights and values, f32 sums.
//!
//! The products take a fraction of what they take with vectors, so that the softmax between them is half of the time:
//! its steps are the ones that every score needs, and no others.

use std::arch::x86_64::*;

use super::PAGE_KEYS;
use super::ahead::Ahead;
use super::softmax::{BrainRow, decay};
use super::tile::MicroTile;
use crate::amx::{Elements, PRODUCT_ROWS, Product, ROW_BYTES, TILE_ROWS, Tiles};

/// Pages of keys between one softmax and the next: their scores, weights, keys and values lie in the caches next to the
/// core.
const STRIP_PAGES: usize = 8;
/// Pages that one step of the weighted values takes: their keys are the 32 brain floats of a row of a tile.
const VALUE_PAGES: usize = 2;
/// Floats of a tile of scores.
const TILE: usize = TILE_ROWS * PAGE_KEYS;
/// Floats of the scores, and brain floats of the weights, that [`micro_tiles`] needs room for.
pub(super) const STRIP: usize = PRODUCT_ROWS * STRIP_PAGES * PAGE_KEYS;

/// Runs micro-tiles of up to [`PRODUCT_ROWS`] rows each, given with their numbers of rows: queries and keys are
/// `elements`, values brain floats. Int8 scores are multiplied by the scales of their keys, and weights by
/// `value_factors`.
///
/// Scores are kept as tiles, `[rows / 16][pages][16 rows][16 keys]`, weights too, `[rows / 16][pages / 2][16][32]`:
/// rows further apart would share a few sets of the first-level cache.
///
/// # Safety
/// The machine has AMX and AVX-512 BF16; the pointers of the tiles hold for their rows of these types, scores and
/// weights for [`STRIP`] elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn micro_tiles(elements: Elements, micro_tiles: &[(usize, MicroTile<'_>)]) {
    let mut tiles = Tiles::new();
    let most = micro_tiles.iter().map(|(_, tile)| tile.pages).max().unwrap_or(0);
    let all_rows: usize = micro_tiles.iter().map(|(rows, tile)| rows * tile.pages.div_ceil(STRIP_PAGES)).sum();
    let mut share = Share::new(elements, micro_tiles, most, all_rows);
    for first in (0..most).step_by(STRIP_PAGES) {
        for (rows, tile) in micro_tiles.iter().filter(|(_, tile)| first < tile.pages) {
            let strip = Strip { rows: *rows, elements, first, pages: STRIP_PAGES.min(tile.pages - first) };
            // SAFETY: forwarded from the caller.
            unsafe {
                strip.scores(&mut tiles, tile);
                strip.mask(tile);
                strip.softmax(tile, &mut share);
                strip.weighted_values(&mut tiles, tile);
            }
        }
    }
}

/// Some pages of a block for the rows of a micro-tile.
struct Strip {
    rows: usize,
    elements: Elements,
    /// First page of the block.
    first: usize,
    pages: usize,
}

/// Bytes of a row of `row_bytes` that one step takes: the largest equal part that fits a tile.
fn step_bytes(row_bytes: usize) -> usize {
    let parts = (row_bytes.div_ceil(ROW_BYTES)..).find(|parts| (row_bytes / 4).is_multiple_of(*parts));
    row_bytes / parts.expect("as many parts as there are words divide the row")
}

/// The keys and values of the next block, asked for little by little: the processor waits when too many lines are on
/// their way at a time.
struct Share {
    /// Where the next keys, values and scales to ask for lie, and how many bytes of each are left.
    ranges: [(*const u8, usize); 4],
    /// Bytes of each to ask for at a time.
    share: usize,
    ahead: Ahead,
}

impl Share {
    /// Asks in `times` times for as many `pages` as this block has, after the first of the tiles that says where.
    fn new(elements: Elements, micro_tiles: &[(usize, MicroTile<'_>)], pages: usize, times: usize) -> Self {
        let nothing = Self { ranges: [(std::ptr::null(), 0); 4], share: 0, ahead: Ahead::default() };
        let Some((tile, ahead)) = micro_tiles.iter().find_map(|(_, tile)| Some((tile, tile.ahead?))) else {
            return nothing;
        };
        let element_bytes = if elements == Elements::Bf16 { 2 } else { 1 };
        let bytes = |width: usize| width * PAGE_KEYS * pages * element_bytes;
        let (key_bytes, value_bytes) = (bytes(tile.key_dim), bytes(tile.value_dim));
        let scale_bytes = if elements == Elements::Int8 { pages * PAGE_KEYS * size_of::<f32>() } else { 0 };
        let [key_scales, value_scales] = ahead.scales();
        Self {
            ranges: [
                (ahead.key_page(0), key_bytes),
                (ahead.value_page(0), value_bytes),
                (key_scales, scale_bytes),
                (value_scales, scale_bytes),
            ],
            share: key_bytes.max(value_bytes).div_ceil(times.max(1)).next_multiple_of(64),
            ahead,
        }
    }

    #[inline(always)]
    fn fetch_next(&mut self) {
        for (start, left) in &mut self.ranges {
            let bytes = self.share.min(*left);
            for offset in (0..bytes).step_by(64) {
                self.ahead.fetch(*start, offset);
            }
            *start = start.wrapping_add(bytes);
            *left -= bytes;
        }
    }
}

impl Strip {
    /// Dot products of the queries with the keys.
    ///
    /// # Safety
    /// As [`micro_tiles`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn scores(&self, tiles: &mut Tiles, tile: &MicroTile<'_>) {
        let element_bytes = if self.elements == Elements::Bf16 { 2 } else { 1 };
        let row_bytes = tile.key_dim * element_bytes;
        let step_bytes = step_bytes(row_bytes);
        let page_bytes = row_bytes * PAGE_KEYS;
        tiles.configure(self.rows, step_bytes);
        for page in (0..self.pages).step_by(2) {
            let panels = (self.pages - page).min(2);
            let at = self.first + page;
            // SAFETY: the queries have `rows` rows, the block page `at + panels − 1`, the scores STRIP elements.
            unsafe {
                let product = Product {
                    a: tile.queries,
                    a_row: row_bytes,
                    a_tile: TILE_ROWS * row_bytes,
                    a_step: step_bytes,
                    b: tile.keys.add(at * page_bytes),
                    b_row: ROW_BYTES,
                    b_panel: page_bytes,
                    b_step: step_bytes / 4 * ROW_BYTES,
                    c: tile.scores.add(page * TILE).cast(),
                    c_row: ROW_BYTES,
                    c_tile: STRIP_PAGES * TILE * size_of::<f32>(),
                    c_panel: TILE * size_of::<f32>(),
                    steps: row_bytes / step_bytes,
                };
                product.run(self.elements, self.rows, panels, false);
            }
        }
        if self.elements == Elements::Int8 {
            // SAFETY: forwarded from the caller.
            (0..self.rows).for_each(|row| unsafe { self.scale_scores(tile, row) });
        }
    }

    /// First score of row `row`; the next page's lies [`TILE`] further.
    ///
    /// # Safety
    /// As [`micro_tiles`].
    #[inline(always)]
    unsafe fn row_scores(&self, tile: &MicroTile<'_>, row: usize) -> *mut f32 {
        // SAFETY: the row is one of the strip's.
        unsafe { tile.scores.add((row / TILE_ROWS * STRIP_PAGES * TILE_ROWS + row % TILE_ROWS) * PAGE_KEYS) }
    }

    /// The integer scores of row `row` become numbers: less what the offset of the keys added, times their scales and
    /// the row's.
    ///
    /// # Safety
    /// As [`micro_tiles`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn scale_scores(&self, tile: &MicroTile<'_>, row: usize) {
        // SAFETY: the row has `pages` vectors of integer scores, and there is a scale for each of their keys.
        unsafe {
            let scores = self.row_scores(tile, row);
            let offset = _mm512_set1_epi32(*tile.query_offsets.add(row));
            let scale = _mm512_set1_ps(*tile.query_scales.add(row));
            let key_scales = tile.key_scales.add(self.first * PAGE_KEYS);
            for page in 0..self.pages {
                let at = scores.add(page * TILE);
                let integers = _mm512_add_epi32(_mm512_loadu_si512(at.cast()), offset);
                let scales = _mm512_mul_ps(_mm512_loadu_ps(key_scales.add(page * PAGE_KEYS)), scale);
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_cvtepi32_ps(integers), scales));
            }
        }
    }

    /// Sets the scores of keys that a row may not see to −∞.
    ///
    /// # Safety
    /// As [`micro_tiles`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn mask(&self, tile: &MicroTile<'_>) {
        let Some((first_key, visible)) = tile.mask else { return };
        for (row, (start, end)) in visible.iter().take(self.rows).enumerate() {
            for page in 0..self.pages {
                let key = first_key + (self.first + page) * PAGE_KEYS;
                let hidden = |count: usize| u16::MAX.checked_shr(PAGE_KEYS as u32 - count as u32).unwrap_or(0);
                let before = hidden(start.saturating_sub(key).min(PAGE_KEYS));
                let seen = hidden(end.saturating_sub(key).min(PAGE_KEYS));
                // SAFETY: the row has `pages` vectors of scores.
                unsafe {
                    let at = self.row_scores(tile, row).add(page * TILE);
                    _mm512_mask_storeu_ps(at, before | !seen, _mm512_set1_ps(f32::NEG_INFINITY));
                }
            }
        }
    }

    /// One step of the online softmax (Milakov & Gimelshein 2018): scores become bf16 weights, and earlier outputs and
    /// sums shrink.
    ///
    /// # Safety
    /// As [`micro_tiles`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn softmax(&self, tile: &MicroTile<'_>, share: &mut Share) {
        for first in (0..self.rows).step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(self.rows - first);
            // SAFETY: the rows have `pages` vectors of scores, a maximum, a sum and an output each.
            unsafe {
                let mut largest = [_mm512_set1_ps(f32::NEG_INFINITY); TILE_ROWS];
                for (index, largest) in largest.iter_mut().enumerate().take(count) {
                    let scores = self.row_scores(tile, first + index);
                    for page in 0..self.pages {
                        *largest = _mm512_max_ps(*largest, _mm512_loadu_ps(scores.add(page * TILE)));
                    }
                }
                let rows = u16::MAX >> (TILE_ROWS - count);
                let before = _mm512_maskz_loadu_ps(rows, tile.maxima.add(first));
                let after = _mm512_max_ps(before, largest_of_rows(largest));
                _mm512_mask_storeu_ps(tile.maxima.add(first), rows, after);
                let decay = decay(before, after);
                let (mut maxima, mut decays) = ([0.0_f32; TILE_ROWS], [0.0_f32; TILE_ROWS]);
                _mm512_storeu_ps(maxima.as_mut_ptr(), after);
                _mm512_storeu_ps(decays.as_mut_ptr(), decay);
                for index in 0..count {
                    share.fetch_next();
                    match self.elements {
                        Elements::Bf16 => self.weights::<false>(tile, first + index, maxima[index], decays[index]),
                        Elements::Int8 => self.weights::<true>(tile, first + index, maxima[index], decays[index]),
                    }
                }
                // Once a row has seen its largest score, nothing shrinks any more.
                let shrinking = rows & _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(decay, _mm512_set1_ps(1.0));
                for index in (0..count).filter(|index| shrinking >> index & 1 == 1) {
                    let decay = _mm512_set1_ps(decays[index]);
                    for column in (0..tile.value_dim).step_by(PAGE_KEYS) {
                        let at = tile.output.add((first + index) * tile.value_dim + column);
                        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), decay));
                    }
                }
            }
        }
    }

    /// Turns the scores of row `row` into bf16 weights relative to `maximum` and adds them to its sum, which shrinks by
    /// `decay` first. With `FACTORS` a weight is multiplied by its key's factor after it was added.
    ///
    /// # Safety
    /// As [`micro_tiles`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weights<const FACTORS: bool>(&self, tile: &MicroTile<'_>, row: usize, maximum: f32, decay: f32) {
        let pair = VALUE_PAGES * PAGE_KEYS;
        // SAFETY: the row has `pages` vectors of scores and room for whole pairs of weights.
        unsafe {
            let first_weight = (row / TILE_ROWS * (STRIP_PAGES / VALUE_PAGES) * TILE_ROWS + row % TILE_ROWS) * pair;
            let row_of_scores = BrainRow {
                scores: self.row_scores(tile, row),
                page_stride: TILE,
                weights: tile.weights.add(first_weight),
                pair_stride: TILE_ROWS * pair,
                pages: self.pages,
                sum: tile.sums.add(row * PAGE_KEYS),
                factors: if FACTORS { tile.value_factors.add(self.first * PAGE_KEYS) } else { std::ptr::null() },
            };
            row_of_scores.weigh::<FACTORS>(maximum, decay);
        }
    }

    /// `output += weights · values`.
    ///
    /// # Safety
    /// As [`micro_tiles`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weighted_values(&self, tiles: &mut Tiles, tile: &MicroTile<'_>) {
        let steps = self.pages / VALUE_PAGES;
        // SAFETY: the steps are within the pages of the strip.
        unsafe {
            if steps > 0 {
                tiles.configure(self.rows, ROW_BYTES);
                self.weighted_steps(tile, 0, steps);
            }
            if !self.pages.is_multiple_of(VALUE_PAGES) {
                tiles.configure(self.rows, ROW_BYTES / VALUE_PAGES);
                self.weighted_steps(tile, steps, 1);
            }
        }
    }

    /// `output += weights · values` for `steps` steps of [`VALUE_PAGES`] pages (or less, as configured) from step
    /// `first_step` on.
    ///
    /// # Safety
    /// As [`micro_tiles`], with tiles configured for the rows of the strip and the pages of a step.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weighted_steps(&self, tile: &MicroTile<'_>, first_step: usize, steps: usize) {
        let weight_tile = TILE_ROWS * VALUE_PAGES * PAGE_KEYS;
        let pair = self.first * PAGE_KEYS / 2 + first_step * PAGE_KEYS;
        for column in (0..tile.value_dim).step_by(2 * PAGE_KEYS) {
            let panels = ((tile.value_dim - column) / PAGE_KEYS).min(2);
            // SAFETY: values are `[pages · 8][value_dim]` pairs, output rows `value_dim`, and
            // `column + panels · 16 <= value_dim`.
            unsafe {
                let product = Product {
                    a: tile.weights.add(first_step * weight_tile).cast(),
                    a_row: ROW_BYTES,
                    a_tile: STRIP_PAGES / VALUE_PAGES * weight_tile * size_of::<u16>(),
                    a_step: weight_tile * size_of::<u16>(),
                    b: tile.values.cast::<u32>().add(pair * tile.value_dim + column).cast(),
                    b_row: tile.value_dim * size_of::<u32>(),
                    b_panel: ROW_BYTES,
                    b_step: PAGE_KEYS * tile.value_dim * size_of::<u32>(),
                    c: tile.output.add(column).cast(),
                    c_row: tile.value_dim * size_of::<f32>(),
                    c_tile: TILE_ROWS * tile.value_dim * size_of::<f32>(),
                    c_panel: ROW_BYTES,
                    steps,
                };
                product.run(Elements::Bf16, self.rows, panels, true);
            }
        }
    }
}

/// The largest lane of each of sixteen vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn largest_of_rows(rows: [__m512; TILE_ROWS]) -> __m512 {
    // Each round takes the larger of two halves and brings two vectors together in one.
    let two: [__m512; 8] = std::array::from_fn(|i| {
        let (a, b) = (rows[2 * i], rows[2 * i + 1]);
        _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
    });
    let four: [__m512; 4] = std::array::from_fn(|i| {
        let (a, b) = (_mm512_castps_pd(two[2 * i]), _mm512_castps_pd(two[2 * i + 1]));
        _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
    });
    let halves =
        |a: __m512, b: __m512| _mm512_max_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    halves(halves(four[0], four[1]), halves(four[2], four[3]))
}

/// Writes signed bytes as brain floats, which hold them exactly.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn widen(bytes: &[i8], brain_floats: &mut [u16]) {
    let (bytes, rest) = bytes.as_chunks::<32>();
    assert!(rest.is_empty() && brain_floats.len() >= bytes.len() * 32, "room for whole vectors");
    for (source, target) in bytes.iter().zip(brain_floats.chunks_exact_mut(32)) {
        // SAFETY: the source has 32 bytes, the target 64.
        unsafe {
            let bytes = _mm256_loadu_si256(source.as_ptr().cast());
            let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
            let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256::<1>(bytes)));
            let packed: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(target.as_mut_ptr().cast(), packed);
        }
    }
}
