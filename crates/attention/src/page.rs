//! Writing one key or value into the page layouts of [`iceformer_kernels::attention`], and reading it back.
//!
//! `slot` counts keys from the start of the buffer; widths are the padded ones, and shorter input leaves zeros.

use bytemuck::Pod;
use iceformer_kernels::attention::PAGE_KEYS;
use iceformer_kernels::half::bf16;
use iceformer_kernels::{brain_bits, nearest_integer};

/// Integers of a segment and the scale of the slot being written.
pub(crate) struct Int8Slot<'a, T> {
    pub data: &'a mut [T],
    pub scale: &'a mut f32,
}

/// `[key_dim][16]`.
pub(crate) fn write_key_f32(keys: &mut [f32], slot: usize, key: &[f32], key_dim: usize) {
    let page = &mut keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    for (channel, value) in key.iter().enumerate() {
        page[channel * PAGE_KEYS + slot % PAGE_KEYS] = *value;
    }
}

/// `[key_dim / 2][16][2]`.
pub(crate) fn write_key_bf16(keys: &mut [u16], slot: usize, key: &[f32], key_dim: usize) {
    let page = &mut keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    // Rounded some at a time, side by side, before they are spread.
    for (part, key) in key.chunks(PAGE_KEYS).enumerate() {
        let mut bits = [0; PAGE_KEYS];
        bits.iter_mut().zip(key).for_each(|(bits, value)| *bits = brain_bits(*value));
        for (step, pair) in bits.chunks_exact(2).enumerate().take(key.len().div_ceil(2)) {
            page[((part * PAGE_KEYS / 2 + step) * PAGE_KEYS + slot % PAGE_KEYS) * 2..][..2].copy_from_slice(pair);
        }
    }
}

/// `[key_dim / 4][16][4]` of the integers of `key − mean`, plus 128.
pub(crate) fn write_key_int8(target: Int8Slot<'_, u8>, slot: usize, key: &[f32], mean: &[f32], key_dim: usize) {
    let inverse = scale(key.iter().zip(mean).map(|(value, mean)| value - mean), target.scale);
    let page = &mut target.data[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    let lane = slot % PAGE_KEYS;
    for (step, (key, mean)) in key.chunks(4).zip(mean.chunks(4)).enumerate() {
        // A padded channel keeps the offset alone, so that it counts as zero.
        let mut integers = [128; 4];
        for ((integer, value), mean) in integers.iter_mut().zip(key).zip(mean) {
            *integer = (nearest_integer((value - mean) * inverse) + 128) as u8;
        }
        page[(step * PAGE_KEYS + lane) * 4..][..4].copy_from_slice(&integers);
    }
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

/// Key `slot` of [`write_key_f32`]'s layout.
pub(crate) fn read_key_f32(keys: &[f32], slot: usize, key_dim: usize, key: &mut [f32]) {
    let page = &keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    let lane = page.iter().skip(slot % PAGE_KEYS).step_by(PAGE_KEYS);
    key.iter_mut().zip(lane).for_each(|(target, value)| *target = *value);
}

/// Key `slot` of [`write_key_bf16`]'s layout.
pub(crate) fn read_key_bf16(keys: &[u16], slot: usize, key_dim: usize, key: &mut [f32]) {
    let page = &keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    for (step, pair) in key.chunks_mut(2).enumerate() {
        let source = &page[(step * PAGE_KEYS + slot % PAGE_KEYS) * 2..][..2];
        pair.iter_mut().zip(source).for_each(|(target, bits)| *target = bf16::from_bits(*bits).to_f32());
    }
}

/// Key `slot` of [`write_key_int8`]'s layout, without its mean.
pub(crate) fn read_key_int8(keys: &[u8], scale: f32, slot: usize, key_dim: usize, key: &mut [f32]) {
    let page = &keys[slot / PAGE_KEYS * PAGE_KEYS * key_dim..][..PAGE_KEYS * key_dim];
    for (step, four) in key.chunks_mut(4).enumerate() {
        let source = &page[(step * PAGE_KEYS + slot % PAGE_KEYS) * 4..][..4];
        four.iter_mut().zip(source).for_each(|(target, byte)| *target = (f32::from(*byte) - 128.0) * scale);
    }
}

/// Value `slot` of [`write_value_f32`]'s layout.
pub(crate) fn read_value_f32(values: &[f32], slot: usize, value_dim: usize, value: &mut [f32]) {
    value.copy_from_slice(&values[slot * value_dim..][..value.len()]);
}

/// Value `slot` of [`write_value_bf16`]'s layout.
pub(crate) fn read_value_bf16(values: &[u16], slot: usize, value_dim: usize, value: &mut [f32]) {
    let pairs = values[slot / 2 * 2 * value_dim..][..2 * value_dim].chunks_exact(2);
    for (target, pair) in value.iter_mut().zip(pairs) {
        *target = bf16::from_bits(pair[slot % 2]).to_f32();
    }
}

/// Value `slot` of [`write_value_int8`]'s layout.
pub(crate) fn read_value_int8(values: &[i8], scale: f32, slot: usize, value_dim: usize, value: &mut [f32]) {
    let pairs = values[slot / 2 * 2 * value_dim..][..2 * value_dim].chunks_exact(2);
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
    let source = &source[from / 2 * 2 * value_dim..][..2 * value_dim];
    let target = &mut values[slot / 2 * 2 * value_dim..][..2 * value_dim];
    for (target, source) in target.as_chunks_mut::<2>().0.iter_mut().zip(source.as_chunks::<2>().0) {
        target[slot % 2] = source[from % 2];
    }
}

/// Sets the scale that maps the largest of `values` to 127 and returns its inverse. A NaN or ∞ makes the scale NaN or
/// ∞, so that it shows in every score of the key instead of turning into a wrong number.
fn scale(values: impl Iterator<Item = f32>, scale: &mut f32) -> f32 {
    let largest = values.fold(0.0_f32, |largest, value| {
        // `f32::max` would drop a NaN.
        if value.abs() > largest || value.is_nan() { value.abs() } else { largest }
    });
    *scale = largest / 127.0;
    if largest > 0.0 { 127.0 / largest } else { 0.0 }
}
