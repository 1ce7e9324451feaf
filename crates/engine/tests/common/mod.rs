//! What several tests of model files share.
#![allow(dead_code, missing_docs)]

pub mod folder;
pub mod gguf;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use iceformer_engine::MemoryModel;

/// The result of `run`, and how many bytes beyond those before were in use at once in this thread: a test can tell a parser
/// that believes a length in a file.
pub fn peak_of<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let mut result = None;
    let counts = allocation_counter::measure(|| result = Some(run()));
    (result.expect("it was run"), counts.bytes_max)
}

/// The folder of golden files.
pub fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testing/golden")
}

/// A folder for one test, emptied first.
pub fn scratch_folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("iceformer-{}-{name}", std::process::id()));
    std::fs::remove_dir_all(&folder).ok();
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// `config.json` of the smallest Llama there can be.
pub fn tiny_config(vocabulary: usize) -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1,
    })
}

/// Names and shapes of the tensors of [`tiny_config`].
pub fn tiny_shapes(vocabulary: usize) -> BTreeMap<String, Vec<usize>> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    BTreeMap::from([
        ("model.embed_tokens.weight".into(), vec![vocabulary, 8]),
        ("model.norm.weight".into(), vec![8]),
        (layer("input_layernorm"), vec![8]),
        (layer("post_attention_layernorm"), vec![8]),
        (layer("self_attn.q_proj"), vec![8, 8]),
        (layer("self_attn.k_proj"), vec![4, 8]),
        (layer("self_attn.v_proj"), vec![4, 8]),
        (layer("self_attn.o_proj"), vec![8, 8]),
        (layer("mlp.gate_proj"), vec![16, 8]),
        (layer("mlp.up_proj"), vec![16, 8]),
        (layer("mlp.down_proj"), vec![8, 16]),
    ])
}

/// A safetensors file of f32 ones.
pub fn safetensors_of(shapes: &BTreeMap<String, Vec<usize>>) -> Vec<u8> {
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .iter()
        .map(|(name, shape)| {
            let ones: Vec<u8> = (0..shape.iter().product::<usize>()).flat_map(|_| 1f32.to_le_bytes()).collect();
            (name.clone(), shape.clone(), ones)
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    safetensors::serialize(views, None).unwrap()
}

/// A tiny model with the given `tokenizer.json`.
pub fn tiny_model(vocabulary: usize, tokenizer: Vec<u8>) -> MemoryModel {
    MemoryModel {
        config: Cow::Owned(tiny_config(vocabulary).to_string().into_bytes()),
        tokenizer: Cow::Owned(tokenizer),
        weights: Cow::Owned(safetensors_of(&tiny_shapes(vocabulary))),
        tokenizer_config: None,
    }
}
