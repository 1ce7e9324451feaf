//! A chat on the terminal: turn after turn, each reading only what is new.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::Context;
use iceformer_engine::{Finish, GenerationSettings, Message, Model, Sampler};

use super::run::{Plan, read, stream};
use super::text::{rate, seconds};
use super::{Outcome, interrupt};

/// Runs the chat until the input ends or the user leaves.
pub fn run(plan: &Plan, model: &Model) -> anyhow::Result<Outcome> {
    let template =
        model.chat_template().map_err(|error| anyhow::anyhow!("{error}"))?.context("a chat needs a chat template")?;
    let mut session = model.session(&plan.session)?;
    let mut sampler = Sampler::new(plan.sampler.clone())?;
    let settings = GenerationSettings { chat: true, ..plan.generation.clone() };
    let mut messages = plan.messages();
    let mut input = std::io::stdin().lock();
    say("Ctrl-C stops an answer, Ctrl-D ends the chat.\n");
    loop {
        say("\n> ");
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            say("\n");
            return Ok(Outcome::Done);
        }
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        messages.push(Message { role: "user".into(), content: line.into() });
        let tokens = model.tokenizer().encode(&template.render(&messages, true)?, false)?;

        let _guard = interrupt::guard(session.cancel());
        let start = Instant::now();
        let kept = match read(&mut session, &tokens, plan.quiet) {
            Ok(Some(kept)) => kept,
            Ok(None) => {
                messages.pop();
                continue;
            }
            // The turn does not fit: it is dropped and the chat goes on.
            Err(error) => {
                messages.pop();
                say(&format!("error: {error:#}\n"));
                continue;
            }
        };
        let read_seconds = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let generation = stream(&mut session, model, &mut sampler, &settings, true)?;
        let decode_seconds = start.elapsed().as_secs_f64();
        messages.push(Message { role: "assistant".into(), content: generation.text });
        if !plan.quiet {
            let per_second = generation.tokens.len() as f64 / decode_seconds.max(1e-9);
            say(&format!(
                "[{} tokens kept, {} read in {}; {} generated, {} tokens/s{}]\n",
                kept,
                tokens.len() - kept,
                seconds(read_seconds),
                generation.tokens.len(),
                rate(per_second),
                match generation.finish {
                    Finish::Length => "; ended at --max-tokens",
                    Finish::Context => "; the context is full",
                    _ => "",
                }
            ));
        }
    }
}

/// Writes to standard error, where the conversation's own text does not go.
fn say(text: &str) {
    let mut error = std::io::stderr().lock();
    let _ = error.write_all(text.as_bytes()).and_then(|()| error.flush());
}
