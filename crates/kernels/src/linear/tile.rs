//! What every micro-kernel computes: one tile of a few rows by a few panels of the output.

use super::packed::PANEL;

/// Most rows of a tile.
pub(super) const TILE_ROWS: usize = 6;

/// One tile: `output[r, c] (+)= Σ_k activations[k, r] · weights[k, c]`.
///
/// Preconditions of every kernel that takes one, for `R` rows and `P` panels:
/// 1. `activations` points at `steps` steps of the kernel's own activation layout for `R` rows.
/// 2. `weights + p · panel_stride` points at `steps` steps of panel `p` in the kernel's own weight layout, `p < P`.
/// 3. `output + r · row_stride + c` is valid for reads and writes for `r < R`, `c < columns`, and no other thread
///    uses it meanwhile.
/// 4. `16 · (P − 1) < columns ≤ 16 · P`.
/// 5. The processor has the instructions the kernel is compiled for.
pub(super) struct Tile {
    /// Inner steps, in the unit of the kernel: inputs (f32), pairs (bf16) or blocks of 32 (int8).
    pub steps: usize,
    pub activations: *const u32,
    pub weights: *const u8,
    /// Bytes from one panel to the next.
    pub panel_stride: usize,
    pub output: *mut f32,
    /// Floats from one output row to the next.
    pub row_stride: usize,
    /// Output columns that exist.
    pub columns: usize,
    /// Continue the sums that `output` holds instead of starting from zero.
    pub accumulate: bool,
}

/// A micro-kernel for one number of rows and panels.
pub(super) type TileKernel = unsafe fn(&Tile);

/// The micro-kernels of one kind.
#[derive(Clone, Copy)]
pub(super) struct TileKernels {
    /// As reports print it: level, type, rows × columns.
    pub name: &'static str,
    pub table: TileTable,
}

/// How a tile comes to its kernel.
#[derive(Clone, Copy)]
pub(super) enum TileTable {
    /// A kernel for every tile size: `table[rows − 1][panels − 1]`.
    Vectors(&'static [&'static [TileKernel]; TILE_ROWS]),
    /// Tile registers, which take any size ([`super::amx`]).
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl TileKernels {
    /// Most rows of a tile.
    pub fn rows(&self) -> usize {
        match self.table {
            TileTable::Vectors(table) => table.len(),
            #[cfg(target_arch = "x86_64")]
            TileTable::Amx => crate::amx::PRODUCT_ROWS,
        }
    }

    /// Most panels of a tile.
    pub fn panels(&self) -> usize {
        match self.table {
            TileTable::Vectors(table) => table[TILE_ROWS - 1].len(),
            #[cfg(target_arch = "x86_64")]
            TileTable::Amx => super::amx::PANELS,
        }
    }
}

/// Columns of panel `panel` that exist.
#[inline(always)]
pub(super) fn columns_of(tile: &Tile, panel: usize) -> usize {
    (tile.columns - panel * PANEL).min(PANEL)
}
