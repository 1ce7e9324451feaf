//! Which kernels a product runs on, and the loops around them.

use std::ops::Range;

use super::activations::{RowTiles, interleave_f32};
use super::expand::expand_to_f32;
use super::packed::{PANEL, packed_unit, padded_inputs};
use super::tile::{TILE_ROWS, Tile, TileKernels, TileTable};
use super::{LinearWeights, OutputView, WeightType, float};
#[cfg(target_arch = "x86_64")]
use super::{amx, brain_float, int8, int8_avx2};
use crate::InstructionSet;
use crate::aligned::AlignedScratch;
#[cfg(target_arch = "x86_64")]
use crate::amx::Tiles;

/// Packed panels of one task up to this size stay in the L2 cache while all row tiles pass over them.
const CACHED_BYTES: usize = 512 << 10;
/// Bytes of each larger panel that 16 row tiles pass over at a time.
const PACKED_CHUNK: usize = 64 << 10;
/// Inputs whose weights are expanded to f32 at a time: 16 KiB for each panel.
const F32_CHUNK: usize = 256;
/// Inputs whose weights are expanded to bytes at a time: about 80 KiB for each panel, so that two stay in the L2 cache.
#[cfg(target_arch = "x86_64")]
const INT8_CHUNK: usize = 4096;
/// Inputs of two panels that all rows pass over as tiles at a time (measured: half as many are 10 % slower, as the sums
/// are then loaded and stored more often; twice as many no faster).
#[cfg(target_arch = "x86_64")]
const AMX_CHUNK: usize = 1024;
/// Up to so many rows the int8 kernels, and the f32 kernels of bf16 weights, unpack weights again for every tile instead
/// of once (measured: 16 % faster at 12 rows of Q4_K, even at 30, 6 % slower at 512).
const DIRECT_ROWS: usize = 30;

/// How weights come to the micro-kernel.
enum Source {
    /// From the packed panels.
    Packed,
    /// Expanded to f32 first.
    F32,
    /// Expanded to one byte a code first.
    #[cfg(target_arch = "x86_64")]
    Bytes(int8::ExpandedKernels),
}

/// What one call runs.
pub(super) struct Plan {
    pub kernels: TileKernels,
    source: Source,
    /// Inputs of one step of the kernels.
    step_inputs: usize,
    /// 32-bit words a row of activations takes for each step.
    step_words: usize,
    /// 32-bit words a row of activations takes.
    pub row_words: usize,
}

/// One task: some row tiles of one group of panels.
pub(super) struct Part<'a> {
    /// Tiles of activations, `tile_words` apart.
    pub activations: &'a [u32],
    pub tile_words: usize,
    pub tiles: RowTiles,
    pub row_tiles: Range<usize>,
    /// Output columns, from the start of a panel.
    pub columns: Range<usize>,
    pub output: &'a OutputView,
}

impl Plan {
    pub fn new(weights: &LinearWeights, rows: usize) -> Self {
        let inputs = padded_inputs(weights.weight_type, weights.in_features);
        let (kernels, source, step_inputs, step_words) =
            Self::choose(weights.weight_type, weights.level, weights.in_features, rows);
        Self { kernels, source, step_inputs, step_words, row_words: inputs / step_inputs * step_words }
    }

    fn choose(
        weight_type: WeightType,
        level: InstructionSet,
        in_features: usize,
        rows: usize,
    ) -> (TileKernels, Source, usize, usize) {
        let _ = (rows, in_features);
        match weight_type {
            WeightType::F32 => return (float::kernels(level), Source::Packed, 1, 1),
            #[cfg(target_arch = "x86_64")]
            WeightType::F16 | WeightType::Bf16
                if level == InstructionSet::Amx && in_features.is_multiple_of(amx::STEP_INPUTS) =>
            {
                return (amx::kernels(), Source::Packed, amx::STEP_INPUTS, amx::STEP_INPUTS / 2);
            }
            #[cfg(target_arch = "x86_64")]
            WeightType::F16 | WeightType::Bf16
                if level >= InstructionSet::Avx512Bf16 && !InstructionSet::brain_dots_are_slow() =>
            {
                return (brain_float::kernels(), Source::Packed, 2, 1);
            }
            #[cfg(target_arch = "x86_64")]
            _ if level >= InstructionSet::Avx512Vnni && weight_type.block_weights() > 1 => {
                let kernels = int8::kernels(weight_type);
                return match kernels.expanded {
                    Some(expanded) if rows > DIRECT_ROWS => {
                        (expanded.kernels, Source::Bytes(expanded), 32, int8::BLOCK_WORDS)
                    }
                    _ => (kernels.direct, Source::Packed, 32, int8::BLOCK_WORDS),
                };
            }
            #[cfg(target_arch = "x86_64")]
            _ if level >= InstructionSet::Avx2 && weight_type.block_weights() > 1 => {
                return (int8_avx2::kernels(weight_type), Source::Packed, 32, int8::BLOCK_WORDS);
            }
            WeightType::F16 | WeightType::Bf16 if rows <= DIRECT_ROWS => {
                return (float::brain_kernels(level), Source::Packed, 1, 1);
            }
            _ => {}
        }
        (float::kernels(level), Source::F32, 1, 1)
    }

    /// Converts the rows of one tile to the layout of the kernels.
    pub fn convert(&self, weights: &LinearWeights, input: &[f32], words: &mut [u32]) {
        #[cfg(target_arch = "x86_64")]
        let tiles = matches!(self.kernels.table, TileTable::Amx);
        #[cfg(target_arch = "x86_64")]
        match self.step_inputs {
            // SAFETY: a level with AMX has AVX-512 BF16.
            amx::STEP_INPUTS if tiles => return unsafe { amx::convert(input, weights.in_features, words) },
            // SAFETY: only kernels for a level with AVX-512 BF16, checked when the weights were packed, step by 2.
            2 => return unsafe { brain_float::interleave(input, weights.in_features, words) },
            32 if weights.level >= InstructionSet::Avx512Vnni => {
                // SAFETY: a level is only in use when this machine has it.
                return unsafe { int8::quantise(weights.weight_type, input, weights.in_features, words) };
            }
            // SAFETY: only kernels for a level with AVX2, checked when the weights were packed, step by 32.
            32 => return unsafe { int8_avx2::quantise(weights.weight_type, input, weights.in_features, words) },
            _ => {}
        }
        interleave_f32(input, weights.in_features, words);
    }

    /// Runs one task; `expanded` is scratch of the worker.
    pub fn run(&self, weights: &LinearWeights, part: &Part<'_>, expanded: &mut AlignedScratch) {
        let inputs = padded_inputs(weights.weight_type, weights.in_features);
        let panels = part.columns.len().div_ceil(PANEL);
        let first_panel = part.columns.start / PANEL;
        let panel = |index: usize| weights.panel(first_panel + index);
        match &self.source {
            Source::Packed => {
                let all = &weights.packed()[first_panel * weights.panel_bytes..][..panels * weights.panel_bytes];
                let whole = all.len() <= CACHED_BYTES || part.row_tiles.len() <= DIRECT_ROWS.div_ceil(TILE_ROWS);
                let (unit, unit_bytes) = packed_unit(weights.weight_type);
                let (tiles, chunk) = match whole {
                    #[cfg(target_arch = "x86_64")]
                    _ if matches!(self.kernels.table, TileTable::Amx) => (usize::MAX, AMX_CHUNK),
                    true => (usize::MAX, inputs),
                    false => (16, PACKED_CHUNK.div_ceil(unit_bytes) * unit),
                };
                let end = part.row_tiles.end;
                for start in part.row_tiles.clone().step_by(tiles) {
                    let row_tiles = start..end.min(start.saturating_add(tiles));
                    for first in (0..inputs).step_by(chunk) {
                        let range = first..inputs.min(first + chunk);
                        let weights = (&all[first / unit * unit_bytes..], all.len() / panels);
                        self.multiply(part, row_tiles.clone(), weights, range);
                    }
                }
            }
            Source::F32 => {
                for first in (0..inputs).step_by(F32_CHUNK) {
                    let count = F32_CHUNK.min(inputs - first);
                    let expanded = expanded.bytes(panels * count * PANEL * 4);
                    for (index, output) in expanded.chunks_exact_mut(count * PANEL * 4).enumerate() {
                        let output = bytemuck::cast_slice_mut(output);
                        expand_to_f32(weights.level, weights.weight_type, panel(index), first, output);
                    }
                    let weights = (&*expanded, count * PANEL * 4);
                    self.multiply(part, part.row_tiles.clone(), weights, first..first + count);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Source::Bytes(bytes) => {
                for first in (0..inputs).step_by(INT8_CHUNK) {
                    let count = INT8_CHUNK.min(inputs - first);
                    let panel_bytes = count / self.step_inputs * bytes.block_bytes;
                    let expanded = expanded.bytes(panels * panel_bytes);
                    for (index, output) in expanded.chunks_exact_mut(panel_bytes).enumerate() {
                        // SAFETY: these kernels are only chosen for a level with AVX-512 VNNI, checked when the
                        // weights were packed.
                        unsafe { bytes.expand(panel(index), first / self.step_inputs, output) };
                    }
                    let weights = (&*expanded, panel_bytes);
                    self.multiply(part, part.row_tiles.clone(), weights, first..first + count);
                }
            }
        }
    }

    /// Multiplies row tiles of a task with the weights of `inputs`: a slice that begins with them in the first panel
    /// of the task, and the bytes from there to the next panel. Later ranges of inputs continue the sums of earlier
    /// ones.
    fn multiply(
        &self,
        part: &Part<'_>,
        row_tiles: Range<usize>,
        (weights, panel_stride): (&[u8], usize),
        inputs: Range<usize>,
    ) {
        let panels = part.columns.len().div_ceil(PANEL);
        let steps = inputs.len() / self.step_inputs;
        #[cfg(target_arch = "x86_64")]
        let mut registers = matches!(self.kernels.table, TileTable::Amx).then(Tiles::new);
        for tile in row_tiles {
            let (start, height) = (part.tiles.start(tile), part.tiles.height(tile));
            let words = inputs.start / self.step_inputs * self.step_words * height;
            let activations = &part.activations[tile * part.tile_words + words..][..steps * self.step_words * height];
            let tile = Tile {
                steps,
                activations: activations.as_ptr(),
                weights: weights.as_ptr(),
                panel_stride,
                output: part.output.at(start, part.columns.start),
                row_stride: part.output.row_stride,
                columns: part.columns.len(),
                accumulate: inputs.start > 0,
            };
            // SAFETY: the slices cover the activations and panels of the tile in the layouts of the kernels; this
            // task alone writes rows `start..start + height` of its columns, which lie inside the output; the level
            // of the kernels was checked when the weights were packed.
            unsafe {
                match self.kernels.table {
                    TileTable::Vectors(table) => table[height - 1][panels - 1](&tile),
                    #[cfg(target_arch = "x86_64")]
                    TileTable::Amx => {
                        amx::multiply(registers.as_mut().expect("made for this table"), height, panels, &tile);
                    }
                }
            }
        }
    }
}
