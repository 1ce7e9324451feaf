//! The weight types of model files.

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
    /// GGML blocks of 32 weights: f16 scale and least value, 4-bit integers.
    Q4_1,
    /// GGML blocks of 32 weights: f16 scale, 5-bit integers offset by 16.
    Q5_0,
    /// GGML blocks of 32 weights: f16 scale and least value, 5-bit integers.
    Q5_1,
    /// GGML superblocks of 256 weights: 4-bit integers, 6-bit scales and minima for each 32.
    Q4_K,
    /// GGML superblocks of 256 weights: 5-bit integers, 6-bit scales and minima for each 32.
    Q5_K,
    /// GGML superblocks of 256 weights: 6-bit integers, 8-bit scales for each 16.
    Q6_K,
}

impl WeightType {
    /// Every type.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Weights in one block of the file format; a row is a whole number of blocks.
    pub fn block_weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
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
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of a row of `in_features` weights in the file format; `None` when that is no whole number of blocks or
    /// more than memory can hold.
    pub fn row_bytes(self, in_features: usize) -> Option<usize> {
        if !in_features.is_multiple_of(self.block_weights()) {
            return None;
        }
        (in_features / self.block_weights()).checked_mul(self.block_bytes())
    }

    /// Lower-case name as the command line takes it (`f32`, `bf16`, `q4_k`, …).
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q4_K => "q4_k",
            Self::Q5_K => "q5_k",
            Self::Q6_K => "q6_k",
        }
    }
}
