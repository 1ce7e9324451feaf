//! Panels of GGML types and of bf16 as f32, for instruction sets without products of 8 or 16 bits.

use super::WeightType;
use super::packed::{PANEL, expand_panel};
use crate::InstructionSet;

/// Writes inputs `first..first + output.len() / 16` of a packed panel as f32 `[k][16]`.
pub(super) fn expand_to_f32(
    level: InstructionSet,
    weight_type: WeightType,
    panel: &[u8],
    first: usize,
    output: &mut [f32],
) {
    // GGML types are expanded on the portable level alone.
    #[cfg(target_arch = "x86_64")]
    if matches!(weight_type, WeightType::F16 | WeightType::Bf16) {
        // SAFETY: a level is only in use when this machine has it.
        unsafe {
            match level {
                InstructionSet::Portable => {}
                InstructionSet::Avx2 => return expand_brain_avx2(panel, first, output),
                _ => return expand_brain_avx512(panel, first, output),
            }
        }
    }
    let _ = level;
    by_type(weight_type, panel, first, output);
}

/// One compiled loop for each type, so that the compiler sees constant shifts and offsets.
fn by_type(weight_type: WeightType, panel: &[u8], first: usize, output: &mut [f32]) {
    use WeightType::*;
    match weight_type {
        Q8_0 => expand_panel(Q8_0, panel, first, output),
        Q4_0 => expand_panel(Q4_0, panel, first, output),
        Q4_1 => expand_panel(Q4_1, panel, first, output),
        Q5_0 => expand_panel(Q5_0, panel, first, output),
        Q5_1 => expand_panel(Q5_1, panel, first, output),
        Q4_K => expand_panel(Q4_K, panel, first, output),
        Q5_K => expand_panel(Q5_K, panel, first, output),
        Q6_K => expand_panel(Q6_K, panel, first, output),
        F16 | Bf16 => expand_brain(panel, first, output),
        F32 => unreachable!("multiplied as it is"),
    }
}

/// Pairs of bf16 weights `[k/2][16][2]`; `first` is even.
#[inline(always)]
fn expand_brain(panel: &[u8], first: usize, output: &mut [f32]) {
    let pairs = panel[2 * first * PANEL..].chunks_exact(4 * PANEL);
    for (output, pairs) in output.chunks_exact_mut(2 * PANEL).zip(pairs) {
        let (even, odd) = output.split_at_mut(PANEL);
        for ((even, odd), pair) in even.iter_mut().zip(odd).zip(pairs.chunks_exact(4)) {
            let pair = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]);
            (*even, *odd) = (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn expand_brain_avx2(panel: &[u8], first: usize, output: &mut [f32]) {
    expand_brain(panel, first, output);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn expand_brain_avx512(panel: &[u8], first: usize, output: &mut [f32]) {
    expand_brain(panel, first, output);
}
