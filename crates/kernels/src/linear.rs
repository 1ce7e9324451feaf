//! Linear layers: `output = input · weightsᵀ`, weights packed once at load for this machine.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod blocks;
#[cfg(target_arch = "x86_64")]
mod brain_float;
mod expand;
mod float;
#[cfg(target_arch = "x86_64")]
mod int8;
#[cfg(target_arch = "x86_64")]
mod int8_avx2;
mod packed;
mod plan;
mod recoded;
mod stored;
#[cfg(test)]
mod tests;
mod tile;
mod weight_type;

use std::sync::Mutex;

use memmap2::{MmapMut, MmapOptions};

use crate::aligned::AlignedScratch;
use crate::{InstructionSet, ThreadTeam};
use activations::RowTiles;
use packed::PANEL;
use plan::{Part, Plan};

pub use recoded::RecodedType;
pub use stored::StoredType;
pub use weight_type::WeightType;

/// What is wrong with weights given to [`LinearWeights::pack`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PackError {
    /// The row length is no whole number of blocks.
    #[error("a row of {in_features} weights is no whole number of {weight_type} blocks of {block}")]
    RowLength {
        /// Length of a row.
        in_features: usize,
        /// Name of the type.
        weight_type: &'static str,
        /// Weights in one block.
        block: usize,
    },
    /// The bytes do not fit the shape.
    #[error("row {row}: {given} bytes given for {in_features} {weight_type} weights, which take {expected}")]
    ByteLength {
        /// Index of the row.
        row: usize,
        /// Bytes given.
        given: usize,
        /// Bytes that a row takes.
        expected: usize,
        /// Length of a row.
        in_features: usize,
        /// Name of the type.
        weight_type: &'static str,
    },
    /// The system gives no memory for the packed weights.
    #[error("no memory for {bytes} bytes of {out_features} × {in_features} {weight_type} weights")]
    Memory {
        /// Bytes wanted.
        bytes: u128,
        /// Rows.
        out_features: usize,
        /// Columns.
        in_features: usize,
        /// Name of the type.
        weight_type: &'static str,
    },
}

/// Weights of a linear layer, `[out_features, in_features]`, packed for this machine.
pub struct LinearWeights {
    weight_type: WeightType,
    level: InstructionSet,
    out_features: usize,
    in_features: usize,
    panel_bytes: usize,
    /// Panels of 16 rows each (see `packed`); anonymous memory, so that the system may back it with huge pages.
    /// `None` when there is nothing to hold.
    packed: Option<MmapMut>,
}

/// Buffers that [`LinearWeights::forward`] reuses from call to call.
#[derive(Default)]
pub struct LinearScratch {
    activations: AlignedScratch,
    /// One for each worker: panels expanded for the micro-kernel.
    expanded: Vec<Mutex<AlignedScratch>>,
}

/// Up to so many rows one thread converts the activations: a job for the team would take longer.
const PARALLEL_ROWS: usize = 8;

impl LinearWeights {
    /// Packs the rows given by `row_bytes(index)`, each the bytes of one row in the file's format, in parallel.
    /// Rows come from a function so that a caller may reorder, join or rewrite tensors
    /// without a copy of them all. f16 weights are
    /// rounded to bf16.
    ///
    /// # Errors
    /// When the row length is no whole number of blocks, a row has another number of bytes than its shape takes, or
    /// the system has no memory left.
    pub fn pack<R: AsRef<[u8]>>(
        weight_type: WeightType,
        out_features: usize,
        in_features: usize,
        row_bytes: impl Fn(usize) -> R + Sync,
        team: &ThreadTeam,
    ) -> Result<Self, PackError> {
        Self::pack_for(InstructionSet::current(), weight_type, out_features, in_features, row_bytes, team)
    }

    /// [`LinearWeights::pack`] for a given instruction set, to compare or test levels in one process.
    ///
    /// # Errors
    /// As [`LinearWeights::pack`].
    ///
    /// # Panics
    /// When this machine does not have `level`.
    pub fn pack_for<R: AsRef<[u8]>>(
        level: InstructionSet,
        weight_type: WeightType,
        out_features: usize,
        in_features: usize,
        row_bytes: impl Fn(usize) -> R + Sync,
        team: &ThreadTeam,
    ) -> Result<Self, PackError> {
        assert!(level <= InstructionSet::detected(), "this machine has no {}", level.name());
        let expected = weight_type.row_bytes(in_features).ok_or(PackError::RowLength {
            in_features,
            weight_type: weight_type.name(),
            block: weight_type.block_weights(),
        })?;
        let wrong_length =
            |row, given| PackError::ByteLength { row, given, expected, in_features, weight_type: weight_type.name() };
        // Before memory is asked for.
        if let Some(given) = (out_features > 0).then(|| row_bytes(0).as_ref().len()).filter(|given| *given != expected)
        {
            return Err(wrong_length(0, given));
        }
        let panel_bytes = packed::panel_bytes(weight_type, in_features);
        let panels = out_features.div_ceil(PANEL);
        let no_memory = || PackError::Memory {
            bytes: panels as u128 * panel_bytes as u128,
            out_features,
            in_features,
            weight_type: weight_type.name(),
        };
        let bytes = panels.checked_mul(panel_bytes).ok_or_else(no_memory)?;
        // The first row of another length than its own, with that.
        let wrong = Mutex::new(None);
        let mut packed = match bytes {
            0 => None,
            _ => Some(MmapOptions::new().len(bytes).map_anon().map_err(|_| no_memory())?),
        };
        if let Some(memory) = &mut packed {
            #[cfg(target_os = "linux")]
            // Fewer page-table walks while weights stream; a kernel without huge pages refuses, which is harmless.
            let _ = memory.advise(memmap2::Advice::HugePage);
            team.run_chunks(memory, panel_bytes, |panel, bytes, _| {
                let first = panel * PANEL;
                for row in first..out_features.min(first + PANEL) {
                    let stored = row_bytes(row);
                    let stored = stored.as_ref();
                    if stored.len() == expected {
                        packed::pack_row(weight_type, stored, row - first, bytes);
                    } else {
                        let mut wrong = wrong.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                        *wrong = wrong.filter(|&(first, _)| first < row).or(Some((row, stored.len())));
                    }
                }
            });
        }
        if let Some((row, given)) = wrong.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            return Err(wrong_length(row, given));
        }
        Ok(Self { weight_type, level, out_features, in_features, panel_bytes, packed })
    }

    /// Type the weights had in the file.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// Length of an output row.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Length of an input row.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        self.packed().len()
    }

    /// Name of the kernel that runs for `rows` rows, as reports print it.
    pub fn kernel_name(&self, rows: usize) -> &'static str {
        Plan::new(self, rows).kernels.name
    }

    fn packed(&self) -> &[u8] {
        self.packed.as_deref().unwrap_or_default()
    }

    /// Writes row `index` of the weights, dequantised, to `output` (`[in_features]`): an embedding look-up.
    ///
    /// # Panics
    /// When `index` is no row or `output` has another length.
    pub fn row(&self, index: usize, output: &mut [f32]) {
        assert!(index < self.out_features, "row {index} of {}", self.out_features);
        assert_eq!(output.len(), self.in_features, "length of a row");
        packed::expand_column(self.weight_type, self.panel(index / PANEL), index % PANEL, output);
    }

    /// `output[r, o] = Σ_i input[r, i] · weights[o, i]`; `input` is `[rows, in_features]`, `output`
    /// `[rows, out_features]`, both row-major. The result does not depend on the number of threads.
    ///
    /// # Panics
    /// When a slice has another length than its shape takes.
    pub fn forward(&self, input: &[f32], output: &mut [f32], team: &ThreadTeam, scratch: &mut LinearScratch) {
        if self.in_features == 0 || self.out_features == 0 {
            output.fill(0.0);
            return;
        }
        let rows = output.len() / self.out_features;
        assert_eq!(output.len(), rows * self.out_features, "output is [rows, {}]", self.out_features);
        assert_eq!(input.len(), rows * self.in_features, "input is [{rows}, {}]", self.in_features);
        if rows == 0 {
            return;
        }
        let plan = Plan::new(self, rows);
        let tiles = RowTiles::new(rows, plan.kernels.rows());
        scratch.expanded.resize_with(team.threads().max(scratch.expanded.len()), Mutex::default);
        let tile_words = tiles.tallest() * plan.row_words;
        let activations: &mut [u32] = bytemuck::cast_slice_mut(scratch.activations.bytes(tiles.count * tile_words * 4));
        let convert = |tile: usize, words: &mut [u32]| {
            let rows = tiles.start(tile) * self.in_features..tiles.start(tile + 1) * self.in_features;
            plan.convert(self, &input[rows], &mut words[..tiles.height(tile) * plan.row_words]);
        };
        if rows <= PARALLEL_ROWS {
            activations.chunks_exact_mut(tile_words).enumerate().for_each(|(tile, words)| convert(tile, words));
        } else {
            team.run_chunks(activations, tile_words, |tile, words, _| convert(tile, words));
        }
        let output = OutputView { start: output.as_mut_ptr(), row_stride: self.out_features };
        let columns = plan.kernels.panels() * PANEL;
        let groups = self.out_features.div_ceil(columns);
        let row_chunks = (4 * team.threads()).div_ceil(groups).min(tiles.count);
        let (activations, expanded) = (&*activations, &scratch.expanded);
        team.run(groups * row_chunks, |task, worker| {
            let (group, chunk) = (task / row_chunks, task % row_chunks);
            let part = Part {
                activations,
                tile_words,
                tiles,
                row_tiles: tiles.count * chunk / row_chunks..tiles.count * (chunk + 1) / row_chunks,
                columns: group * columns..self.out_features.min((group + 1) * columns),
                output: &output,
            };
            let mut expanded = expanded[worker].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            plan.run(self, &part, &mut expanded);
        });
    }

    fn panel(&self, panel: usize) -> &[u8] {
        &self.packed()[panel * self.panel_bytes..][..self.panel_bytes]
    }
}

/// Where tasks write: each its own rows and columns.
struct OutputView {
    start: *mut f32,
    row_stride: usize,
}

impl OutputView {
    /// Where row `row`, column `column` is written.
    fn at(&self, row: usize, column: usize) -> *mut f32 {
        self.start.wrapping_add(row * self.row_stride + column)
    }
}

// SAFETY: tasks write disjoint parts of the output (see `forward`).
unsafe impl Sync for OutputView {}
