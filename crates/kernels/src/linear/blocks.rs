//! The file formats of weights: bytes to numbers and back.
//!
//! The layouts are those of GGML's `block_q8_0`, `block_q4_0`, `block_q4_1`, `block_q5_0`, `block_q5_1`, `block_q4_K`,
//! `block_q5_K` and `block_q6_K` (<https://github.com/ggml-org/ggml>, `src/ggml-common.h`).

use half::{bf16, f16};

use super::WeightType;

/// Most weights one file block holds.
pub(super) const SUPERBLOCK: usize = 256;

/// One file block with its bit fields apart: weight `i` is
/// `scale · scales[i / (weights per scale)] · (codes[i] − offset) − minimum · minima[i / 32]`; `scales` and `minima`
/// count only for the superblocks of 256.
#[derive(Clone)]
pub(super) struct UnpackedBlock {
    /// Unsigned integers, `offset` above the stored value.
    pub codes: [u8; SUPERBLOCK],
    /// f16 bits of the block's scale.
    pub scale: u16,
    /// f16 bits of the factor of the minima (Q4_1, Q5_1: of the minimum, the least value's opposite).
    pub minimum: u16,
    /// Integer scales: one for each 32 weights (Q4_K, Q5_K), one i8 for each 16 (Q6_K), unused otherwise.
    pub scales: [u8; 16],
    /// Integer minima, one for each 32 weights (Q4_K, Q5_K).
    pub minima: [u8; 8],
}

impl UnpackedBlock {
    pub const ZERO: Self = Self { codes: [0; SUPERBLOCK], scale: 0, minimum: 0, scales: [0; 16], minima: [0; 8] };

    /// Reads one block of a GGML type.
    pub fn read(&mut self, weight_type: WeightType, block: &[u8]) {
        let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        match weight_type {
            WeightType::Q8_0 => {
                self.scale = u16_at(0);
                for (code, &byte) in self.codes.iter_mut().zip(&block[2..34]) {
                    *code = byte ^ 0x80;
                }
            }
            WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q5_0 | WeightType::Q5_1 => {
                self.scale = u16_at(0);
                if has_minima(weight_type) {
                    self.minimum = u16_at(2) ^ SIGN;
                }
                let (low, high) = self.codes[..32].split_at_mut(16);
                for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[block.len() - 16..]) {
                    *low = byte & 15;
                    *high = byte >> 4;
                }
                if has_fifth_bits(weight_type) {
                    let at = block.len() - 20;
                    let fifths = u32::from_le_bytes(block[at..at + 4].try_into().expect("4 bytes"));
                    for (index, code) in self.codes[..32].iter_mut().enumerate() {
                        *code |= ((fifths >> index & 1) as u8) << 4;
                    }
                }
            }
            WeightType::Q4_K | WeightType::Q5_K => {
                self.scale = u16_at(0);
                self.minimum = u16_at(2);
                (self.scales, self.minima) = read_six_bit_scales(block[4..16].try_into().expect("12 bytes"));
                let quarters = if weight_type == WeightType::Q4_K { &block[16..144] } else { &block[48..176] };
                for (codes, bytes) in self.codes.chunks_exact_mut(64).zip(quarters.chunks_exact(32)) {
                    let (low, high) = codes.split_at_mut(32);
                    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
                        *low = byte & 15;
                        *high = byte >> 4;
                    }
                }
                if weight_type == WeightType::Q5_K {
                    for (bit, codes) in self.codes.chunks_exact_mut(32).enumerate() {
                        for (code, &byte) in codes.iter_mut().zip(&block[16..48]) {
                            *code |= (byte >> bit & 1) << 4;
                        }
                    }
                }
            }
            WeightType::Q6_K => {
                self.scale = u16_at(208);
                self.scales.copy_from_slice(&block[192..208]);
                for (half, codes) in self.codes.chunks_exact_mut(128).enumerate() {
                    let low = &block[half * 64..][..64];
                    let high = &block[128 + half * 32..][..32];
                    for (quarter, codes) in codes.chunks_exact_mut(32).enumerate() {
                        let low = &low[quarter % 2 * 32..][..32];
                        for ((code, &low), &high) in codes.iter_mut().zip(low).zip(high) {
                            *code = (low >> (quarter / 2 * 4) & 15) | (high >> (2 * quarter) & 3) << 4;
                        }
                    }
                }
            }
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 => unreachable!("floats have no blocks"),
        }
    }

    /// Writes the block in the file's format.
    pub fn write(&self, weight_type: WeightType, block: &mut [u8]) {
        let nibbles = |codes: &[u8], bytes: &mut [u8]| {
            let (low, high) = codes.split_at(codes.len() / 2);
            for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
                *byte = low & 15 | (high & 15) << 4;
            }
        };
        match weight_type {
            WeightType::Q8_0 => {
                block[..2].copy_from_slice(&self.scale.to_le_bytes());
                for (byte, &code) in block[2..].iter_mut().zip(&self.codes) {
                    *byte = code ^ 0x80;
                }
            }
            WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q5_0 | WeightType::Q5_1 => {
                block[..2].copy_from_slice(&self.scale.to_le_bytes());
                if has_minima(weight_type) {
                    block[2..4].copy_from_slice(&(self.minimum ^ SIGN).to_le_bytes());
                }
                let codes = block.len() - 16;
                if has_fifth_bits(weight_type) {
                    let bits =
                        self.codes[..32].iter().rev().fold(0_u32, |bits, &code| bits << 1 | u32::from(code >> 4));
                    block[codes - 4..codes].copy_from_slice(&bits.to_le_bytes());
                }
                nibbles(&self.codes[..32], &mut block[codes..]);
            }
            WeightType::Q4_K | WeightType::Q5_K => {
                block[..2].copy_from_slice(&self.scale.to_le_bytes());
                block[2..4].copy_from_slice(&self.minimum.to_le_bytes());
                block[4..16].copy_from_slice(&write_six_bit_scales(&self.scales, &self.minima));
                let quarters = if weight_type == WeightType::Q4_K { 16 } else { 48 };
                for (codes, bytes) in self.codes.chunks_exact(64).zip(block[quarters..].chunks_exact_mut(32)) {
                    nibbles(codes, bytes);
                }
                if weight_type == WeightType::Q5_K {
                    block[16..48].fill(0);
                    for (index, &code) in self.codes.iter().enumerate() {
                        block[16 + index % 32] |= (code >> 4) << (index / 32);
                    }
                }
            }
            WeightType::Q6_K => {
                block[..192].fill(0);
                for (index, &code) in self.codes.iter().enumerate() {
                    let (half, quarter, lane) = (index / 128, index / 32 % 4, index % 32);
                    block[half * 64 + quarter % 2 * 32 + lane] |= (code & 15) << (quarter / 2 * 4);
                    block[128 + half * 32 + lane] |= (code >> 4) << (2 * quarter);
                }
                block[192..208].copy_from_slice(&self.scales);
                block[208..210].copy_from_slice(&self.scale.to_le_bytes());
            }
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 => unreachable!("floats have no blocks"),
        }
    }

    fn dequantise(&self, weight_type: WeightType, output: &mut [f32]) {
        let scale = f16::from_bits(self.scale).to_f32();
        let minimum = f16::from_bits(self.minimum).to_f32();
        for (index, (value, &code)) in output.iter_mut().zip(&self.codes).enumerate() {
            let number = f32::from(i16::from(code) - offset(weight_type));
            *value = match weight_type {
                WeightType::Q4_K | WeightType::Q5_K => {
                    let part = index / 32;
                    scale * f32::from(self.scales[part]) * number - minimum * f32::from(self.minima[part])
                }
                WeightType::Q6_K => scale * f32::from(self.scales[index / 16] as i8) * number,
                WeightType::Q4_1 | WeightType::Q5_1 => scale * number - minimum,
                _ => scale * number,
            };
        }
    }
}

/// What the unsigned codes of a type lie above the values they stand for.
pub(super) fn offset(weight_type: WeightType) -> i16 {
    match weight_type {
        WeightType::Q8_0 => 128,
        WeightType::Q4_0 => 8,
        WeightType::Q5_0 => 16,
        WeightType::Q6_K => 32,
        _ => 0,
    }
}

/// Whether a minimum is subtracted from the weights of a type; their codes have no offset then.
pub(super) const fn has_minima(weight_type: WeightType) -> bool {
    matches!(weight_type, WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K)
}

/// Whether the fifth bits of the codes of a type lie apart from the other four.
pub(super) const fn has_fifth_bits(weight_type: WeightType) -> bool {
    matches!(weight_type, WeightType::Q5_0 | WeightType::Q5_1 | WeightType::Q5_K)
}

/// The sign of f16 bits: files hold the least value where the unpacked block holds a minimum to subtract.
const SIGN: u16 = 0x8000;

fn read_six_bit_scales(packed: &[u8; 12]) -> ([u8; 16], [u8; 8]) {
    let (mut scales, mut minima) = ([0; 16], [0; 8]);
    for part in 0..4 {
        scales[part] = packed[part] & 63;
        minima[part] = packed[part + 4] & 63;
        scales[part + 4] = packed[part + 8] & 15 | packed[part] >> 6 << 4;
        minima[part + 4] = packed[part + 8] >> 4 | packed[part + 4] >> 6 << 4;
    }
    (scales, minima)
}

fn write_six_bit_scales(scales: &[u8; 16], minima: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for part in 0..4 {
        packed[part] = scales[part] | scales[part + 4] >> 4 << 6;
        packed[part + 4] = minima[part] | minima[part + 4] >> 4 << 6;
        packed[part + 8] = scales[part + 4] & 15 | (minima[part + 4] & 15) << 4;
    }
    packed
}

/// Turns `bytes` in the file format of `weight_type` into numbers, exactly as the format defines them.
///
/// # Panics
/// When `bytes` is not what `output.len()` weights take.
pub fn dequantise(weight_type: WeightType, bytes: &[u8], output: &mut [f32]) {
    assert_eq!(Some(bytes.len()), weight_type.row_bytes(output.len()), "bytes of {} weights", output.len());
    match weight_type {
        WeightType::F32 => output
            .iter_mut()
            .zip(bytes.chunks_exact(4))
            .for_each(|(value, b)| *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        WeightType::F16 => output
            .iter_mut()
            .zip(bytes.chunks_exact(2))
            .for_each(|(value, b)| *value = f16::from_le_bytes([b[0], b[1]]).to_f32()),
        WeightType::Bf16 => output
            .iter_mut()
            .zip(bytes.chunks_exact(2))
            .for_each(|(value, b)| *value = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        _ => {
            let mut block = UnpackedBlock::ZERO;
            let blocks = bytes.chunks_exact(weight_type.block_bytes());
            for (values, bytes) in output.chunks_exact_mut(weight_type.block_weights()).zip(blocks) {
                block.read(weight_type, bytes);
                block.dequantise(weight_type, values);
            }
        }
    }
}

/// Rounds `values` to the nearest weights that `weight_type` can hold under simple scales (largest magnitude, or
/// least and largest value, of each part), in the file format. Good for tests and measurements; llama.cpp's
/// quantiser searches for better scales.
///
/// # Panics
/// When `values` is no whole number of blocks.
pub fn quantise(weight_type: WeightType, values: &[f32]) -> Vec<u8> {
    let bytes = weight_type.row_bytes(values.len()).expect("a whole number of blocks");
    match weight_type {
        WeightType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        WeightType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        WeightType::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => {
            let mut output = vec![0; bytes];
            let blocks = output.chunks_exact_mut(weight_type.block_bytes());
            for (values, bytes) in values.chunks_exact(weight_type.block_weights()).zip(blocks) {
                quantise_block(weight_type, values).write(weight_type, bytes);
            }
            output
        }
    }
}

fn quantise_block(weight_type: WeightType, values: &[f32]) -> UnpackedBlock {
    let mut block = UnpackedBlock::ZERO;
    let largest = |values: &[f32]| values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    match weight_type {
        WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0 => {
            let offset = f32::from(offset(weight_type));
            let limit = offset - 1.0;
            let scale = f16::from_f32(largest(values) / limit);
            block.scale = scale.to_bits();
            for (code, value) in block.codes.iter_mut().zip(values) {
                *code =
                    (nearest(*value, scale.to_f32()) + offset).clamp(offset - limit - 1.0, 2.0 * offset - 1.0) as u8;
            }
        }
        WeightType::Q4_1 | WeightType::Q5_1 => {
            let limit = if weight_type == WeightType::Q4_1 { 15.0 } else { 31.0 };
            let (least, most) =
                values.iter().fold((f32::MAX, f32::MIN), |(least, most), &v| (least.min(v), most.max(v)));
            let scale = f16::from_f32((most - least) / limit);
            let minimum = f16::from_f32(-least);
            (block.scale, block.minimum) = (scale.to_bits(), minimum.to_bits());
            for (code, value) in block.codes.iter_mut().zip(values) {
                *code = nearest(*value + minimum.to_f32(), scale.to_f32()).clamp(0.0, limit) as u8;
            }
        }
        WeightType::Q4_K | WeightType::Q5_K => {
            let limit = if weight_type == WeightType::Q4_K { 15.0 } else { 31.0 };
            let ranges: Vec<(f32, f32)> = values
                .chunks_exact(32)
                .map(|part| {
                    let least = part.iter().fold(0.0_f32, |least, &value| least.min(value));
                    let most = part.iter().fold(least, |most, &value| most.max(value));
                    ((most - least) / limit, -least)
                })
                .collect();
            let scale = f16::from_f32(ranges.iter().fold(0.0_f32, |max, range| max.max(range.0)) / 63.0);
            let minimum = f16::from_f32(ranges.iter().fold(0.0_f32, |max, range| max.max(range.1)) / 63.0);
            (block.scale, block.minimum) = (scale.to_bits(), minimum.to_bits());
            for (part, range) in ranges.iter().enumerate() {
                let (step, least) = (nearest(range.0, scale.to_f32()), nearest(range.1, minimum.to_f32()));
                block.scales[part] = step.clamp(0.0, 63.0) as u8;
                block.minima[part] = least.clamp(0.0, 63.0) as u8;
                let step = scale.to_f32() * f32::from(block.scales[part]);
                let least = minimum.to_f32() * f32::from(block.minima[part]);
                for index in part * 32..part * 32 + 32 {
                    block.codes[index] = nearest(values[index] + least, step).clamp(0.0, limit) as u8;
                }
            }
        }
        WeightType::Q6_K => {
            let scale = f16::from_f32(largest(values) / 31.0 / 127.0);
            block.scale = scale.to_bits();
            for (part, values) in values.chunks_exact(16).enumerate() {
                let step = nearest(largest(values) / 31.0, scale.to_f32()).clamp(0.0, 127.0) as i8;
                block.scales[part] = step as u8;
                let step = scale.to_f32() * f32::from(step);
                for (code, &value) in block.codes[part * 16..].iter_mut().zip(values) {
                    *code = (nearest(value, step) + 32.0).clamp(0.0, 63.0) as u8;
                }
            }
        }
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => unreachable!("floats have no blocks"),
    }
    block
}

/// The whole number of steps nearest to `value`; 0 when a step is 0.
fn nearest(value: f32, step: f32) -> f32 {
    if step == 0.0 { 0.0 } else { (value / step).round() }
}
