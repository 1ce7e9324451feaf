//! The keys and values of a block, row by row, as f32.

use bytemuck::cast_slice;

use super::transpose::rows_of_page;
use super::{KEY_DIM_MULTIPLE, KeyBlock, PAGE_KEYS, VALUE_DIM_MULTIPLE};
use crate::InstructionSet;
use crate::simd::{self, Operation, Simd};

/// Words of each key that are read together.
const WORDS: usize = 16;
/// Channels of values that are read together.
const LANES: usize = VALUE_DIM_MULTIPLE;

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

/// Writes the values of `block`, of padded width `value_dim`, to `rows` `[keys][value_dim]`.
///
/// # Panics
/// When the width is no multiple of [`VALUE_DIM_MULTIPLE`], or there are not as many rows as values.
pub fn read_values(block: KeyBlock<'_>, value_dim: usize, rows: &mut [f32]) {
    read_values_at(InstructionSet::current(), ReadValues { block, value_dim, rows });
}

fn read_values_at(level: InstructionSet, read: ReadValues<'_>) {
    assert!(read.value_dim.is_multiple_of(LANES), "values of width {}", read.value_dim);
    simd::run(level, read);
}

struct ReadValues<'a> {
    block: KeyBlock<'a>,
    value_dim: usize,
    rows: &'a mut [f32],
}

impl Operation for ReadValues<'_> {
    type Output = ();

    /// Plain loops over sixteen channels, which the compiler turns into the vectors of the caller's instruction set.
    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { block, value_dim, rows } = self;
        match block {
            KeyBlock::F32 { values, .. } => rows.copy_from_slice(values),
            KeyBlock::Bf16 { values, .. } => read_pairs(
                values,
                value_dim,
                rows,
                #[inline(always)]
                |bits, _| f32::from_bits(u32::from(bits) << 16),
            ),
            KeyBlock::Int8 { values, value_scales, .. } => read_pairs(
                values,
                value_dim,
                rows,
                #[inline(always)]
                |integer: i8, key| f32::from(integer) * value_scales[key],
            ),
        }
    }
}

/// Writes `values` `[keys / 2][width][2]` to `rows` `[keys][width]`, each number by `convert`, which is told whose it is.
#[inline(always)]
fn read_pairs<T: Copy>(values: &[T], width: usize, rows: &mut [f32], convert: impl Fn(T, usize) -> f32) {
    assert_eq!(values.len(), rows.len(), "as many rows as values");
    for (pair, (values, rows)) in values.chunks_exact(2 * width).zip(rows.chunks_exact_mut(2 * width)).enumerate() {
        let (even, odd) = rows.split_at_mut(width);
        let sources = values.as_chunks::<{ 2 * LANES }>().0;
        let targets = even.as_chunks_mut::<LANES>().0.iter_mut().zip(odd.as_chunks_mut::<LANES>().0);
        for (source, (even, odd)) in sources.iter().zip(targets) {
            for lane in 0..LANES {
                even[lane] = convert(source[2 * lane], 2 * pair);
                odd[lane] = convert(source[2 * lane + 1], 2 * pair + 1);
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

    #[test]
    fn values_come_to_their_rows() {
        let keys = 3 * PAGE_KEYS;
        let scales: Vec<f32> = (0..keys).map(|key| 0.5 + key as f32).collect();
        for level in levels() {
            for width in [16, 48, 64] {
                let integer = |key: usize, channel: usize| ((key * 31 + channel * 7) % 255) as i32 - 127;
                let pair = |at: usize| integer(at / (2 * width) * 2 + at % 2, at / 2 % width);
                let whole: Vec<f32> = (0..keys * width).map(|at| integer(at / width, at % width) as f32).collect();
                let narrow: Vec<u16> = (0..keys * width).map(|at| crate::brain_bits(pair(at) as f32)).collect();
                let integers: Vec<i8> = (0..keys * width).map(|at| pair(at) as i8).collect();
                let blocks = [
                    KeyBlock::F32 { keys: &[], values: &whole },
                    KeyBlock::Bf16 { keys: &[], values: &narrow },
                    KeyBlock::Int8 { keys: &[], key_scales: &[], values: &integers, value_scales: &scales },
                ];
                for (kind, block) in blocks.into_iter().enumerate() {
                    let mut rows = vec![9.0; keys * width];
                    read_values_at(level, ReadValues { block, value_dim: width, rows: &mut rows });
                    for (at, value) in rows.into_iter().enumerate() {
                        let scale = if kind == 2 { scales[at / width] } else { 1.0 };
                        assert_eq!(value, scale * whole[at], "{level:?}, kind {kind}, width {width}");
                    }
                }
            }
        }
    }
}
