//! Token ids against those of the Hugging Face library, SentencePiece and llama.cpp.
#![allow(missing_docs)]

mod common;

use common::{golden, safetensors_of, scratch_folder, tiny_config, tiny_model, tiny_shapes};
use iceformer_engine::{ModelFiles, Tokenizer};
use serde_json::{Value, json};

fn texts() -> Vec<String> {
    let json = std::fs::read_to_string(golden().join("tokenizers/texts.json")).unwrap();
    serde_json::from_str(&json).unwrap()
}

fn expected(name: &str) -> Value {
    let json = std::fs::read_to_string(golden().join(format!("tokenizers/{name}.json"))).unwrap();
    serde_json::from_str(&json).unwrap()
}

fn of_gguf(name: &str) -> Tokenizer {
    ModelFiles::open(&golden().join(format!("tokenizers/{name}.gguf"))).unwrap().tokenizer().unwrap()
}

fn of_json(name: &str) -> Tokenizer {
    let json = std::fs::read(golden().join(format!("tokenizers/{name}.tokenizer.json"))).unwrap();
    ModelFiles::from_memory("tiny", tiny_model(1024, json)).unwrap().tokenizer().unwrap()
}

fn check(tokenizer: &Tokenizer, expected: &Value, kind: &str, add_special: bool, skip: &[usize]) {
    let lines = expected[kind].as_array().unwrap();
    let texts = texts();
    assert_eq!(lines.len(), texts.len());
    for (index, (text, ids)) in texts.iter().zip(lines).enumerate().filter(|(index, _)| !skip.contains(index)) {
        let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
        assert_eq!(tokenizer.encode(text, add_special).unwrap(), ids, "{kind}, text {index}: {text:?}");
    }
}

/// Decoded text equals the library's, at once and token by token.
fn check_decoded(tokenizer: &Tokenizer, expected: &Value) {
    for (ids, text) in expected["hugging_face"].as_array().unwrap().iter().zip(expected["decoded"].as_array().unwrap())
    {
        let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
        assert_eq!(tokenizer.decode(&ids), text.as_str().unwrap());
        let mut stream = tokenizer.text_stream();
        let mut streamed = String::new();
        for &id in &ids {
            let piece = stream.push(id);
            assert!(!piece.contains('\u{FFFD}'), "half a character was shown: {text}");
            streamed += &piece;
        }
        streamed += &stream.finish();
        assert_eq!(streamed, text.as_str().unwrap());
    }
}

#[test]
fn byte_level_gguf_gives_the_ids_of_hugging_face() {
    for name in ["llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "falcon", "deepseek-v3", "deepseek-coder"]
    {
        let (tokenizer, expected) = (of_gguf(name), expected(name));
        check(&tokenizer, &expected, "hugging_face", false, &[]);
        check_decoded(&tokenizer, &expected);
    }
}

#[test]
fn byte_level_gguf_gives_the_ids_of_llama_cpp() {
    for name in
        ["llama-bpe", "qwen2", "gpt-2", "smollm", "falcon", "deepseek-v3", "deepseek-coder", "deepseek-llm", "default"]
    {
        check(&of_gguf(name), &expected(name), "llama_cpp", false, &[]);
    }
    // llama.cpp's regular expressions have no letter cases, so it simplifies these two; where it differs from the
    // models' own tokenizers we follow those.
    for name in ["tekken", "gpt-4o"] {
        let expected = expected(name);
        let differing: Vec<usize> = serde_json::from_value(expected["differing"].clone()).unwrap();
        assert_eq!(differing.len(), 1);
        check(&of_gguf(name), &expected, "llama_cpp", false, &differing);
    }
}

#[test]
fn sentence_piece_gguf_gives_the_ids_of_llama_cpp() {
    let (tokenizer, expected) = (of_gguf("sentencepiece"), expected("sentencepiece"));
    check(&tokenizer, &expected, "llama_cpp", true, &[]);
    check_decoded(&tokenizer, &expected);
}

/// SentencePiece itself takes no control symbols from text, so only texts without them can agree.
#[test]
fn sentence_piece_gguf_gives_the_ids_of_sentence_piece() {
    let (tokenizer, expected) = (of_gguf("sentencepiece"), expected("sentencepiece"));
    let written: Vec<usize> = texts()
        .iter()
        .enumerate()
        .filter(|(_, text)| ["<|", "<s>", "[tool]"].iter().any(|token| text.contains(token)))
        .map(|(index, _)| index)
        .collect();
    assert_eq!(written.len(), 4);
    check(&tokenizer, &expected, "sentencepiece", true, &written);
}

#[test]
fn tokenizer_json_gives_the_ids_of_hugging_face() {
    let expected_ids = expected("smollm");
    let tokenizer = of_json("byte-level");
    check(&tokenizer, &expected_ids, "hugging_face", false, &[]);
    check_decoded(&tokenizer, &expected_ids);

    let expected_ids = expected("sentencepiece");
    let tokenizer = of_json("sentencepiece");
    check(&tokenizer, &expected_ids, "hugging_face", true, &[]);
    check_decoded(&tokenizer, &expected_ids);
}

#[test]
fn special_tokens_of_a_gguf() {
    let tokenizer = of_gguf("llama-bpe");
    let end = tokenizer.token_id("<|end|>").unwrap();
    assert_eq!(tokenizer.end_tokens(), [end]);
    assert!(tokenizer.is_special(end));
    assert!(!tokenizer.is_special(tokenizer.token_id("[tool]").unwrap()));
    assert_eq!(tokenizer.token_piece(end).as_deref(), Some("<|end|>"));
    assert_eq!(tokenizer.token_piece(u32::MAX), None);
    assert_eq!(tokenizer.decode(&[end, u32::MAX]), "");
}

#[test]
fn a_continued_text_keeps_its_space() {
    let tokenizer = of_gguf("sentencepiece");
    let ids = tokenizer.encode("the ships", false).unwrap();
    assert_eq!(tokenizer.decode(&ids), "the ships");
    let mut stream = tokenizer.text_stream_continuing();
    let text: String = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(text, " the ships");
}

/// Decoders that look like the usual ones but have other parameters: the library's own text, at once and token by token.
#[test]
fn unusual_decoders_give_the_text_of_the_library() {
    let step = |kind: &str| json!({ "type": kind });
    let strip = |start: u32, stop: u32| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let replace = |from: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": " "});
    let metaspace =
        |sign: &str| json!({"type": "Metaspace", "replacement": sign, "prepend_scheme": "always", "split": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    // And whether a part of the text is as right as the whole.
    let cases = [
        ("sentencepiece", vec![metaspace("_")], true),
        ("sentencepiece", vec![replace("_"), step("ByteFallback"), step("Fuse")], true),
        ("sentencepiece", vec![replace("▁"), step("ByteFallback"), step("Fuse"), strip(2, 0)], false),
        ("sentencepiece", vec![step("ByteFallback"), metaspace("▁")], true),
        ("byte-level", vec![byte_level, strip(1, 0)], false),
    ];
    for (name, steps, in_pieces) in cases {
        let json = std::fs::read(golden().join(format!("tokenizers/{name}.tokenizer.json"))).unwrap();
        let mut json: Value = serde_json::from_slice(&json).unwrap();
        json["decoder"] = match steps.as_slice() {
            [step] => step.clone(),
            _ => json!({"type": "Sequence", "decoders": steps}),
        };
        let bytes = json.to_string().into_bytes();
        let library = tokenizers::Tokenizer::from_bytes(&bytes).unwrap();
        let tokenizer = ModelFiles::from_memory("tiny", tiny_model(1024, bytes)).unwrap().tokenizer().unwrap();
        for text in texts().into_iter().chain([" Hello  world ".into(), "灯台 🙂 é".into()]) {
            let ids = tokenizer.encode(&text, false).unwrap();
            let expected = library.decode(&ids, true).unwrap();
            assert_eq!(tokenizer.decode(&ids), expected, "{:?}", json["decoder"]);
            let mut stream = tokenizer.text_stream();
            let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
            streamed += &stream.finish();
            match in_pieces {
                true => assert_eq!(streamed, expected, "{:?}", json["decoder"]),
                // Spaces that the decoder strips at the ends of a text.
                false => assert_eq!(streamed.replace(' ', ""), expected.replace(' ', ""), "{:?}", json["decoder"]),
            }
        }
    }
}

/// A folder with the golden `tokenizer.json` and `files` beside it.
fn of_folder(name: &str, files: &Value) -> Result<Tokenizer, String> {
    let folder = scratch_folder(name);
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
    put("config.json", tiny_config(1024).to_string().as_bytes());
    put("model.safetensors", &safetensors_of(&tiny_shapes(1024)));
    put("tokenizer.json", &std::fs::read(golden().join("tokenizers/byte-level.tokenizer.json")).unwrap());
    for (name, content) in files.as_object().unwrap() {
        put(name, content.to_string().as_bytes());
    }
    let tokenizer = ModelFiles::open(&folder).unwrap().tokenizer().map_err(|error| error.to_string());
    std::fs::remove_dir_all(&folder).unwrap();
    tokenizer
}

/// Chat markers that only the files beside `tokenizer.json` name fell into pieces.
#[test]
fn tokens_beside_the_tokenizer_are_added_as_in_transformers() {
    let golden = expected("added_tokens");
    for case in golden["cases"].as_array().unwrap() {
        let tokenizer = of_folder("beside", &case["files"]).unwrap();
        for (index, text) in golden["texts"].as_array().unwrap().iter().enumerate() {
            let ids: Vec<u32> = serde_json::from_value(case["ids"][index].clone()).unwrap();
            assert_eq!(tokenizer.encode(text.as_str().unwrap(), false).unwrap(), ids, "{}: {text}", case["name"]);
            assert_eq!(tokenizer.decode(&ids), case["decoded"][index].as_str().unwrap(), "{}: {text}", case["name"]);
        }
    }
    let tokenizer = of_folder(
        "turns",
        &json!({"added_tokens.json": {}, "special_tokens_map.json":
        {"additional_special_tokens": ["<|im_end|>"]}}),
    )
    .unwrap();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert!(tokenizer.is_special(end) && tokenizer.end_of_turn_tokens().contains(&end));
}

#[test]
fn tokens_beside_the_tokenizer_that_do_not_fit_are_named() {
    let next = of_json("byte-level").vocabulary_size();
    let listed = |id: String, token: Value| json!({"tokenizer_config.json": {"added_tokens_decoder": {id: token}}});
    for (files, parts) in [
        (listed((next + 5).to_string(), json!({"content": "<new>"})), vec!["\"<new>\" has id", "next free id"]),
        (listed("0".into(), json!({"content": "<new>"})), vec!["\"<new>\" has id 0"]),
        (listed("-1".into(), json!({"content": "<new>"})), vec!["added_tokens_decoder has \"-1\"", "a token id"]),
        (listed("5".into(), json!({"text": "<new>"})), vec!["added_tokens_decoder.\"5\"", "with content"]),
        (json!({"tokenizer_config.json": {"added_tokens_decoder": []}}), vec!["added_tokens_decoder is no object"]),
        (json!({"tokenizer_config.json": {"additional_special_tokens": [3]}}), vec!["additional_special_tokens[0]"]),
        (json!({"added_tokens.json": {"<new>": "0"}}), vec!["added_tokens.json: token \"<new>\" has no id"]),
        (json!({"added_tokens.json": {"<new>": next + 1}}), vec!["added_tokens.json: token \"<new>\" has id"]),
        (json!({"added_tokens.json": []}), vec!["added_tokens.json: expected an object"]),
    ] {
        let message = of_folder("unfit", &files).unwrap_err();
        for part in parts {
            assert!(message.contains(part) && !message.contains('\n'), "{part:?} is not in {message:?}");
        }
    }
}
