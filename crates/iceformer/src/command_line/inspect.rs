//! `iceformer inspect`: what is in a model's files.

use std::fmt::Write as _;

use iceformer_engine::{ModelConfig, ModelFiles, RopeScaling, TensorInfo, TypeSummary, printable};
use serde::Serialize;
use serde_json::{Value, json};

use super::arguments::InspectArguments;
use super::text::{bytes, grouped};
use super::{Outcome, print_json, print_text};

/// Everything that is shown. Field names are those of the JSON output.
#[derive(Serialize)]
struct Inspection {
    path: String,
    name: String,
    format: String,
    files: usize,
    family: &'static str,
    parameters: u64,
    bytes: u64,
    context_length: usize,
    config: Value,
    types: Vec<TypeSummary>,
    tokenizer: Value,
    chat_template: Option<String>,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    chat_template_error: Option<String>,
    metadata: Vec<(String, String)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<Value>>,
}

/// Runs the command.
pub fn run(arguments: &InspectArguments) -> anyhow::Result<Outcome> {
    let files = ModelFiles::open(&arguments.model)?;
    let config = files.config();
    let summary = files.summary();
    // A model without tokenizer is still worth a look: the problem is shown in its place.
    let tokenizer = match files.tokenizer() {
        Ok(tokenizer) => json!({
            "kind": tokenizer.kind(),
            "vocabulary": tokenizer.vocabulary_size(),
            "bos_token": tokenizer.bos_token().and_then(|token| tokenizer.token_piece(token)),
            "end_tokens": tokenizer.end_tokens().iter().map(|&token| tokenizer.token_piece(token)).collect::<Vec<_>>(),
        }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    let (chat_template, chat_template_error) = match files.chat_template() {
        Ok(template) => (template.map(|template| template.source().to_owned()), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let inspection = Inspection {
        path: arguments.model.display().to_string(),
        name: summary.name,
        format: summary.format,
        files: summary.files,
        family: config.family.name(),
        parameters: summary.parameters,
        bytes: summary.bytes,
        context_length: config.context_length,
        config: describe(config),
        types: summary.types,
        tokenizer,
        chat_template,
        chat_template_error,
        metadata: summary.metadata,
        tensors: arguments.tensors.then(|| files.tensors().map(|tensor| tensor_json(&tensor)).collect()),
    };
    if arguments.json {
        print_json(&inspection)?;
    } else {
        print_text(&inspection.table(config))?;
    }
    Ok(Outcome::Done)
}

fn describe(config: &ModelConfig) -> Value {
    json!({
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "query_heads": config.query_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocabulary,
        "norm_epsilon": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config),
        "sliding_window": config.sliding_window,
        "tied_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias,
        "query_key_norm": config.query_key_norm,
    })
}

fn rope_scaling(config: &ModelConfig) -> String {
    let context = config.context_length;
    match &config.rope.scaling {
        RopeScaling::None => "none".into(),
        RopeScaling::Linear { factor } => format!("linear, factor {factor}"),
        RopeScaling::Llama3 { factor, original_context, .. } => {
            format!("llama3, factor {factor} over {original_context} tokens")
        }
        RopeScaling::Yarn { factor, original_context, .. } => {
            format!("yarn, factor {factor} over {original_context} tokens")
        }
        RopeScaling::Dynamic { factor } => {
            format!("dynamic, factor {factor}, not applied: no text beyond {context} tokens is read")
        }
        RopeScaling::Factors(factors) => format!("{} factors from the file", factors.len()),
    }
}

fn tensor_json(tensor: &TensorInfo) -> Value {
    let TensorInfo { name, weight_type, computed_as, shape, bytes } = tensor;
    json!({ "name": name, "type": weight_type, "computed_as": computed_as, "shape": shape, "bytes": bytes })
}

impl Inspection {
    fn table(&self, config: &ModelConfig) -> String {
        let mut table = String::new();
        let mut row = |name: &str, value: String| {
            // Some values come from the files.
            let _ = writeln!(table, "{name:16}{}", printable(&value));
        };
        row("name", self.name.clone());
        let files = if self.files == 1 { "1 file".to_owned() } else { format!("{} files", self.files) };
        row("format", format!("{}, {files}, {}", self.format, bytes(self.bytes)));
        row("family", self.family.into());
        row("parameters", grouped(self.parameters));
        row("context", format!("{} tokens", grouped(self.context_length as u64)));
        row("layers", config.layers.to_string());
        row("width", format!("{}, feed-forward {}", config.hidden_size, config.intermediate_size));
        row("heads", format!("{} query, {} key/value, width {}", config.query_heads, config.kv_heads, config.head_dim));
        let tied = if config.tied_embeddings { "tied to the embedding" } else { "own weights" };
        row("vocabulary", format!("{}, output layer {tied}", grouped(config.vocabulary as u64)));
        row("rope", format!("theta {}, scaling {}", config.rope.theta, rope_scaling(config)));
        if let Some(window) = config.sliding_window {
            let layers = config.sliding_layers.iter().filter(|&&sliding| sliding).count();
            row("sliding window", format!("{window} tokens in {layers} of {} layers", config.layers));
        }
        for kind in &self.types {
            let computed = match kind.computed_as {
                Some(other) if other == kind.name => String::new(),
                Some(other) => format!(", computed as {other}"),
                None => ", not computed with".into(),
            };
            row("tensors", format!("{} of {}, {}{computed}", kind.tensors, kind.name, bytes(kind.bytes)));
        }
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if let Value::Object(tokenizer) = &self.tokenizer {
            let told: Vec<_> = tokenizer.iter().map(|(name, value)| format!("{name} {}", text(value))).collect();
            row("tokenizer", told.join(", "));
        }
        let chat_template =
            self.chat_template.as_ref().map(|template| format!("{} characters", template.chars().count()));
        let unusable = self.chat_template_error.as_ref().map(|error| format!("unusable: {error}"));
        row("chat template", chat_template.or(unusable).unwrap_or_else(|| "none".into()));
        for (name, value) in &self.metadata {
            row("metadata", format!("{name} = {value}"));
        }
        for tensor in self.tensors.iter().flatten() {
            let [name, kind, shape] = ["name", "type", "shape"].map(|field| text(&tensor[field]));
            let _ = writeln!(table, "  {name:44} {kind:6} {shape}");
        }
        table
    }
}
