//! Linear layers: `output = input · weightsᵀ`, weights packed once at load for this machine.

use crate::ThreadTeam;

/// How the weights of a model file are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit brain floats.
    Bf16,
    /// GGML blocks of 32 weights: f16 scale, 8-bit integers.
    Q8_0,
    /// GGML blocks of 32 weights: f16 scale, 4-bit integers offset by 8.
    Q4_0,
    /// GGML superblocks of 256 weights: 4-bit integers, 6-bit scales and minima for each 32.
    Q4_K,
    /// GGML superblocks of 256 weights: 5-bit integers, 6-bit scales and minima for each 32.
    Q5_K,
    /// GGML superblocks of 256 weights: 6-bit integers, 8-bit scales for each 16.
    Q6_K,
}

impl WeightType {
    /// Weights in one block of the file format; a row is a whole number of blocks.
    pub fn block_weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of one block of the file format.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Lower-case name as the command line takes it (`f32`, `bf16`, `q4_k`, …).
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_K => "q4_k",
            Self::Q5_K => "q5_k",
            Self::Q6_K => "q6_k",
        }
    }
}

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
    #[error("{given} bytes given for {out_features} × {in_features} {weight_type} weights, which take {expected}")]
    ByteLength {
        /// Bytes given.
        given: usize,
        /// Bytes that the shape takes.
        expected: usize,
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
    out_features: usize,
    in_features: usize,
    rows: Vec<f32>,
}

/// Buffers that [`LinearWeights::forward`] reuses from call to call.
#[derive(Default)]
pub struct LinearScratch {}

impl LinearWeights {
    /// Packs the rows given by `row_bytes(index)`, each the bytes of one row in the file's format, in parallel.
    /// Rows come from a function so that a caller may reorder or join tensors without a copy.
    ///
    /// # Errors
    /// When the row length is no whole number of blocks or a row has another number of bytes than its shape takes.
    pub fn pack<'a>(
        weight_type: WeightType,
        out_features: usize,
        in_features: usize,
        row_bytes: impl Fn(usize) -> &'a [u8] + Sync,
        team: &ThreadTeam,
    ) -> Result<Self, PackError> {
        let _ = team;
        let mut rows = Vec::new();
        for index in 0..out_features {
            let bytes = row_bytes(index);
            if bytes.len() != in_features * weight_type.block_bytes() / weight_type.block_weights() {
                return Err(PackError::ByteLength {
                    given: bytes.len(),
                    expected: in_features * weight_type.block_bytes() / weight_type.block_weights(),
                    out_features,
                    in_features,
                    weight_type: weight_type.name(),
                });
            }
            match weight_type {
                WeightType::F32 => {
                    rows.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())))
                }
                WeightType::F16 => {
                    rows.extend(bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()))
                }
                _ => rows.extend(bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())),
            }
        }
        Ok(Self { weight_type, out_features, in_features, rows })
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
        self.rows.len() * 4
    }

    /// Name of the kernel that runs, as reports print it.
    pub fn kernel_name(&self) -> &'static str {
        "portable-f32"
    }

    /// Writes row `index` of the weights, dequantised, to `output` (`[in_features]`): an embedding look-up.
    pub fn row(&self, index: usize, output: &mut [f32]) {
        output.copy_from_slice(&self.rows[index * self.in_features..][..self.in_features]);
    }

    /// `output[r, o] = Σ_i input[r, i] · weights[o, i]`; `input` is `[rows, in_features]`, `output`
    /// `[rows, out_features]`, both row-major. The result does not depend on the number of threads.
    ///
    /// # Panics
    /// When a slice has another length than its shape takes.
    pub fn forward(&self, input: &[f32], output: &mut [f32], team: &ThreadTeam, scratch: &mut LinearScratch) {
        let _ = scratch;
        team.run_chunks(output, self.out_features, |row, output, _| {
            let input = &input[row * self.in_features..][..self.in_features];
            for (value, weights) in output.iter_mut().zip(self.rows.chunks_exact(self.in_features)) {
                *value = input.iter().zip(weights).map(|(a, b)| a * b).sum();
            }
        });
    }
}
