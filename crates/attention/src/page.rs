//! Writing one key or value into the page layouts of [`iceformer_kernels::attention`], and reading it back.
//!
//! `slot` counts keys from the start of the buffer; widths are the padded ones, and shorter input leaves zeros.

use bytemuck::Pod;
use iceformer_kernels::attention::{PAGE_KEYS, transpose_keys};
use iceformer_kernels::half::bf16;
use iceformer_kernels::{brain_bits, nearest_integer};

/// Integers of a segment and the scale of the slot being written.
pub(crate) struct Int8Slot<'a, T> {
    pub data: &'a mut [T],
    pub scale: &'a mut f32,
}

/// Writes `key` as a page of f32 holds it, a number in each of `words`.
pub(crate) fn encode_key_f32(words: &mut [u32], key: &[f32]) {
    let (words, padding) = words.split_at_mut(key.len());
    words.copy_from_slice(bytemuck::cast_slice(key));
    padding.fill(0);
}

/// Writes `key` as a page of bf16 holds it, two numbers in each of `words`.
pub(crate) fn encode_key_bf16(words: &mut [u32], key: &[f32]) {
    let (bits, padding) = bytemuck::cast_slice_mut::<u32, u16>(words).split_at_mut(key.len());
    bits.iter_mut().zip(key).for_each(|(bits, value)| *bits = brain_bits(*value));
    padding.fill(0);
}

/// Writes the integers of `key − mean`, plus 128, as a page of int8 holds them, four in each of `words`.
pub(crate) fn encode_key_int8(words: &mut [u32], scale_of_key: &mut f32, key: &[f32], mean: &[f32]) {
    let inverse = scale(key.iter().zip(mean).map(|(value, mean)| value - mean), scale_of_key);
    let (bytes, padding) = bytemuck::cast_slice_mut::<u32, u8>(words).split_at_mut(key.len());
    for ((byte, value), mean) in bytes.iter_mut().zip(key).zip(mean) {
        *byte = (nearest_integer((value - mean) * inverse) + 128) as u8;
    }
    // A padded channel keeps the offset alone, so that it counts as zero.
    padding.fill(128);
}

/// Writes sixteen encoded keys of `words` words each, less zeros at the end, to the page that starts at `slot`.
pub(crate) fn write_page<T: Pod>(keys: &mut [T], slot: usize, encoded: [&[u32]; PAGE_KEYS], words: usize) {
    let page = &mut bytemuck::cast_slice_mut::<T, u32>(keys)[slot * words..(slot + PAGE_KEYS) * words];
    transpose_keys(encoded, page);
}

/// Writes an encoded key to `slot`.
pub(crate) fn write_key<T: Pod>(keys: &mut [T], slot: usize, encoded: &[u32]) {
    let first = slot / PAGE_KEYS * PAGE_KEYS * encoded.len();
    let page = &mut bytemuck::cast_slice_mut::<T, u32>(keys)[first..first + PAGE_KEYS * encoded.len()];
    page.as_chunks_mut::<PAGE_KEYS>()
        .0
        .iter_mut()
        .zip(encoded)
        .for_each(|(lanes, word)| lanes[slot % PAGE_KEYS] = *word);
}

/// `[16][value_dim]`.
pub(crate) fn write_value_f32(values: &mut [f32], slot: usize, value: &[f32], value_dim: usize) {
    values[slot * value_dim..][..value.len()].copy_from_slice(value);
}

/// `[8][value_dim][2]`.
pub(crate) fn write_value_bf16(values: &mut [u16], slot: usize, value: &[f32], value_dim: usize) {
    let pair = &mut values[slot / 2 * 2 * value_dim..][..2 * value_dim];
    for (target, value) in pair.iter_mut().skip(slot % 2).step_by(2).zip(value) {
        *target = brain_bits(*value);
    }
}

/// `[8][value_dim][2]`.
pub(crate) fn write_value_int8(target: Int8Slot<'_, i8>, slot: usize, value: &[f32], value_dim: usize) {
    let inverse = scale(value.iter().copied(), target.scale);
    let pair = &mut target.data[slot / 2 * 2 * value_dim..][..2 * value_dim];
    for (target, value) in pair.iter_mut().skip(slot % 2).step_by(2).zip(value) {
        *target = nearest_integer(value * inverse) as i8;
    }
}

/// As [`write_value_bf16`], the values of `slot`, an even one, and of the next.
pub(crate) fn write_value_pair_bf16(values: &mut [u16], slot: usize, pair: [&[f32]; 2], value_dim: usize) {
    let target = &mut values[slot * value_dim..][..2 * value_dim];
    for ((target, one), other) in target.as_chunks_mut::<2>().0.iter_mut().zip(pair[0]).zip(pair[1]) {
        *target = [brain_bits(*one), brain_bits(*other)];
    }
}

/// As [`write_value_int8`], the values of `slot`, an even one, and of the next.
pub(crate) fn write_value_pair_int8(
    values: &mut [i8],
    scales: &mut [f32],
    slot: usize,
    pair: [&[f32]; 2],
    value_dim: usize,
) {
    let [one, other] = [0, 1].map(|row| scale(pair[row].iter().copied(), &mut scales[row]));
    let target = &mut values[slot * value_dim..][..2 * value_dim];
    for ((target, first), second) in target.as_chunks_mut::<2>().0.iter_mut().zip(pair[0]).zip(pair[1]) {
        *target = [nearest_integer(first * one) as i8, nearest_integer(second * other) as i8];
    }
}

/// Key `slot` of a page of f32.
pub(crate) fn read_key_f32(keys: &[f32], slot: usize, key_dim: usize, key: &mut [f32]) {
    let page = &keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    let lane = page.iter().skip(slot % PAGE_KEYS).step_by(PAGE_KEYS);
    key.iter_mut().zip(lane).for_each(|(target, value)| *target = *value);
}

/// Key `slot` of a page of bf16.
pub(crate) fn read_key_bf16(keys: &[u16], slot: usize, key_dim: usize, key: &mut [f32]) {
    let page = &keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    for (step, pair) in key.chunks_mut(2).enumerate() {
        let source = &page[(step * PAGE_KEYS + slot % PAGE_KEYS) * 2..][..2];
        pair.iter_mut().zip(source).for_each(|(target, bits)| *target = bf16::from_bits(*bits).to_f32());
    }
}

/// Key `slot` of a page of int8, without its mean.
pub(crate) fn read_key_int8(keys: &[u8], scale: f32, slot: usize, key_dim: usize, key: &mut [f32]) {
    let page = &keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    for (step, four) in key.chunks_mut(4).enumerate() {
        let source = &page[(step * PAGE_KEYS + slot % PAGE_KEYS) * 4..][..4];
        four.iter_mut().zip(source).for_each(|(target, byte)| *target = (f32::from(*byte) - 128.0) * scale);
    }
}

/// The numbers of value `slot` of [`write_value_f32`]'s layout.
pub(crate) fn value_f32(values: &[f32], slot: usize, value_dim: usize) -> &[f32] {
    &values[slot * value_dim..][..value_dim]
}

/// The numbers of value `slot` of [`write_value_bf16`]'s or [`write_value_int8`]'s layout and of the value that it is paired
/// with, in turns.
pub(crate) fn paired_value<T>(values: &[T], slot: usize, value_dim: usize) -> &[T] {
    &values[slot / 2 * 2 * value_dim..][..2 * value_dim]
}

/// Value `slot` of [`write_value_f32`]'s layout.
pub(crate) fn read_value_f32(values: &[f32], slot: usize, value_dim: usize, value: &mut [f32]) {
    value.copy_from_slice(&value_f32(values, slot, value_dim)[..value.len()]);
}

/// Value `slot` of [`write_value_bf16`]'s layout.
pub(crate) fn read_value_bf16(values: &[u16], slot: usize, value_dim: usize, value: &mut [f32]) {
    let pairs = paired_value(values, slot, value_dim).chunks_exact(2);
    for (target, pair) in value.iter_mut().zip(pairs) {
        *target = bf16::from_bits(pair[slot % 2]).to_f32();
    }
}

/// Value `slot` of [`write_value_int8`]'s layout.
pub(crate) fn read_value_int8(values: &[i8], scale: f32, slot: usize, value_dim: usize, value: &mut [f32]) {
    let pairs = paired_value(values, slot, value_dim).chunks_exact(2);
    for (target, pair) in value.iter_mut().zip(pairs) {
        *target = f32::from(pair[slot % 2]) * scale;
    }
}

/// Copies the key at slot `from` of `source` to slot `slot`; it takes `bytes` bytes, padding included. A page of keys is
/// `[bytes / 4][16][4]` bytes whatever its type.
pub(crate) fn copy_key<T: Pod>(keys: &mut [T], slot: usize, source: &[T], from: usize, bytes: usize) {
    let page = |slot: usize| slot / PAGE_KEYS * PAGE_KEYS * bytes / 4..(slot / PAGE_KEYS + 1) * PAGE_KEYS * bytes / 4;
    let source = &bytemuck::cast_slice::<T, u32>(source)[page(from)];
    let target = &mut bytemuck::cast_slice_mut::<T, u32>(keys)[page(slot)];
    for (target, source) in target.as_chunks_mut::<PAGE_KEYS>().0.iter_mut().zip(source.as_chunks::<PAGE_KEYS>().0) {
        target[slot % PAGE_KEYS] = source[from % PAGE_KEYS];
    }
}

/// Copies the value at slot `from` of `source` to slot `slot`, in pages of `[8][value_dim][2]`.
pub(crate) fn copy_paired_value<T: Pod>(values: &mut [T], slot: usize, source: &[T], from: usize, value_dim: usize) {
    let source = paired_value(source, from, value_dim);
    let target = &mut values[slot / 2 * 2 * value_dim..][..2 * value_dim];
    for (target, source) in target.as_chunks_mut::<2>().0.iter_mut().zip(source.as_chunks::<2>().0) {
        target[slot % 2] = source[from % 2];
    }
}

/// Sets the scale that maps the largest of `values` to 127 and returns its inverse. A NaN or ∞ makes the scale NaN or
/// ∞, so that it shows in every score of the key instead of turning into a wrong number.
fn scale(values: impl Iterator<Item = f32>, scale: &mut f32) -> f32 {
    // Sizes are ordered as their bits are, a NaN above all, which `f32::max` would drop.
    let largest = f32::from_bits(values.map(|value| value.abs().to_bits()).fold(0, u32::max));
    *scale = largest / 127.0;
    if largest > 0.0 { 127.0 / largest } else { 0.0 }
}
