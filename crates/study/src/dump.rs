//! Dumps: queries, keys and values of every layer of a model on a text, in one safetensors file.
//!
//! For each layer `L`, counted from 0, the tensors `layer.L.queries` `[tokens, query_heads, key_dim]`, `layer.L.keys`
//! `[tokens, kv_heads, key_dim]` and `layer.L.values` `[tokens, kv_heads, value_dim]`, of f32, f16 or bf16, as attention
//! sees them: after rotation and norms, before the factor on the logits. The file's metadata, all of them text:
//!
//! | name | |
//! |---|---|
//! | `format` | `iceformer-dump` |
//! | `scale` | factor on the logits |
//! | `causal` | `true` or `false` |
//! | `window` | `none`, or the tokens that a query sees back; of layers that differ a list such as `none,4096` |
//! | `source` | the text |
//! | `model` | the model |

mod read;
mod write;

pub use read::{Dump, Layer};
pub use write::DumpWriter;

use safetensors::Dtype;

/// What the metadata of a dump says.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// Factor on the logits.
    pub scale: f32,
    /// Whether a query sees no key behind its position.
    pub causal: bool,
    /// For each layer the tokens that a query sees back, where not all.
    pub windows: Vec<Option<usize>>,
    /// The text.
    pub source: String,
    /// The model.
    pub model: String,
}

/// Type of the numbers of a dump to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberType {
    /// 16-bit floats: eleven significant bits, up to 65,504.
    F16,
    /// 32-bit floats.
    F32,
}

impl NumberType {
    /// Every type.
    pub const ALL: [Self; 2] = [Self::F16, Self::F32];

    /// Name as the command line takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }
}

/// A dump that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {problem}")]
pub struct DumpError {
    file: String,
    problem: String,
}

/// Value of `format` in the metadata.
const FORMAT: &str = "iceformer-dump";
/// What a layer has, in the order of the file.
const PARTS: [&str; 3] = ["queries", "keys", "values"];

/// Name of a tensor.
fn tensor_name(layer: usize, part: &str) -> String {
    format!("layer.{layer}.{part}")
}

#[cfg(test)]
mod tests;
