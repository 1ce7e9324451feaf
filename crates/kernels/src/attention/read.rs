//! The keys of a block, row by row, as f32.

use bytemuck::cast_slice;

use super::transpose::rows_of_page;
use super::{KEY_DIM_MULTIPLE, KeyBlock, PAGE_KEYS};
use crate::InstructionSet;
use crate::simd::{self, Operation, Simd};

/// Words of each key that are read together.
const WORDS: usize = 16;

/// Writes the keys of `block`, of padded width `key_dim`, to the rows of `rows` `[rows][width]` that `targets` names, as the
/// block holds them: rounded, and int8 keys less their channel mean. What a row has beyond `key_dim` stays as it is.
///
/// # Panics
/// When `targets` names no row for some key, or `width` is below `key_dim`.
pub fn read_keys(block: KeyBlock<'_>, key_dim: usize, targets: &[u32], width: usize, rows: &mut [f32]) {
    let level = InstructionSet::current();
    read_keys_at(ReadKeys { level, block, key_dim, targets, width, rows });
}

fn read_keys_at(read: ReadKeys<'_>) {
    assert!(
        read.key_dim.is_multiple_of(KEY_DIM_MULTIPLE) && read.key_dim <= read.width,
        "keys of width {}",
        read.key_dim
    );
    simd::run(read.level, read);
}

struct ReadKeys<'a> {
    level: InstructionSet,
    block: KeyBlock<'a>,
    key_dim: usize,
    targets: &'a [u32],
    width: usize,
    rows: &'a mut [f32],
}

impl Operation for ReadKeys<'_> {
    type Output = ();

    /// Plain loops over the words of a key, which the compiler turns into the vectors of the caller's instruction set.
    #[inline(always)]
    fn eval<S: Simd>(mut self, _: S) {
        match self.block {
            KeyBlock::F32 { keys, .. } => self.read_pages(
                cast_slice(keys),
                1,
                #[inline(always)]
                |_, words, row| row.copy_from_slice(cast_slice(words)),
            ),
            KeyBlock::Bf16 { keys, .. } => self.read_pages(
                cast_slice(keys),
                2,
                #[inline(always)]
                |_, words, row| {
                    let bits = cast_slice::<u32, u16>(words);
                    row.iter_mut().zip(bits).for_each(|(value, bits)| *value = f32::from_bits(u32::from(*bits) << 16));
                },
            ),
            KeyBlock::Int8 { keys, key_scales, .. } => self.read_pages(
                cast_slice(keys),
                4,
                #[inline(always)]
                |key, words, row| {
                    let (bytes, scale) = (cast_slice::<u32, u8>(words), key_scales[key]);
                    row.iter_mut().zip(bytes).for_each(|(value, byte)| *value = (f32::from(*byte) - 128.0) * scale);
                },
            ),
        }
    }
}

impl ReadKeys<'_> {
    /// Calls `convert` with the number of each key of `keys`, pages of `[words][16]` with `in_word` numbers in a word, up to
    /// [`WORDS`] of its words at a time, and what they are written to.
    #[inline(always)]
    fn read_pages(&mut self, keys: &[u32], in_word: usize, convert: impl Fn(usize, &[u32], &mut [f32])) {
        let mut buffer = [0; PAGE_KEYS * WORDS];
        for (page, source) in keys.chunks_exact(PAGE_KEYS * self.key_dim / in_word).enumerate() {
            for (part, source) in source.chunks(PAGE_KEYS * WORDS).enumerate() {
                rows_of_page(self.level, source, &mut buffer);
                let in_part = source.len() / PAGE_KEYS;
                for (lane, words) in buffer.chunks_exact(in_part).take(PAGE_KEYS).enumerate() {
                    let key = page * PAGE_KEYS + lane;
                    let first = self.targets[key] as usize * self.width + part * WORDS * in_word;
                    convert(key, words, &mut self.rows[first..][..in_part * in_word]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elementwise::levels;

    #[test]
    fn keys_come_to_their_rows() {
        let (pages, width) = (2, 96);
        let keys = pages * PAGE_KEYS;
        let targets: Vec<u32> = (0..keys as u32).map(|key| (key * 7 + 3) % keys as u32).collect();
        for level in levels() {
            for key_dim in [4, 16, 20, 32, 60, 64, 68, 96] {
                let number = |key: usize, channel: usize| (key * 3 + channel) % 101;
                let place = |key: usize, channel: usize, together: usize| {
                    let in_page = (channel / together * PAGE_KEYS + key % PAGE_KEYS) * together + channel % together;
                    key / PAGE_KEYS * PAGE_KEYS * key_dim + in_page
                };
                let (mut f32_keys, mut bf16_keys) = (vec![0.0; keys * key_dim], vec![0_u16; keys * key_dim]);
                let mut int8_keys = vec![0_u8; keys * key_dim];
                let key_scales: Vec<f32> = (0..keys).map(|key| 0.5 + key as f32).collect();
                for (key, channel) in (0..keys).flat_map(|key| (0..key_dim).map(move |channel| (key, channel))) {
                    let value = number(key, channel) as f32;
                    f32_keys[place(key, channel, 1)] = value;
                    bf16_keys[place(key, channel, 2)] = crate::brain_bits(value);
                    int8_keys[place(key, channel, 4)] = number(key, channel) as u8;
                }
                let blocks = [
                    KeyBlock::F32 { keys: &f32_keys, values: &[] },
                    KeyBlock::Bf16 { keys: &bf16_keys, values: &[] },
                    KeyBlock::Int8 { keys: &int8_keys, key_scales: &key_scales, values: &[], value_scales: &[] },
                ];
                for (kind, block) in blocks.into_iter().enumerate() {
                    let mut rows = vec![-7.0; keys * width];
                    read_keys_at(ReadKeys { level, block, key_dim, targets: &targets, width, rows: &mut rows });
                    for key in 0..keys {
                        let row = &rows[targets[key] as usize * width..][..width];
                        for (channel, value) in row.iter().enumerate() {
                            let number = number(key, channel) as f32;
                            let expected = match (channel < key_dim, kind) {
                                (false, _) => -7.0,
                                (_, 2) => (number - 128.0) * key_scales[key],
                                _ => number,
                            };
                            assert_eq!(*value, expected, "{}, kind {kind}, width {key_dim}", level.name());
                        }
                    }
                }
            }
        }
    }
}
