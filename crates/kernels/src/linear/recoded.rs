//! File formats of weights that are computed as another: their rows are written anew as they are packed.
//!
//! The layouts are those of GGML's `block_q2_K`, `block_q3_K`, `block_iq4_nl` and `block_iq4_xs`
//! (<https://github.com/ggml-org/ggml>, `src/ggml-common.h`).

use half::f16;

use super::WeightType;
use super::blocks::{SUPERBLOCK, UnpackedBlock, quantise};

/// A file format whose weights another type holds: without loss (Q3_K, IQ4_NL), with the scale of 32 weights rounded to
/// f16 (IQ4_XS, at most a 2048th of a weight), or rounded to a 254th of the largest of 32 weights (Q2_K).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum RecodedType {
    /// Superblocks of 256 weights: 2-bit integers, 4-bit scales and minima for each 16.
    Q2_K,
    /// Superblocks of 256 weights: 3-bit integers, 6-bit scales for each 16.
    Q3_K,
    /// Blocks of 32 weights: f16 scale, 4-bit places in a table.
    Iq4_Nl,
    /// Superblocks of 256 weights: 6-bit scales for each 32, 4-bit places in the same table.
    Iq4_Xs,
}

/// The table of the IQ4 types.
const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl RecodedType {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::Q2_K, Self::Q3_K, Self::Iq4_Nl, Self::Iq4_Xs];

    /// Lower-case name of the type in the files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q2_K => "q2_k",
            Self::Q3_K => "q3_k",
            Self::Iq4_Nl => "iq4_nl",
            Self::Iq4_Xs => "iq4_xs",
        }
    }

    /// Weights in one block of the file format.
    pub fn block_weights(self) -> usize {
        if self == Self::Iq4_Nl { 32 } else { SUPERBLOCK }
    }

    /// Bytes of one block of the file format.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Iq4_Nl => 18,
            Self::Iq4_Xs => 136,
        }
    }

    /// The type that its weights are computed as.
    pub fn weight_type(self) -> WeightType {
        match self {
            Self::Q3_K => WeightType::Q6_K,
            Self::Q2_K | Self::Iq4_Nl | Self::Iq4_Xs => WeightType::Q8_0,
        }
    }

    /// The bytes of a row in this format in that of [`weight_type`](Self::weight_type).
    ///
    /// # Panics
    /// When `row` is no whole number of blocks.
    pub fn recode(self, row: &[u8]) -> Vec<u8> {
        assert!(row.len().is_multiple_of(self.block_bytes()), "{} bytes of {}", row.len(), self.name());
        let blocks = row.chunks_exact(self.block_bytes());
        let target = self.weight_type();
        let block_bytes = self.block_weights() / target.block_weights() * target.block_bytes();
        let mut output = vec![0; blocks.len() * block_bytes];
        for (block, target) in blocks.zip(output.chunks_exact_mut(block_bytes)) {
            match self {
                Self::Q2_K => recode_q2_k(block, target),
                Self::Q3_K => recode_q3_k(block, target),
                Self::Iq4_Nl => write_q8_0(f16_at(block, 0), &block[2..], target),
                Self::Iq4_Xs => recode_iq4_xs(block, target),
            }
        }
        output
    }
}

fn f16_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// Sixteen bytes of scales, 64 of codes, f16 factors of scales and minima.
fn recode_q2_k(block: &[u8], target: &mut [u8]) {
    let (scales, codes) = block[..80].split_at(16);
    let (scale, minimum) = (f16_at(block, 80).to_f32(), f16_at(block, 82).to_f32());
    let mut values = [0.0; SUPERBLOCK];
    for (part, values) in values.chunks_exact_mut(16).enumerate() {
        let scale = scale * f32::from(scales[part] & 15);
        let minimum = minimum * f32::from(scales[part] >> 4);
        for (lane, value) in values.iter_mut().enumerate() {
            *value = scale * f32::from(two_bits(codes, part, lane)) - minimum;
        }
    }
    target.copy_from_slice(&quantise(WeightType::Q8_0, &values));
}

/// 32 bytes of third bits, 64 of the lower two, twelve of scales, the f16 scale of them all.
fn recode_q3_k(block: &[u8], target: &mut [u8]) {
    let (third_bits, codes) = block[..96].split_at(32);
    let scales = &block[96..108];
    let mut unpacked = UnpackedBlock { scale: f16_at(block, 108).to_bits(), ..UnpackedBlock::ZERO };
    for part in 0..16 {
        // Four bits of two scales in each of eight bytes, the other two of four scales in each of four.
        let low = scales[part % 8] >> (part / 8 * 4) & 15;
        let high = scales[8 + part % 4] >> (part / 4 * 2) & 3;
        unpacked.scales[part] = (low | high << 4).wrapping_sub(32);
        for (lane, code) in unpacked.codes[part * 16..][..16].iter_mut().enumerate() {
            let third = third_bits[part % 2 * 16 + lane] >> (part / 2) & 1;
            // The offset is 4 in the file and 32 in a block of Q6_K.
            *code = (two_bits(codes, part, lane) | third << 2) + 28;
        }
    }
    unpacked.write(WeightType::Q6_K, target);
}

/// Code `lane` of the sixteen of `part`: each half of a superblock lies in 32 bytes, two bits of each to a quarter of it.
fn two_bits(codes: &[u8], part: usize, lane: usize) -> u8 {
    codes[part / 8 * 32 + part % 2 * 16 + lane] >> (part % 8 / 2 * 2) & 3
}

/// The f16 scale, two bits of each part's scale, the other four, 128 bytes of places.
fn recode_iq4_xs(block: &[u8], target: &mut [u8]) {
    let scale = f16_at(block, 0).to_f32();
    let high_bits = u16::from_le_bytes([block[2], block[3]]);
    let (low_bits, places) = block[4..].split_at(4);
    let targets = target.chunks_exact_mut(WeightType::Q8_0.block_bytes());
    for (part, (places, target)) in places.chunks_exact(16).zip(targets).enumerate() {
        let low = low_bits[part / 2] >> (part % 2 * 4) & 15;
        let high = (high_bits >> (2 * part) & 3) as u8;
        let factor = f32::from(low | high << 4) - 32.0;
        write_q8_0(f16::from_f32(scale * factor), places, target);
    }
}

/// Writes 32 weights, whose places in the table lie in the halves of sixteen bytes.
fn write_q8_0(scale: f16, places: &[u8], target: &mut [u8]) {
    let (factor, codes) = target.split_at_mut(2);
    factor.copy_from_slice(&scale.to_le_bytes());
    let (low, high) = codes.split_at_mut(16);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(places) {
        *low = IQ4_VALUES[usize::from(byte & 15)] as u8;
        *high = IQ4_VALUES[usize::from(byte >> 4)] as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_blocks_are_none() {
        for kind in RecodedType::ALL {
            assert!(kind.recode(&[]).is_empty());
        }
    }
}
