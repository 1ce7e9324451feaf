//! The reference model against transformers (f32), and against itself on other chunks and threads.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use iceformer_attention::{KeyValueType, ThreadTeam};
use iceformer_engine::{
    Finish, Generation, GenerationSettings, Model, Sampler, SamplerSettings, Session, SessionError, SessionSettings,
    generate,
};
use serde_json::Value;

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn model(threads: usize) -> Model {
    Model::load(&repository().join("models/reference"), Arc::new(ThreadTeam::new(threads)), |_, _| {}).unwrap()
}

fn settings(chunk: usize, key_value_type: KeyValueType) -> SessionSettings {
    SessionSettings { chunk: Some(chunk), key_value_type, ..Default::default() }
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
}

fn golden() -> Vec<Value> {
    let text = std::fs::read_to_string(repository().join("testing/golden/reference/greedy.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Continues what `session` holds by up to `most` tokens.
fn go_on(session: &mut Session, model: &Model, sampler: SamplerSettings, most: usize) -> Generation {
    let mut sampler = Sampler::new(sampler).unwrap();
    let settings = GenerationSettings { max_tokens: Some(most), ..Default::default() };
    generate(session, model.tokenizer(), &mut sampler, &settings, |_| ControlFlow::Continue(())).unwrap()
}

/// Asserts that logits differ by no more than the rounding of bfloat16 products.
fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= 0.01 * largest, "{what}: {a} is not {b}");
    }
}

#[test]
fn greedy_text_equals_transformers() {
    let model = model(2);
    for (index, case) in golden().iter().enumerate() {
        let prompt = model.tokenizer().encode(case["prompt"].as_str().unwrap(), false).unwrap();
        assert_eq!(prompt, tokens(&case["prompt_tokens"]), "token ids of case {index}");
        for kind in [KeyValueType::F32, KeyValueType::Bf16, KeyValueType::Int8] {
            let mut session = model.session(&settings(512, kind)).unwrap();
            session.read(&prompt, |_, _| {}).unwrap();
            let found = go_on(&mut session, &model, SamplerSettings::default(), 200).tokens;
            let expected = tokens(&case["tokens"]);
            let same = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            assert_eq!(same, 200, "case {index} with {kind:?} leaves transformers' text after {same} tokens");
        }
    }
}

#[test]
fn a_number_planted_in_a_novel_is_found() {
    let novel = std::fs::read_to_string(repository().join("examples/texts/milly_and_olly.txt")).unwrap();
    let sentence = |byte: usize| byte + novel[byte..].find(". ").unwrap() + 1;
    let (place, end) = (sentence(1500), sentence(3000));
    let (key, number) = ("winter-kettle", "9312021");
    let text = format!(
        "{} One of the special magic numbers for {key} is: {number}.{}\nWhat is the special magic number for {key} \
         mentioned in the provided text? The special magic number for {key} mentioned in the provided text is: ",
        &novel[..place],
        &novel[place..end]
    );
    let model = model(2);
    let prompt = model.tokenizer().encode(&text, true).unwrap();
    for kind in [KeyValueType::F32, KeyValueType::Bf16, KeyValueType::Int8] {
        let mut session = model.session(&settings(512, kind)).unwrap();
        session.read(&prompt, |_, _| {}).unwrap();
        let answer = go_on(&mut session, &model, SamplerSettings::default(), 8).text;
        assert!(answer.starts_with(number), "{kind:?}: {answer}");
    }
}

#[test]
fn chunks_agree() {
    let model = model(2);
    let prompt = tokens(&golden()[0]["prompt_tokens"]);
    let logits = |chunk| {
        let mut session = model.session(&settings(chunk, KeyValueType::F32)).unwrap();
        session.read(&prompt, |_, _| {}).unwrap();
        let last = session.logits().to_vec();
        let mut session = model.session(&settings(chunk, KeyValueType::F32)).unwrap();
        let mut all = Vec::new();
        session.read_with_logits(&prompt, |rows| all.extend_from_slice(rows)).unwrap();
        assert_eq!(all.len(), prompt.len() * last.len());
        assert_close(&last, &all[all.len() - last.len()..], "last of all");
        last
    };
    let whole = logits(512);
    for chunk in [1, 7, 64, 100] {
        assert_close(&logits(chunk), &whole, &format!("chunks of {chunk}"));
    }
}

#[test]
fn threads_change_nothing() {
    let prompt = tokens(&golden()[1]["prompt_tokens"]);
    let run = |threads| {
        let model = model(threads);
        let mut session = model.session(&settings(128, KeyValueType::Int8)).unwrap();
        session.read(&prompt, |_, _| {}).unwrap();
        let first: Vec<u32> = session.logits().iter().map(|logit| logit.to_bits()).collect();
        let sampled = SamplerSettings { temperature: 1.0, seed: 11, ..Default::default() };
        (first, go_on(&mut session, &model, sampled, 40))
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(4));
}

#[test]
fn truncation_and_common_starts() {
    let model = model(1);
    let prompt = tokens(&golden()[2]["prompt_tokens"]);
    let mut session = model.session(&settings(512, KeyValueType::F32)).unwrap();
    session.read(&prompt, |_, _| {}).unwrap();
    let mut other = prompt[..200].to_vec();
    other.extend([5, 6, 7]);
    assert_eq!(session.read_from_start(&other, |_, _| {}).unwrap(), 200);
    assert_eq!(session.tokens(), other);
    assert_eq!(session.read_from_start(&other, |_, _| {}).unwrap(), 202, "one token is read again for its logits");
    let mut fresh = model.session(&settings(512, KeyValueType::F32)).unwrap();
    fresh.read(&other, |_, _| {}).unwrap();
    assert_close(session.logits(), fresh.logits(), "after a common start");
    session.truncate(10);
    assert!(session.logits().is_empty());
    assert_eq!(session.tokens().len(), 10);
}

#[test]
fn limits_are_errors_before_any_work() {
    let model = model(1);
    let short = SessionSettings { context: Some(50), ..Default::default() };
    let mut session = model.session(&short).unwrap();
    let too_long = SessionError::TooLong { tokens: 51, held: 0, context: 50 };
    assert_eq!(session.read(&[1; 51], |_, _| {}), Err(too_long));
    assert_eq!(session.read(&[], |_, _| {}), Err(SessionError::Empty));
    assert_eq!(session.read(&[4096], |_, _| {}), Err(SessionError::Token { token: 4096, vocabulary: 4096 }));
    assert!(session.tokens().is_empty());
    let mut sampler = Sampler::new(SamplerSettings::default()).unwrap();
    let until_full = GenerationSettings { ignore_end: true, ..Default::default() };
    let mut go = |session: &mut _| {
        generate(session, model.tokenizer(), &mut sampler, &until_full, |_| ControlFlow::Continue(()))
    };
    assert!(go(&mut session).is_err(), "nothing was read");
    for (read, generated) in [(50, 0), (48, 2)] {
        let mut session = model.session(&short).unwrap();
        session.read(&vec![1; read], |_, _| {}).unwrap();
        let generation = go(&mut session).unwrap();
        assert_eq!((generation.finish, generation.tokens.len()), (Finish::Context, generated));
    }
    let too_long = SessionSettings { context: Some(65_537), ..Default::default() };
    assert_eq!(model.session(&too_long).err(), Some(SessionError::Context { asked: 65_537, model: 65_536 }));
}

#[test]
fn a_cancelled_session_keeps_whole_chunks_and_goes_on() {
    let model = model(1);
    let prompt = tokens(&golden()[0]["prompt_tokens"]);
    let mut session = model.session(&settings(64, KeyValueType::F32)).unwrap();
    let cancel = session.cancel();
    let outcome = session.read(&prompt, |done, _| {
        if done >= 128 {
            cancel.cancel();
        }
    });
    assert!(matches!(outcome, Err(SessionError::Cancelled(_))));
    assert_eq!(session.tokens(), &prompt[..128]);
    cancel.reset();
    session.read(&prompt[128..], |_, _| {}).unwrap();
    let mut fresh = model.session(&settings(64, KeyValueType::F32)).unwrap();
    fresh.read(&prompt, |_, _| {}).unwrap();
    assert_eq!(session.logits(), fresh.logits());
}

#[test]
fn room_for_a_prompt_is_made_at_once_and_given_back() {
    let model = model(1);
    let prompt: Vec<u32> = tokens(&golden()[0]["prompt_tokens"]).into_iter().cycle().take(1_300).collect();
    let mut session = model.session(&settings(64, KeyValueType::Bf16)).unwrap();
    session.read(&prompt[..64], |_, _| {}).unwrap();
    let least = session.cache_bytes();
    assert_eq!(session.occupied_cache_bytes(), least / 8, "64 of 512 tokens");
    let cancel = session.cancel();
    let mut most = 0;
    let outcome = session.read(&prompt[64..], |done, _| {
        most = most.max(done);
        cancel.cancel();
    });
    assert!(matches!(outcome, Err(SessionError::Cancelled(_))) && most < 64, "cancelled in its first chunk");
    assert_eq!((session.tokens().len(), session.cache_bytes()), (64, least));
    cancel.reset();
    session.read(&prompt[64..], |_, _| {}).unwrap();
    assert_eq!(session.cache_bytes(), 3 * least, "1,300 of 1,536 tokens");
}

#[test]
fn a_generation_goes_on_once_its_last_token_is_read() {
    let model = model(1);
    let prompt = model.tokenizer().encode("It was a bright cold day", false).unwrap();
    let session = || {
        let mut session = model.session(&SessionSettings::default()).unwrap();
        session.read(&prompt, |_, _| {}).unwrap();
        session
    };
    let at_once = go_on(&mut session(), &model, SamplerSettings::default(), 12).tokens;
    let mut session = session();
    let mut parts = go_on(&mut session, &model, SamplerSettings::default(), 5).tokens;
    assert_eq!(session.tokens(), [&prompt[..], &parts[..4]].concat());
    session.read(&parts[4..], |_, _| {}).unwrap();
    parts.extend(go_on(&mut session, &model, SamplerSettings::default(), 7).tokens);
    assert_eq!(parts, at_once);

    // Without logits it cannot, and says why.
    session.truncate(3);
    let (mut sampler, settings) = (Sampler::new(SamplerSettings::default()).unwrap(), GenerationSettings::default());
    let error = generate(&mut session, model.tokenizer(), &mut sampler, &settings, |_| ControlFlow::Continue(()));
    assert!(error.unwrap_err().to_string().contains("truncated or cancelled since"));
}

#[test]
fn stop_strings_and_receivers_end_a_generation() {
    let model = model(1);
    let prompt = tokens(&golden()[0]["prompt_tokens"]);
    let mut session = model.session(&settings(512, KeyValueType::F32)).unwrap();
    let mut run = |stop: Vec<String>, most_pieces: usize| {
        session.read_from_start(&prompt, |_, _| {}).unwrap();
        let mut sampler = Sampler::new(SamplerSettings::default()).unwrap();
        let settings = GenerationSettings { max_tokens: Some(60), stop, ..Default::default() };
        let (mut seen, mut pieces) = (String::new(), 0);
        let generation = generate(&mut session, model.tokenizer(), &mut sampler, &settings, |piece| {
            seen += piece;
            pieces += 1;
            if pieces == most_pieces { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert_eq!(seen, generation.text);
        generation
    };
    let whole = run(vec![], usize::MAX);
    assert_eq!(whole.finish, Finish::Length);
    let middle: String = whole.text.chars().skip(20).take(9).collect();
    let stopped = run(vec![middle.clone()], usize::MAX);
    assert_eq!(stopped.finish, Finish::Stop);
    assert_eq!(stopped.text, whole.text[..whole.text.find(&middle).unwrap()]);
    assert_eq!(run(vec![], 3).finish, Finish::Cancelled);
}

/// The keys of an int8 cache are centred on a mean of the first 64, so those of a short shared start are rounded as the
/// text that was read first wants it.
#[test]
fn what_was_read_before_does_not_change_an_answer() {
    let novel = std::fs::read_to_string(repository().join("examples/texts/milly_and_olly.txt")).unwrap();
    let model = model(2);
    let text = model.tokenizer().encode(&novel[..4000], false).unwrap();
    let (prompt, other) = (&text[..150], &text[400..700]);
    let answer = |session: &mut Session, prompt: &[u32]| {
        let kept = session.read_from_start(prompt, |_, _| {}).unwrap();
        let logits = session.logits().to_vec();
        (kept, logits, go_on(session, &model, SamplerSettings::default(), 10).tokens)
    };
    for (kind, chunk, starts) in [
        (KeyValueType::F32, 512, &[50][..]),
        (KeyValueType::Bf16, 512, &[50]),
        (KeyValueType::Int8, 512, &[50, 63, 64, 150]),
        (KeyValueType::Int8, 7, &[50, 63]),
    ] {
        let new = || model.session(&settings(chunk, kind)).unwrap();
        let (_, new_logits, new_tokens) = answer(&mut new(), prompt);
        for &shared in starts {
            let mut session = new();
            session.read_from_start(&[&prompt[..shared], other].concat(), |_, _| {}).unwrap();
            let (kept, logits, tokens) = answer(&mut session, prompt);
            let case = format!("{kind:?}, chunks of {chunk}, {shared} tokens shared");
            assert_eq!(tokens, new_tokens, "{case}");
            // Whole chunks of what is shared would be read alike.
            let alike = kind != KeyValueType::Int8 || shared >= 64 || shared % chunk == 0;
            assert_eq!(kept, if alike { shared.min(149) } else { 0 }, "{case}");
            if kept == 0 {
                assert_eq!(logits, new_logits, "{case}");
            }
            // The same prompt again is held but for its last token, time after time.
            for _ in 0..2 {
                assert_eq!(session.read_from_start(prompt, |_, _| {}).unwrap(), 149, "{case}");
            }
        }
    }
    // A start that was a whole prompt before, and a chat that goes on.
    let new = || model.session(&settings(512, KeyValueType::Int8)).unwrap();
    let mut session = new();
    answer(&mut session, &prompt[..40]);
    session.truncate(40);
    assert_eq!(answer(&mut session, prompt), answer(&mut new(), prompt));
    let mut chat = new();
    chat.read(&prompt[..40], |_, _| {}).unwrap();
    go_on(&mut chat, &model, SamplerSettings { temperature: 1.0, ..Default::default() }, 60);
    let held = chat.tokens().to_vec();
    assert_eq!(chat.read_from_start(&[&held[..], other].concat(), |_, _| {}).unwrap(), held.len());
}
