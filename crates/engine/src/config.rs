//! The shape of a model, as its files state it, checked before anything is allocated from it.

mod gguf;
mod hugging_face;

use crate::text::quoted;

pub(crate) use gguf::config_of_gguf;
pub(crate) use hugging_face::{merge_generation_config, parse_config};

/// The families of decoder models that the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1, 2, 3.x and models of the same architecture.
    Llama,
    /// Mistral: Llama with an attention window.
    Mistral,
    /// Qwen 2 and 2.5: Llama with biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: Llama with RMS norms on each head's queries and keys.
    Qwen3,
}

impl Family {
    /// Lower-case name, as `model_type` in a `config.json` gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// How rotary positions are stretched beyond the lengths of the training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All positions divided by one factor.
    Linear {
        /// Divisor of the positions.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, those between interpolated.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original_context / low_frequency_factor` count as low frequencies.
        low_frequency_factor: f32,
        /// Wavelengths below `original_context / high_frequency_factor` count as high frequencies.
        high_frequency_factor: f32,
        /// Context length of the training, in tokens.
        original_context: usize,
    },
    /// YaRN (Peng et al. 2023, <https://arxiv.org/abs/2309.00071>).
    Yarn {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Multiplies the cosines and sines; computed as transformers does where the file does not give it.
        attention_factor: f32,
        /// Rotations within the original context above which a frequency is kept.
        beta_fast: f32,
        /// Rotations within the original context below which a frequency is divided by `factor`.
        beta_slow: f32,
        /// Context length of the training, in tokens.
        original_context: usize,
        /// Whether the ends of the ramp between kept and divided frequencies are rounded to whole dimensions.
        truncate: bool,
    },
    /// Dynamic NTK: a larger theta for texts beyond the context length, which the engine does not read. Up to it nothing
    /// is scaled.
    Dynamic {
        /// By how much the context is to grow.
        factor: f32,
    },
    /// Frequency `i` is divided by factor `i`: `rope_freqs.weight` of a GGUF file, `[head_dim / 2]`.
    Factors(Vec<f32>),
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies: frequency `i` is `theta^(-2 i / head_dim)`.
    pub theta: f64,
    /// How positions are stretched.
    pub scaling: RopeScaling,
}

/// The shape of a model.
///
/// All sizes are checked when a model is opened: none is zero, `query_heads` is a multiple of `kv_heads`, and they agree
/// with the shapes of the tensors. [`context_length`](Self::context_length) is only what the file states: allocate as
/// tokens come, never by it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which architecture.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads; each serves `query_heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of a head, even; `query_heads · head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Rows of the token embedding and of the output layer; may be more than the tokenizer knows.
    pub vocabulary: usize,
    /// Epsilon of the RMS norms.
    pub norm_epsilon: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// A query at position `p` sees the keys at positions `> p − window`, in layers where
    /// [`sliding_layers`](Self::sliding_layers) says so.
    pub sliding_window: Option<usize>,
    /// For each layer whether it uses the sliding window, `[layers]`.
    pub sliding_layers: Vec<bool>,
    /// Longest sequence the model is made for, in tokens.
    pub context_length: usize,
    /// Whether the output layer is the token embedding.
    pub tied_embeddings: bool,
    /// Whether queries, keys and values have biases.
    pub attention_bias: bool,
    /// Whether the attention's output layer has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward layers have biases.
    pub feed_forward_bias: bool,
    /// Whether each head's queries and keys are normed (Qwen 3).
    pub query_key_norm: bool,
    /// Token that starts a sequence, as the files state it.
    pub bos_token: Option<u32>,
    /// Tokens that end a generation, as the configuration states them; see also `Tokenizer::end_tokens`.
    pub eos_tokens: Vec<u32>,
}

impl ModelConfig {
    /// The attention window of a layer, in tokens, or `None` where it sees everything before it.
    pub fn attention_window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| self.sliding_layers.get(layer).copied().unwrap_or(false))
    }

    /// Checks sizes against each other and against bounds that no real model reaches, so that nothing derived from
    /// them overflows.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let within = |field: &'static str, value: usize, maximum: usize| {
            if (1..=maximum).contains(&value) {
                Ok(())
            } else {
                Err(ConfigError::OutOfRange { field: field.into(), found: value.to_string(), minimum: 1, maximum })
            }
        };
        within("hidden size", self.hidden_size, 1 << 17)?;
        within("feed-forward size", self.intermediate_size, 1 << 20)?;
        within("number of layers", self.layers, 1 << 10)?;
        within("number of attention heads", self.query_heads, 1 << 10)?;
        within("number of key/value heads", self.kv_heads, 1 << 10)?;
        within("head width", self.head_dim, 1 << 9)?;
        within("vocabulary size", self.vocabulary, 1 << 23)?;
        within("context length", self.context_length, 1 << 30)?;
        if let Some(window) = self.sliding_window {
            within("sliding window", window, 1 << 30)?;
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            return Err(ConfigError::Inconsistent(format!(
                "{} attention heads are no multiple of {} key/value heads",
                self.query_heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::Inconsistent(format!(
                "head width {} is odd; rotary positions need an even one",
                self.head_dim
            )));
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon >= 0.0) {
            return Err(ConfigError::Inconsistent(format!(
                "RMS norm epsilon {} is no small number",
                self.norm_epsilon
            )));
        }
        if self.sliding_layers.len() != self.layers {
            return Err(ConfigError::Inconsistent(format!(
                "{} layer types for {} layers",
                self.sliding_layers.len(),
                self.layers
            )));
        }
        self.rope.check(self.head_dim)
    }
}

impl RopeConfig {
    fn check(&self, head_dim: usize) -> Result<(), ConfigError> {
        let positive = |field: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(ConfigError::Inconsistent(format!("{field} is {value}; expected a positive number")))
            }
        };
        positive("rope theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                positive("rope scaling factor", f64::from(*factor))
            }
            RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_context } => {
                positive("rope scaling factor", f64::from(*factor))?;
                positive("rope scaling low_freq_factor", f64::from(*low_frequency_factor))?;
                positive("rope scaling high_freq_factor", f64::from(*high_frequency_factor))?;
                positive("rope scaling original_max_position_embeddings", *original_context as f64)?;
                if high_frequency_factor <= low_frequency_factor {
                    return Err(ConfigError::Inconsistent(format!(
                        "rope scaling high_freq_factor {high_frequency_factor} is not above low_freq_factor \
                         {low_frequency_factor}"
                    )));
                }
                Ok(())
            }
            RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_context, .. } => {
                positive("rope scaling factor", f64::from(*factor))?;
                positive("rope scaling attention_factor", f64::from(*attention_factor))?;
                positive("rope scaling beta_fast", f64::from(*beta_fast))?;
                positive("rope scaling beta_slow", f64::from(*beta_slow))?;
                positive("rope scaling original_max_position_embeddings", *original_context as f64)?;
                if self.theta <= 1.0 {
                    return Err(ConfigError::Inconsistent(format!("rope theta {} is not above 1", self.theta)));
                }
                Ok(())
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != head_dim / 2 {
                    return Err(ConfigError::Inconsistent(format!(
                        "{} rope frequency factors for a head width of {head_dim}; expected {}",
                        factors.len(),
                        head_dim / 2
                    )));
                }
                factors.iter().try_for_each(|&factor| positive("a rope frequency factor", f64::from(factor)))
            }
        }
    }
}

/// What is wrong with the stated shape of a model.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("not valid JSON: {0}")]
    Json(String),
    /// A field that must be there is not.
    #[error("{field} is missing")]
    Missing {
        /// Name of the field.
        field: String,
    },
    /// A field has another type than it should.
    #[error("{field} is {found}; expected {expected}")]
    WrongType {
        /// Name of the field.
        field: String,
        /// What stands in the file, shortened.
        found: String,
        /// What should stand there.
        expected: &'static str,
    },
    /// A number lies outside what the engine accepts.
    #[error("{field} is {found}; expected {minimum} to {maximum}")]
    OutOfRange {
        /// Name of the field.
        field: String,
        /// What stands in the file.
        found: String,
        /// Smallest value accepted.
        minimum: usize,
        /// Largest value accepted.
        maximum: usize,
    },
    /// The model is of a family that the engine does not run.
    #[error("{field} {} is not supported; known families are {known}", quoted(.found))]
    UnknownFamily {
        /// Name of the field.
        field: &'static str,
        /// What stands in the file.
        found: String,
        /// The names that are known.
        known: &'static str,
    },
    /// The model uses a feature that the engine does not have.
    #[error("{field} {} is not supported; {hint}", quoted(.found))]
    Unsupported {
        /// Name of the field.
        field: String,
        /// What stands in the file.
        found: String,
        /// What is supported, or what to do.
        hint: &'static str,
    },
    /// Fields contradict each other.
    #[error("{0}")]
    Inconsistent(String),
}
