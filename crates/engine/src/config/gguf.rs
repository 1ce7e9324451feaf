//! The shape of a model from the metadata and tensors of a GGUF file.

use std::collections::BTreeSet;

use iceformer_kernels::linear::{StoredType, WeightType};

use super::{ConfigError, Family, ModelConfig, RopeConfig, RopeScaling};
use crate::gguf::{GgufError, Metadata};
use crate::text::quoted;
use crate::weights::{TensorName, TensorTable, floats};

const KNOWN_ARCHITECTURES: &str = "llama (Llama and Mistral), qwen2, qwen3";
const ROPE_FACTORS: &str = "rope_freqs.weight";

impl From<GgufError> for ConfigError {
    fn from(error: GgufError) -> Self {
        Self::Inconsistent(error.to_string())
    }
}

/// Reads the metadata; tensors tell which optional parts the model has, as they do for llama.cpp.
pub(crate) fn config_of_gguf(metadata: &Metadata, table: &TensorTable) -> Result<ModelConfig, ConfigError> {
    let architecture = metadata
        .string("general.architecture")?
        .ok_or_else(|| ConfigError::Missing { field: "general.architecture".into() })?;
    let mut family = match architecture {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => {
            return Err(ConfigError::UnknownFamily {
                field: "general.architecture",
                found: other.into(),
                known: KNOWN_ARCHITECTURES,
            });
        }
    };
    let fields = Fields { metadata, architecture };
    refuse_unsupported(&fields)?;

    let hidden_size = fields.required("embedding_length", 1 << 17)?;
    let layers = fields.required("block_count", 1 << 10)?;
    let query_heads = fields.required("attention.head_count", 1 << 10)?;
    let kv_heads = fields.optional("attention.head_count_kv", 1 << 10)?.unwrap_or(query_heads);
    let head_dim = head_dim(&fields, hidden_size, query_heads)?;
    let context_length = fields.required("context_length", 1 << 30)?;
    let sliding_window = match metadata.u32(&fields.key("attention.sliding_window"))? {
        None | Some(0) => None,
        Some(window) => Some(window as usize),
    };
    if family == Family::Llama && sliding_window.is_some() {
        family = Family::Mistral;
    }
    let has = |name: &str| table.tensors.contains_key(name);
    let vocabulary = match table.tensors.get("token_embd.weight").map(|tensor| tensor.shape.as_slice()) {
        Some([rows, _]) => usize::try_from(*rows).unwrap_or(usize::MAX),
        _ => return Err(ConfigError::Missing { field: "matrix token_embd.weight".into() }),
    };

    let config = ModelConfig {
        family,
        hidden_size,
        intermediate_size: fields.required("feed_forward_length", 1 << 20)?,
        layers,
        query_heads,
        kv_heads,
        head_dim,
        vocabulary,
        norm_epsilon: metadata
            .float(&fields.key("attention.layer_norm_rms_epsilon"))?
            .ok_or_else(|| ConfigError::Missing { field: fields.key("attention.layer_norm_rms_epsilon") })?
            as f32,
        rope: rope(&fields, table, context_length, head_dim)?,
        sliding_window,
        sliding_layers: vec![sliding_window.is_some(); layers],
        context_length,
        tied_embeddings: !has("output.weight"),
        attention_bias: has("blk.0.attn_q.bias"),
        output_bias: has("blk.0.attn_output.bias"),
        feed_forward_bias: has("blk.0.ffn_gate.bias"),
        query_key_norm: family == Family::Qwen3,
        bos_token: metadata.u32("tokenizer.ggml.bos_token_id")?,
        eos_tokens: eos_tokens(metadata)?,
    };
    config.check()?;
    refuse_unused_parts(table, &config)?;
    Ok(config)
}

/// A bias that only some layers have, or a scale of a matrix, would be left out in silence, and the result be wrong.
fn refuse_unused_parts(table: &TensorTable, config: &ModelConfig) -> Result<(), ConfigError> {
    let used: BTreeSet<String> = TensorName::all(config).map(TensorName::gguf).collect();
    let is_part = |name: &&String| name.ends_with(".bias") || name.ends_with(".scale");
    match table.tensors.keys().filter(is_part).find(|name| !used.contains(*name)) {
        None => Ok(()),
        Some(name) => Err(ConfigError::Inconsistent(format!(
            "tensor {} has no place in this model; expected biases of a kind in all layers or in none, and no scales",
            quoted(name)
        ))),
    }
}

fn eos_tokens(metadata: &Metadata) -> Result<Vec<u32>, ConfigError> {
    let mut tokens = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        if let Some(token) = metadata.u32(&format!("tokenizer.ggml.{key}"))?
            && !tokens.contains(&token)
        {
            tokens.push(token);
        }
    }
    Ok(tokens)
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, query_heads: usize) -> Result<usize, ConfigError> {
    let key_length = fields.optional("attention.key_length", 1 << 9)?;
    let head_dim = match key_length {
        Some(length) => length,
        None if hidden_size.is_multiple_of(query_heads) => hidden_size / query_heads,
        None => {
            return Err(ConfigError::Inconsistent(format!(
                "{} {hidden_size} is no multiple of {} {query_heads} and {} is missing",
                fields.key("embedding_length"),
                fields.key("attention.head_count"),
                fields.key("attention.key_length"),
            )));
        }
    };
    for (field, hint) in [
        ("attention.value_length", "values must be as wide as keys"),
        ("rope.dimension_count", "all of a head must be rotary"),
    ] {
        if let Some(length) = fields.optional(field, 1 << 9)?.filter(|&length| length != head_dim) {
            return Err(ConfigError::Unsupported { field: fields.key(field), found: length.to_string(), hint });
        }
    }
    Ok(head_dim)
}

/// Features of other models of these architectures that would give wrong results if they were ignored.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let refuse =
        |field: &str, found: String, hint| Err(ConfigError::Unsupported { field: fields.key(field), found, hint });
    if let Some(experts) = fields.metadata.u32(&fields.key("expert_count"))?
        && experts > 0
    {
        return refuse("expert_count", experts.to_string(), "mixtures of experts are not run");
    }
    if fields.metadata.bool(&fields.key("attention.causal"))? == Some(false) {
        return refuse("attention.causal", "false".into(), "only causal decoders are run");
    }
    for field in ["attention.scale", "attention.clamp_kqv", "attention.temperature_scale", "logit_scale"] {
        if let Some(value) = fields.metadata.float(&fields.key(field))?
            && value != 0.0
        {
            return refuse(field, value.to_string(), "only the usual scales are computed");
        }
    }
    Ok(())
}

fn rope(
    fields: &Fields<'_>,
    table: &TensorTable,
    context_length: usize,
    head_dim: usize,
) -> Result<RopeConfig, ConfigError> {
    let theta = fields.metadata.float(&fields.key("rope.freq_base"))?.unwrap_or(10_000.0);
    let factor = match fields.metadata.float(&fields.key("rope.scaling.factor"))? {
        Some(factor) => factor,
        None => fields.metadata.float(&fields.key("rope.scale_linear"))?.unwrap_or(0.0),
    };
    // llama.cpp takes a missing or zero factor for none.
    let factor = if factor == 0.0 { 1.0 } else { factor };
    let kind = fields.metadata.string(&fields.key("rope.scaling.type"))?.unwrap_or("linear");
    let scaling = match kind {
        "none" => RopeScaling::None,
        "linear" if factor == 1.0 => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor as f32 },
        "yarn" => yarn(fields, factor, context_length)?,
        other => {
            return Err(ConfigError::Unsupported {
                field: fields.key("rope.scaling.type"),
                found: other.into(),
                hint: "known types are none, linear, yarn",
            });
        }
    };
    for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        if table.tensors.contains_key(name) {
            return Err(ConfigError::Unsupported {
                field: "tensor".into(),
                found: name.into(),
                hint: "two sets of rope factors are not computed",
            });
        }
    }
    if !table.tensors.contains_key(ROPE_FACTORS) {
        return Ok(RopeConfig { theta, scaling });
    }
    if scaling != RopeScaling::None {
        return Err(ConfigError::Unsupported {
            field: fields.key("rope.scaling.type"),
            found: kind.into(),
            hint: "rope_freqs.weight is there too; expected one of them",
        });
    }
    Ok(RopeConfig { theta, scaling: RopeScaling::Factors(rope_factors(table, head_dim)?) })
}

fn rope_factors(table: &TensorTable, head_dim: usize) -> Result<Vec<f32>, ConfigError> {
    let tensor = &table.tensors[ROPE_FACTORS];
    if tensor.stored != Some(StoredType::Computed(WeightType::F32)) || tensor.shape != [head_dim as u64 / 2] {
        return Err(ConfigError::Inconsistent(format!(
            "tensor {ROPE_FACTORS} is {} {:?}; expected f32 [{}]",
            tensor.type_name,
            tensor.shape,
            head_dim / 2
        )));
    }
    let source = &table.sources[tensor.source];
    let bytes = source
        .bytes(tensor.start..tensor.start + tensor.bytes)
        .map_err(|error| ConfigError::Inconsistent(format!("tensor {ROPE_FACTORS}: {error}")))?;
    Ok(floats(WeightType::F32, &bytes))
}

/// llama.cpp's YaRN: cosines and sines are multiplied by `1 + 0.1 ln(factor)` and by the `attn_factor` that the file states.
/// Its converter writes transformers' `attention_factor`, which is the whole factor, as `yarn_attn_factor`.
fn yarn(fields: &Fields<'_>, factor: f64, context_length: usize) -> Result<RopeScaling, ConfigError> {
    let number = |field: &str| fields.metadata.float(&fields.key(field));
    if let Some(multiplier) = number("rope.scaling.yarn_log_multiplier")?.filter(|&multiplier| multiplier != 0.0) {
        return Err(ConfigError::Unsupported {
            field: fields.key("rope.scaling.yarn_log_multiplier"),
            found: multiplier.to_string(),
            hint: "only plain YaRN is computed",
        });
    }
    let attention_factor = match number("rope.scaling.yarn_attn_factor")? {
        Some(whole) => whole,
        None => {
            let magnitude = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            magnitude * number("rope.scaling.attn_factor")?.unwrap_or(1.0)
        }
    };
    let original = fields.optional("rope.scaling.original_context_length", 1 << 30)?;
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        attention_factor: attention_factor as f32,
        beta_fast: number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0) as f32,
        beta_slow: number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0) as f32,
        original_context: original.unwrap_or(context_length),
        truncate: true,
    })
}

/// The metadata of one architecture: keys are prefixed with its name.
struct Fields<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Fields<'_> {
    fn key(&self, field: &str) -> String {
        format!("{}.{field}", self.architecture)
    }

    fn optional(&self, field: &str, maximum: usize) -> Result<Option<usize>, ConfigError> {
        let key = self.key(field);
        match self.metadata.usize(&key)? {
            None => Ok(None),
            Some(value) if (1..=maximum).contains(&value) => Ok(Some(value)),
            Some(value) => Err(ConfigError::OutOfRange { field: key, found: value.to_string(), minimum: 1, maximum }),
        }
    }

    fn required(&self, field: &str, maximum: usize) -> Result<usize, ConfigError> {
        self.optional(field, maximum)?.ok_or_else(|| ConfigError::Missing { field: self.key(field) })
    }
}
