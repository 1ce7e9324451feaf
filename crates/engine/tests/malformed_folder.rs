//! Malformed Hugging Face folders: each gives a one-line error that names the file and the field, without a large
//! allocation.
#![allow(missing_docs)]

mod common;

use common::folder::{Folder, assert_names, error_of};
use common::{safetensors_of, tiny_config, tiny_shapes};
use iceformer_engine::{Family, ModelFiles, RopeScaling, TensorName};
use serde_json::{Value, json};

#[test]
fn the_unchanged_folder_opens() {
    let folder = Folder::new("good");
    let files = ModelFiles::open(&folder.0).unwrap();
    assert_eq!(files.tokenizer().unwrap().encode("ab", true).unwrap(), [0, 1]);
    assert!(files.chat_template().unwrap().is_none());
}

#[test]
fn missing_files() {
    let folder = Folder::new("missing");
    assert_names(
        &error_of(&folder.0.join("nothing")),
        &["nothing", "No such file", "model folder or a .gguf", "not downloaded"],
    );
    folder.put("notes.txt", "hello");
    assert_names(&error_of(&folder.0.join("notes.txt")), &["notes.txt", "not a model", ".gguf"]);
    folder.remove("tokenizer.json");
    assert_names(&folder.error(), &["tokenizer.json", "missing"]);
    folder.remove("model.safetensors");
    folder.put("pytorch_model.bin", "");
    assert_names(&folder.error(), &["no model.safetensors", "converted"]);
    folder.remove("config.json");
    assert_names(&folder.error(), &["not a model", "config.json"]);
    let snapshots = folder.0.join("snapshots");
    for (revision, named) in [("first", "snapshots/first"), ("second", "snapshots/…")] {
        std::fs::create_dir_all(snapshots.join(revision)).unwrap();
        assert_names(&folder.error(), &["cache of the Hugging Face Hub", named]);
    }
    folder.put("empty.gguf", "");
    assert_names(&error_of(&folder.0.join("empty.gguf")), &["empty.gguf", "magic", "ends early"]);
}

#[test]
fn configurations() {
    let folder = Folder::new("config");
    for json in ["", "{", "[]", "null", "\u{0}", &"[".repeat(10_000), "{\"model_type\": \"llama\"} trailing"] {
        folder.put("config.json", json);
        assert_names(&folder.error(), &["config.json: not valid JSON"]);
    }
    folder.put("config.json", b"{\"model_type\": \"\xff\"}");
    assert_names(&folder.error(), &["config.json: not valid JSON"]);

    let cases: &[(&str, Value, &[&str])] = &[
        ("model_type", json!(null), &["model_type is missing"]),
        ("model_type", json!("gpt_neox"), &["gpt_neox", "llama, mistral, ministral, qwen2, qwen3"]),
        ("model_type", json!("x\ny"), &["x\\ny"]),
        ("model_type", json!(["llama"]), &["model_type is a list", "a string"]),
        ("hidden_size", json!(null), &["hidden_size is missing"]),
        ("hidden_size", json!(0), &["hidden_size is 0", "1 to 131072"]),
        ("hidden_size", json!(-8), &["hidden_size is -8"]),
        ("hidden_size", json!(8.5), &["hidden_size is 8.5; expected a whole number"]),
        ("num_hidden_layers", json!(3.0), &["num_hidden_layers is 3.0; expected a whole number"]),
        ("hidden_size", json!("8"), &["hidden_size is \"8\"", "a whole number"]),
        ("hidden_size", json!(u64::MAX), &["hidden_size is 18446744073709551615"]),
        ("hidden_size", json!(7), &["hidden_size 7 is no multiple of num_attention_heads 2"]),
        ("hidden_size", json!(16), &["model.safetensors", "model.embed_tokens.weight", "[64, 16]", "[64, 8]"]),
        ("num_attention_heads", json!(0), &["num_attention_heads is 0"]),
        ("num_key_value_heads", json!(3), &["2 attention heads", "3 key/value heads"]),
        ("num_hidden_layers", json!(1u64 << 40), &["num_hidden_layers is 1099511627776"]),
        ("num_hidden_layers", json!(2), &["model.layers.1.input_layernorm.weight", "missing"]),
        ("head_dim", json!(5), &["odd"]),
        ("head_dim", json!(100_000), &["head_dim is 100000"]),
        ("vocab_size", json!(1u64 << 33), &["vocab_size is 8589934592"]),
        ("vocab_size", json!(65), &["model.embed_tokens.weight", "[65, 8]"]),
        ("rms_norm_eps", json!("small"), &["rms_norm_eps is \"small\"", "a number"]),
        ("rms_norm_eps", json!(-1.0), &["epsilon -1"]),
        ("hidden_act", json!("gelu"), &["hidden_act", "gelu", "silu"]),
        ("is_causal", json!(false), &["is_causal \"false\" is not supported", "causal"]),
        ("tie_word_embeddings", json!("yes"), &["tie_word_embeddings is \"yes\"", "true or false"]),
        ("tie_word_embeddings", json!(false), &["lm_head.weight", "missing"]),
        ("attention_bias", json!(true), &["q_proj.bias", "missing"]),
        ("eos_token_id", json!([1, "2"]), &["eos_token_id[1] is \"2\"", "token ids"]),
        ("eos_token_id", json!(-2), &["eos_token_id is -2", "token id"]),
        ("quantization_config", json!({"quant_method": "gptq"}), &["quantization_config", "gptq", "GGUF"]),
        ("rope_theta", json!(-2), &["rope theta is -2"]),
        ("rope_scaling", json!("linear"), &["rope_scaling is \"linear\"", "an object"]),
        (
            "rope_scaling",
            json!({"rope_type": "longrope"}),
            &["rope_scaling.rope_type", "longrope", "yarn, and dynamic up to"],
        ),
        ("rope_scaling", json!({"type": "linear"}), &["rope_scaling.factor is missing"]),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), &["rope scaling factor is 0"]),
        ("rope_scaling", json!({"type": "linear", "factor": "2"}), &["rope_scaling.factor is \"2\""]),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8}), &["rope_scaling.low_freq_factor is missing"]),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
            &["high_freq_factor 1 is not above low_freq_factor 4"],
        ),
        ("rope_parameters", json!({"full_attention": {"rope_theta": 1}}), &["rope_parameters", "layer type"]),
        ("partial_rotary_factor", json!(0.5), &["partial_rotary_factor", "0.5"]),
    ];
    for (field, value, expected) in cases {
        let mut config = tiny_config(64);
        config[*field] = value.clone();
        folder.put("config.json", config.to_string());
        let message = folder.error();
        assert!(message.contains(".json: ") || message.contains(".safetensors: "), "names no file: {message}");
        assert_names(&message, expected);
    }
}

#[test]
fn layers_and_windows() {
    let folder = Folder::new("layers");
    let mut config = tiny_config(64);
    config["model_type"] = json!("qwen3");
    for (field, value, expected) in [
        ("layer_types", json!("full_attention"), "layer_types is \"full_attention\""),
        ("layer_types", json!(["full_attention", "full_attention"]), "2 entries for num_hidden_layers 1"),
        ("layer_types", json!(["linear_attention"]), "linear_attention"),
        ("layer_types", json!(["sliding_attention"]), "no sliding window"),
    ] {
        let mut config = config.clone();
        config[field] = value;
        folder.put("config.json", config.to_string());
        assert_names(&folder.error(), &["config.json", expected]);
    }
    // A Mistral with such a list is what transformers calls a Ministral.
    for (family, window) in [("mistral", Some(16)), ("ministral", Some(16)), ("llama", None)] {
        let mut config = config.clone();
        config["model_type"] = json!(family);
        config["sliding_window"] = json!(16);
        for (kind, expected) in [("full_attention", None), ("sliding_attention", window)] {
            config["layer_types"] = json!([kind]);
            folder.put("config.json", config.to_string());
            let files = ModelFiles::open(&folder.0).unwrap();
            assert_eq!(files.config().attention_window(0), expected, "{family}, {kind}");
        }
    }
    config["model_type"] = json!("mistral");
    config["sliding_window"] = json!(0);
    folder.put("config.json", config.to_string());
    assert_names(&folder.error(), &["config.json", "sliding_window is 0"]);
    // As in transformers, a missing window is 4096 and null is none.
    for (window, expected) in [(None, Some(4096)), (Some(Value::Null), None), (Some(json!(16)), Some(16))] {
        config.as_object_mut().unwrap().remove("sliding_window");
        if let Some(window) = window {
            config["sliding_window"] = window;
        }
        folder.put("config.json", config.to_string());
        let files = ModelFiles::open(&folder.0).unwrap();
        assert_eq!(files.config().family, Family::Mistral);
        assert_eq!(files.config().attention_window(0), expected);
        assert_eq!(files.config().attention_window(1), None);
    }
}

#[test]
fn generation_config_adds_end_tokens() {
    let folder = Folder::new("generation");
    folder.put("generation_config.json", r#"{"eos_token_id": [5, 1], "bos_token_id": 7}"#);
    let files = ModelFiles::open(&folder.0).unwrap();
    assert_eq!(files.config().eos_tokens, [1, 5]);
    assert_eq!(files.config().bos_token, Some(0));
    assert_eq!(files.tokenizer().unwrap().end_tokens(), [1, 5]);
    folder.put("generation_config.json", r#"{"eos_token_id": "x"}"#);
    assert_names(&folder.error(), &["generation_config.json", "eos_token_id is \"x\""]);
}

/// What transformers takes for none or for a default.
#[test]
fn fields_that_say_nothing() {
    let folder = Folder::new("nothing");
    let open = |family: &str, field: &str, value: Value| {
        let mut config = tiny_config(64);
        config["model_type"] = json!(family);
        config["num_attention_heads"] = json!(1);
        config["head_dim"] = json!(4);
        config[field] = value;
        let mut shapes = tiny_shapes(64);
        shapes.insert("model.layers.0.self_attn.q_proj.weight".into(), vec![4, 8]);
        shapes.insert("model.layers.0.self_attn.o_proj.weight".into(), vec![8, 4]);
        for (tensor, length) in [("q_norm.weight", 4), ("k_norm.weight", 4), ("q_proj.bias", 4), ("k_proj.bias", 4)] {
            shapes.insert(format!("model.layers.0.self_attn.{tensor}"), vec![length]);
        }
        shapes.insert("model.layers.0.self_attn.v_proj.bias".into(), vec![4]);
        folder.put("model.safetensors", safetensors_of(&shapes));
        folder.put("config.json", config.to_string());
        ModelFiles::open(&folder.0).unwrap_or_else(|error| panic!("{family}, {field}: {error}")).config().clone()
    };
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        assert_eq!(open(family, "num_key_value_heads", Value::Null).kv_heads, 1, "{family}");
    }
    assert!(open("llama", "eos_token_id", json!(-1)).eos_tokens.is_empty());
    assert_eq!(open("llama", "eos_token_id", json!([-1, 5])).eos_tokens, [5]);
    assert_eq!(open("llama", "bos_token_id", json!(-1)).bos_token, None);
    folder.put("generation_config.json", r#"{"eos_token_id": -1, "bos_token_id": -1}"#);
    assert_eq!(open("llama", "bos_token_id", Value::Null).bos_token, None);
}

#[test]
fn both_layouts_of_rope() {
    let folder = Folder::new("rope");
    let open = |field: &str, value: Value| {
        let mut config = tiny_config(64);
        config[field] = value;
        folder.put("config.json", config.to_string());
        ModelFiles::open(&folder.0).unwrap().config().rope.clone()
    };
    let old = open("rope_scaling", json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}));
    let new = open(
        "rope_parameters",
        json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}),
    );
    assert_eq!(old, new);
    let RopeScaling::Yarn { attention_factor, original_context: 32, truncate: true, .. } = new.scaling else {
        panic!()
    };
    assert!((f64::from(attention_factor) - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-6);
    // As transformers reads it: what is not stated is yes, and null is no.
    let unstated = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": null});
    assert!(matches!(open("rope_scaling", unstated).scaling, RopeScaling::Yarn { truncate: false, .. }));
    assert_eq!(open("rope_theta", json!(5e5)).theta, 5e5);
    assert_eq!(open("rope_parameters", json!({"rope_type": "default", "rope_theta": 7.0})).theta, 7.0);
    assert_eq!(open("rope_scaling", Value::Null).scaling, RopeScaling::None);
    let dynamic = open("rope_scaling", json!({"type": "dynamic", "factor": 2.0})).scaling;
    assert_eq!(dynamic, RopeScaling::Dynamic { factor: 2.0 });
    // Of both the older counts, unless it says nothing.
    let both = |older: Value| {
        let mut config = tiny_config(64);
        config["rope_scaling"] = older;
        config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 7.0});
        folder.put("config.json", config.to_string());
        ModelFiles::open(&folder.0).unwrap().config().rope.clone()
    };
    let linear = both(json!({"type": "linear", "factor": 4.0}));
    assert_eq!((linear.theta, linear.scaling), (1e4, RopeScaling::Linear { factor: 4.0 }));
    for nothing in [Value::Null, json!({})] {
        assert_eq!(both(nothing).theta, 7.0);
    }
}

#[test]
fn an_output_layer_of_its_own_counts() {
    let folder = Folder::new("untied");
    let mut shapes = tiny_shapes(64);
    shapes.insert("lm_head.weight".into(), vec![64, 8]);
    let same = safetensors_of(&shapes);
    folder.put("model.safetensors", &same);
    assert!(ModelFiles::open(&folder.0).unwrap().config().tied_embeddings);
    // Tensors lie in the order of their names, the head first.
    let header = 8 + u64::from_le_bytes(same[..8].try_into().unwrap()) as usize;
    let mut other = same;
    other[header + 4 * 8 * 63..][..4].copy_from_slice(&3.0f32.to_le_bytes());
    folder.put("model.safetensors", other);
    let files = ModelFiles::open(&folder.0).unwrap();
    assert!(!files.config().tied_embeddings);
    let (head, embedding) =
        (files.tensor(TensorName::Output).unwrap(), files.tensor(TensorName::TokenEmbedding).unwrap());
    assert_eq!(head.row_bytes(62), embedding.row_bytes(62));
    assert_ne!(head.row_bytes(63), embedding.row_bytes(63));
    shapes.insert("lm_head.weight".into(), vec![63, 8]);
    folder.put("model.safetensors", safetensors_of(&shapes));
    assert_names(&folder.error(), &["lm_head.weight", "[63, 8]", "[64, 8]"]);
}

/// A model cut short would answer, and answer nonsense.
#[test]
fn layers_that_the_configuration_does_not_tell_of() {
    let folder = Folder::new("more-layers");
    let mut shapes = tiny_shapes(64);
    for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.mlp.up_proj.weight"] {
        shapes.insert(name.into(), vec![16, 8]);
    }
    folder.put("model.safetensors", safetensors_of(&shapes));
    let parts = ["model.safetensors", "model.layers.1.mlp.up_proj.weight", "none of the 1 layers", "num_hidden_layers"];
    assert_names(&folder.error(), &parts);
    shapes.remove(parts[1]);
    folder.put("model.safetensors", safetensors_of(&shapes));
    ModelFiles::open(&folder.0).unwrap();
}

/// Folders saved from the base class of transformers: it has no output layer, which then must be tied.
#[test]
fn tensors_without_the_prefix_of_the_model() {
    let folder = Folder::new("prefix");
    let bare = |name: &str| name.trim_start_matches("model.").to_owned();
    let mut shapes: std::collections::BTreeMap<_, _> =
        tiny_shapes(64).into_iter().map(|(name, shape)| (bare(&name), shape)).collect();
    folder.put("model.safetensors", safetensors_of(&shapes));
    let files = ModelFiles::open(&folder.0).unwrap();
    assert_eq!(files.tensor(TensorName::TokenEmbedding).unwrap().rows(), 64);
    assert_eq!(files.vector(TensorName::OutputNorm).unwrap(), [1.0; 8]);

    let mut config = tiny_config(64);
    config["tie_word_embeddings"] = json!(false);
    folder.put("config.json", config.to_string());
    assert_names(&folder.error(), &["lm_head.weight", "missing"]);
    shapes.insert("lm_head.weight".into(), vec![64, 8]);
    folder.put("model.safetensors", safetensors_of(&shapes));
    assert!(!ModelFiles::open(&folder.0).unwrap().config().tied_embeddings);
    shapes.remove("norm.weight");
    folder.put("model.safetensors", safetensors_of(&shapes));
    assert_names(&folder.error(), &["model.norm.weight", "missing"]);
}

/// A header and `data` bytes behind it.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn safetensors_headers() {
    let folder = Folder::new("safetensors");
    let tensor = |shape: Value, offsets: Value| {
        json!({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).to_string()
    };
    let good = safetensors_of(&tiny_shapes(64));
    let mut longer = good.clone();
    longer.push(0);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "too short"),
        (vec![1, 2, 3], "too short"),
        (u64::MAX.to_le_bytes().to_vec(), "beyond what safetensors allows"),
        ((1u64 << 40).to_le_bytes().to_vec(), "beyond what safetensors allows"),
        (99u64.to_le_bytes().to_vec(), "longer than the file"),
        (safetensors("", 0), "header is not valid"),
        (safetensors("{", 0), "header is not valid"),
        (safetensors("[]", 0), "header is not valid"),
        (safetensors(&"[".repeat(5000), 0), "header is not valid"),
        (safetensors(r#"{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}"#, 4), "header is not valid"),
        (safetensors(&tensor(json!([1]), json!([0, 4])), 3), "do not end where the file ends"),
        (safetensors(&tensor(json!([1]), json!([0, 4])), 5), "do not end where the file ends"),
        (safetensors(&tensor(json!([2]), json!([0, 4])), 4), "another number of bytes"),
        (safetensors(&tensor(json!([1]), json!([4, 0])), 4), "data_offsets"),
        (safetensors(&tensor(json!([1]), json!([4, 8])), 8), "data_offsets"),
        (safetensors(&tensor(json!([1u64 << 32, 1u64 << 32]), json!([0, 4])), 4), "too large"),
        (safetensors(&tensor(json!([u64::MAX]), json!([0, 4])), 4), "too large"),
        (safetensors(&tensor(json!([-1]), json!([0, 4])), 4), "header is not valid"),
        (safetensors(&tensor(json!([1u64 << 60]), json!([0, 1u64 << 62])), 4), "model.safetensors: "),
        (safetensors(&tensor(json!([0]), json!([0, 0])), 0), "missing"),
        (good[..good.len() - 1].to_vec(), "do not end where the file ends"),
        (longer, "do not end where the file ends"),
    ];
    for (bytes, expected) in cases {
        folder.put("model.safetensors", bytes);
        assert_names(&folder.error(), &["model.safetensors: ", expected]);
    }
    for length in (0..good.len()).step_by(7) {
        folder.put("model.safetensors", &good[..length]);
        assert_names(&folder.error(), &["model.safetensors: "]);
    }
}

#[test]
fn tensors() {
    let folder = Folder::new("tensors");
    let mut shapes = tiny_shapes(64);
    shapes.insert("model.norm.weight".into(), vec![4]);
    folder.put("model.safetensors", safetensors_of(&shapes));
    assert_names(&folder.error(), &["model.safetensors", "model.norm.weight", "[4]", "[8]"]);
    shapes.insert("model.norm.weight".into(), vec![1, 8]);
    folder.put("model.safetensors", safetensors_of(&shapes));
    assert_names(&folder.error(), &["model.norm.weight", "[1, 8]"]);
    shapes.remove("model.norm.weight");
    folder.put("model.safetensors", safetensors_of(&shapes));
    assert_names(&folder.error(), &["model.safetensors", "model.norm.weight", "missing"]);

    for (kind, size) in [("I32", 4), ("F8_E4M3", 1)] {
        let mut end = 0;
        let mut tensor = |shape: Vec<usize>| {
            let start = end;
            end += shape.iter().product::<usize>() * size;
            json!({"dtype": kind, "shape": shape, "data_offsets": [start, end]})
        };
        let header: serde_json::Map<String, Value> =
            tiny_shapes(64).into_iter().map(|(name, shape)| (name, tensor(shape))).collect();
        folder.put("model.safetensors", safetensors(&Value::Object(header).to_string(), end));
        let message = folder.error();
        assert_names(&message, &["model.safetensors", "model.embed_tokens.weight", "BF16"]);
        assert!(message.to_uppercase().contains(kind), "{message}");
    }
}

#[test]
fn indexes_and_shards() {
    let folder = Folder::new("index");
    folder.remove("model.safetensors");
    for (index, expected) in [
        ("", "not valid JSON"),
        ("{}", "weight_map is missing"),
        (r#"{"weight_map": []}"#, "weight_map is missing"),
        (r#"{"weight_map": {}}"#, "weight_map is empty"),
        (r#"{"weight_map": {"a": 1}}"#, "weight_map.\"a\" is no file name"),
        (r#"{"weight_map": {"a": "../other/model.safetensors"}}"#, "same folder"),
        (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "same folder"),
        (r#"{"weight_map": {"a": "config.json"}}"#, "same folder"),
        (r#"{"weight_map": {"a": "s-1.safetensors"}}"#, "names shard \"s-1.safetensors\", which cannot be opened"),
    ] {
        folder.put("model.safetensors.index.json", index);
        assert_names(&folder.error(), &["model.safetensors.index.json", expected]);
    }
    let many: serde_json::Map<String, Value> =
        (0..2000).map(|number| (format!("t{number}"), json!(format!("s{number}.safetensors")))).collect();
    folder.put("model.safetensors.index.json", json!({ "weight_map": many }).to_string());
    let message = ModelFiles::open(&folder.0).unwrap_err().to_string();
    assert_names(&message, &["model.safetensors.index.json", "2000 shards"]);

    let (first, second): (Vec<_>, Vec<_>) = tiny_shapes(64).into_iter().partition(|(name, _)| name.contains("mlp"));
    let map: serde_json::Map<String, Value> = first
        .iter()
        .map(|(name, _)| (name.clone(), json!("one.safetensors")))
        .chain(second.iter().map(|(name, _)| (name.clone(), json!("two.safetensors"))))
        .collect();
    folder.put("model.safetensors.index.json", json!({ "weight_map": map }).to_string());
    folder.put("one.safetensors", safetensors_of(&first.clone().into_iter().collect()));
    assert_names(&folder.error(), &["two.safetensors", "cannot be opened"]);
    folder.put("two.safetensors", safetensors_of(&first.into_iter().collect()));
    assert_names(&folder.error(), &["two.safetensors", "missing", "places here"]);
    folder.put("two.safetensors", safetensors_of(&second.into_iter().collect()));
    assert_eq!(ModelFiles::open(&folder.0).unwrap().summary().files, 2);
    let mut config = tiny_config(64);
    config["tie_word_embeddings"] = json!(false);
    folder.put("config.json", config.to_string());
    assert_names(&folder.error(), &["one.safetensors", "(2 in all)", "lm_head.weight", "missing"]);
}
