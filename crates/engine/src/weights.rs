//! Tensors of a model by what they are for, whatever a file calls them.

mod table;

use std::borrow::Cow;

use iceformer_kernels::linear::{StoredType, WeightType};

use crate::config::{Family, ModelConfig};
use crate::file_map::FileBytes;
use crate::text::quoted;

pub(crate) use table::{Layout, StoredTensor, TensorTable, floats};

/// A tensor of a decoder model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorName {
    /// Token embedding, `[vocabulary, hidden_size]`.
    TokenEmbedding,
    /// Weight of the last RMS norm, `[hidden_size]`.
    OutputNorm,
    /// Output layer, `[vocabulary, hidden_size]`; the token embedding where embeddings are tied.
    Output,
    /// A tensor of one layer.
    Layer(usize, LayerTensor),
}

/// A tensor of one layer. Linear weights are `[out_features, in_features]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerTensor {
    /// RMS norm before attention, `[hidden_size]`.
    AttentionNorm,
    /// Queries, `[query_heads · head_dim, hidden_size]`.
    Query,
    /// Keys, `[kv_heads · head_dim, hidden_size]`.
    Key,
    /// Values, `[kv_heads · head_dim, hidden_size]`.
    Value,
    /// Attention's output layer, `[hidden_size, query_heads · head_dim]`.
    AttentionOutput,
    /// `[query_heads · head_dim]`.
    QueryBias,
    /// `[kv_heads · head_dim]`.
    KeyBias,
    /// `[kv_heads · head_dim]`.
    ValueBias,
    /// `[hidden_size]`.
    OutputBias,
    /// RMS norm of each query head, `[head_dim]`.
    QueryNorm,
    /// RMS norm of each key head, `[head_dim]`.
    KeyNorm,
    /// RMS norm before the feed-forward layers, `[hidden_size]`.
    FeedForwardNorm,
    /// Feed-forward gate, `[intermediate_size, hidden_size]`.
    Gate,
    /// Feed-forward up, `[intermediate_size, hidden_size]`.
    Up,
    /// Feed-forward down, `[hidden_size, intermediate_size]`.
    Down,
    /// `[intermediate_size]`.
    GateBias,
    /// `[intermediate_size]`.
    UpBias,
    /// `[hidden_size]`.
    DownBias,
}

impl LayerTensor {
    /// Name within a layer in Hugging Face files, and in GGUF files.
    fn file_names(self) -> (&'static str, &'static str) {
        match self {
            Self::AttentionNorm => ("input_layernorm.weight", "attn_norm.weight"),
            Self::Query => ("self_attn.q_proj.weight", "attn_q.weight"),
            Self::Key => ("self_attn.k_proj.weight", "attn_k.weight"),
            Self::Value => ("self_attn.v_proj.weight", "attn_v.weight"),
            Self::AttentionOutput => ("self_attn.o_proj.weight", "attn_output.weight"),
            Self::QueryBias => ("self_attn.q_proj.bias", "attn_q.bias"),
            Self::KeyBias => ("self_attn.k_proj.bias", "attn_k.bias"),
            Self::ValueBias => ("self_attn.v_proj.bias", "attn_v.bias"),
            Self::OutputBias => ("self_attn.o_proj.bias", "attn_output.bias"),
            Self::QueryNorm => ("self_attn.q_norm.weight", "attn_q_norm.weight"),
            Self::KeyNorm => ("self_attn.k_norm.weight", "attn_k_norm.weight"),
            Self::FeedForwardNorm => ("post_attention_layernorm.weight", "ffn_norm.weight"),
            Self::Gate => ("mlp.gate_proj.weight", "ffn_gate.weight"),
            Self::Up => ("mlp.up_proj.weight", "ffn_up.weight"),
            Self::Down => ("mlp.down_proj.weight", "ffn_down.weight"),
            Self::GateBias => ("mlp.gate_proj.bias", "ffn_gate.bias"),
            Self::UpBias => ("mlp.up_proj.bias", "ffn_up.bias"),
            Self::DownBias => ("mlp.down_proj.bias", "ffn_down.bias"),
        }
    }
}

impl TensorName {
    /// Name in Hugging Face files.
    pub fn hugging_face(self) -> String {
        match self {
            Self::TokenEmbedding => "model.embed_tokens.weight".into(),
            Self::OutputNorm => "model.norm.weight".into(),
            Self::Output => "lm_head.weight".into(),
            Self::Layer(layer, tensor) => format!("model.layers.{layer}.{}", tensor.file_names().0),
        }
    }

    /// Name in GGUF files.
    pub fn gguf(self) -> String {
        match self {
            Self::TokenEmbedding => "token_embd.weight".into(),
            Self::OutputNorm => "output_norm.weight".into(),
            Self::Output => "output.weight".into(),
            Self::Layer(layer, tensor) => format!("blk.{layer}.{}", tensor.file_names().1),
        }
    }

    /// Rows and columns that the configuration asks for, or `None` where the model has no such tensor; a vector has one
    /// row.
    pub fn shape(self, config: &ModelConfig) -> Option<(usize, usize)> {
        use LayerTensor::*;
        let hidden = config.hidden_size;
        let (query_width, kv_width) = (config.query_heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Self::TokenEmbedding => Some((config.vocabulary, hidden)),
            Self::Output => (!config.tied_embeddings).then_some((config.vocabulary, hidden)),
            Self::OutputNorm => Some((1, hidden)),
            Self::Layer(layer, _) if layer >= config.layers => None,
            Self::Layer(_, tensor) => match tensor {
                AttentionNorm | FeedForwardNorm => Some((1, hidden)),
                Query => Some((query_width, hidden)),
                Key | Value => Some((kv_width, hidden)),
                AttentionOutput => Some((hidden, query_width)),
                QueryBias => config.attention_bias.then_some((1, query_width)),
                KeyBias | ValueBias => config.attention_bias.then_some((1, kv_width)),
                OutputBias => config.output_bias.then_some((1, hidden)),
                QueryNorm | KeyNorm => config.query_key_norm.then_some((1, config.head_dim)),
                Gate | Up => Some((config.intermediate_size, hidden)),
                Down => Some((hidden, config.intermediate_size)),
                GateBias | UpBias => config.feed_forward_bias.then_some((1, config.intermediate_size)),
                DownBias => config.feed_forward_bias.then_some((1, hidden)),
            },
        }
    }

    /// Whether the tensor is a vector.
    pub fn is_vector(self) -> bool {
        use LayerTensor::*;
        !matches!(
            self,
            Self::TokenEmbedding
                | Self::Output
                | Self::Layer(_, Query | Key | Value | AttentionOutput | Gate | Up | Down)
        )
    }

    /// Every tensor that a model of this configuration has.
    pub fn all(config: &ModelConfig) -> impl Iterator<Item = Self> + '_ {
        use LayerTensor::*;
        let layer_tensors = [
            AttentionNorm,
            Query,
            Key,
            Value,
            AttentionOutput,
            QueryBias,
            KeyBias,
            ValueBias,
            OutputBias,
            QueryNorm,
            KeyNorm,
            FeedForwardNorm,
            Gate,
            Up,
            Down,
            GateBias,
            UpBias,
            DownBias,
        ];
        [Self::TokenEmbedding, Self::OutputNorm, Self::Output]
            .into_iter()
            .chain((0..config.layers).flat_map(move |layer| layer_tensors.map(|tensor| Self::Layer(layer, tensor))))
            .filter(|name| name.shape(config).is_some())
    }

    /// Whether rows of this tensor stand in another order in GGUF files of the family: llama.cpp's converter reorders
    /// the queries and keys of Llama and Mistral so that the two numbers of a rotary pair are neighbours.
    pub(crate) fn is_interleaved_in_gguf(self, family: Family) -> bool {
        use LayerTensor::{Key, KeyBias, Query, QueryBias};
        matches!(family, Family::Llama | Family::Mistral)
            && matches!(self, Self::Layer(_, Query | Key | QueryBias | KeyBias))
    }
}

/// A tensor's bytes, mapped while the view lives: drop it once the weights are packed.
#[derive(Debug)]
pub struct TensorView {
    stored: StoredType,
    rows: usize,
    columns: usize,
    /// Bytes of a row in the file.
    row_length: usize,
    bytes: FileBytes,
    /// Head width, where rows stand in the interleaved order of llama.cpp.
    interleaved: Option<usize>,
}

impl TensorView {
    /// `bytes` must be as long as the shape takes; that was checked when the file was opened.
    pub(crate) fn new(
        stored: StoredType,
        rows: usize,
        columns: usize,
        bytes: FileBytes,
        interleaved: Option<usize>,
    ) -> Self {
        let row_length = columns / stored.block_weights() * stored.block_bytes();
        debug_assert_eq!(rows * row_length, bytes.len());
        Self { stored, rows, columns, row_length, bytes, interleaved }
    }

    /// How the weights are computed.
    pub fn weight_type(&self) -> WeightType {
        self.stored.weight_type()
    }

    /// Rows: output features of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: input features of a linear layer.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The bytes of row `index` in the format of [`weight_type`](Self::weight_type). Rows of queries and keys come in
    /// Hugging Face's order, where number `i` of a head is rotated with number `i + head_dim / 2`, whatever the file's
    /// order.
    ///
    /// # Panics
    /// When `index` is not below [`rows`](Self::rows).
    pub fn row_bytes(&self, index: usize) -> Cow<'_, [u8]> {
        assert!(index < self.rows, "row {index} of a tensor with {} rows", self.rows);
        let stored = self.interleaved.map_or(index, |head_dim| interleaved_position(index, head_dim));
        let row = &self.bytes[stored * self.row_length..][..self.row_length];
        self.stored.row(row)
    }
}

/// Where number `index` of the half-split order stands in the interleaved order.
pub(crate) fn interleaved_position(index: usize, head_dim: usize) -> usize {
    let (head, within) = (index / head_dim, index % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

/// A tensor of a file, as `inspect` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Name of the element type, lower case.
    pub weight_type: &'static str,
    /// The type that the engine computes with; `None` where it does not compute with it.
    pub computed_as: Option<&'static str>,
    /// Shape, slowest dimension first: `[rows, columns]` or `[length]`.
    pub shape: Vec<u64>,
    /// Size in the file, in bytes.
    pub bytes: u64,
}

/// What is wrong with a tensor.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    /// The file has no such tensor.
    #[error("{file}: tensor {} is missing", quoted(.name))]
    Missing {
        /// File that should hold it.
        file: String,
        /// Name in the file.
        name: String,
    },
    /// The shape is not what the configuration asks for.
    #[error("{file}: tensor {} has shape {found:?}; the configuration asks for {expected:?}", quoted(.name))]
    Shape {
        /// File that holds it.
        file: String,
        /// Name in the file.
        name: String,
        /// Shape that the configuration asks for.
        expected: Vec<u64>,
        /// Shape in the file.
        found: Vec<u64>,
    },
    /// The element type is none that the engine computes with.
    #[error("{file}: tensor {} is of type {found}; supported are {supported}", quoted(.name))]
    Type {
        /// File that holds it.
        file: String,
        /// Name in the file.
        name: String,
        /// Type in the file.
        found: String,
        /// Types that are supported.
        supported: &'static str,
    },
    /// The files hold more layers than the configuration tells of.
    #[error("{file}: tensor {} belongs to none of the {layers} layers that {field} tells of", quoted(.name))]
    MoreLayers {
        /// File that holds it.
        file: String,
        /// Name in the file.
        name: String,
        /// Layers of the configuration.
        layers: usize,
        /// Where the number of layers stands.
        field: &'static str,
    },
    /// The model has no such tensor: a bias of a model without biases, a layer behind the last.
    #[error("a {family} model of this shape has no tensor {name:?}")]
    NotInModel {
        /// Name of the family.
        family: &'static str,
        /// The tensor asked for.
        name: TensorName,
    },
    /// A matrix was asked for as a vector.
    #[error("tensor {0:?} is a matrix, not a vector")]
    NotAVector(TensorName),
    /// The file could not be read.
    #[error("{file}: {error}")]
    Read {
        /// File that holds it.
        file: String,
        /// What the system said.
        error: std::io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_order_is_undone() {
        let file_order: Vec<usize> = (0..8).map(|index| interleaved_position(index, 4)).collect();
        assert_eq!(file_order, [0, 2, 1, 3, 4, 6, 5, 7]);
        let mut seen: Vec<usize> = (0..96).map(|index| interleaved_position(index, 32)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..96).collect::<Vec<_>>());
    }
}
