//! The packed layout of weights: panels of 16 output columns, so that one vector holds the same inputs of 16 rows.
//!
//! A panel is, by what the kernels multiply, with `k` counting inputs (padded with zeros to the sizes below):
//!
//! | type | layout of one panel |
//! |---|---|
//! | f32 | `[k][16]` f32 |
//! | f16, bf16 | `[k/2][16][2]` bf16 |
//! | GGML | groups one after another: scales of 16 columns, then codes `[block of 32][quad][16][4]` |
//!
//! Codes stay in the bits of the file (two 4-bit codes a byte: quad `q` low, quad `q + 4` high), because reading them
//! is what a decoded token costs. Sizes in bytes of one group:
//!
//! | type | inputs | f16 scales | integer scales | codes |
//! |---|---|---|---|---|
//! | Q8_0 | 64 | 64 `[2][16]` | | 1024 `[2][8][16][4]` |
//! | Q4_0 | 64 | 64 `[2][16]` | | 512 `[2][4][16][4]` |
//! | Q4_1 | 64 | 128 `[2][2][16]` (scales, minima) | | 512 `[2][4][16][4]` |
//! | Q5_0 | 64 | 64 `[2][16]` | | 128 `[2][8]` u64 of fifth bits, 512 |
//! | Q5_1 | 64 | 128 `[2][2][16]` (scales, minima) | | 128 `[2][8]` u64 of fifth bits, 512 |
//! | Q4_K | 256 | 64 (scale, minimum) | 256 (`[8][16]` scales, minima) | 2048 `[8][4][16][4]` |
//! | Q5_K | 256 | 64 (scale, minimum) | 256 (`[8][16]` scales, minima) | 512 `[8][8]` u64 of fifth bits, 2048 |
//! | Q6_K | 256 | 64 (scale, padding) | 256 `[8][2][16]` | 3072 `[8][6][16][4]`: 4-bit quads, then 2-bit quads |

use half::{bf16, f16};

use super::WeightType;
use super::blocks::{UnpackedBlock, has_fifth_bits, offset};

/// Output columns of a panel: the f32 lanes of a 512-bit vector.
pub(super) const PANEL: usize = 16;
/// Inputs that share a scale in every GGML type (Q6_K: two scales).
pub(super) const BLOCK: usize = 32;

/// Blocks of 32 inputs in a group of the packed layout.
pub(super) const fn group_blocks(weight_type: WeightType) -> usize {
    match weight_type {
        WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q5_0 | WeightType::Q5_1 => 2,
        _ => 8,
    }
}

/// Bytes of a group of the packed layout.
pub(super) const fn group_bytes(weight_type: WeightType) -> usize {
    match weight_type {
        WeightType::Q8_0 => 64 + 1024,
        WeightType::Q4_0 => 64 + 512,
        WeightType::Q4_1 => 128 + 512,
        WeightType::Q5_0 => 64 + 128 + 512,
        WeightType::Q5_1 => 128 + 128 + 512,
        WeightType::Q4_K => 64 + 256 + 2048,
        WeightType::Q5_K => 64 + 256 + 512 + 2048,
        WeightType::Q6_K => 64 + 256 + 3072,
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => panic!("floats have no groups"),
    }
}

/// Where the codes of a group begin, in bytes.
pub(super) const fn codes_offset(weight_type: WeightType) -> usize {
    let fifths = if has_fifth_bits(weight_type) { 64 * group_blocks(weight_type) } else { 0 };
    fifths_offset(weight_type) + fifths
}

/// Where the fifth bits of a group begin, in bytes; types without any have their codes there.
pub(super) const fn fifths_offset(weight_type: WeightType) -> usize {
    match weight_type {
        WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0 => 64,
        WeightType::Q4_1 | WeightType::Q5_1 => 128,
        _ => 64 + 256,
    }
}

/// The fewest inputs that lie together in a panel, and their bytes.
pub(super) fn packed_unit(weight_type: WeightType) -> (usize, usize) {
    match weight_type {
        WeightType::F32 => (1, PANEL * 4),
        WeightType::F16 | WeightType::Bf16 => (2, 2 * PANEL * 2),
        _ => (group_blocks(weight_type) * BLOCK, group_bytes(weight_type)),
    }
}

/// Inputs of a row after padding.
pub(super) fn padded_inputs(weight_type: WeightType, in_features: usize) -> usize {
    in_features.next_multiple_of(packed_unit(weight_type).0)
}

/// Bytes of a panel.
pub(super) fn panel_bytes(weight_type: WeightType, in_features: usize) -> usize {
    let (unit, bytes) = packed_unit(weight_type);
    in_features.div_ceil(unit) * bytes
}

/// Writes one row, given in the file's format, into column `column` of a zeroed panel.
pub(super) fn pack_row(weight_type: WeightType, row: &[u8], column: usize, panel: &mut [u8]) {
    match weight_type {
        WeightType::F32 => {
            let words: &mut [u32] = bytemuck::cast_slice_mut(panel);
            for (lanes, b) in words.chunks_exact_mut(PANEL).zip(row.chunks_exact(4)) {
                lanes[column] = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        WeightType::F16 | WeightType::Bf16 => {
            let words: &mut [u16] = bytemuck::cast_slice_mut(panel);
            for (index, b) in row.chunks_exact(2).enumerate() {
                let bits = u16::from_le_bytes([b[0], b[1]]);
                let bits = match weight_type {
                    WeightType::F16 => bf16::from_f32(f16::from_bits(bits).to_f32()).to_bits(),
                    _ => bits,
                };
                words[index / 2 * (2 * PANEL) + column * 2 + index % 2] = bits;
            }
        }
        _ => {
            let mut block = UnpackedBlock::ZERO;
            let parts = weight_type.block_weights() / BLOCK;
            for (index, bytes) in row.chunks_exact(weight_type.block_bytes()).enumerate() {
                block.read(weight_type, bytes);
                for part in 0..parts {
                    let at = index * parts + part;
                    let group = &mut panel[at / group_blocks(weight_type) * group_bytes(weight_type)..]
                        [..group_bytes(weight_type)];
                    pack_part(weight_type, &block, part, group, at % group_blocks(weight_type), column);
                }
            }
        }
    }
}

/// Writes 32 weights (`part` of `block`) into block `slot` of a group.
fn pack_part(weight_type: WeightType, block: &UnpackedBlock, part: usize, group: &mut [u8], slot: usize, lane: usize) {
    let quad = |q: usize| {
        let at = part * BLOCK + q * 4;
        u32::from_le_bytes([block.codes[at], block.codes[at + 1], block.codes[at + 2], block.codes[at + 3]])
    };
    let mut put_f16 = |index: usize, bits: u16| group[index * 2..][..2].copy_from_slice(&bits.to_le_bytes());
    match weight_type {
        WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0 => put_f16(slot * PANEL + lane, block.scale),
        WeightType::Q4_1 | WeightType::Q5_1 => {
            put_f16(slot * PANEL + lane, block.scale);
            put_f16((2 + slot) * PANEL + lane, block.minimum);
        }
        _ => {
            put_f16(lane, block.scale);
            put_f16(PANEL + lane, block.minimum);
        }
    }
    match weight_type {
        WeightType::Q4_K | WeightType::Q5_K => {
            group[64 + slot * PANEL + lane] = block.scales[part];
            group[192 + slot * PANEL + lane] = block.minima[part];
        }
        WeightType::Q6_K => {
            group[64 + slot * 2 * PANEL + lane] = block.scales[2 * part];
            group[64 + (slot * 2 + 1) * PANEL + lane] = block.scales[2 * part + 1];
        }
        _ => {}
    }
    if has_fifth_bits(weight_type) {
        for q in 0..8 {
            let bits = quad(q) >> 4 & 0x0101_0101;
            let nibble = (bits | bits >> 7 | bits >> 14 | bits >> 21) as u8 & 15;
            group[fifths_offset(weight_type) + slot * 64 + q * 8 + lane / 2] |= nibble << (lane % 2 * 4);
        }
    }
    let words: &mut [u32] = bytemuck::cast_slice_mut(&mut group[codes_offset(weight_type)..]);
    let nibbles = |q: usize| quad(q) & 0x0f0f_0f0f | (quad(q + 4) & 0x0f0f_0f0f) << 4;
    match weight_type {
        WeightType::Q8_0 => (0..8).for_each(|q| words[(slot * 8 + q) * PANEL + lane] = quad(q)),
        WeightType::Q4_0
        | WeightType::Q4_1
        | WeightType::Q5_0
        | WeightType::Q5_1
        | WeightType::Q4_K
        | WeightType::Q5_K => {
            (0..4).for_each(|q| words[(slot * 4 + q) * PANEL + lane] = nibbles(q));
        }
        _ => {
            (0..4).for_each(|q| words[(slot * 6 + q) * PANEL + lane] = nibbles(q));
            for half in 0..2 {
                let pairs = (0..4).fold(0, |word, q| word | (quad(half * 4 + q) >> 4 & 0x0303_0303) << (2 * q));
                words[(slot * 6 + 4 + half) * PANEL + lane] = pairs;
            }
        }
    }
}

/// The four codes of quad `q` of block `slot` of 16 columns, one a byte. Loops over lanes of fixed-size arrays, so
/// that the compiler makes vectors of them.
#[inline(always)]
fn quads(weight_type: WeightType, group: &[u8], slot: usize, q: usize) -> [u32; PANEL] {
    let codes: &[u32] = bytemuck::cast_slice(&group[codes_offset(weight_type)..]);
    let vector = |at: usize| -> [u32; PANEL] { codes[at * PANEL..][..PANEL].try_into().expect("16 lanes") };
    let nibbles = |at: usize| vector(at).map(|word| word >> (q / 4 * 4) & 0x0f0f_0f0f);
    match weight_type {
        WeightType::Q8_0 => vector(slot * 8 + q),
        WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q4_K => nibbles(slot * 4 + q % 4),
        WeightType::Q5_0 | WeightType::Q5_1 | WeightType::Q5_K => {
            let mut quads = nibbles(slot * 4 + q % 4);
            let fifths: &[u32] = bytemuck::cast_slice(&group[fifths_offset(weight_type) + slot * 64 + q * 8..][..8]);
            for (lane, quad) in quads.iter_mut().enumerate() {
                let fifth = fifths[lane / 8] >> (lane % 8 * 4);
                *quad |= (fifth & 1 | (fifth & 2) << 7 | (fifth & 4) << 14 | (fifth & 8) << 21) << 4;
            }
            quads
        }
        _ => {
            let mut quads = nibbles(slot * 6 + q % 4);
            for (quad, pairs) in quads.iter_mut().zip(vector(slot * 6 + 4 + q / 4)) {
                *quad |= (pairs >> (q % 4 * 2) & 0x0303_0303) << 4;
            }
            quads
        }
    }
}

/// Scales of the codes of quad `q` of 16 columns, and what is subtracted from the products.
#[inline(always)]
fn scales_and_minima(weight_type: WeightType, group: &[u8], slot: usize, q: usize) -> ([f32; PANEL], [f32; PANEL]) {
    let halves = |at: usize| -> [f32; PANEL] {
        let halves: &[u16] = &bytemuck::cast_slice(group)[at * PANEL..][..PANEL];
        let halves: [u16; PANEL] = halves.try_into().expect("16 lanes");
        halves.map(f32_of_f16)
    };
    let bytes = |at: usize| -> [u8; PANEL] { group[at..][..PANEL].try_into().expect("16 lanes") };
    let times = |mut factors: [f32; PANEL], bytes: [u8; PANEL]| {
        factors.iter_mut().zip(bytes).for_each(|(factor, byte)| *factor *= f32::from(byte));
        factors
    };
    match weight_type {
        WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0 => (halves(slot), [0.0; PANEL]),
        WeightType::Q4_1 | WeightType::Q5_1 => (halves(slot), halves(2 + slot)),
        WeightType::Q4_K | WeightType::Q5_K => {
            (times(halves(0), bytes(64 + slot * PANEL)), times(halves(1), bytes(192 + slot * PANEL)))
        }
        _ => {
            let mut scales = halves(0);
            let integers = bytes(64 + (slot * 2 + q / 4) * PANEL);
            scales.iter_mut().zip(integers).for_each(|(scale, byte)| *scale *= f32::from(byte as i8));
            (scales, [0.0; PANEL])
        }
    }
}

/// The number that f16 bits stand for; unlike the library's conversion it becomes vector code in a loop.
#[inline(always)]
fn f32_of_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    // Read as f32 bits, exponent and fraction stand for a number 2¹¹² too small, subnormal or not.
    let finite = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
    let value = if magnitude < 0x7c00 { finite.to_bits() } else { magnitude << 13 | 0x7f80_0000 };
    f32::from_bits(value | u32::from(bits & 0x8000) << 16)
}

/// Writes the weights of inputs `first..first + output.len()/16` of a panel of GGML groups as f32 `[k][16]`; `first`
/// and the length are whole blocks of 32.
#[inline(always)]
pub(super) fn expand_panel(weight_type: WeightType, panel: &[u8], first: usize, output: &mut [f32]) {
    let blocks = group_blocks(weight_type);
    for (index, output) in output.chunks_exact_mut(BLOCK * PANEL).enumerate() {
        let at = first / BLOCK + index;
        let group = &panel[at / blocks * group_bytes(weight_type)..][..group_bytes(weight_type)];
        let slot = at % blocks;
        for (half, output) in output.chunks_exact_mut(4 * 4 * PANEL).enumerate() {
            let (scales, minima) = scales_and_minima(weight_type, group, slot, half * 4);
            for (q, output) in output.chunks_exact_mut(4 * PANEL).enumerate() {
                let words = quads(weight_type, group, slot, half * 4 + q);
                for (byte, output) in output.chunks_exact_mut(PANEL).enumerate() {
                    for lane in 0..PANEL {
                        let code = (words[lane] >> (8 * byte) & 255) as i32 - i32::from(offset(weight_type));
                        output[lane] = scales[lane] * code as f32 - minima[lane];
                    }
                }
            }
        }
    }
}

/// Writes one column of a panel as f32 `[in_features]`.
pub(super) fn expand_column(weight_type: WeightType, panel: &[u8], column: usize, output: &mut [f32]) {
    match weight_type {
        WeightType::F32 => {
            let words: &[f32] = bytemuck::cast_slice(panel);
            output.iter_mut().zip(words.chunks_exact(PANEL)).for_each(|(value, lanes)| *value = lanes[column]);
        }
        WeightType::F16 | WeightType::Bf16 => {
            let words: &[bf16] = bytemuck::cast_slice(panel);
            for (pair, lanes) in output.chunks_mut(2).zip(words.chunks_exact(2 * PANEL)) {
                pair.iter_mut().zip(&lanes[2 * column..]).for_each(|(value, lane)| *value = lane.to_f32());
            }
        }
        _ => {
            let blocks = group_blocks(weight_type);
            for (at, output) in output.chunks_exact_mut(BLOCK).enumerate() {
                let group = &panel[at / blocks * group_bytes(weight_type)..][..group_bytes(weight_type)];
                for (half, output) in output.chunks_exact_mut(BLOCK / 2).enumerate() {
                    let (scales, minima) = scales_and_minima(weight_type, group, at % blocks, half * 4);
                    for (q, output) in output.chunks_exact_mut(4).enumerate() {
                        let word = quads(weight_type, group, at % blocks, half * 4 + q)[column];
                        for (value, code) in output.iter_mut().zip(word.to_le_bytes()) {
                            let number = f32::from(i16::from(code) - offset(weight_type));
                            *value = scales[column] * number - minima[column];
                        }
                    }
                }
            }
        }
    }
}
