//! Tiny random Hugging Face models of every family against transformers in f32
//! (`testing/golden/scripts/parity_models.py`).

mod golden;

use std::path::{Path, PathBuf};

use golden::{Expected, folder, load, logits, session};
use iceformer_attention::KeyValueType;
use iceformer_testing::compare::{assert_close, relative_error};
use iceformer_testing::elementwise::widen;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// The folders below `testing/golden/parity`.
fn models() -> Vec<PathBuf> {
    let mut models: Vec<PathBuf> =
        std::fs::read_dir(folder("parity")).unwrap().map(|entry| entry.unwrap().path()).collect();
    models.sort();
    assert!(models.len() >= 12, "the golden models are there");
    models
}

fn name(model: &Path) -> String {
    model.file_name().unwrap().to_string_lossy().into_owned()
}

/// A copy of a model folder with the same weights stored as f32.
fn widened(model: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(model).unwrap().map(|entry| entry.unwrap().path()) {
        let target = copy.path().join(file.file_name().unwrap());
        let bytes = std::fs::read(&file).unwrap();
        if !name(&file).starts_with("model") || file.extension().is_none_or(|extension| extension != "safetensors") {
            std::fs::write(target, bytes).unwrap();
            continue;
        }
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let wide: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .iter()
            .map(|(name, tensor)| (name.to_owned(), tensor.shape().to_vec(), to_f32(tensor.dtype(), tensor.data())))
            .collect();
        let views =
            wide.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        std::fs::write(target, safetensors::serialize(views, None).unwrap()).unwrap();
    }
    copy
}

fn to_f32(kind: Dtype, bytes: &[u8]) -> Vec<u8> {
    let pairs = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match kind {
        Dtype::F32 => bytes.to_vec(),
        Dtype::BF16 => pairs.flat_map(|pair| half::bf16::from_le_bytes(pair).to_f32().to_le_bytes()).collect(),
        Dtype::F16 => pairs.flat_map(|pair| half::f16::from_le_bytes(pair).to_f32().to_le_bytes()).collect(),
        other => panic!("a weight of type {other:?}"),
    }
}

/// Most divergence in nats per token of a model as stored, by the type of the cache.
///
/// Weights of f16 are rounded to bf16 when they are packed.
fn tolerance(model: &Path, kind: KeyValueType) -> f64 {
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let f16 = config.contains(r#""dtype": "float16""#);
    match kind {
        KeyValueType::Int8 => 1e-3,
        _ if f16 => 2e-4,
        _ => 1e-4,
    }
}

fn expected(model: &Path) -> Expected {
    Expected::read(&model.join("expected.safetensors"))
}

#[test]
fn f32_logits_equal_those_of_transformers() {
    for model in models() {
        let expected = expected(&model);
        let wide = widened(&model);
        let loaded = load(wide.path(), 2);
        let found = logits(&loaded, &expected.tokens, 512, KeyValueType::F32);
        let error = relative_error(&found, &widen(&expected.logits));
        println!("{}: relative logit error {error:.1e}", name(&model));
        assert_close(&found, &widen(&expected.logits), 1e-4, name(&model));
    }
}

#[test]
fn stored_weights_and_small_caches_stay_near() {
    for model in models() {
        let expected = expected(&model);
        let loaded = load(&model, 2);
        for kind in [KeyValueType::F32, KeyValueType::Bf16, KeyValueType::Int8] {
            let most = tolerance(&model, kind);
            let (mean, largest) = expected.divergence(&logits(&loaded, &expected.tokens, 512, kind));
            println!("{} {kind:?}: divergence {mean:.1e}, largest {largest:.1e} nats", name(&model));
            assert!(
                mean <= most,
                "{} {kind:?}: divergence {mean:.2e} nats per token is above {most:.0e}",
                name(&model)
            );
        }
    }
}

#[test]
fn greedy_continuation_equals_that_of_transformers() {
    for model in models() {
        let expected = expected(&model);
        let wide = widened(&model);
        let loaded = load(wide.path(), 2);
        let mut session = session(&loaded, 512, KeyValueType::F32);
        session.read(&expected.tokens, |_, _| {}).unwrap();
        let mut found = Vec::new();
        for _ in expected.other("continuation") {
            let best = (0..expected.vocabulary).max_by(|&a, &b| session.logits()[a].total_cmp(&session.logits()[b]));
            found.push(best.unwrap() as u32);
            session.read(&found[found.len() - 1..], |_, _| {}).unwrap();
        }
        assert_eq!(
            found.iter().copied().map(f64::from).collect::<Vec<_>>(),
            expected.other("continuation"),
            "{}",
            name(&model)
        );
    }
}

#[test]
fn chunks_do_not_matter() {
    for model in models() {
        let expected = expected(&model);
        let wide = widened(&model);
        let (exact, stored) = (load(wide.path(), 2), load(&model, 2));
        for chunk in [1, 7, 16, 64] {
            let found = logits(&exact, &expected.tokens, chunk, KeyValueType::F32);
            assert_close(&found, &widen(&expected.logits), 1e-4, format!("{}, chunks of {chunk}", name(&model)));
            for kind in [KeyValueType::Bf16, KeyValueType::Int8] {
                let most = tolerance(&model, kind);
                let (mean, _) = expected.divergence(&logits(&stored, &expected.tokens, chunk, kind));
                assert!(mean <= most, "{} {kind:?}, chunks of {chunk}: divergence {mean:.2e} nats", name(&model));
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for model in models() {
        let expected = expected(&model);
        for kind in [KeyValueType::F32, KeyValueType::Bf16, KeyValueType::Int8] {
            let one = logits(&load(&model, 1), &expected.tokens, 64, kind);
            for threads in [2, 4] {
                let more = logits(&load(&model, threads), &expected.tokens, 64, kind);
                assert!(one == more, "{} {kind:?}: {threads} threads give other bits than one", name(&model));
            }
        }
    }
}

#[test]
fn tokenizer_gives_the_expected_tokens() {
    let text = std::fs::read_to_string(folder("scripts/parity_text.txt")).unwrap();
    for model in models() {
        let expected = expected(&model);
        let tokens = load(&model, 1).tokenizer().encode(&text, false).unwrap();
        assert_eq!(tokens[..expected.tokens.len()], expected.tokens, "{}", name(&model));
    }
}
