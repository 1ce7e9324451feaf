//! bf16 micro-kernel with AVX-512 BF16: 6 rows × 4 panels, two inputs a step (`vdpbf16ps`).
//!
//! Activations `[k/2][rows][2]` bf16, weights `[k/2][16][2]` bf16, sums in f32. The instruction flushes subnormal
//! numbers to zero. Every output is one chain in the order of `k`.

use std::arch::x86_64::*;

use super::float::{load_avx512, store_avx512};
use super::packed::PANEL;
use super::tile::{TILE_ROWS, Tile, TileKernel, TileKernels, TileTable};

/// The bf16 kernels.
pub(super) fn kernels() -> TileKernels {
    TileKernels { table: TileTable::Vectors(&TABLE), name: "avx512-bf16-6x64" }
}

macro_rules! row {
    ($rows:literal) => {
        &[multiply::<$rows, 1>, multiply::<$rows, 2>, multiply::<$rows, 3>, multiply::<$rows, 4>]
    };
}
static TABLE: [&[TileKernel]; TILE_ROWS] = [row!(1), row!(2), row!(3), row!(4), row!(5), row!(6)];

/// # Safety
/// The preconditions of [`Tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn multiply<const R: usize, const P: usize>(tile: &Tile) {
    let weights = tile.weights.cast::<u32>();
    let stride = tile.panel_stride / 4;
    // SAFETY: preconditions 3 and 4.
    let mut sums = unsafe { load_avx512::<R, P>(tile) };
    for step in 0..tile.steps {
        let mut columns = [pairs(_mm512_setzero_si512()); P];
        for panel in 0..P {
            // SAFETY: precondition 2.
            columns[panel] = pairs(unsafe { _mm512_loadu_si512(weights.add(panel * stride + step * PANEL).cast()) });
        }
        for row in 0..R {
            // SAFETY: precondition 1.
            let activation = pairs(_mm512_set1_epi32(unsafe { *tile.activations.add(step * R + row) } as i32));
            for panel in 0..P {
                sums[row][panel] = _mm512_dpbf16_ps(sums[row][panel], columns[panel], activation);
            }
        }
    }
    // SAFETY: preconditions 3 and 4.
    unsafe { store_avx512(tile, &sums) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes without invalid patterns.
    unsafe { std::mem::transmute(bits) }
}

/// bf16 pairs `[k/2][rows]` of rows `[rows][in_features]`, rounded to nearest even; inputs past `in_features` are
/// zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn interleave(input: &[f32], in_features: usize, output: &mut [u32]) {
    let rows = input.len() / in_features;
    for (row, values) in input.chunks_exact(in_features).enumerate() {
        for (values, output) in values.chunks(32).zip(output.chunks_mut(16 * rows)) {
            let mask = (u64::MAX >> (64 - values.len())) as u32;
            // SAFETY: the mask covers the `values.len() <= 32` values only.
            let (first, second) = unsafe {
                (
                    _mm512_maskz_loadu_ps(mask as __mmask16, values.as_ptr()),
                    _mm512_maskz_loadu_ps((mask >> 16) as __mmask16, values.as_ptr().wrapping_add(16)),
                )
            };
            let rounded = _mm512_cvtne2ps_pbh(second, first);
            // SAFETY: both are 64 bytes without invalid patterns.
            let words: [u32; 16] = unsafe { std::mem::transmute(rounded) };
            for (word, step) in words.iter().zip(output.chunks_exact_mut(rows)) {
                step[row] = *word;
            }
        }
    }
}
