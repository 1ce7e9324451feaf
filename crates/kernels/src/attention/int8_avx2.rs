//! AVX2 micro-tiles over int8 blocks (6 rows × 8 keys, 3 rows × 16): integers of eight bits widened to sixteen, as `vpmaddwd`
//! multiplies them.
//!
//! Queries, weights and sums are those of [`super::int8`], and so are the results, but for the last places of weights next to
//! the largest (AVX-512 rounds a difference there towards zero). The bytes of an unsigned and a
//! signed operand (`vpmaddubsw`) would not fit their sums, and taking signs off and on again costs as much as widening does;
//! what is widened serves all rows.

use std::arch::x86_64::*;

use super::ahead;
use super::softmax::EXP2;
use super::tile::{MicroTile, NOTHING_SEEN};
use super::value_scales::{LEAST, WEIGHT_STEPS};
use super::{MAX_BLOCK_KEYS, MICRO_ROWS, PAGE_KEYS, PAGE_PAIRS};
use crate::simd::avx2::largest_lane;
use crate::simd::exponential::LOWEST_WEIGHT;

/// Lanes of a vector; a page of keys has two sides of as many.
const SIDE: usize = PAGE_KEYS / 2;
/// Rows whose sums leave registers for two vectors of keys or values each, instead of one.
const FEW_SUMS: usize = 3;

const _: () = assert!(MICRO_ROWS <= SIDE);

// Takes int16 queries, and int8 keys and values.
ahead::enter_micro_tile!("avx2,fma");

#[target_feature(enable = "avx2,fma")]
unsafe fn micro_tile<const ROWS: usize, const AHEAD: u8>(tile: &mut MicroTile<'_>) {
    // SAFETY: forwarded from the caller; each call stays within the block's pages and the value width.
    unsafe {
        let mut largest = [_mm256_set1_ps(f32::NEG_INFINITY); ROWS];
        for page in 0..tile.pages {
            if ROWS <= FEW_SUMS {
                scores::<ROWS, 2, AHEAD>(tile, page, 0, &mut largest);
            } else {
                scores::<ROWS, 1, AHEAD>(tile, page, 0, &mut largest);
                scores::<ROWS, 1, AHEAD>(tile, page, 1, &mut largest);
            }
        }
        // What is masked does not count.
        if tile.mask.is_some() {
            tile.apply_mask::<ROWS>();
            largest = std::array::from_fn(|row| largest_scores(tile, row));
        }
        let factors = softmax::<ROWS>(tile, largest);
        let mut column = 0;
        while column < tile.value_dim {
            if ROWS <= FEW_SUMS && tile.value_dim - column >= 2 * PAGE_KEYS {
                weighted_values::<ROWS, 4, AHEAD>(tile, &factors, column);
                column += 4 * SIDE;
            } else {
                weighted_values::<ROWS, 2, AHEAD>(tile, &factors, column);
                column += 2 * SIDE;
            }
        }
    }
}

/// Dot products of `ROWS` queries with the keys of `SIDES` sides of page `page` from `side` on, in units of the row's query
/// scale (the softmax multiplies by it).
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn scores<const ROWS: usize, const SIDES: usize, const AHEAD: u8>(
    tile: &MicroTile<'_>,
    page: usize,
    side: usize,
    largest: &mut [__m256; ROWS],
) {
    // SAFETY: the page is in the block; it is `[steps][16]` groups of four, a query `steps` groups; there is one key scale
    // for each key of the block.
    unsafe {
        let steps = tile.key_dim / 4;
        let keys = tile.keys.add(page * PAGE_KEYS * tile.key_dim + side * 4 * SIDE);
        let queries = tile.queries.cast::<i64>();
        let asked = tile.ahead.unwrap_or_default().key_page(page);
        // Two vectors for each side, each of the sums of two channels for four keys.
        let mut sums = [[[_mm256_setzero_si256(); 2]; SIDES]; ROWS];
        for step in 0..steps {
            let mut lanes = [[_mm256_setzero_si256(); 2]; SIDES];
            for half in 0..2 * SIDES {
                let bytes = _mm_loadu_si128(keys.add(step * 4 * PAGE_KEYS + 16 * half).cast());
                lanes[half / 2][half % 2] = _mm256_cvtepu8_epi16(bytes);
            }
            if side == 0 {
                ahead::fetch_to::<AHEAD>(asked, 64 * step);
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = _mm256_set1_epi64x(queries.add(row * steps + step).read_unaligned());
                for (sums, lanes) in sums.iter_mut().zip(lanes) {
                    for half in 0..2 {
                        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(lanes[half], query));
                    }
                }
            }
        }
        for (place, first) in (side..side + SIDES).map(|side| page * PAGE_KEYS + side * SIDE).enumerate() {
            let scales = _mm256_loadu_ps(tile.key_scales.add(first));
            for (row, sums) in sums.iter().enumerate() {
                let [low, high] = sums[place];
                // Keys 0, 1, 4, 5 and 2, 3, 6, 7 of the side.
                let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(low, high));
                // Keys are stored with an offset of 128; this takes it out again.
                let sums = _mm256_add_epi32(pairs, _mm256_set1_epi32(*tile.query_offsets.add(row)));
                let score = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scales);
                largest[row] = _mm256_max_ps(largest[row], score);
                _mm256_storeu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + first), score);
            }
        }
    }
}

/// Largest scores of row `row`, by lane.
///
/// # Safety
/// The row has `pages` · 16 scores.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn largest_scores(tile: &MicroTile<'_>, row: usize) -> __m256 {
    let mut largest = _mm256_set1_ps(f32::NEG_INFINITY);
    for first in (0..tile.pages * PAGE_KEYS).step_by(SIDE) {
        // SAFETY: forwarded from the caller.
        largest = unsafe { _mm256_max_ps(largest, _mm256_loadu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + first))) };
    }
    largest
}

/// 2^x for x up to 0, as [`super::softmax::exp2`].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp2(x: __m256) -> __m256 {
    let floor = _mm256_floor_ps(x);
    let fraction = _mm256_sub_ps(x, floor);
    let mut mantissa = _mm256_fmadd_ps(_mm256_set1_ps(EXP2[0]), fraction, _mm256_set1_ps(EXP2[1]));
    mantissa = _mm256_fmadd_ps(mantissa, fraction, _mm256_set1_ps(EXP2[2]));
    mantissa = _mm256_fmadd_ps(mantissa, fraction, _mm256_set1_ps(EXP2[3]));
    let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(floor));
    let power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(mantissa), exponent));
    let wanted = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(LOWEST_WEIGHT));
    _mm256_and_ps(power, wanted)
}

/// As [`super::softmax::decay`].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn decay(before: __m256, after: __m256) -> __m256 {
    let same = _mm256_cmp_ps::<_CMP_EQ_OQ>(before, after);
    _mm256_blendv_ps(exp2(_mm256_sub_ps(before, after)), _mm256_set1_ps(1.0), same)
}

/// The lanes of `vector`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn lanes(vector: __m256) -> [f32; SIDE] {
    let mut lanes = [0.0; SIDE];
    // SAFETY: eight f32.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), vector) };
    lanes
}

/// Factors of each row.
struct Factors {
    /// On the earlier output.
    earlier: [f32; SIDE],
    /// On the block's weighted values.
    values: [f32; SIDE],
}

/// One step of the online softmax (Milakov & Gimelshein 2018): scores become int16 weights, relative to the largest of the row
/// in this block, times the values' scales. `largest` holds the largest scores of each row in any of its lanes.
///
/// # Safety
/// A row of scores and weights of `tile` has `pages · 16` elements; there are ROWS maxima, query scales and sums, and one value
/// factor for each key of the block.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn softmax<const ROWS: usize>(tile: &mut MicroTile<'_>, largest: [__m256; ROWS]) -> Factors {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut maxima = [NOTHING_SEEN; SIDE];
        let mut before = [NOTHING_SEEN; SIDE];
        for (row, largest) in largest.into_iter().enumerate() {
            maxima[row] = NOTHING_SEEN.max(largest_lane(largest) * *tile.query_scales.add(row));
            before[row] = *tile.maxima.add(row);
        }
        let (largest, before) = (_mm256_loadu_ps(maxima.as_ptr()), _mm256_loadu_ps(before.as_ptr()));
        let after = _mm256_max_ps(before, largest);
        tile.maxima.copy_from_nonoverlapping(lanes(after).as_ptr(), ROWS);
        let (earlier, block) = (lanes(decay(before, after)), decay(largest, after));
        let mut values = lanes(_mm256_mul_ps(block, _mm256_set1_ps(tile.value_step)));
        let block = lanes(block);
        for row in 0..ROWS {
            let maximum = _mm256_set1_ps(maxima[row]);
            let sums = weigh(tile, row, maximum);
            if !tile.values_are_even {
                values[row] *= round_to_own_largest(tile, row, maximum);
            }
            for (side, sum) in sums.into_iter().enumerate() {
                let total = tile.sums.add(row * PAGE_KEYS + side * SIDE);
                let before = _mm256_mul_ps(_mm256_loadu_ps(total), _mm256_set1_ps(earlier[row]));
                _mm256_storeu_ps(total, _mm256_fmadd_ps(sum, _mm256_set1_ps(block[row]), before));
            }
        }
        Factors { earlier, values }
    }
}

/// Weights of the keys from `first` on in row `row`, relative to those of the row's largest logit in the block, `maximum`;
/// and the same times the factors of the values.
///
/// # Safety
/// As for [`softmax`]; `first + 8` is at most the number of keys.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weights_of(tile: &MicroTile<'_>, row: usize, first: usize, maximum: __m256) -> (__m256, __m256) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let score = _mm256_loadu_ps(tile.scores.add(row * MAX_BLOCK_KEYS + first));
        let weight = exp2(_mm256_fmsub_ps(score, _mm256_set1_ps(*tile.query_scales.add(row)), maximum));
        (weight, _mm256_mul_ps(weight, _mm256_loadu_ps(tile.value_factors.add(first))))
    }
}

/// Rounds the weights of a page to integers.
///
/// # Safety
/// There is room for sixteen at `target`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn store_integers(weights: [__m256; 2], target: *mut u16) {
    let [low, high] = weights.map(|side| _mm256_cvtps_epi32(side));
    let integers = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
    // SAFETY: forwarded from the caller.
    unsafe { _mm256_storeu_si256(target.cast(), integers) }
}

/// Makes all weights of row `row`. Returns their sums by lane.
///
/// # Safety
/// As for [`softmax`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh(tile: &MicroTile<'_>, row: usize, maximum: __m256) -> [__m256; 2] {
    let mut sums = [_mm256_setzero_ps(); 2];
    for first in (0..tile.pages * PAGE_KEYS).step_by(PAGE_KEYS) {
        // SAFETY: forwarded from the caller.
        unsafe {
            let (low, scaled_low) = weights_of(tile, row, first, maximum);
            let (high, scaled_high) = weights_of(tile, row, first + SIDE, maximum);
            sums = [_mm256_add_ps(sums[0], low), _mm256_add_ps(sums[1], high)];
            store_integers([scaled_low, scaled_high], tile.weights.add(row * MAX_BLOCK_KEYS + first));
        }
    }
    sums
}

/// Makes the weights of row `row` once more, rounded in relation to the largest product of weight and scale of the row
/// itself. Returns what the row's steps are worth in those of the block. `maximum` is the row's largest logit in the block, in
/// each lane.
///
/// # Safety
/// As for [`softmax`].
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
unsafe fn round_to_own_largest(tile: &MicroTile<'_>, row: usize, maximum: __m256) -> f32 {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut largest = _mm256_setzero_ps();
        for first in (0..tile.pages * PAGE_KEYS).step_by(SIDE) {
            largest = _mm256_max_ps(weights_of(tile, row, first, maximum).1, largest);
        }
        let largest = largest_lane(largest);
        // Next to nothing stays what it is in the block's steps; what is no number stays so by the block's step.
        if !(largest > LEAST && largest < f32::INFINITY) {
            return 1.0;
        }
        let factor = _mm256_set1_ps(WEIGHT_STEPS / largest);
        for first in (0..tile.pages * PAGE_KEYS).step_by(PAGE_KEYS) {
            let scaled =
                [first, first + SIDE].map(|first| _mm256_mul_ps(weights_of(tile, row, first, maximum).1, factor));
            store_integers(scaled, tile.weights.add(row * MAX_BLOCK_KEYS + first));
        }
        largest / WEIGHT_STEPS
    }
}

/// `output = earlier · output + block · (weights · values)` for the `VECTORS` · 8 value channels from `column` on.
///
/// # Safety
/// The pointers of `tile` hold for `ROWS` rows, whose weights are made; `column + VECTORS · 8 <= value_dim`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weighted_values<const ROWS: usize, const VECTORS: usize, const AHEAD: u8>(
    tile: &MicroTile<'_>,
    factors: &Factors,
    column: usize,
) {
    // SAFETY: values are `[pages · 8][value_dim]` pairs of i8, output rows `value_dim` f32; a row of weights has `pages · 8`
    // pairs.
    unsafe {
        let pairs = tile.pages * PAGE_PAIRS;
        let values = tile.values.add(2 * column);
        let weights = tile.weights.cast::<i32>();
        let asked = tile.ahead.unwrap_or_default().value_page(0).wrapping_add(2 * pairs * column);
        let mut sums = [[_mm256_setzero_si256(); VECTORS]; ROWS];
        for pair in 0..pairs {
            let mut lanes = [_mm256_setzero_si256(); VECTORS];
            for (vector, lanes) in lanes.iter_mut().enumerate() {
                let bytes = values.add(2 * (pair * tile.value_dim + vector * SIDE));
                *lanes = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes.cast()));
            }
            if VECTORS == 4 || pair % 2 == 0 {
                ahead::fetch_to::<AHEAD>(asked, 2 * VECTORS * SIDE * pair);
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = _mm256_set1_epi32(*weights.add(row * MAX_BLOCK_KEYS / 2 + pair));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(lanes, weight));
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let (earlier, block) = (_mm256_set1_ps(factors.earlier[row]), _mm256_set1_ps(factors.values[row]));
            for (vector, sum) in sums.iter().enumerate() {
                let target = tile.output.add(row * tile.value_dim + column + vector * SIDE);
                let before = _mm256_mul_ps(_mm256_loadu_ps(target), earlier);
                _mm256_storeu_ps(target, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*sum), block, before));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use crate::InstructionSet;
    use crate::attention::{AttentionTile, KeyBlock, PAGE_KEYS, TileShape};

    /// Keys and values of one block.
    struct Block {
        keys: Vec<u8>,
        key_scales: Vec<f32>,
        values: Vec<i8>,
        value_scales: Vec<f32>,
    }

    impl Block {
        /// Scales of values lie `spread` powers of two around .01; every ninth value is zero.
        fn random(random: &mut Random, pages: usize, shape: TileShape, spread: f64) -> Self {
            let keys = pages * PAGE_KEYS;
            let mut integers = |width: usize| -> Vec<i8> {
                let normals = random.normals(keys * width, 50.0);
                normals.into_iter().map(|value| value.clamp(-127.0, 127.0) as i8).collect()
            };
            let (key_integers, values) = (integers(shape.key_dim), integers(shape.value_dim));
            let scale = |value: f32| 0.01 * value.exp2();
            let mut value_scales: Vec<f32> = random.normals(keys, spread).into_iter().map(scale).collect();
            value_scales.iter_mut().step_by(9).for_each(|scale| *scale = 0.0);
            Self {
                keys: key_integers.into_iter().map(|integer| (integer as u8) ^ 128).collect(),
                key_scales: random.normals(keys, 0.3).into_iter().map(scale).collect(),
                values,
                value_scales,
            }
        }

        fn block(&self) -> KeyBlock<'_> {
            let Self { keys, key_scales, values, value_scales } = self;
            KeyBlock::Int8 { keys, key_scales, values, value_scales }
        }
    }

    /// Log-sum-exps and outputs of rows that attend to all blocks in turn.
    fn attend(level: InstructionSet, blocks: &[Block], shape: TileShape, queries: &[f32]) -> Vec<(f32, Vec<f32>)> {
        let TileShape { rows, key_dim, value_dim } = shape;
        let keys: usize = blocks.iter().map(|block| block.key_scales.len()).sum();
        let mut tile = AttentionTile::default();
        tile.begin(level, shape, blocks[0].block());
        for (row, query) in queries.chunks_exact(key_dim).enumerate() {
            // The last row sees next to nothing, none of it in the first block where there are more.
            let visible = if row + 1 == rows { (keys - 9, keys - 8) } else { (row % 3, keys - row) };
            tile.set_row(row, query, if row == 1 { -0.2 } else { 0.2 }, visible);
        }
        let mut first = 0;
        for (number, block) in blocks.iter().enumerate() {
            tile.accumulate(first, block.block(), blocks.get(number + 1).map(Block::block));
            first += block.key_scales.len();
        }
        let finished = |row: usize| {
            let mut output = vec![0.0; value_dim];
            tile.finish_row(row, &mut output);
            (tile.log_sum_exp(row), output)
        };
        (0..rows).map(finished).collect()
    }

    #[test]
    fn results_are_those_of_vnni() {
        if InstructionSet::detected() < InstructionSet::Avx512Vnni {
            return;
        }
        let mut random = Random::new(23);
        for (key_dim, value_dim) in [(4, 16), (36, 48), (64, 64), (128, 80), (8, 112)] {
            for rows in 1..=13 {
                for (pages, spread) in [(1, 0.5), (2, 4.0), (5, 0.5), (31, 8.0), (32, 0.5)] {
                    let shape = TileShape { rows, key_dim, value_dim };
                    let blocks: Vec<_> =
                        [32, pages].map(|pages| Block::random(&mut random, pages, shape, spread)).into();
                    let mut queries = random.normals(rows * key_dim, 3.0);
                    queries[..key_dim].fill(0.0);
                    let of_level = |level: InstructionSet| attend(level, &blocks, shape, &queries);
                    let (narrow, wide) = (of_level(InstructionSet::Avx2), of_level(InstructionSet::Avx512Vnni));
                    for (row, ((sum, output), (wide_sum, wide_output))) in narrow.iter().zip(&wide).enumerate() {
                        let what =
                            format!("row {row} of {rows}, {pages} pages, {key_dim} × {value_dim}, spread {spread}");
                        assert!((sum - wide_sum).abs() < 1e-6 * wide_sum.abs().max(1.0), "{what}: {sum}, {wide_sum}");
                        let largest = wide_output.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                        for (value, wide) in output.iter().zip(wide_output) {
                            assert!((value - wide).abs() <= 1e-4 * largest, "{what}: {value} and {wide}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_scale_that_is_no_number_shows() {
        if InstructionSet::detected() < InstructionSet::Avx2 {
            return;
        }
        let mut random = Random::new(24);
        let shape = TileShape { rows: 2, key_dim: 16, value_dim: 16 };
        let queries = random.normals(32, 1.0);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut block = Block::random(&mut random, 2, shape, 0.5);
            block.value_scales[7] = bad;
            let rows = attend(InstructionSet::Avx2, &[block], shape, &queries);
            assert!(rows[0].1.iter().all(|value| value.is_nan()), "values times {bad}");
        }
        let mut block = Block::random(&mut random, 2, shape, 0.5);
        block.key_scales[7] = f32::NAN;
        let rows = attend(InstructionSet::Avx2, &[block], shape, &queries);
        assert!(rows[0].0.is_nan() && rows[0].1.iter().all(|value| value.is_nan()), "keys times NaN");
    }
}
