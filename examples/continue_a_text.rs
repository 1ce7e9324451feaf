//! Loads a model, reads a text and continues it, token by token.
//!
//! `cargo run --release --example continue_a_text -- MODEL "Once upon a time"`

use std::error::Error;
use std::io::{Write, stdout};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use iceformer::attention::ThreadTeam;
use iceformer::engine::{GenerationSettings, Model, Sampler, SamplerSettings, SessionSettings, generate};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "models/reference".into());
    let text = arguments.next().unwrap_or_else(|| "Once upon a time".into());

    let team = Arc::new(ThreadTeam::new(ThreadTeam::available()));
    let model = Model::load(Path::new(&path), team, |_, _| {})?;
    let mut session = model.session(&SessionSettings::default())?;
    let tokens = model.tokenizer().encode(&text, true)?;
    session.read(&tokens, |done, total| eprintln!("read {done} of {total} tokens"))?;

    let mut sampler = Sampler::new(SamplerSettings { temperature: 0.8, seed: 1, ..Default::default() })?;
    let settings = GenerationSettings { max_tokens: Some(60), ..Default::default() };
    let show = |piece: &str| stdout().write_all(piece.as_bytes()).and_then(|()| stdout().flush());
    show(&text)?;
    let generation = generate(&mut session, model.tokenizer(), &mut sampler, &settings, |piece| {
        // A reader that went away ends the generation, and is no error.
        match show(piece) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    eprintln!("\n[{} tokens, {}]", generation.tokens.len(), generation.finish.name());
    Ok(())
}
