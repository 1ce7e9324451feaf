//! Malformed and unusual tokenizer files of Hugging Face folders: each of the malformed gives a one-line error that names
//! the file and the field, without a large allocation.
#![allow(missing_docs)]

mod common;

use common::folder::{Folder, TOKENIZER, assert_names};
use common::{safetensors_of, tiny_config, tiny_shapes};
use iceformer_engine::{Message, ModelFiles};
use serde_json::{Value, json};

#[test]
fn tokenizers() {
    // A backtrace allocates too.
    iceformer_engine::silence_caught_panics();
    let folder = Folder::new("tokenizer");
    for (json, expected) in [
        ("", "not a tokenizer: not valid JSON"),
        ("{}", "not a tokenizer: model is missing"),
        (r#"{"a": 1}"#, "not a tokenizer: model is missing"),
        ("[]", "not a tokenizer: expected an object"),
        (r#"{"model": {"type": "BPE", "vocab": [], "merges": 3}}"#, "not a tokenizer"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}"#, "not a tokenizer"),
        (r#"{"model": {"type": "BPE", "vocab": {}, "merges": []}}"#, "the vocabulary is empty"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 64}, "merges": []}}"#, "token id 64 is not below"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}"#, "token id 4294967295"),
        (r#"{"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}}"#, "model.dropout"),
        (
            r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
            "continuing_subword_prefix": "aaaa"}}"#,
            "the tokenizers library panicked",
        ),
        (r#"{"decoder": !"#, "not valid JSON"),
        (r#"{"decoder": {"type": "Sequ"#, "not valid JSON"),
    ] {
        folder.put("tokenizer.json", json);
        assert_names(&folder.error(), &["tokenizer.json: ", expected]);
    }
    let trie_of_everything = "/////w==";
    let trie_of_another = "BAAAAP////9hYmMA";
    for (part, value, expected) in [
        ("decoder", json!({"type": "none"}), "not a tokenizer"),
        ("decoder", nested("decoders", 100), "recursion limit exceeded"),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "is cut off"),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "/////w"}), "is not base64"),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": trie_of_everything}), "is cut off"),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": trie_of_another}), "panicked"),
        (
            "normalizer",
            json!({"type": "Sequence", "normalizers":
                [{"type": "Precompiled", "precompiled_charsmap": trie_of_everything}]}),
            "normalizer.precompiled_charsmap is cut off",
        ),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "panicked"),
        (
            "post_processor",
            json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [],
                "special_tokens": {}}),
            "panicked",
        ),
    ] {
        let mut tokenizer: Value = serde_json::from_str(TOKENIZER).unwrap();
        tokenizer[part] = value;
        folder.put("tokenizer.json", tokenizer.to_string());
        assert_names(&folder.error(), &["tokenizer.json: not a tokenizer: ", expected]);
    }
    folder.put("tokenizer.json", TOKENIZER);
    folder.put("tokenizer_config.json", "{");
    assert_names(&folder.error(), &["tokenizer_config.json: not valid JSON"]);
    folder.remove("tokenizer_config.json");
    folder.put("chat_template.jinja", "{% for %}");
    assert_names(&folder.error(), &["/chat_template.jinja: chat template: syntax error"]);
    folder.put("chat_template.jinja", [0xff]);
    assert_names(&folder.error(), &["/chat_template.jinja: not UTF-8"]);
    folder.remove("chat_template.jinja");
    std::fs::create_dir(folder.0.join("chat_template.jinja")).unwrap();
    assert_names(&folder.error(), &["/chat_template.jinja: "]);
    folder.remove("tokenizer.json");
    std::fs::create_dir(folder.0.join("tokenizer.json")).unwrap();
    assert_names(&folder.error(), &["/tokenizer.json: "]);
}

/// A sequence of steps in a sequence, and so on.
fn nested(steps: &str, depth: usize) -> Value {
    (0..depth).fold(json!({"type": "Fuse"}), |inner, _| json!({"type": "Sequence", steps: [inner]}))
}

/// A tokenizer file may ask for texts to be cut to a length; a prompt is never cut silently.
#[test]
fn truncation_in_the_tokenizer_file_is_ignored() {
    let folder = Folder::new("truncation");
    let mut tokenizer: Value = serde_json::from_str(TOKENIZER).unwrap();
    tokenizer["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 1_000_000_000_000_u64}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
    folder.put("tokenizer.json", tokenizer.to_string());
    let tokenizer = ModelFiles::open(&folder.0).unwrap().tokenizer().unwrap();
    assert_eq!(tokenizer.encode("abab", true).unwrap(), [0, 1, 0, 1]);
}

/// Many models come with a token more than they have rows, usually one to fill batches.
#[test]
fn a_token_that_only_the_tokenizer_has() {
    let folder = Folder::new("added");
    let mut tokenizer: Value = serde_json::from_str(TOKENIZER).unwrap();
    tokenizer["added_tokens"] = json!([{"id": 64, "content": "<pad>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}]);
    let mut config = tiny_config(2);
    folder.put("tokenizer.json", tokenizer.to_string());
    config["vocab_size"] = json!(2);
    folder.put("config.json", config.to_string());
    folder.put("model.safetensors", safetensors_of(&tiny_shapes(2)));
    let tokenizer = ModelFiles::open(&folder.0).unwrap().tokenizer().unwrap();
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [0, 1]);
    let message = tokenizer.encode("a<pad>", true).unwrap_err().to_string();
    assert_names(&message, &["\"<pad>\" (2)", "only 2 tokens"]);
}

#[test]
fn special_tokens_of_the_older_file() {
    let folder = Folder::new("special");
    let template = r#""chat_template": "{{ bos_token }}|{{ eos_token }}""#;
    let older = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "additional_special_tokens": ["<x>"]}"#;
    folder.put("special_tokens_map.json", older);
    for (config, expected) in [
        (format!("{{{template}}}"), "<s>|</s>"),
        (format!(r#"{{{template}, "bos_token": "<b>", "eos_token": null}}"#), "<s>|</s>"),
        (format!(r#"{{{template}, "bos_token": "<b>", "added_tokens_decoder": {{}}}}"#), "<b>|"),
    ] {
        folder.put("tokenizer_config.json", &config);
        let chat = ModelFiles::open(&folder.0).unwrap().chat_template().unwrap().unwrap();
        assert_eq!(chat.render(&[Message::new("user", "a")], true).unwrap(), expected, "{config}");
    }
    folder.remove("tokenizer_config.json");
    folder.put("chat_template.jinja", "{{ bos_token }}");
    let chat = ModelFiles::open(&folder.0).unwrap().chat_template().unwrap().unwrap();
    assert_eq!(chat.render(&[Message::new("user", "a")], true).unwrap(), "<s>");
    folder.put("special_tokens_map.json", "[");
    assert_names(&folder.error(), &["special_tokens_map.json: not valid JSON"]);
}
