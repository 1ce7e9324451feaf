//! Blocks of bf16 or int8 as f32, for levels that multiply nothing narrower.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::PAGE_KEYS;
use super::block::KeyBlock;
use crate::InstructionSet;

/// Writes a bf16 or int8 block in the f32 page layout.
pub(super) fn expand(
    level: InstructionSet,
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
        #[cfg(target_arch = "x86_64")]
        KeyBlock::Int8 { keys, key_scales, values, value_scales } if level >= InstructionSet::Avx2 => {
            assert!(keys.len() == key_scales.len() * key_dim && values.len() == value_scales.len() * value_dim);
            assert!(keys_out.len() == keys.len() && values_out.len() == values.len());
            // SAFETY: a level is only in use when this machine has it; the lengths were checked.
            unsafe {
                expand_keys_avx2(keys, key_scales, key_dim, keys_out);
                expand_values_avx2(values, value_scales, value_dim, values_out);
            }
        }
        KeyBlock::Int8 { keys, key_scales, values, value_scales } => {
            let _ = level;
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

/// Keys `[pages][key_dim / 4][16][4]` to `[pages][key_dim][16]`.
///
/// # Safety
/// The machine has AVX2; there are as many numbers in `output` as in `keys`, and `key_dim` for each of `scales`, which are
/// whole pages.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn expand_keys_avx2(keys: &[u8], scales: &[f32], key_dim: usize, output: &mut [f32]) {
    const SIDE: usize = PAGE_KEYS / 2;
    for (page, scales) in scales.chunks_exact(PAGE_KEYS).enumerate() {
        for (side, scales) in scales.chunks_exact(SIDE).enumerate() {
            // SAFETY: eight scales; four channels of eight keys are 32 bytes, and four vectors of the page.
            unsafe {
                let scales = _mm256_loadu_ps(scales.as_ptr());
                let offsets = _mm256_mul_ps(scales, _mm256_set1_ps(128.0));
                for quad in 0..key_dim / 4 {
                    let at = page * PAGE_KEYS * key_dim + quad * 4 * PAGE_KEYS;
                    let mut words = _mm256_loadu_si256(keys.as_ptr().add(at + 4 * SIDE * side).cast());
                    for channel in 0..4 {
                        let integers = _mm256_and_si256(words, _mm256_set1_epi32(255));
                        let numbers = _mm256_fmsub_ps(_mm256_cvtepi32_ps(integers), scales, offsets);
                        let target = output.as_mut_ptr().add(at + channel * PAGE_KEYS + side * SIDE);
                        _mm256_storeu_ps(target, numbers);
                        words = _mm256_srli_epi32(words, 8);
                    }
                }
            }
        }
    }
}

/// Values `[keys / 2][value_dim][2]` to `[keys][value_dim]`.
///
/// # Safety
/// The machine has AVX2; there are as many numbers in `output` as in `values`, and `value_dim`, a multiple of eight, for each
/// of `scales`, of which there is an even number.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn expand_values_avx2(values: &[i8], scales: &[f32], value_dim: usize, output: &mut [f32]) {
    for (pair, scales) in scales.as_chunks::<2>().0.iter().enumerate() {
        let (even_scale, odd_scale) = (_mm256_set1_ps(scales[0]), _mm256_set1_ps(scales[1]));
        let first = 2 * pair * value_dim;
        for column in (0..value_dim).step_by(8) {
            // SAFETY: eight channels of a pair of keys are 16 bytes, and a vector of each key.
            unsafe {
                let pairs = _mm_loadu_si128(values.as_ptr().add(first + 2 * column).cast());
                let words = _mm256_cvtepi8_epi16(pairs);
                let even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16));
                let odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16));
                let target = output.as_mut_ptr().add(first + column);
                _mm256_storeu_ps(target, _mm256_mul_ps(even, even_scale));
                _mm256_storeu_ps(target.add(value_dim), _mm256_mul_ps(odd, odd_scale));
            }
        }
    }
}
