//! `config.json` and `generation_config.json` of a Hugging Face folder.
//!
//! Where a field is missing the default is that of the family's configuration class in transformers.

use serde_json::{Map, Value};

use super::{ConfigError, Family, ModelConfig, RopeConfig, RopeScaling};
use crate::text::quoted;

const KNOWN_FAMILIES: &str = "llama, mistral, ministral, qwen2, qwen3";

/// Reads a `config.json`.
pub(crate) fn parse_config(json: &[u8]) -> Result<ModelConfig, ConfigError> {
    let object = parse_object(json)?;
    let fields = Fields { object: &object, prefix: "" };

    let family = match fields.string("model_type")? {
        Some("llama") => Family::Llama,
        // Ministral is a Mistral whose windows differ from layer to layer.
        Some("mistral" | "ministral") => Family::Mistral,
        Some("qwen2") => Family::Qwen2,
        Some("qwen3") => Family::Qwen3,
        Some(other) => {
            return Err(ConfigError::UnknownFamily { field: "model_type", found: other.into(), known: KNOWN_FAMILIES });
        }
        None => return Err(ConfigError::Missing { field: "model_type".into() }),
    };
    refuse_unsupported(&fields)?;

    let hidden_size = fields.required_integer("hidden_size", 1 << 17)?;
    let query_heads = fields.required_integer("num_attention_heads", 1 << 10)?;
    let layers = fields.required_integer("num_hidden_layers", 1 << 10)?;
    // `null` means one for each query head, a missing field the default of the family.
    let kv_heads = match (fields.integer("num_key_value_heads", 1 << 10)?, family) {
        (Some(heads), _) => heads,
        (None, Family::Llama) => query_heads,
        (None, _) if object.contains_key("num_key_value_heads") => query_heads,
        (None, Family::Mistral) => 8,
        (None, Family::Qwen2 | Family::Qwen3) => 32,
    };
    let head_dim = match (fields.integer("head_dim", 1 << 9)?, family) {
        (Some(width), _) => width,
        (None, Family::Qwen3) => 128,
        (None, _) if hidden_size.is_multiple_of(query_heads) => hidden_size / query_heads,
        (None, _) => {
            return Err(ConfigError::Inconsistent(format!(
                "hidden_size {hidden_size} is no multiple of num_attention_heads {query_heads} and head_dim is missing"
            )));
        }
    };
    let context_length = fields.integer("max_position_embeddings", 1 << 30)?.unwrap_or(match family {
        Family::Llama => 2048,
        Family::Mistral => 131_072,
        Family::Qwen2 | Family::Qwen3 => 32_768,
    });
    let (sliding_window, sliding_layers) = sliding_window(&fields, family, layers)?;
    let attention_bias = match family {
        Family::Qwen2 => true,
        Family::Mistral => false,
        Family::Llama | Family::Qwen3 => fields.boolean("attention_bias")?.unwrap_or(false),
    };
    let (default_bos, default_eos) = match family {
        Family::Llama | Family::Mistral => (Some(1), vec![2]),
        Family::Qwen2 | Family::Qwen3 => (None, vec![]),
    };

    let config = ModelConfig {
        family,
        hidden_size,
        intermediate_size: fields.required_integer("intermediate_size", 1 << 20)?,
        layers,
        query_heads,
        kv_heads,
        head_dim,
        vocabulary: fields.required_integer("vocab_size", 1 << 23)?,
        norm_epsilon: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope: rope(&fields, context_length)?,
        sliding_window,
        sliding_layers,
        context_length,
        tied_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
        attention_bias,
        output_bias: attention_bias && family != Family::Qwen2,
        feed_forward_bias: family == Family::Llama && fields.boolean("mlp_bias")?.unwrap_or(false),
        query_key_norm: family == Family::Qwen3,
        bos_token: match object.contains_key("bos_token_id") {
            true => fields.token_ids("bos_token_id")?.first().copied(),
            false => default_bos,
        },
        eos_tokens: match object.contains_key("eos_token_id") {
            true => fields.token_ids("eos_token_id")?,
            false => default_eos,
        },
    };
    config.check()?;
    Ok(config)
}

/// Adds what a `generation_config.json` says: its end tokens come on top of those of the `config.json`.
pub(crate) fn merge_generation_config(config: &mut ModelConfig, json: &[u8]) -> Result<(), ConfigError> {
    let object = parse_object(json)?;
    let fields = Fields { object: &object, prefix: "" };
    for token in fields.token_ids("eos_token_id")? {
        if !config.eos_tokens.contains(&token) {
            config.eos_tokens.push(token);
        }
    }
    if config.bos_token.is_none() {
        config.bos_token = fields.token_ids("bos_token_id")?.first().copied();
    }
    Ok(())
}

fn parse_object(json: &[u8]) -> Result<Map<String, Value>, ConfigError> {
    match serde_json::from_slice(json) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ConfigError::Json("expected an object".into())),
        Err(error) => Err(ConfigError::Json(error.to_string())),
    }
}

/// Features that other models of these architectures use and that would give wrong results if they were ignored.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let unsupported = |field: &str, found: &str, hint| {
        Err(ConfigError::Unsupported { field: field.into(), found: found.into(), hint })
    };
    if let Some(activation) = fields.string("hidden_act")?
        && !matches!(activation, "silu" | "swish")
    {
        return unsupported("hidden_act", activation, "expected silu");
    }
    // transformers then lets every token see all others, as embedding models made of decoders do.
    if fields.boolean("is_causal")? == Some(false) {
        return unsupported("is_causal", "false", "expected a causal decoder, that predicts the next token");
    }
    if let Some(Value::Object(quantization)) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("of unknown method");
        return unsupported(
            "quantization_config",
            method,
            "use the unquantised folder (F32, F16 or BF16) or a GGUF file of this model",
        );
    }
    Ok(())
}

fn sliding_window(
    fields: &Fields<'_>,
    family: Family,
    layers: usize,
) -> Result<(Option<usize>, Vec<bool>), ConfigError> {
    // A missing window means 4096 in transformers; `null` means none.
    let stated = match fields.get("sliding_window") {
        Some(_) => fields.integer("sliding_window", 1 << 30)?,
        None if fields.object.contains_key("sliding_window") => None,
        None => Some(4096),
    };
    let window = match family {
        Family::Llama => None,
        Family::Mistral => stated,
        Family::Qwen2 | Family::Qwen3 => {
            stated.filter(|_| matches!(fields.get("use_sliding_window"), Some(Value::Bool(true))))
        }
    };
    let first = match family {
        Family::Llama | Family::Mistral => 0,
        Family::Qwen2 | Family::Qwen3 => fields.integer_from("max_window_layers", 0, 1 << 30)?.unwrap_or(28),
    };
    let mut sliding: Vec<bool> = (0..layers).map(|layer| window.is_some() && layer >= first).collect();
    // transformers ignores the list of a Llama, and takes a Mistral that has one for a Ministral.
    if let (Some(types), Family::Mistral | Family::Qwen2 | Family::Qwen3) = (fields.get("layer_types"), family) {
        let Value::Array(types) = types else {
            return Err(fields.wrong_type("layer_types", "a list of layer types"));
        };
        if types.len() != layers {
            return Err(ConfigError::Inconsistent(format!(
                "layer_types has {} entries for num_hidden_layers {layers}",
                types.len()
            )));
        }
        for (layer, kind) in types.iter().enumerate() {
            sliding[layer] = match kind.as_str() {
                Some("full_attention") => false,
                Some("sliding_attention") if window.is_some() => true,
                Some("sliding_attention") => {
                    // transformers opens such a folder, but fails at the first token.
                    return Err(ConfigError::Inconsistent(
                        "layer_types names sliding_attention but no sliding window is in use; set sliding_window (and \
                         use_sliding_window, where the family has it) or name full_attention"
                            .into(),
                    ));
                }
                _ => {
                    return Err(ConfigError::Unsupported {
                        field: format!("layer_types[{layer}]"),
                        found: kind.as_str().map_or_else(|| kind.to_string(), Into::into),
                        hint: "known types are full_attention and sliding_attention",
                    });
                }
            };
        }
    }
    let window = window.filter(|_| sliding.contains(&true));
    Ok((window, sliding))
}

/// Rotary positions: `rope_theta` and `rope_scaling` as transformers 4 writes them, or `rope_parameters` of
/// transformers 5. Of both the first that says something counts, as there.
fn rope(fields: &Fields<'_>, context_length: usize) -> Result<RopeConfig, ConfigError> {
    let says_something = |name: &&str| match fields.get(name) {
        Some(Value::Object(object)) => !object.is_empty(),
        other => other.is_some(),
    };
    let name = ["rope_scaling", "rope_parameters"].into_iter().find(says_something);
    let empty = Map::new();
    let (object, prefix) = match name {
        None => (&empty, ""),
        Some(name) => match fields.get(name) {
            Some(Value::Object(object)) => (object, name),
            _ => return Err(fields.wrong_type(name, "an object")),
        },
    };
    let scaling = Fields { object, prefix };
    if object.contains_key("full_attention") || object.contains_key("sliding_attention") {
        return Err(ConfigError::Unsupported {
            field: prefix.into(),
            found: "rope parameters by layer type".into(),
            hint: "expected one set for all layers",
        });
    }
    for fields in [fields, &scaling] {
        if let Some(share) = fields.number("partial_rotary_factor")?
            && share != 1.0
        {
            return Err(ConfigError::Unsupported {
                field: fields.path("partial_rotary_factor"),
                found: share.to_string(),
                hint: "all of a head must be rotary (1.0)",
            });
        }
    }
    let theta = match scaling.number("rope_theta")? {
        Some(theta) => theta,
        None => fields.number("rope_theta")?.unwrap_or(10_000.0),
    };
    let kind = match scaling.string("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.string("type")?,
    };
    let original_context = || {
        let outside = fields.integer("original_max_position_embeddings", 1 << 30)?;
        let inside = scaling.integer("original_max_position_embeddings", 1 << 30)?;
        Ok::<_, ConfigError>(outside.or(inside).unwrap_or(context_length))
    };
    let scaling = match kind {
        None | Some("default") => RopeScaling::None,
        // It begins beyond max_position_embeddings, which is the context of the model here.
        Some("dynamic") => RopeScaling::Dynamic { factor: scaling.number("factor")?.unwrap_or(1.0) as f32 },
        Some("linear") => RopeScaling::Linear { factor: scaling.required_number("factor")? as f32 },
        Some("llama3") => RopeScaling::Llama3 {
            factor: scaling.required_number("factor")? as f32,
            low_frequency_factor: scaling.required_number("low_freq_factor")? as f32,
            high_frequency_factor: scaling.required_number("high_freq_factor")? as f32,
            original_context: original_context()?,
        },
        Some("yarn") => yarn(&scaling, context_length, original_context()?)?,
        Some(other) => {
            return Err(ConfigError::Unsupported {
                field: scaling.path("rope_type"),
                found: other.into(),
                hint: "known types are default, linear, llama3, yarn, and dynamic up to max_position_embeddings",
            });
        }
    };
    Ok(RopeConfig { theta, scaling })
}

fn yarn(fields: &Fields<'_>, context_length: usize, original_context: usize) -> Result<RopeScaling, ConfigError> {
    let factor = match fields.number("factor")? {
        Some(factor) => factor,
        None => context_length as f64 / original_context as f64,
    };
    let magnitude = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let attention_factor = match fields.number("attention_factor")? {
        Some(stated) => stated,
        None => {
            let weight = fields.number("mscale")?.filter(|&weight| weight != 0.0);
            let weight_all = fields.number("mscale_all_dim")?.filter(|&weight| weight != 0.0);
            match (weight, weight_all) {
                (Some(weight), Some(weight_all)) => magnitude(weight) / magnitude(weight_all),
                _ => magnitude(1.0),
            }
        }
    };
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        attention_factor: attention_factor as f32,
        beta_fast: fields.number("beta_fast")?.filter(|&beta| beta != 0.0).unwrap_or(32.0) as f32,
        beta_slow: fields.number("beta_slow")?.filter(|&beta| beta != 0.0).unwrap_or(1.0) as f32,
        original_context,
        // transformers takes a null for no.
        truncate: fields.boolean("truncate")?.unwrap_or(!fields.object.contains_key("truncate")),
    })
}

/// Typed access to a JSON object; `null` counts as missing.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    fn path(&self, field: &str) -> String {
        if self.prefix.is_empty() { field.into() } else { format!("{}.{field}", self.prefix) }
    }

    fn wrong_type(&self, field: &str, expected: &'static str) -> ConfigError {
        let found = self.object.get(field).map_or_else(|| "missing".into(), described);
        ConfigError::WrongType { field: self.path(field), found, expected }
    }

    fn string(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(field, "a string")),
        }
    }

    fn boolean(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wrong_type(field, "true or false")),
        }
    }

    fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(field).map(Value::as_f64) {
            None => Ok(None),
            Some(Some(value)) => Ok(Some(value)),
            Some(None) => Err(self.wrong_type(field, "a number")),
        }
    }

    fn required_number(&self, field: &str) -> Result<f64, ConfigError> {
        self.number(field)?.ok_or_else(|| ConfigError::Missing { field: self.path(field) })
    }

    fn integer_from(&self, field: &str, minimum: usize, maximum: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        if !value.is_u64() && !value.is_i64() {
            return Err(self.wrong_type(field, "a whole number"));
        }
        match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
            Some(value) if (minimum..=maximum).contains(&value) => Ok(Some(value)),
            _ => Err(ConfigError::OutOfRange { field: self.path(field), found: value.to_string(), minimum, maximum }),
        }
    }

    fn integer(&self, field: &str, maximum: usize) -> Result<Option<usize>, ConfigError> {
        self.integer_from(field, 1, maximum)
    }

    fn required_integer(&self, field: &str, maximum: usize) -> Result<usize, ConfigError> {
        self.integer(field, maximum)?.ok_or_else(|| ConfigError::Missing { field: self.path(field) })
    }

    /// One token id or a list of them; −1 stands for none.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value, field: String| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            let expected = "a token id or a list of token ids";
            match id {
                None if value.as_i64() == Some(-1) => Ok(None),
                None => Err(ConfigError::WrongType { field, found: described(value), expected }),
                id => Ok(id),
            }
        };
        let path = self.path(field);
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                let ids = list.iter().enumerate().map(|(index, value)| id(value, format!("{path}[{index}]")));
                ids.filter_map(Result::transpose).collect()
            }
            Some(value) => Ok(id(value, path)?.into_iter().collect()),
        }
    }
}

/// A value as messages show it.
fn described(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".into(),
        Value::Array(_) => "a list".into(),
        Value::String(text) => quoted(text),
        other => other.to_string(),
    }
}
