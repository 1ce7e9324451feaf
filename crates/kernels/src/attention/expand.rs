//! Blocks of bf16 or int8 as f32, for levels that multiply nothing narrower.

use super::PAGE_KEYS;
use super::block::KeyBlock;

/// Writes a bf16 or int8 block in the f32 page layout.
pub(super) fn expand(
    block: KeyBlock<'_>,
    key_dim: usize,
    value_dim: usize,
    keys_out: &mut [f32],
    values_out: &mut [f32],
) {
    let from_bits = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    match block {
        KeyBlock::F32 { .. } => unreachable!("f32 blocks are used in place"),
        KeyBlock::Bf16 { keys, values } => {
            for (source, target) in keys.chunks_exact(32).zip(keys_out.chunks_exact_mut(32)) {
                let (even, odd) = target.split_at_mut(PAGE_KEYS);
                for (key, pair) in source.chunks_exact(2).enumerate() {
                    even[key] = from_bits(pair[0]);
                    odd[key] = from_bits(pair[1]);
                }
            }
            for (source, target) in values.chunks_exact(2 * value_dim).zip(values_out.chunks_exact_mut(2 * value_dim)) {
                let (even, odd) = target.split_at_mut(value_dim);
                for (channel, pair) in source.chunks_exact(2).enumerate() {
                    even[channel] = from_bits(pair[0]);
                    odd[channel] = from_bits(pair[1]);
                }
            }
        }
        KeyBlock::Int8 { keys, key_scales, values, value_scales } => {
            let page = PAGE_KEYS * key_dim;
            for ((source, target), scales) in
                keys.chunks_exact(page).zip(keys_out.chunks_exact_mut(page)).zip(key_scales.chunks_exact(PAGE_KEYS))
            {
                for (source, target) in source.chunks_exact(64).zip(target.chunks_exact_mut(64)) {
                    for (channel, target) in target.chunks_exact_mut(PAGE_KEYS).enumerate() {
                        for (key, target) in target.iter_mut().enumerate() {
                            *target = (f32::from(source[key * 4 + channel]) - 128.0) * scales[key];
                        }
                    }
                }
            }
            for ((source, target), scales) in values
                .chunks_exact(2 * value_dim)
                .zip(values_out.chunks_exact_mut(2 * value_dim))
                .zip(value_scales.chunks_exact(2))
            {
                let (even, odd) = target.split_at_mut(value_dim);
                for (channel, pair) in source.chunks_exact(2).enumerate() {
                    even[channel] = f32::from(pair[0]) * scales[0];
                    odd[channel] = f32::from(pair[1]) * scales[1];
                }
            }
        }
    }
}
