//! f32 micro-kernels: portable and AVX2 (6 rows × 1 panel), AVX-512 (6 × 4).
//!
//! Activations `[k][rows]` f32, weights `[k][16]` f32, or (`BRAIN`) `[k/2][16][2]` bf16 made f32 on the way, for
//! machines without bf16 dot products. Every output is one chain of multiply-adds in the order of
//! `k`, so its bits do not depend on the tile it falls in.

use super::packed::PANEL;
use super::tile::{TILE_ROWS, Tile, TileKernel, TileKernels, TileTable, columns_of};
use crate::InstructionSet;

/// The f32 kernels of `level`.
pub(super) fn kernels(level: InstructionSet) -> TileKernels {
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx512 {
        return TileKernels { table: TileTable::Vectors(&x86::AVX512), name: "avx512-f32-6x64" };
    }
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx2 {
        return TileKernels { table: TileTable::Vectors(&x86::AVX2), name: "avx2-f32-6x16" };
    }
    let _ = level;
    TileKernels { table: TileTable::Vectors(&PORTABLE), name: "portable-f32-6x16" }
}

/// The kernels of `level` that multiply bf16 weights in f32.
pub(super) fn brain_kernels(level: InstructionSet) -> TileKernels {
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx512 {
        return TileKernels { table: TileTable::Vectors(&x86::AVX512_BRAIN), name: "avx512-f32-bf16-6x64" };
    }
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx2 {
        return TileKernels { table: TileTable::Vectors(&x86::AVX2_BRAIN), name: "avx2-f32-bf16-6x16" };
    }
    let _ = level;
    TileKernels { table: TileTable::Vectors(&PORTABLE_BRAIN), name: "portable-f32-bf16-6x16" }
}

/// A table of kernels `$kernel::<rows, panels, BRAIN>`.
macro_rules! table {
    ($kernel:ident, $brain:literal, $panels:tt) => {
        [
            table!(row $kernel, $brain, 1, $panels),
            table!(row $kernel, $brain, 2, $panels),
            table!(row $kernel, $brain, 3, $panels),
            table!(row $kernel, $brain, 4, $panels),
            table!(row $kernel, $brain, 5, $panels),
            table!(row $kernel, $brain, 6, $panels),
        ]
    };
    (row $kernel:ident, $brain:literal, $rows:literal, [$($panels:literal),+]) => {
        &[$($kernel::<$rows, $panels, $brain>),+]
    };
}

static PORTABLE: [&[TileKernel]; TILE_ROWS] = table!(portable, false, [1]);
static PORTABLE_BRAIN: [&[TileKernel]; TILE_ROWS] = table!(portable, true, [1]);

/// # Safety
/// The preconditions of [`Tile`]; `P` is 1.
unsafe fn portable<const R: usize, const P: usize, const BRAIN: bool>(tile: &Tile) {
    // SAFETY: precondition 1.
    let activations = unsafe { std::slice::from_raw_parts(tile.activations.cast::<[f32; R]>(), tile.steps) };
    let mut sums = [[0.0_f32; PANEL]; R];
    if tile.accumulate {
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: precondition 3.
            sums[..tile.columns].copy_from_slice(unsafe { output_row(tile, row) });
        }
    }
    let mut add = |activations: &[f32; R], weights: &[f32; PANEL]| {
        for (sums, activation) in sums.iter_mut().zip(activations) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += activation * weight;
            }
        }
    };
    if BRAIN {
        // SAFETY: precondition 2.
        let pairs = unsafe { std::slice::from_raw_parts(tile.weights.cast::<[u32; PANEL]>(), tile.steps / 2) };
        for (activations, pairs) in activations.chunks_exact(2).zip(pairs) {
            add(&activations[0], &pairs.map(|pair| f32::from_bits(pair << 16)));
            add(&activations[1], &pairs.map(|pair| f32::from_bits(pair & 0xffff_0000)));
        }
    } else {
        // SAFETY: precondition 2.
        let weights = unsafe { std::slice::from_raw_parts(tile.weights.cast::<[f32; PANEL]>(), tile.steps) };
        activations.iter().zip(weights).for_each(|(activations, weights)| add(activations, weights));
    }
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: precondition 3.
        unsafe { output_row(tile, row) }.copy_from_slice(&sums[..tile.columns]);
    }
}

/// Row `row` of the output of a tile with one panel.
///
/// # Safety
/// Precondition 3 of [`Tile`]; the slice is gone before the next one of this row is made.
unsafe fn output_row<'a>(tile: &Tile, row: usize) -> &'a mut [f32] {
    // SAFETY: precondition 3.
    unsafe { std::slice::from_raw_parts_mut(tile.output.add(row * tile.row_stride), tile.columns) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    pub(super) static AVX2: [&[TileKernel]; TILE_ROWS] = table!(avx2, false, [1]);
    pub(super) static AVX2_BRAIN: [&[TileKernel]; TILE_ROWS] = table!(avx2, true, [1]);
    pub(super) static AVX512: [&[TileKernel]; TILE_ROWS] = table!(avx512, false, [1, 2, 3, 4]);
    pub(super) static AVX512_BRAIN: [&[TileKernel]; TILE_ROWS] = table!(avx512, true, [1, 2, 3, 4]);

    /// # Safety
    /// The preconditions of [`Tile`]; `P` is 1, and with `BRAIN` `steps` is even.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const R: usize, const P: usize, const BRAIN: bool>(tile: &Tile) {
        let weights = tile.weights.cast::<f32>();
        let activations = tile.activations.cast::<f32>();
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        if tile.accumulate {
            for (row, sums) in sums.iter_mut().enumerate() {
                let mut lanes = [0.0_f32; PANEL];
                // SAFETY: precondition 3.
                lanes[..tile.columns].copy_from_slice(unsafe { output_row(tile, row) });
                // SAFETY: `lanes` holds 16 floats.
                *sums = unsafe { [_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes.as_ptr().add(8))] };
            }
        }
        // With bf16 a round is one vector of pairs: two steps.
        let round = if BRAIN { 2 } else { 1 };
        for index in 0..tile.steps / round {
            // SAFETY: precondition 2.
            let vectors = unsafe {
                let at = weights.add(index * PANEL);
                [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]
            };
            for step in 0..round {
                let columns =
                    if BRAIN { [brain_avx2(vectors[0], step), brain_avx2(vectors[1], step)] } else { vectors };
                for row in 0..R {
                    // SAFETY: precondition 1.
                    let activation = unsafe { *activations.add((index * round + step) * R + row) };
                    let activation = _mm256_set1_ps(activation);
                    sums[row][0] = _mm256_fmadd_ps(activation, columns[0], sums[row][0]);
                    sums[row][1] = _mm256_fmadd_ps(activation, columns[1], sums[row][1]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let mut lanes = [0.0_f32; PANEL];
            // SAFETY: `lanes` holds 16 floats.
            unsafe {
                _mm256_storeu_ps(lanes.as_mut_ptr(), sums[0]);
                _mm256_storeu_ps(lanes.as_mut_ptr().add(8), sums[1]);
            }
            // SAFETY: precondition 3.
            unsafe { output_row(tile, row) }.copy_from_slice(&lanes[..tile.columns]);
        }
    }

    /// The first (`step` 0) or second numbers of bf16 pairs.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn brain_avx2(pairs: __m256, step: usize) -> __m256 {
        let pairs = _mm256_castps_si256(pairs);
        _mm256_castsi256_ps(match step {
            0 => _mm256_slli_epi32(pairs, 16),
            _ => _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)),
        })
    }

    /// The first (`step` 0) or second numbers of bf16 pairs.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn brain_avx512(pairs: __m512, step: usize) -> __m512 {
        let pairs = _mm512_castps_si512(pairs);
        _mm512_castsi512_ps(match step {
            0 => _mm512_slli_epi32(pairs, 16),
            _ => _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)),
        })
    }

    /// # Safety
    /// The preconditions of [`Tile`]; with `BRAIN` `steps` is even.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn avx512<const R: usize, const P: usize, const BRAIN: bool>(tile: &Tile) {
        let weights = tile.weights.cast::<f32>();
        let stride = tile.panel_stride / 4;
        let activations = tile.activations.cast::<f32>();
        // SAFETY: preconditions 3 and 4.
        let mut sums = unsafe { load_avx512::<R, P>(tile) };
        // With bf16 a round is one vector of pairs: two steps.
        let round = if BRAIN { 2 } else { 1 };
        for index in 0..tile.steps / round {
            let mut vectors = [_mm512_setzero_ps(); P];
            for panel in 0..P {
                // SAFETY: precondition 2.
                vectors[panel] = unsafe { _mm512_loadu_ps(weights.add(panel * stride + index * PANEL)) };
            }
            for step in 0..round {
                let mut columns = vectors;
                if BRAIN {
                    for panel in 0..P {
                        columns[panel] = brain_avx512(vectors[panel], step);
                    }
                }
                for row in 0..R {
                    // SAFETY: precondition 1.
                    let activation = unsafe { *activations.add((index * round + step) * R + row) };
                    let activation = _mm512_set1_ps(activation);
                    for panel in 0..P {
                        sums[row][panel] = _mm512_fmadd_ps(activation, columns[panel], sums[row][panel]);
                    }
                }
            }
        }
        // SAFETY: preconditions 3 and 4.
        unsafe { store_avx512(tile, &sums) }
    }

    /// The columns of panel `panel` that exist, as a mask.
    #[inline]
    fn mask(tile: &Tile, panel: usize) -> __mmask16 {
        (0xffff_u32 >> (PANEL - columns_of(tile, panel))) as __mmask16
    }

    /// What the sums of a tile start from.
    ///
    /// # Safety
    /// Preconditions 3, 4 and 5 of [`Tile`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in crate::linear) unsafe fn load_avx512<const R: usize, const P: usize>(tile: &Tile) -> [[__m512; P]; R] {
        let mut sums = [[_mm512_setzero_ps(); P]; R];
        for row in 0..R {
            for panel in 0..P {
                let output = tile.output.wrapping_add(row * tile.row_stride + panel * PANEL);
                if tile.accumulate {
                    // SAFETY: preconditions 3 and 4; lanes past the last column are masked out.
                    sums[row][panel] = unsafe { _mm512_maskz_loadu_ps(mask(tile, panel), output) };
                } else {
                    // The line is written at the end; a prefetch never faults.
                    _mm_prefetch::<_MM_HINT_ET0>(output.cast());
                }
            }
        }
        sums
    }

    /// Writes the sums of a tile.
    ///
    /// # Safety
    /// Preconditions 3, 4 and 5 of [`Tile`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in crate::linear) unsafe fn store_avx512<const R: usize, const P: usize>(tile: &Tile, sums: &[[__m512; P]; R]) {
        for row in 0..R {
            for panel in 0..P {
                // SAFETY: preconditions 3 and 4; lanes past the last column are masked out.
                unsafe {
                    let output = tile.output.add(row * tile.row_stride + panel * PANEL);
                    _mm512_mask_storeu_ps(output, mask(tile, panel), sums[row][panel]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{load_avx512, store_avx512};
