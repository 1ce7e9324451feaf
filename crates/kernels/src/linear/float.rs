//! f32 micro-kernels: portable and AVX2 (6 rows × 1 panel), AVX-512 (6 × 4).
//!
//! Activations `[k][rows]` f32, weights `[k][16]` f32. Every output is one chain of multiply-adds in the order of
//! `k`, so its bits do not depend on the tile it falls in.

use super::packed::PANEL;
use super::tile::{TILE_ROWS, Tile, TileKernels, columns_of};
use crate::InstructionSet;

/// The f32 kernels of `level`.
pub(super) fn kernels(level: InstructionSet) -> TileKernels {
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx512 {
        return TileKernels { table: &x86::AVX512, name: "avx512-f32-6x64" };
    }
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx2 {
        return TileKernels { table: &x86::AVX2, name: "avx2-f32-6x16" };
    }
    let _ = level;
    TileKernels { table: &PORTABLE, name: "portable-f32-6x16" }
}

static PORTABLE: [&[super::tile::TileKernel]; TILE_ROWS] =
    [&[portable::<1>], &[portable::<2>], &[portable::<3>], &[portable::<4>], &[portable::<5>], &[portable::<6>]];

/// # Safety
/// The preconditions of [`Tile`] with `P = 1`.
unsafe fn portable<const R: usize>(tile: &Tile) {
    // SAFETY: preconditions 1 and 2.
    let (activations, weights) = unsafe {
        (
            std::slice::from_raw_parts(tile.activations.cast::<[f32; R]>(), tile.steps),
            std::slice::from_raw_parts(tile.weights.cast::<[f32; PANEL]>(), tile.steps),
        )
    };
    let mut sums = [[0.0_f32; PANEL]; R];
    if tile.accumulate {
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: precondition 3.
            sums[..tile.columns].copy_from_slice(unsafe { output_row(tile, row) });
        }
    }
    for (activations, weights) in activations.iter().zip(weights) {
        for (sums, activation) in sums.iter_mut().zip(activations) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += activation * weight;
            }
        }
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
    use crate::linear::tile::TileKernel;

    pub(super) static AVX2: [&[TileKernel]; TILE_ROWS] =
        [&[avx2::<1>], &[avx2::<2>], &[avx2::<3>], &[avx2::<4>], &[avx2::<5>], &[avx2::<6>]];

    macro_rules! row {
        ($rows:literal) => {
            &[avx512::<$rows, 1>, avx512::<$rows, 2>, avx512::<$rows, 3>, avx512::<$rows, 4>]
        };
    }
    pub(super) static AVX512: [&[TileKernel]; TILE_ROWS] = [row!(1), row!(2), row!(3), row!(4), row!(5), row!(6)];

    /// # Safety
    /// The preconditions of [`Tile`] with `P = 1`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const R: usize>(tile: &Tile) {
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
        for step in 0..tile.steps {
            // SAFETY: precondition 2.
            let weights = unsafe {
                let at = weights.add(step * PANEL);
                [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]
            };
            for row in 0..R {
                // SAFETY: precondition 1.
                let activation = _mm256_set1_ps(unsafe { *activations.add(step * R + row) });
                sums[row][0] = _mm256_fmadd_ps(activation, weights[0], sums[row][0]);
                sums[row][1] = _mm256_fmadd_ps(activation, weights[1], sums[row][1]);
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

    /// # Safety
    /// The preconditions of [`Tile`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn avx512<const R: usize, const P: usize>(tile: &Tile) {
        let weights = tile.weights.cast::<f32>();
        let stride = tile.panel_stride / 4;
        let activations = tile.activations.cast::<f32>();
        // SAFETY: preconditions 3 and 4.
        let mut sums = unsafe { load_avx512::<R, P>(tile) };
        for step in 0..tile.steps {
            let mut columns = [_mm512_setzero_ps(); P];
            for panel in 0..P {
                // SAFETY: precondition 2.
                columns[panel] = unsafe { _mm512_loadu_ps(weights.add(panel * stride + step * PANEL)) };
            }
            for row in 0..R {
                // SAFETY: precondition 1.
                let activation = _mm512_set1_ps(unsafe { *activations.add(step * R + row) });
                for panel in 0..P {
                    sums[row][panel] = _mm512_fmadd_ps(activation, columns[panel], sums[row][panel]);
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
