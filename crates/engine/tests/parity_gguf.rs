//! GGUF files quantised by llama.cpp against transformers in f32 with the dequantised weights
//! (`testing/golden/scripts/parity_gguf.py`).

mod golden;

use std::path::PathBuf;

use golden::{Expected, folder, load, logits};
use iceformer_attention::KeyValueType;
use iceformer_engine::ModelFiles;
use iceformer_kernels::InstructionSet;
use iceformer_testing::compare::{assert_close, divergence};
use iceformer_testing::elementwise::widen;

/// The GGUF files below `testing/golden/parity_gguf`, with what they should compute.
fn models() -> Vec<(String, PathBuf, Expected)> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder("parity_gguf")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    paths.sort();
    assert!(paths.len() >= 9, "the golden models are there");
    let describe = |path: PathBuf| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let expected = Expected::read(&path.with_extension("expected.safetensors"));
        (name, path, expected)
    };
    paths.into_iter().map(describe).collect()
}

#[test]
fn logits_follow_the_dequantised_weights() {
    for (name, path, expected) in models() {
        let model = load(&path, 2);
        let found = logits(&model, &expected.tokens, 512, KeyValueType::F32);
        let (mean, largest) = expected.divergence(&found);
        let theirs = expected.other("llama_cpp_divergence");
        let theirs = theirs.iter().sum::<f64>() / theirs.len() as f64;
        println!("{name}: divergence {mean:.1e}, largest {largest:.1e} nats; llama.cpp's {theirs:.1e}");
        assert!(mean <= 1e-3, "{name}: divergence {mean:.2e} nats per token is above 1e-3");
        // Without 8-bit and bf16 products nothing but the order of sums differs. Weights of f16 are rounded to bf16 on
        // every level, those of some types as they are written anew.
        let holds = |kind| ModelFiles::open(&path).unwrap().tensors().any(|tensor| tensor.weight_type == kind);
        let is_exact = InstructionSet::current() == InstructionSet::Portable && !holds("f16");
        let tolerance = if holds("q2_k") {
            5e-2
        } else if holds("iq4_xs") {
            1e-2
        } else {
            1e-4
        };
        if is_exact || name.ends_with("f32") {
            assert_close(&found, &widen(&expected.logits), tolerance, &name);
        }
    }
}

#[test]
fn small_caches_and_chunks_stay_near() {
    for (name, path, expected) in models() {
        let model = load(&path, 2);
        for chunk in [1, 7, 16, 64] {
            for kind in [KeyValueType::F32, KeyValueType::Bf16, KeyValueType::Int8] {
                let (mean, _) = expected.divergence(&logits(&model, &expected.tokens, chunk, kind));
                assert!(mean <= 1e-3, "{name} {kind:?}, chunks of {chunk}: divergence {mean:.2e} nats per token");
            }
        }
    }
}

/// llama.cpp's own logits of the last position: near ours, as both are near the reference.
#[test]
fn llama_cpp_agrees() {
    for (name, path, expected) in models() {
        let found = logits(&load(&path, 2), &expected.tokens, 512, KeyValueType::F32);
        let theirs: Vec<f32> = expected.other("llama_cpp_logits").iter().map(|&logit| logit as f32).collect();
        let ours = &found[found.len() - expected.vocabulary..];
        let distance = divergence(&theirs, ours);
        assert!(distance <= 5e-3, "{name}: divergence from llama.cpp {distance:.2e} nats");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for (name, path, expected) in models() {
        let one = logits(&load(&path, 1), &expected.tokens, 64, KeyValueType::Int8);
        for threads in [2, 4] {
            let more = logits(&load(&path, threads), &expected.tokens, 64, KeyValueType::Int8);
            assert!(one == more, "{name}: {threads} threads give other bits than one");
        }
    }
}

#[test]
fn tokenizer_gives_the_expected_tokens() {
    let text = std::fs::read_to_string(folder("scripts/parity_text.txt")).unwrap();
    for (name, path, expected) in models() {
        let tokens = load(&path, 1).tokenizer().encode(&text, false).unwrap();
        assert_eq!(tokens[..expected.tokens.len()], expected.tokens, "{name}");
    }
}
