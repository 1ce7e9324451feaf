//! Entrances to the parsers for the fuzz targets (fuzz/); compiled only for them.
#![allow(missing_docs)]

use std::collections::BTreeMap;

use crate::chat::TemplateFiles;
use crate::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use crate::file_map::FileSource;
use crate::side_file::SideFile;
use crate::tokenizer::TokenFiles;
use crate::{ChatTemplate, Message, ModelFiles, TensorName, Tokenizer};

const TEXT: &str = "The 2 ships, 1729 entries.\n\n  naïve 灯台 🙂 <|end|> <s> ▁x\t";

/// Reads everything of a model that can be read.
pub fn gguf(data: &[u8]) {
    let Ok(files) = ModelFiles::from_gguf_memory("fuzz", data.to_vec()) else { return };
    everything(&files);
}

pub fn safetensors_index(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    if first % 2 == 0 {
        let _ = crate::safetensors_files::parse_index(rest);
    } else if let Ok(table) = crate::safetensors_files::open_single(FileSource::memory("fuzz", rest.to_vec())) {
        for tensor in table.infos() {
            assert!(tensor.bytes <= rest.len() as u64);
        }
    }
}

pub fn config(data: &[u8]) {
    if let Ok(mut config) = crate::config::parse_config(data) {
        assert_eq!(config.sliding_layers.len(), config.layers);
        assert!(config.query_heads.is_multiple_of(config.kv_heads));
        let _ = crate::config::merge_generation_config(&mut config, data);
    }
}

pub fn tokenizer_json(data: &[u8]) {
    let missing = SideFile { bytes: None, file: "fuzz" };
    let beside = TokenFiles { config: missing, special_tokens_map: missing, added_tokens: missing };
    contained_panics(|| {
        if let Ok(tokenizer) = Tokenizer::from_hugging_face(data, "fuzz", &beside, &tiny_config()) {
            use_tokenizer(&tokenizer);
        }
    });
}

/// Reads a GGUF header that has metadata only.
pub fn tokenizer_metadata(data: &[u8]) {
    let Ok(header) = crate::gguf::Header::parse(data) else { return };
    if let Ok(tokenizer) = Tokenizer::from_gguf(&header.metadata, "fuzz", &tiny_config()) {
        use_tokenizer(&tokenizer);
    }
    if let Ok(Some(template)) = ChatTemplate::from_gguf(&header.metadata, "fuzz") {
        contained_panics(|| drop(template.render(&[Message::new("user", "hello")], true)));
    }
}

fn tiny_config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden_size: 8,
        intermediate_size: 8,
        layers: 1,
        query_heads: 1,
        kv_heads: 1,
        head_dim: 8,
        vocabulary: 1 << 20,
        norm_epsilon: 1e-5,
        rope: RopeConfig { theta: 1e4, scaling: RopeScaling::None },
        sliding_window: None,
        sliding_layers: vec![false],
        context_length: 64,
        tied_embeddings: true,
        attention_bias: false,
        output_bias: false,
        feed_forward_bias: false,
        query_key_norm: false,
        bos_token: Some(0),
        eos_tokens: vec![1],
    }
}

pub fn chat_template(data: &[u8]) {
    let tokens = br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
    let file = |bytes| SideFile { bytes, file: "fuzz" };
    let files =
        TemplateFiles { template: file(Some(data)), config: file(Some(tokens)), special_tokens_map: file(None) };
    let Ok(Some(template)) = ChatTemplate::from_hugging_face(&files) else { return };
    let messages = [Message::new("system", "Be brief."), Message::new("user", " a\n"), Message::new("assistant", "b")];
    contained_panics(|| {
        let _ = template.render(&messages, true);
        let _ = template.render(&messages[..1], false);
    });
}

/// The fuzzer's hook ends the process at any panic; those that the engine catches are fine.
fn contained_panics(run: impl FnOnce()) {
    let hook = std::panic::take_hook();
    run();
    std::panic::set_hook(hook);
}

fn everything(files: &ModelFiles) {
    let config = files.config();
    let _ = files.summary();
    let mut total = BTreeMap::new();
    for tensor in files.tensors() {
        total.insert(tensor.name, tensor.bytes);
    }
    for name in TensorName::all(config) {
        if name.is_vector() {
            let vector = files.vector(name).expect("was checked at opening");
            assert!(!vector.is_empty());
        } else {
            let tensor = files.tensor(name).expect("was checked at opening");
            for row in [0, tensor.rows() / 2, tensor.rows() - 1] {
                assert!(!tensor.row_bytes(row).is_empty());
            }
        }
    }
    if let Ok(tokenizer) = files.tokenizer() {
        use_tokenizer(&tokenizer);
    }
    let _ = files.chat_template();
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    let Ok(tokens) = tokenizer.encode(TEXT, true) else { return };
    let text = tokenizer.decode(&tokens);
    let mut stream = tokenizer.text_stream();
    let mut streamed: String = tokens.iter().map(|&token| stream.push(token)).collect();
    streamed += &stream.finish();
    assert_eq!(text, streamed);
    for token in [0, 1, u32::MAX] {
        let _ = tokenizer.token_piece(token);
    }
}
