//! A chat on the terminal: turn after turn, each reading what is new.

mod input;

use std::io::Write;
use std::time::Instant;

use anyhow::Context;
use iceformer_engine::{ChatTemplate, Finish, GenerationSettings, Message, Model, Sampler, Session, SessionError};

use super::report::per_second;
use super::run::{Plan, read, stream};
use super::text::{grouped, rate, seconds};
use super::{Outcome, interrupt};
use input::{HELP, Input, Keyboard};

/// What stands at the start of a chat.
pub enum Opening {
    Nothing,
    /// Read at once, and in front of the first message.
    Read(Given),
    /// The first message.
    Ask(Given),
}

/// A text from the command line.
pub struct Given {
    pub text: String,
    /// Of the conversation with it as its only message.
    pub tokens: Vec<u32>,
}

/// Runs the chat until the input ends or the user leaves.
pub fn run(plan: &Plan, model: &Model, opening: Opening) -> anyhow::Result<Outcome> {
    let mut chat = Chat::new(plan, model)?;
    let mut keyboard = Keyboard::new(plan.quiet)?;
    chat.guide("Ctrl-C stops an answer, Ctrl-D ends the chat, /help shows more.\n");
    match opening {
        Opening::Nothing => {}
        Opening::Read(given) => {
            if !chat.read_ahead(given)? {
                return Ok(Outcome::Interrupted);
            }
        }
        Opening::Ask(Given { text, tokens }) => {
            if !chat.answer(text, &tokens)? {
                return Ok(Outcome::Interrupted);
            }
        }
    }
    loop {
        chat.guide("\n");
        match keyboard.next()? {
            Input::Message(message) => {
                chat.turn(message)?;
            }
            Input::Nothing => {}
            Input::Clear => chat.clear(),
            Input::Help => say(HELP),
            Input::NotText => say("error: standard input: the line is not UTF-8; type it again\n"),
            Input::End => return Ok(Outcome::Done),
            Input::Interrupt => return Ok(Outcome::Interrupted),
        }
    }
}

/// The conversation so far.
struct Chat<'a> {
    plan: &'a Plan,
    model: &'a Model,
    template: &'a ChatTemplate,
    session: Session,
    sampler: Sampler,
    settings: GenerationSettings,
    messages: Vec<Message>,
    /// Text of files that the next message is to begin with.
    pending: Option<String>,
}

impl<'a> Chat<'a> {
    fn new(plan: &'a Plan, model: &'a Model) -> anyhow::Result<Self> {
        let template = model.chat_template().map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(Self {
            plan,
            model,
            template: template.context("a chat needs a chat template")?,
            session: model.session(&plan.session)?,
            sampler: Sampler::new(plan.sampler.clone())?,
            settings: GenerationSettings { chat: true, ..plan.generation.clone() },
            messages: plan.messages(),
            pending: None,
        })
    }

    /// Forgets all but the system message.
    fn clear(&mut self) {
        self.messages = self.plan.messages();
        self.pending = None;
        self.guide("[cleared]\n");
    }

    /// The tokens of the conversation with `message` as its last.
    fn tokens(&self, message: &str) -> anyhow::Result<Vec<u32>> {
        let mut messages = self.messages.clone();
        messages.push(Message::new("user", message));
        Ok(self.model.tokenizer().encode(&self.plan.render(self.template, &messages)?, false)?)
    }

    /// Reads a text that the first message is to begin with, so that its answer need not wait; `false` when Ctrl-C stopped
    /// it.
    fn read_ahead(&mut self, Given { text, tokens }: Given) -> anyhow::Result<bool> {
        let _guard = interrupt::guard(self.session.cancel());
        let start = Instant::now();
        match read(&mut self.session, &tokens, self.plan.quiet)? {
            Some(_) => {
                let count = grouped(tokens.len() as u64);
                self.guide(&format!("[{count} tokens read in {}]\n", seconds(start.elapsed().as_secs_f64())));
                self.pending = Some(text);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Answers a message; `false` when Ctrl-C stopped it before the answer began.
    fn turn(&mut self, message: String) -> anyhow::Result<bool> {
        let content = match &self.pending {
            Some(text) => format!("{text}\n\n{message}"),
            None => message,
        };
        let tokens = self.tokens(&content)?;
        self.answer(content, &tokens)
    }

    /// Answers a message with which the conversation has these `tokens`, as [`turn`](Self::turn) does.
    fn answer(&mut self, content: String, tokens: &[u32]) -> anyhow::Result<bool> {
        let _guard = interrupt::guard(self.session.cancel());
        let start = Instant::now();
        // A turn that is not read is dropped and the chat goes on.
        let kept = match read(&mut self.session, tokens, self.plan.quiet) {
            Ok(Some(kept)) => kept,
            Ok(None) => return Ok(false),
            Err(error) => {
                let told = self.told(&error);
                say(&format!("error: {told}\n"));
                return Ok(true);
            }
        };
        self.pending = None;
        let read_seconds = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let generation = stream(&mut self.session, self.model, &mut self.sampler, &self.settings, true)?;
        let decode_seconds = start.elapsed().as_secs_f64();
        self.messages.push(Message::new("user", content));
        self.messages.push(Message::new("assistant", generation.text));
        // The first token needs no pass through the layers.
        let passes = self.session.tokens().len() - tokens.len();
        self.guide(&format!(
            "[{} tokens kept, {} read in {}; {} generated, {} tokens/s{}]\n",
            kept,
            tokens.len() - kept,
            seconds(read_seconds),
            generation.tokens.len(),
            per_second(passes, decode_seconds).map_or_else(|| "–".into(), rate),
            match generation.finish {
                Finish::Length => "; ended at --max-tokens",
                Finish::Context => "; the context is full, /clear starts anew",
                Finish::Cancelled => "; cancelled",
                Finish::End | Finish::Stop => "",
            }
        ));
        Ok(true)
    }

    /// Why a message was not read, and what to do.
    fn told(&self, error: &SessionError) -> String {
        let SessionError::TooLong { tokens, context, .. } = error else { return error.to_string() };
        let is_first = self.messages.len() == self.plan.messages().len() && self.pending.is_none();
        let advice = if is_first { "shorten the message" } else { "shorten the message, or type /clear to start anew" };
        format!("the chat has {tokens} tokens with this message; the context takes {context}: {advice}")
    }

    /// Tells what helps, where it is wanted.
    fn guide(&self, text: &str) {
        if !self.plan.quiet {
            say(text);
        }
    }
}

/// Writes to standard error, where the conversation's own text does not go.
fn say(text: &str) {
    let mut error = std::io::stderr().lock();
    let _ = error.write_all(text.as_bytes()).and_then(|()| error.flush());
}
