//! What the parity tests share: the golden models of `testing/golden` and how far a session is from them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use iceformer_attention::{KeyValueType, ThreadTeam};
use iceformer_engine::{Model, Session, SessionSettings};
use iceformer_testing::compare::divergence;
use safetensors::{Dtype, SafeTensors};

/// What a model of the golden files should compute.
pub struct Expected {
    /// The text, encoded.
    pub tokens: Vec<u32>,
    /// `[tokens, vocabulary]`.
    pub logits: Vec<f32>,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Other tensors of the file, as f64, by name.
    others: Vec<(String, Vec<f64>)>,
}

impl Expected {
    /// Reads an `expected.safetensors`.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let numbers = |name: &str| {
            let tensor = file.tensor(name).unwrap();
            let bytes = tensor.data();
            let numbers: Vec<f64> = match tensor.dtype() {
                Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
                Dtype::I32 => bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
                Dtype::F64 => bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
                other => panic!("{name} has type {other:?}"),
            };
            numbers
        };
        let logits: Vec<f32> = numbers("logits").into_iter().map(|x| x as f32).collect();
        let tokens: Vec<u32> = numbers("tokens").into_iter().map(|x| x as u32).collect();
        let vocabulary = logits.len() / tokens.len();
        let others = file.names().into_iter().map(|name| (name.to_owned(), numbers(name))).collect();
        Self { tokens, logits, vocabulary, others }
    }

    /// Another tensor of the file.
    pub fn other(&self, name: &str) -> &[f64] {
        &self.others.iter().find(|(other, _)| other == name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    /// Kullback-Leibler divergence of `logits`, `[tokens, vocabulary]`, from the expected ones: mean and largest over
    /// the tokens, in nats.
    pub fn divergence(&self, logits: &[f32]) -> (f64, f64) {
        assert_eq!(logits.len(), self.logits.len(), "logits of every token");
        let rows = self.logits.chunks(self.vocabulary).zip(logits.chunks(self.vocabulary));
        let each: Vec<f64> = rows.map(|(expected, found)| divergence(expected, found)).collect();
        (each.iter().sum::<f64>() / each.len() as f64, each.iter().copied().fold(0.0, f64::max))
    }
}

/// A folder of `testing/golden`.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testing/golden").join(name)
}

/// Loads a model on `threads` threads.
pub fn load(path: &Path, threads: usize) -> Model {
    Model::load(path, Arc::new(ThreadTeam::new(threads)), |_, _| {})
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// An empty session that reads `chunk` tokens at a time.
pub fn session(model: &Model, chunk: usize, key_value_type: KeyValueType) -> Session {
    model.session(&SessionSettings { chunk: Some(chunk), key_value_type, ..Default::default() }).unwrap()
}

/// Logits of every token, `[tokens, vocabulary]`.
pub fn logits(model: &Model, tokens: &[u32], chunk: usize, key_value_type: KeyValueType) -> Vec<f32> {
    let mut all = Vec::new();
    session(model, chunk, key_value_type).read_with_logits(tokens, |rows| all.extend_from_slice(rows)).unwrap();
    all
}
