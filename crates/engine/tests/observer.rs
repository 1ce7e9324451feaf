//! What an observer of attention is shown.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

use iceformer_attention::{Attention, AttentionScratch, CacheShape, KeyValueCache, Mask, Method, Queries};
use iceformer_attention::{KeyValueType, ThreadTeam};
use iceformer_engine::{AttentionInputs, AttentionObserver, Model, Session, SessionError, SessionSettings};

/// Queries, keys and values of each layer, joined over passes.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<[Vec<f32>; 3]>>>);

struct Recorder {
    seen: Seen,
    /// Calls until it breaks.
    calls: usize,
}

impl AttentionObserver for Recorder {
    fn observe(&mut self, inputs: AttentionInputs<'_>) -> ControlFlow<()> {
        if self.calls == 0 {
            return ControlFlow::Break(());
        }
        self.calls -= 1;
        let mut seen = self.seen.0.lock().unwrap();
        if seen.len() <= inputs.layer {
            seen.resize_with(inputs.layer + 1, Default::default);
        }
        let [queries, keys, values] = &mut seen[inputs.layer];
        // Key/value heads of the reference model: 2 of 64.
        assert_eq!(keys.len(), inputs.first_position * 2 * 64);
        queries.extend_from_slice(inputs.queries);
        keys.extend_from_slice(inputs.keys);
        values.extend_from_slice(inputs.values);
        ControlFlow::Continue(())
    }
}

fn model() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/reference");
    Model::load(&path, Arc::new(ThreadTeam::new(2)), |_, _| {}).unwrap()
}

fn session(model: &Model, chunk: usize) -> Session {
    let settings = SessionSettings { chunk: Some(chunk), key_value_type: KeyValueType::F32, ..Default::default() };
    model.session(&settings).unwrap()
}

/// What is shown while `tokens` are read.
fn observed(model: &Model, tokens: &[u32], chunk: usize) -> (Vec<[Vec<f32>; 3]>, Vec<f32>) {
    let seen = Seen::default();
    let mut session = session(model, chunk);
    session.set_observer(Some(Box::new(Recorder { seen: seen.clone(), calls: usize::MAX })));
    session.read(tokens, |_, _| {}).unwrap();
    let seen = std::mem::take(&mut *seen.0.lock().unwrap());
    (seen, session.logits().to_vec())
}

#[test]
fn all_tokens_of_all_layers_are_shown_and_nothing_changes() {
    let model = model();
    let tokens: Vec<u32> = (0..50).map(|index| 10 + index * 7 % 300).collect();
    let (whole, logits) = observed(&model, &tokens, 64);
    assert_eq!(whole.len(), model.decoder().config().layers);
    for [queries, keys, values] in &whole {
        assert_eq!([queries.len(), keys.len(), values.len()], [50 * 6 * 64, 50 * 2 * 64, 50 * 2 * 64]);
    }
    let mut plain = session(&model, 64);
    plain.read(&tokens, |_, _| {}).unwrap();
    assert_eq!(plain.logits(), logits);

    let (chunked, _) = observed(&model, &tokens, 16);
    for (whole, chunked) in whole.iter().flatten().zip(chunked.iter().flatten()) {
        assert_eq!(whole.len(), chunked.len());
        let largest = whole.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        assert!(whole.iter().zip(chunked).all(|(a, b)| (a - b).abs() <= 0.02 * largest));
    }

    // The first layer's inputs do not depend on attention; its output does not depend on later tokens.
    let mut cache = KeyValueCache::new(CacheShape { kv_heads: 2, key_dim: 64, value_dim: 64 }, KeyValueType::F32);
    let [queries, keys, values] = &whole[0];
    cache.append(keys, values, model.team());
    let attention = Attention { method: Method::Exact, mask: Mask::causal(), scale: 0.125 };
    let queries = Queries { data: queries, query_heads: 6, first_position: 0 };
    let mut output = vec![0.0; 50 * 6 * 64];
    attention.run(queries, &cache, &mut output, None, model.team(), &mut AttentionScratch::default());
    assert_eq!(output[..64], values[..64], "the first token attends to itself alone");
}

#[test]
fn a_break_ends_the_read_as_cancelled() {
    let model = model();
    // The first chunk, and two layers of the second.
    let calls = model.decoder().config().layers + 2;
    let mut session = session(&model, 8);
    let seen = Seen::default();
    session.set_observer(Some(Box::new(Recorder { seen: seen.clone(), calls })));
    let tokens: Vec<u32> = (10..40).collect();
    assert!(matches!(session.read(&tokens, |_, _| {}), Err(SessionError::Cancelled(_))));
    assert_eq!(session.tokens(), &tokens[..8], "whole chunks stay");
    session.set_observer(None);
    session.read(&tokens[8..], |_, _| {}).unwrap();
    assert_eq!(session.tokens(), tokens);
}
