//! AMX kernel: 32 rows × 2 panels, 32 inputs a step, bf16 products and f32 sums.
//!
//! Activations `[k/32][rows][32]` bf16, weights `[k/2][16][2]` bf16 as they are packed. The instruction flushes subnormal numbers to zero. The sums of an output go on in the order of `k`, whatever
//! rows stand beside it.

use std::arch::x86_64::*;

use super::packed::PANEL;
use super::tile::{Tile, TileKernels, TileTable};
use crate::amx::{Elements, PRODUCT_ROWS, Product, ROW_BYTES, TILE_ROWS, Tiles};

/// Panels of a tile.
pub(super) const PANELS: usize = 2;
/// Inputs of one step.
pub(super) const STEP_INPUTS: usize = 32;

/// The kernel for bf16 weights.
pub(super) fn kernels() -> TileKernels {
    TileKernels { table: TileTable::Amx, name: "amx-bf16-32x32" }
}

/// Bytes of the weights of one step in a panel.
const STEP_BYTES: usize = STEP_INPUTS * PANEL * size_of::<u16>();

/// # Safety
/// The preconditions of [`Tile`] for `rows` rows and `panels` panels.
pub(super) unsafe fn multiply(tiles: &mut Tiles, rows: usize, panels: usize, tile: &Tile) {
    tiles.configure(rows, ROW_BYTES);
    let width = panels * PANEL;
    // SAFETY: the preconditions; `c` has `rows` rows of `width` floats, `row_floats` apart.
    let multiply_into = |c: *mut f32, row_floats: usize| unsafe {
        let product = Product {
            a: tile.activations.cast(),
            a_row: ROW_BYTES,
            a_tile: TILE_ROWS * ROW_BYTES,
            a_step: rows * ROW_BYTES,
            b: tile.weights,
            b_row: ROW_BYTES,
            b_panel: tile.panel_stride,
            b_step: STEP_BYTES,
            c: c.cast(),
            c_row: row_floats * size_of::<f32>(),
            c_tile: TILE_ROWS * row_floats * size_of::<f32>(),
            c_panel: PANEL * size_of::<f32>(),
            steps: tile.steps,
        };
        product.run(Elements::Bf16, rows, panels, tile.accumulate);
    };
    if tile.columns == width {
        return multiply_into(tile.output, tile.row_stride);
    }
    // The last columns of an output are no whole panel, and a tile is stored whole: it goes aside first.
    let mut aside = [0.0_f32; PRODUCT_ROWS * PANELS * PANEL];
    let output_row = |row: usize| {
        // SAFETY: precondition 3: rows of `columns` floats.
        unsafe { std::slice::from_raw_parts_mut(tile.output.add(row * tile.row_stride), tile.columns) }
    };
    if tile.accumulate {
        for (row, aside) in aside.chunks_exact_mut(width).take(rows).enumerate() {
            aside[..tile.columns].copy_from_slice(output_row(row));
        }
    }
    multiply_into(aside.as_mut_ptr(), width);
    for (row, aside) in aside.chunks_exact(width).take(rows).enumerate() {
        output_row(row).copy_from_slice(&aside[..tile.columns]);
    }
}

/// bf16 `[k/32][rows][32]` of rows `[rows][in_features]`, rounded to nearest even; inputs past `in_features` are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn convert(input: &[f32], in_features: usize, output: &mut [u32]) {
    const WORDS: usize = STEP_INPUTS / 2;
    let rows = input.len() / in_features;
    for (row, values) in input.chunks_exact(in_features).enumerate() {
        for (step, values) in output.chunks_exact_mut(WORDS * rows).zip(values.chunks(STEP_INPUTS)) {
            let mask = u32::MAX >> (STEP_INPUTS - values.len());
            // SAFETY: the masks keep the loads within `values`; a row of a step has 16 words.
            unsafe {
                let low = _mm512_maskz_loadu_ps(mask as u16, values.as_ptr());
                let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, values.as_ptr().wrapping_add(16));
                let packed: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(step[row * WORDS..][..WORDS].as_mut_ptr().cast(), packed);
            }
        }
    }
    output[in_features.div_ceil(STEP_INPUTS) * WORDS * rows..].fill(0);
}
