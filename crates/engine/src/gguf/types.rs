//! Element types of tensors.

use iceformer_kernels::linear::{RecodedType, StoredType, WeightType};

/// An element type of GGML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TensorType {
    pub(crate) name: &'static str,
    pub(crate) block_weights: u64,
    pub(crate) block_bytes: u64,
    /// `None` for types that the engine does not compute with; their tensors can still be listed.
    pub(crate) stored: Option<StoredType>,
}

impl TensorType {
    /// The type of a number in a file. Numbers, block lengths and sizes are those of ggml.h.
    pub(crate) fn from_id(id: u32) -> Option<Self> {
        let stored = |kind: StoredType| Self {
            name: kind.name(),
            block_weights: kind.block_weights() as u64,
            block_bytes: kind.block_bytes() as u64,
            stored: Some(kind),
        };
        let computed = |kind: WeightType| stored(StoredType::Computed(kind));
        let recoded = |kind: RecodedType| stored(StoredType::Recoded(kind));
        let listed = |name, block_weights, block_bytes| Self { name, block_weights, block_bytes, stored: None };
        Some(match id {
            0 => computed(WeightType::F32),
            1 => computed(WeightType::F16),
            2 => computed(WeightType::Q4_0),
            3 => computed(WeightType::Q4_1),
            6 => computed(WeightType::Q5_0),
            7 => computed(WeightType::Q5_1),
            8 => computed(WeightType::Q8_0),
            9 => listed("q8_1", 32, 40),
            10 => recoded(RecodedType::Q2_K),
            11 => recoded(RecodedType::Q3_K),
            12 => computed(WeightType::Q4_K),
            13 => computed(WeightType::Q5_K),
            14 => computed(WeightType::Q6_K),
            15 => listed("q8_k", 256, 292),
            16 => listed("iq2_xxs", 256, 66),
            17 => listed("iq2_xs", 256, 74),
            18 => listed("iq3_xxs", 256, 98),
            19 => listed("iq1_s", 256, 50),
            20 => recoded(RecodedType::Iq4_Nl),
            21 => listed("iq3_s", 256, 110),
            22 => listed("iq2_s", 256, 82),
            23 => recoded(RecodedType::Iq4_Xs),
            24 => listed("i8", 1, 1),
            25 => listed("i16", 1, 2),
            26 => listed("i32", 1, 4),
            27 => listed("i64", 1, 8),
            28 => listed("f64", 1, 8),
            29 => listed("iq1_m", 256, 56),
            30 => computed(WeightType::Bf16),
            34 => listed("tq1_0", 256, 54),
            35 => listed("tq2_0", 256, 66),
            39 => listed("mxfp4", 32, 17),
            40 => listed("nvfp4", 64, 36),
            41 => listed("q1_0", 128, 18),
            _ => return None,
        })
    }
}
