//! A chat on the terminal: turn after turn, each reading only what is new.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::Context;
use iceformer_engine::{Finish, GenerationSettings, Message, Model, Sampler};

use super::report::per_second;
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
    let guide = |text: &str| {
        if !plan.quiet {
            say(text);
        }
    };
    guide("Ctrl-C stops an answer, Ctrl-D ends the chat.\n");
    loop {
        guide("\n> ");
        let line = match next_line(&mut input).context("standard input")? {
            Line::End => {
                guide("\n");
                return Ok(Outcome::Done);
            }
            Line::NotText => {
                say("error: standard input: the line is not UTF-8; type it again\n");
                continue;
            }
            Line::Text(line) if line.is_empty() => continue,
            Line::Text(line) => line,
        };
        messages.push(Message { role: "user".into(), content: line });
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
        // The first token needs no pass through the layers.
        let passes = session.tokens().len() - tokens.len();
        guide(&format!(
            "[{} tokens kept, {} read in {}; {} generated, {} tokens/s{}]\n",
            kept,
            tokens.len() - kept,
            seconds(read_seconds),
            generation.tokens.len(),
            per_second(passes, decode_seconds).map_or_else(|| "–".into(), rate),
            match generation.finish {
                Finish::Length => "; ended at --max-tokens",
                Finish::Context => "; the context is full",
                _ => "",
            }
        ));
    }
}

/// What a user typed.
#[derive(Debug, PartialEq)]
enum Line {
    Text(String),
    /// A terminal can send half a character, as when one is deleted byte by byte.
    NotText,
    End,
}

fn next_line(input: &mut impl BufRead) -> std::io::Result<Line> {
    let mut line = Vec::new();
    if input.read_until(b'\n', &mut line)? == 0 {
        return Ok(Line::End);
    }
    Ok(std::str::from_utf8(&line).map_or(Line::NotText, |line| Line::Text(line.trim().to_owned())))
}

/// Writes to standard error, where the conversation's own text does not go.
fn say(text: &str) {
    let mut error = std::io::stderr().lock();
    let _ = error.write_all(text.as_bytes()).and_then(|()| error.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_character_is_no_end_of_the_chat() {
        let mut input = &b" caf\xc3\xa9 \n\xc3\n\nlast"[..];
        let lines = std::array::from_fn(|_| next_line(&mut input).unwrap());
        let text = |text: &str| Line::Text(text.to_owned());
        assert_eq!(lines, [text("caf\u{e9}"), Line::NotText, text(""), text("last"), Line::End]);
    }
}
