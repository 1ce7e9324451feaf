//! 8-bit micro-kernels with AVX2: 6 rows × 1 panel, a block of 32 inputs a step (`vpmaddubsw`, `vpmaddwd`).
//!
//! Weights, activations and sums are those of [`super::int8`], and so are the results, to the bit. Products of unsigned
//! codes and signed activations are summed in 16 bits as long as they fit, which depends on the bits of a code; then in 32.
//! Codes of eight bits do not fit at all: their magnitudes are multiplied, and the activations take their signs.

use std::arch::x86_64::*;

use super::WeightType;
use super::blocks::{has_fifth_bits, has_minima};
use super::int8::{BLOCK_WORDS, BlockWriter, scale_of};
use super::packed::{BLOCK, PANEL, codes_offset, fifths_offset, group_blocks, group_bytes};
use super::tile::{TILE_ROWS, Tile, TileKernel, TileKernels, TileTable, columns_of};

/// Columns of a vector; a panel has two sides of as many.
const SIDE: usize = PANEL / 2;
/// Quads of a block.
const QUADS: usize = BLOCK / 4;

/// A GGML type, as a type of this language.
trait Blocks {
    const TYPE: WeightType;
    /// Scales of a block and column.
    const SCALES: usize = if matches!(Self::TYPE, WeightType::Q6_K) { 2 } else { 1 };
    /// Whether a minimum is subtracted (and codes have no offset).
    const MINIMA: bool = has_minima(Self::TYPE);
    /// Quads whose products fit 16 bits together; 0 where those of one do not.
    const TOGETHER: usize = match Self::TYPE {
        WeightType::Q8_0 => 0,
        WeightType::Q6_K => 2,
        _ if has_fifth_bits(Self::TYPE) => 4,
        _ => 8,
    };
    const GROUP_BLOCKS: usize = group_blocks(Self::TYPE);
    const GROUP_BYTES: usize = group_bytes(Self::TYPE);
}

/// # Safety
/// 32 bytes from `offset` on.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(group: *const u8, offset: usize) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_loadu_si256(group.add(offset).cast()) }
}

/// f32 of eight f16.
///
/// # Safety
/// 16 bytes from `offset` on.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load_f16(group: *const u8, offset: usize) -> __m256 {
    // SAFETY: promised by the caller.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(group.add(offset).cast())) }
}

/// f32 of eight u8.
///
/// # Safety
/// Eight bytes from `offset` on.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_u8(group: *const u8, offset: usize) -> __m256 {
    // SAFETY: promised by the caller.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(group.add(offset).cast()))) }
}

/// Low (quads 0–3) or high (4–7) four bits of each byte.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(bytes: __m256i, quad: usize) -> __m256i {
    let bytes = if quad < 4 { bytes } else { _mm256_srli_epi16(bytes, 4) };
    _mm256_and_si256(bytes, _mm256_set1_epi8(15))
}

/// Codes of four bits of a type.
///
/// # Safety
/// As for [`codes`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_nibbles(weight_type: WeightType, group: *const u8, slot: usize, quad: usize, side: usize) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { nibbles(load(group, codes_offset(weight_type) + (slot * 4 + quad % 4) * 64 + side * 32), quad) }
}

/// The same with a fifth bit that lies apart.
///
/// # Safety
/// As for [`codes`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_five_bits(weight_type: WeightType, group: *const u8, slot: usize, quad: usize, side: usize) -> __m256i {
    // SAFETY: promised by the caller; there are 64 bits for the 16 columns of a quad.
    unsafe {
        let bits = group.add(fifths_offset(weight_type) + slot * 64 + quad * 8 + side * 4);
        let bits = _mm256_set1_epi32(bits.cast::<i32>().read_unaligned());
        // Each byte of the bits eight times, and of these one bit each.
        let bytes = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let single = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let bits = _mm256_and_si256(_mm256_shuffle_epi8(bits, bytes), single);
        let fifths = _mm256_and_si256(_mm256_cmpeq_epi8(bits, single), _mm256_set1_epi8(16));
        _mm256_or_si256(load_nibbles(weight_type, group, slot, quad, side), fifths)
    }
}

/// Codes of six bits, of which two lie apart.
///
/// # Safety
/// As for [`codes`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_six_bits(group: *const u8, slot: usize, quad: usize, side: usize) -> __m256i {
    let at = codes_offset(WeightType::Q6_K) + slot * 6 * 64 + side * 32;
    // SAFETY: promised by the caller.
    let (codes, pairs) =
        unsafe { (nibbles(load(group, at + quad % 4 * 64), quad), load(group, at + (4 + quad / 4) * 64)) };
    let high = match quad % 4 {
        0 => _mm256_slli_epi16(pairs, 4),
        1 => _mm256_slli_epi16(pairs, 2),
        2 => pairs,
        _ => _mm256_srli_epi16(pairs, 2),
    };
    _mm256_or_si256(codes, _mm256_and_si256(high, _mm256_set1_epi8(0x30)))
}

/// Codes of quad `quad` of eight columns: byte `4 · column + i` belongs to input `4 · quad + i`.
///
/// # Safety
/// `group` points at `GROUP_BYTES` readable bytes, `slot < GROUP_BLOCKS`, `quad < 8`, `side < 2`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn codes<B: Blocks>(group: *const u8, slot: usize, quad: usize, side: usize) -> __m256i {
    // SAFETY: promised by the caller; offsets are those of `packed`, inside `group_bytes`.
    unsafe {
        match B::TYPE {
            WeightType::Q8_0 => load(group, codes_offset(B::TYPE) + (slot * 8 + quad) * 64 + side * 32),
            WeightType::Q6_K => load_six_bits(group, slot, quad, side),
            _ if has_fifth_bits(B::TYPE) => load_five_bits(B::TYPE, group, slot, quad, side),
            _ => load_nibbles(B::TYPE, group, slot, quad, side),
        }
    }
}

/// Scales of eight columns.
///
/// # Safety
/// As for [`codes`], with `half < SCALES`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales<B: Blocks>(group: *const u8, slot: usize, half: usize, side: usize) -> __m256 {
    // SAFETY: promised by the caller; offsets are those of `packed`, inside `group_bytes`.
    unsafe {
        match B::TYPE {
            WeightType::Q4_K | WeightType::Q5_K => {
                _mm256_mul_ps(load_f16(group, side * 16), load_u8(group, 64 + slot * 16 + side * 8))
            }
            WeightType::Q6_K => {
                let scales = _mm_loadl_epi64(group.add(64 + (slot * 2 + half) * 16 + side * 8).cast());
                _mm256_mul_ps(load_f16(group, side * 16), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales)))
            }
            _ => load_f16(group, slot * 32 + side * 16),
        }
    }
}

/// Minima of eight columns of a type that has some.
///
/// # Safety
/// As for [`codes`].
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn minima<B: Blocks>(group: *const u8, slot: usize, side: usize) -> __m256 {
    // SAFETY: promised by the caller; offsets are those of `packed`, inside `group_bytes`.
    unsafe {
        match B::TYPE {
            WeightType::Q4_1 | WeightType::Q5_1 => load_f16(group, 64 + slot * 32 + side * 16),
            _ => _mm256_mul_ps(load_f16(group, 32 + side * 16), load_u8(group, 192 + slot * 16 + side * 8)),
        }
    }
}

/// # Safety
/// The preconditions of [`Tile`] for `R` rows and one panel; `steps` is a multiple of `GROUP_BLOCKS`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<B: Blocks, const R: usize>(tile: &Tile) {
    let columns = columns_of(tile, 0);
    let mut outputs = [[0.0_f32; PANEL]; R];
    if tile.accumulate {
        for (row, output) in outputs.iter_mut().enumerate() {
            // SAFETY: precondition 3.
            unsafe { output.as_mut_ptr().copy_from_nonoverlapping(tile.output.add(row * tile.row_stride), columns) };
        }
    }
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for (sums, output) in sums.iter_mut().zip(&outputs) {
        for (side, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a side of sixteen numbers.
            *sum = unsafe { _mm256_loadu_ps(output.as_ptr().add(side * SIDE)) };
        }
    }
    let (mut activations, mut group) = (tile.activations, tile.weights);
    for _ in 0..tile.steps / B::GROUP_BLOCKS {
        for slot in 0..B::GROUP_BLOCKS {
            // SAFETY: `activations` and `group` stay inside what preconditions 1 and 2 give: `steps` blocks of
            // `BLOCK_WORDS · R` words, and `steps / GROUP_BLOCKS` groups of the panel.
            unsafe {
                add_block::<B, R>(activations, group, slot, &mut sums);
                activations = activations.add(BLOCK_WORDS * R);
            }
        }
        group = group.wrapping_add(B::GROUP_BYTES);
    }
    for (row, (output, sums)) in outputs.iter_mut().zip(sums).enumerate() {
        for (side, sum) in sums.into_iter().enumerate() {
            // SAFETY: a side of sixteen numbers.
            unsafe { _mm256_storeu_ps(output.as_mut_ptr().add(side * SIDE), sum) };
        }
        // SAFETY: precondition 3.
        unsafe { tile.output.add(row * tile.row_stride).copy_from_nonoverlapping(output.as_ptr(), columns) };
    }
}

/// # Safety
/// `activations` points at `BLOCK_WORDS · R` words; otherwise as [`codes`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_block<B: Blocks, const R: usize>(
    activations: *const u32,
    group: *const u8,
    slot: usize,
    sums: &mut [[__m256; 2]; R],
) {
    let ones = _mm256_set1_epi16(1);
    // SAFETY: all word offsets are below `BLOCK_WORDS · R`; the rest as the caller promises.
    unsafe {
        let word = |at: usize| _mm256_set1_epi32(*activations.add(at) as i32);
        let factor = |at: usize| _mm256_castsi256_ps(word(at));
        for side in 0..2 {
            for half in 0..B::SCALES {
                let mut dots = [_mm256_setzero_si256(); R];
                // Codes of eight bits are multiplied as the numbers that they stand for.
                if !B::MINIMA && B::TOGETHER > 0 {
                    for row in 0..R {
                        dots[row] = word((9 + half) * R + row);
                    }
                }
                let quads = half * QUADS / B::SCALES..(half + 1) * QUADS / B::SCALES;
                if B::TOGETHER == 0 {
                    for quad in quads {
                        let codes = codes::<B>(group, slot, quad, side);
                        let numbers = _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN));
                        let magnitudes = _mm256_abs_epi8(numbers);
                        for row in 0..R {
                            let signed = _mm256_sign_epi8(word(quad * R + row), numbers);
                            let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, signed), ones);
                            dots[row] = _mm256_add_epi32(dots[row], pairs);
                        }
                    }
                } else {
                    for first in quads.step_by(B::TOGETHER) {
                        let mut pairs = [_mm256_setzero_si256(); R];
                        for quad in first..first + B::TOGETHER {
                            let codes = codes::<B>(group, slot, quad, side);
                            for row in 0..R {
                                let products = _mm256_maddubs_epi16(codes, word(quad * R + row));
                                pairs[row] = _mm256_add_epi16(pairs[row], products);
                            }
                        }
                        for row in 0..R {
                            dots[row] = _mm256_add_epi32(dots[row], _mm256_madd_epi16(pairs[row], ones));
                        }
                    }
                }
                let scale = scales::<B>(group, slot, half, side);
                for row in 0..R {
                    let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[row]), scale);
                    sums[row][side] = _mm256_fmadd_ps(scaled, factor(8 * R + row), sums[row][side]);
                }
            }
            if B::MINIMA {
                let minimum = minima::<B>(group, slot, side);
                for row in 0..R {
                    sums[row][side] = _mm256_fnmadd_ps(minimum, factor(9 * R + row), sums[row][side]);
                }
            }
        }
    }
}

macro_rules! kernels {
    ($type:ident, $name:literal) => {{
        struct Type;
        impl Blocks for Type {
            const TYPE: WeightType = WeightType::$type;
        }
        static TABLE: [&[TileKernel]; TILE_ROWS] = [
            &[multiply::<Type, 1>],
            &[multiply::<Type, 2>],
            &[multiply::<Type, 3>],
            &[multiply::<Type, 4>],
            &[multiply::<Type, 5>],
            &[multiply::<Type, 6>],
        ];
        TileKernels { table: TileTable::Vectors(&TABLE), name: $name }
    }};
}

/// The kernels of a GGML type.
pub(super) fn kernels(weight_type: WeightType) -> TileKernels {
    match weight_type {
        WeightType::Q8_0 => kernels!(Q8_0, "avx2-q8_0-6x16"),
        WeightType::Q4_0 => kernels!(Q4_0, "avx2-q4_0-6x16"),
        WeightType::Q4_1 => kernels!(Q4_1, "avx2-q4_1-6x16"),
        WeightType::Q5_0 => kernels!(Q5_0, "avx2-q5_0-6x16"),
        WeightType::Q5_1 => kernels!(Q5_1, "avx2-q5_1-6x16"),
        WeightType::Q4_K => kernels!(Q4_K, "avx2-q4_k-6x16"),
        WeightType::Q5_K => kernels!(Q5_K, "avx2-q5_k-6x16"),
        WeightType::Q6_K => kernels!(Q6_K, "avx2-q6_k-6x16"),
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => unreachable!("floats have no 8-bit kernel"),
    }
}

/// Rounds rows as [`super::int8::quantise`] does, to the same numbers.
#[target_feature(enable = "avx2,fma")]
pub(super) fn quantise(weight_type: WeightType, input: &[f32], in_features: usize, output: &mut [u32]) {
    let rows = input.len() / in_features;
    let writer = BlockWriter::new(weight_type, rows);
    output[in_features / BLOCK * BLOCK_WORDS * rows..].fill(0);
    for (row, values) in input.chunks_exact(in_features).enumerate() {
        for (values, words) in values.as_chunks::<BLOCK>().0.iter().zip(output.chunks_exact_mut(BLOCK_WORDS * rows)) {
            // As integers the bits of magnitudes are ordered like the numbers, infinity and NaN above all others.
            let largest = values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff));
            let largest = f32::from_bits(largest);
            let scale = scale_of(largest);
            let inverse = if scale > 0.0 { 127.0 / largest } else { 0.0 };
            let mut codes = [0_i32; BLOCK];
            for (code, value) in codes.iter_mut().zip(values) {
                *code = (value * inverse).round_ties_even() as i32;
            }
            let quads = std::array::from_fn(|quad| {
                u32::from_le_bytes(std::array::from_fn(|place| codes[4 * quad + place] as u8))
            });
            let sum = |codes: &[i32]| codes.iter().sum::<i32>();
            let (first, second) = codes.split_at(BLOCK / 2);
            let sums = if writer.halves { [sum(first), sum(second)] } else { [sum(&codes), 0] };
            writer.write(words, row, &quads, scale, sums);
        }
    }
}
