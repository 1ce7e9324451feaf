//! Malformed GGUF files: each gives a one-line error that names the file and the field, without a large allocation.
//!
//! Cases marked with an advisory are the shapes of known holes in other readers.
#![allow(missing_docs)]

mod common;

use common::gguf::{Entry, Gguf, Value, array, string};
use common::scratch_folder;
use iceformer_engine::{ModelFiles, RopeScaling};

const KIB: u64 = 1024;

/// Opens the file and everything behind it, and gives the first error.
fn error_of(bytes: Vec<u8>) -> String {
    let length = bytes.len() as u64;
    let (result, peak) = common::peak_of(|| {
        let files = ModelFiles::from_gguf_memory("model.gguf", bytes).map_err(|error| error.to_string())?;
        files.tokenizer().map_err(|error| error.to_string())?;
        files.chat_template().map_err(|error| error.to_string())?;
        Ok::<_, String>(())
    });
    let message = result.expect_err("the file was accepted");
    assert!(message.starts_with("model.gguf: "), "names no file: {message}");
    assert!(!message.contains('\n') && message.len() < 600, "not one short line: {message}");
    assert!(peak < 2 * length + 4096 * KIB, "{peak} bytes were allocated for a file of {length}: {message}");
    message
}

fn check(case: &str, change: impl FnOnce(&mut Gguf), expected: &[&str]) {
    let mut file = Gguf::tiny();
    change(&mut file);
    let message = error_of(file.write());
    for part in expected {
        assert!(message.contains(part), "{case}: {part:?} is not in {message:?}");
    }
}

#[test]
fn the_unchanged_file_opens() {
    let files = ModelFiles::from_gguf_memory("model.gguf", Gguf::tiny().write()).unwrap();
    let tokenizer = files.tokenizer().unwrap();
    assert_eq!(tokenizer.encode("ab<unk>", false).unwrap(), [4, 7]);
    assert!(files.chat_template().unwrap().is_none());
    let mut old = Gguf::tiny();
    old.version = 2;
    ModelFiles::from_gguf_memory("model.gguf", old.write()).unwrap();
}

#[test]
fn header() {
    check("magic", |file| file.magic = *b"GGML", &["magic"]);
    check("version 1", |file| file.version = 1, &["version: 1"]);
    check("version 4", |file| file.version = 4, &["version: 4"]);
    check("big-endian", |file| file.version = 3u32.swap_bytes(), &["big-endian"]);
    // CVE-2024-23605 and CVE-2024-21802: counts of the header decided on the size of buffers.
    check("tensor count", |file| file.tensor_count = Some(u64::MAX), &["tensor_count"]);
    check("tensor count times size wraps", |file| file.tensor_count = Some(u64::MAX / 32 + 2), &["tensor_count"]);
    check("tensor count, huge", |file| file.tensor_count = Some(1 << 40), &["tensor_count"]);
    check("one tensor too many", |file| file.tensor_count = Some(12), &["tensor 11"]);
    check("value count", |file| file.value_count = Some(u64::MAX), &["metadata_kv_count"]);
    check("value count, huge", |file| file.value_count = Some(1 << 34), &["metadata_kv_count"]);
}

#[test]
fn strings_and_keys() {
    let key = |length: u64| Value::Raw(8, length.to_le_bytes().to_vec());
    check("string length", |file| file.set("general.name", key(u64::MAX)), &["general.name", "ends early"]);
    check("string length, wrapping", |file| file.set("general.name", key(u64::MAX - 7)), &["general.name"]);
    check("string length, beyond the end", |file| file.set("general.name", key(1 << 20)), &["general.name"]);
    check("empty key", |file| file.set("", Value::U32(1)), &["key 15", "length 0"]);
    check("long key", |file| file.set(&"k".repeat(70_000), Value::U32(1)), &["key 15", "length 70000"]);
    check(
        "key twice",
        |file| file.values.push(("llama.block_count".into(), Value::U32(2))),
        &["llama.block_count", "twice"],
    );
    check("line break in a key", |file| file.set("a\nb", Value::Raw(99, vec![])), &["value type 99"]);
    let mut bytes = Gguf::tiny();
    bytes.tensors[0].name = "n\u{0}".into();
    assert!(error_of(bytes.write()).contains("token_embd.weight"));
}

#[test]
fn values() {
    let set = |value: Value| move |file: &mut Gguf| file.set("general.name", value);
    check("unknown type", set(Value::Raw(13, vec![0; 8])), &["general.name", "value type 13"]);
    check("boolean", set(Value::Raw(7, vec![2])), &["general.name", "boolean is 2"]);
    check(
        "array of arrays",
        set(Value::Raw(9, array(9, 1, array(9, 1, std::iter::empty()).into_iter()))),
        &["general.name", "array of arrays"],
    );
    check("array element type", set(Value::Raw(9, array(77, 1, [0; 8].into_iter()))), &["value type 77"]);
    // candle #3533: an array's count decided on the size of a buffer.
    check("array count", set(Value::Raw(9, array(4, usize::MAX, std::iter::empty()))), &["general.name", "entries"]);
    check("array count, wrapping", set(Value::Raw(9, array(10, usize::MAX / 8 + 2, std::iter::empty()))), &["entries"]);
    check("array count, huge", set(Value::Raw(9, array(8, 1 << 33, std::iter::empty()))), &["general.name", "entries"]);
    check(
        "string in an array",
        set(Value::Raw(9, array(8, 1, (1u64 << 50).to_le_bytes().into_iter()))),
        &["general.name", "ends early"],
    );
    let nested: Vec<u8> = (0..5000).flat_map(|_| array(9, 1, std::iter::empty())).collect();
    check("deep nesting", set(Value::Raw(9, nested)), &["array of arrays"]);
    check("no UTF-8 in an array", set(Value::Raw(9, array(8, 1, string(b"\xff\xfe").into_iter()))), &["not UTF-8"]);
}

#[test]
fn alignment() {
    let set = |value: Value| move |file: &mut Gguf| file.set("general.alignment", value);
    // candle #3876: an alignment of zero divided by zero.
    check("zero", set(Value::U32(0)), &["general.alignment is 0"]);
    check("no power of two", set(Value::U32(48)), &["general.alignment is 48"]);
    check("too large", set(Value::U32(1 << 31)), &["general.alignment is 2147483648"]);
    check("wrong type", set(Value::String("32")), &["general.alignment is a string"]);
}

#[test]
fn tensors() {
    let of = |change: fn(&mut Entry)| move |file: &mut Gguf| change(file.tensor("blk.0.ffn_up.weight"));
    check("no dimensions", of(|tensor| tensor.dimensions.clear()), &["blk.0.ffn_up.weight", "0 dimensions"]);
    check("five dimensions", of(|tensor| tensor.dimensions = vec![1; 5]), &["blk.0.ffn_up.weight", "5 dimensions"]);
    check("a million dimensions", of(|tensor| tensor.dimensions = vec![1; 1 << 20]), &["1048576 dimensions"]);
    check("a dimension of zero", of(|tensor| tensor.dimensions = vec![8, 0]), &["blk.0.ffn_up.weight", "zero"]);
    // CVE-2025-53630, CVE-2026-27940, CVE-2026-33298, candle #3714: products of dimensions that wrap.
    check("shape wraps to zero", of(|tensor| tensor.dimensions = vec![1 << 32, 1 << 32]), &["too large"]);
    check("shape wraps to small", of(|tensor| tensor.dimensions = vec![(1 << 32) + 1, 1 << 32]), &["too large"]);
    check("bytes wrap", of(|tensor| tensor.dimensions = vec![8, 1 << 60]), &["blk.0.ffn_up.weight", "too large"]);
    check("one huge dimension", of(|tensor| tensor.dimensions = vec![u64::MAX]), &["too large"]);
    check("huge but countable", of(|tensor| tensor.dimensions = vec![8, 1 << 40]), &["reach beyond"]);
    check("unknown type", of(|tensor| tensor.kind = 200), &["blk.0.ffn_up.weight", "type 200"]);
    check("removed type", of(|tensor| tensor.kind = 4), &["blk.0.ffn_up.weight", "type 4"]);
    check("rows no whole blocks", of(|tensor| tensor.kind = 12), &["blk.0.ffn_up.weight", "q4_k"]);
    check("offset not aligned", of(|tensor| tensor.offset += 4), &["blk.0.ffn_up.weight", "alignment 32"]);
    // CVE-2026-7482: an offset beyond the file read what lay behind it.
    check("offset beyond the file", of(|tensor| tensor.offset = 1 << 40), &["blk.0.ffn_up.weight", "reach beyond"]);
    check("offset wraps", of(|tensor| tensor.offset = u64::MAX - 31), &["blk.0.ffn_up.weight", "reach beyond"]);
    check("overlap", of(|tensor| tensor.offset = 0), &["overlap"]);
    check("long name", of(|tensor| tensor.name = "n".repeat(256)), &["tensor 9", "length 256"]);
    check("name twice", of(|tensor| tensor.name = "token_embd.weight".into()), &["token_embd.weight", "twice"]);
    check("missing", of(|tensor| tensor.name = "other".into()), &["blk.0.ffn_up.weight", "missing"]);
    check("other shape", of(|tensor| tensor.dimensions = vec![16, 8]), &["[8, 16]", "[16, 8]"]);
    check("vector as matrix", |file| file.tensor("output_norm.weight").dimensions = vec![8, 1], &["output_norm"]);
    check("type without kernels", of(|tensor| tensor.kind = 26), &["blk.0.ffn_up.weight", "i32", "Q4_K"]);
}

/// A file may be cut anywhere.
#[test]
fn truncated_everywhere() {
    let bytes = Gguf::tiny().write();
    for length in 0..bytes.len() {
        error_of(bytes[..length].to_vec());
    }
}

#[test]
fn cut_on_the_disk() {
    let path = scratch_folder("cut").join("model.gguf");
    let bytes = Gguf::tiny().write();
    std::fs::write(&path, &bytes).unwrap();
    let files = ModelFiles::open(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 600]).unwrap();
    let name = iceformer_engine::TensorName::Layer(0, iceformer_engine::LayerTensor::Down);
    let message = files.tensor(name).unwrap_err().to_string();
    assert!(message.contains("model.gguf") && message.contains("ends early"), "{message}");
}

#[test]
fn configuration() {
    check("no architecture", |file| file.remove("general.architecture"), &["general.architecture is missing"]);
    let set = |key: &'static str, value: Value| move |file: &mut Gguf| file.set(key, value);
    check("family", set("general.architecture", Value::String("rwkv\n7")), &["rwkv\\n7", "qwen3"]);
    check(
        "architecture's type",
        set("general.architecture", Value::U32(1)),
        &["general.architecture is a whole number"],
    );
    check("no heads", set("llama.attention.head_count", Value::U32(0)), &["llama.attention.head_count is 0"]);
    check("kv heads", set("llama.attention.head_count_kv", Value::U32(3)), &["2 attention heads", "3 key/value heads"]);
    check("heads by layer", set("llama.attention.head_count", Value::I32s(vec![2])), &["head_count", "an array"]);
    check("many layers", set("llama.block_count", Value::U32(u32::MAX)), &["llama.block_count is 4294967295"]);
    check(
        "more layers than tensors",
        set("llama.block_count", Value::U32(1000)),
        &["blk.1.attn_norm.weight", "missing"],
    );
    check("negative", set("llama.block_count", Value::Raw(5, (-1i32).to_le_bytes().to_vec())), &["llama.block_count"]);
    check("huge width", set("llama.embedding_length", Value::U32(u32::MAX)), &["llama.embedding_length"]);
    check("other width", set("llama.embedding_length", Value::U32(16)), &["token_embd.weight", "[8, 16]"]);
    check("no epsilon", |file| file.remove("llama.attention.layer_norm_rms_epsilon"), &["layer_norm_rms_epsilon"]);
    check("epsilon", set("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN)), &["epsilon"]);
    check("theta", set("llama.rope.freq_base", Value::F32(-1.0)), &["rope theta is -1"]);
    check("theta's type", set("llama.rope.freq_base", Value::U32(10000)), &["rope.freq_base is a whole number"]);
    check("rope type", set("llama.rope.scaling.type", Value::String("longrope")), &["longrope", "yarn"]);
    check("experts", set("llama.expert_count", Value::U32(8)), &["llama.expert_count"]);
    check("partly rotary", set("llama.rope.dimension_count", Value::U32(2)), &["llama.rope.dimension_count"]);
    check("odd head width", set("llama.attention.key_length", Value::U32(5)), &["odd"]);
    check("split from memory", set("split.count", Value::U32(3)), &["split.count"]);
}

/// Parts that only some layers have, or that the model has no place for, must not be left out in silence.
#[test]
fn biases_and_scales_without_a_place() {
    for (name, length) in [
        ("blk.0.attn_k.bias", 4),
        ("blk.0.ffn_up.bias", 16),
        ("blk.0.attn_q.scale", 1),
        ("output_norm.bias", 8),
        ("blk.7.attn_q.bias", 8),
    ] {
        let add = |file: &mut Gguf| {
            let offset = file.data_bytes.next_multiple_of(32);
            let entry = Entry { name: name.into(), dimensions: vec![length], kind: 0, offset: offset as u64 };
            file.tensors.push(entry);
            file.data_bytes = offset + 4 * length as usize;
        };
        check(name, add, &[name, "has no place in this model"]);
    }
}

/// llama.cpp's converter writes transformers' `attention_factor`, the whole of it, under another name than llama.cpp's own
/// factor on top.
#[test]
fn both_factors_of_yarn() {
    let factor = |values: &[(&str, f32)]| {
        let mut file = Gguf::tiny();
        file.set("llama.rope.scaling.type", Value::String("yarn"));
        file.set("llama.rope.scaling.factor", Value::F32(4.0));
        values.iter().for_each(|(key, value)| file.set(&format!("llama.rope.scaling.{key}"), Value::F32(*value)));
        let files = ModelFiles::from_gguf_memory("model.gguf", file.write()).unwrap();
        match files.config().rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            ref other => panic!("{other:?}"),
        }
    };
    let usual = 0.1 * 4f32.ln() + 1.0;
    for (values, expected) in [
        (&[][..], usual),
        (&[("attn_factor", 1.5)], 1.5 * usual),
        (&[("yarn_attn_factor", 1.5)], 1.5),
        (&[("yarn_attn_factor", 1.5), ("attn_factor", 3.0)], 1.5),
    ] {
        assert!((factor(values) - expected).abs() < 1e-6, "{values:?}: {}", factor(values));
    }
}

#[test]
fn tokenizers() {
    let set =
        |key: &'static str, value: Value| move |file: &mut Gguf| file.set(&format!("tokenizer.ggml.{key}"), value);
    let without = |key: &'static str| move |file: &mut Gguf| file.remove(&format!("tokenizer.ggml.{key}"));
    check("no model", without("model"), &["tokenizer.ggml.model is missing"]);
    check("unknown model", set("model", Value::String("t5")), &["tokenizer.ggml.model", "t5", "gpt2, llama"]);
    check("unknown pre-tokenizer", set("pre", Value::String("x")), &["tokenizer.ggml.pre", "llama-bpe"]);
    check("no tokens", without("tokens"), &["tokenizer.ggml.tokens is missing"]);
    check("empty tokens", set("tokens", Value::Strings(vec![])), &["tokenizer.ggml.tokens is empty"]);
    check("tokens are numbers", set("tokens", Value::I32s(vec![1])), &["tokenizer.ggml.tokens is an array of 32-bit"]);
    check("tokens are a string", set("tokens", Value::String("a")), &["tokenizer.ggml.tokens is a string"]);
    check("more tokens than rows", set("tokens", Value::Strings(vec!["a".into(); 9])), &["token id 8", "8"]);
    check("types too few", set("token_type", Value::I32s(vec![1])), &["tokenizer.ggml.token_type has 1 entries for 8"]);
    check("types too many", set("token_type", Value::I32s(vec![1; 9])), &["tokenizer.ggml.token_type has 9"]);
    check("types are floats", set("token_type", Value::F32s(vec![1.0; 8])), &["tokenizer.ggml.token_type is"]);
    check("unknown token type", set("token_type", Value::I32s(vec![-7; 8])), &["tokenizer.ggml.token_type[0] is -7"]);
    check("no merges", without("merges"), &["tokenizer.ggml.merges is missing"]);
    check("merge of one", set("merges", Value::Strings(vec!["ab".into()])), &["tokenizer.ggml.merges[0]"]);
    check("empty merge", set("merges", Value::Strings(vec![String::new()])), &["tokenizer.ggml.merges[0]"]);
    check("merge of unknown", set("merges", Value::Strings(vec!["a c".into()])), &["merges[0] needs token \"c\""]);
    check("merge into unknown", set("merges", Value::Strings(vec!["b a".into()])), &["merges[0] needs token \"ba\""]);
    check("bos", set("bos_token_id", Value::U32(8)), &["tokenizer.ggml.bos_token_id is 8"]);
    check("eos", set("eos_token_id", Value::Raw(5, (-1i32).to_le_bytes().to_vec())), &["tokenizer.ggml.eos_token_id"]);
    check("add eos", set("add_eos_token", Value::U32(1)), &["tokenizer.ggml.add_eos_token is a whole number"]);
    check(
        "bos to add is missing",
        |file| {
            file.remove("tokenizer.ggml.bos_token_id");
            file.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
        },
        &["bos_token_id is missing"],
    );
    check("template", |file| file.set("tokenizer.chat_template", Value::String("{% if")), &["chat template"]);
    check(
        "template's type",
        |file| file.set("tokenizer.chat_template", Value::U32(1)),
        &["tokenizer.chat_template is"],
    );
}

#[test]
fn sentence_piece_tokenizers() {
    let sentence_piece = |change: fn(&mut Gguf)| {
        move |file: &mut Gguf| {
            file.set("tokenizer.ggml.model", Value::String("llama"));
            file.set("tokenizer.ggml.scores", Value::F32s(vec![0.0; 8]));
            change(file);
        }
    };
    let mut good = Gguf::tiny();
    sentence_piece(|_| ())(&mut good);
    ModelFiles::from_gguf_memory("model.gguf", good.write()).unwrap().tokenizer().unwrap();
    let scores = |value: Value| {
        move |file: &mut Gguf| {
            sentence_piece(|_| ())(file);
            file.set("tokenizer.ggml.scores", value);
        }
    };
    check("no scores", sentence_piece(|file| file.remove("tokenizer.ggml.scores")), &["scores is missing"]);
    check("scores too few", scores(Value::F32s(vec![0.0])), &["tokenizer.ggml.scores has 1 entries for 8"]);
    check("scores are strings", scores(Value::Strings(vec!["0".into(); 8])), &["tokenizer.ggml.scores is an array"]);
    check(
        "byte token",
        sentence_piece(|file| file.set("tokenizer.ggml.token_type", Value::I32s(vec![6; 8]))),
        &["tokenizer.ggml.tokens[0]", "byte"],
    );
    check(
        "no way for unknown text",
        sentence_piece(|file| file.set("tokenizer.ggml.token_type", Value::I32s(vec![1; 8]))),
        &["neither byte tokens nor an unknown token"],
    );
}

#[test]
fn split_models() {
    let folder = scratch_folder("split");
    let write = |name: &str, number: u32, file: &mut Gguf| {
        file.set("split.no", Value::Raw(2, (number as u16).to_le_bytes().to_vec()));
        file.set("split.count", Value::Raw(2, 2u16.to_le_bytes().to_vec()));
        std::fs::write(folder.join(name), file.write()).unwrap();
    };
    let mut first = Gguf::tiny();
    let mut second = Gguf::tiny();
    let moved = first.tensors.pop().unwrap();
    second.tensors = vec![Entry { offset: 0, ..moved }];
    second.values.clear();
    first.set("split.tensors.count", Value::Raw(5, 11i32.to_le_bytes().to_vec()));
    write("m-00001-of-00002.gguf", 0, &mut first);
    let open = |name: &str| ModelFiles::open(&folder.join(name));
    let message = open("m-00001-of-00002.gguf").unwrap_err().to_string();
    assert!(message.contains("m-00002-of-00002.gguf cannot be opened"), "{message}");

    write("m-00002-of-00002.gguf", 1, &mut second);
    let files = open("m-00001-of-00002.gguf").unwrap();
    assert_eq!((files.summary().files, files.tensors().count()), (2, 11));
    files.tensor(iceformer_engine::TensorName::Layer(0, iceformer_engine::LayerTensor::Down)).unwrap();
    let message = open("m-00002-of-00002.gguf").unwrap_err().to_string();
    assert!(message.contains("split.no is 1") && message.contains("first file"), "{message}");

    write("m-00002-of-00002.gguf", 7, &mut second);
    assert!(open("m-00001-of-00002.gguf").unwrap_err().to_string().contains("split.no is Some(7)"));
    write("m-00002-of-00002.gguf", 1, &mut first.clone());
    assert!(open("m-00001-of-00002.gguf").unwrap_err().to_string().contains("twice"));
    write("other.gguf", 0, &mut first);
    assert!(open("other.gguf").unwrap_err().to_string().contains("does not end in -00001-of-00002.gguf"));
    std::fs::remove_dir_all(folder).unwrap();
}
