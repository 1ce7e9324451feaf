//! The generation loop: sample, decode to text, look for stop strings, read the token.

use std::ops::ControlFlow;

use crate::sampler::{Sampler, SamplerError};
use crate::session::{Session, SessionError};
use crate::stop::StopStrings;
use crate::tokenizer::Tokenizer;

/// When a generation ends, beside the model's own end tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GenerationSettings {
    /// Most tokens to generate; `None`: until the context is full.
    pub max_tokens: Option<usize>,
    /// Ends at the first of these strings, which is not part of the text.
    pub stop: Vec<String>,
    /// Ends at the model's end-of-turn tokens too, as a chat does.
    pub chat: bool,
    /// Goes on at end tokens.
    pub ignore_end: bool,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its text.
    End,
    /// A stop string appeared.
    Stop,
    /// The number of tokens asked for is reached.
    Length,
    /// The context is full.
    Context,
    /// The session was cancelled, or the receiver of the text asked to stop.
    Cancelled,
}

impl Finish {
    /// Name as JSON output gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::End => "end",
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Text without stop string and end token.
    pub text: String,
    /// Tokens sampled, an end token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Why a generation failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The session cannot go on.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The sampler cannot choose.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
}

/// Continues what `session` holds. `on_text` gets pieces of the text as they are final and may stop the generation.
///
/// The session has read all tokens of the generation but the last, of which nothing depends on logits any more; all of them
/// where it ends with [`Finish::Context`]. To go on from there, read the last one first: `session.read` of what
/// [`Session::tokens`] lacks.
///
/// # Errors
/// When nothing was read before, or the logits hold no number. Cancelling is no error but a [`Finish`].
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    sampler: &mut Sampler,
    settings: &GenerationSettings,
    mut on_text: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, GenerationError> {
    if session.logits().is_empty() {
        return Err(SessionError::NothingRead.into());
    }
    let end_tokens = if settings.chat { tokenizer.end_of_turn_tokens() } else { tokenizer.end_tokens() };
    let mut stream = tokenizer.text_stream_continuing();
    let mut stop = StopStrings::new(settings.stop.iter().cloned());
    let mut generation = Generation { text: String::new(), tokens: Vec::new(), finish: Finish::Length };
    let mut emit = |text: String, generation: &mut Generation| {
        generation.text += &text;
        if text.is_empty() { ControlFlow::Continue(()) } else { on_text(&text) }
    };
    while settings.max_tokens.is_none_or(|most| generation.tokens.len() < most) {
        // All that was generated is read by now, and the context takes no more.
        if session.tokens().len() == session.context() {
            generation.finish = Finish::Context;
            break;
        }
        let token = sampler.sample(session.logits(), session.tokens())?;
        generation.tokens.push(token);
        if !settings.ignore_end && end_tokens.contains(&token) {
            generation.finish = Finish::End;
            break;
        }
        let piece = stop.push(&stream.push(token));
        let flow = emit(piece.text, &mut generation);
        if piece.stopped {
            generation.finish = Finish::Stop;
            return Ok(generation);
        }
        if flow.is_break() {
            generation.finish = Finish::Cancelled;
            return Ok(generation);
        }
        if settings.max_tokens == Some(generation.tokens.len()) {
            break;
        }
        match session.read(&[token], |_, _| {}) {
            Ok(()) => {}
            Err(SessionError::Cancelled(_)) => {
                generation.finish = Finish::Cancelled;
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let last = stop.push(&stream.finish());
    let rest = last.text + &stop.finish();
    if last.stopped {
        generation.finish = Finish::Stop;
    }
    if emit(rest, &mut generation).is_break() {
        generation.finish = Finish::Cancelled;
    }
    Ok(generation)
}
