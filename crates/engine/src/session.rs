//! One sequence of tokens: its caches, its position, and reading in chunks.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iceformer_attention::{HeadReport, KeyValueCache, KeyValueType, Method, MethodError, Report};
use iceformer_kernels::ThreadTeam;

use crate::config::ModelConfig;
use crate::decoder::{Cancelled, Decoder, DecoderState, LogitsFor, PartTimes};
use crate::first_passes::{FirstPasses, MEAN_KEYS};
use crate::observer::AttentionObserver;

/// How a session reads and keeps tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionSettings {
    /// Most tokens of the sequence; `None`: what the model is made for.
    pub context: Option<usize>,
    /// Tokens of one pass through the layers; `None`: as [`chunk`](Self::chunk) tells.
    pub chunk: Option<usize>,
    /// Element type of the key/value cache.
    pub key_value_type: KeyValueType,
    /// How attention chooses keys.
    pub method: Method,
}

impl Default for SessionSettings {
    fn default() -> Self {
        Self { context: None, chunk: None, key_value_type: KeyValueType::Int8, method: Method::Exact }
    }
}

/// Tokens of one pass: enough that weights are read from memory for many, and few buffers.
const CHUNK: usize = 512;
/// Method `budgeted` makes clusters, and chooses among them, better and for less in longer calls (docs/performance.md).
const BUDGETED_CHUNK: usize = 2048;

impl SessionSettings {
    /// Tokens of one pass through the layers: unless stated 512, and 2,048 of method `budgeted`.
    pub fn chunk(&self) -> usize {
        self.chunk.unwrap_or(match self.method {
            Method::Budgeted(_) => BUDGETED_CHUNK,
            Method::Exact | Method::Dci(_) => CHUNK,
        })
    }

    /// Tokens that a session of a model will hold at most: lets a caller check a prompt before the weights are loaded.
    ///
    /// # Errors
    /// When the context is zero or beyond the model's, the chunk is zero, or a setting of the method is out of range.
    pub fn check(&self, config: &ModelConfig) -> Result<usize, SessionError> {
        let model = config.context_length;
        let context = self.context.unwrap_or(model);
        if !(1..=model).contains(&context) {
            return Err(SessionError::Context { asked: context, model });
        }
        if self.chunk == Some(0) {
            return Err(SessionError::Chunk);
        }
        self.method.validate()?;
        Ok(context)
    }
}

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SessionError {
    /// The context asked for is outside the model's.
    #[error("a context of {asked} tokens was asked for; this model takes 1 to {model}")]
    Context {
        /// Tokens asked for.
        asked: usize,
        /// Tokens the model is made for.
        model: usize,
    },
    /// The chunk has no tokens.
    #[error("a chunk of 0 tokens was asked for; expected at least 1")]
    Chunk,
    /// A setting of the method is out of range.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// The tokens do not fit.
    #[error(
        "the prompt has {tokens} tokens and {held} are held; the context takes {context}: shorten the text or use a model with a longer context"
    )]
    TooLong {
        /// Tokens to read.
        tokens: usize,
        /// Tokens held already.
        held: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// There is nothing to read.
    #[error("the prompt has no tokens; give at least one")]
    Empty,
    /// A token is not below the vocabulary.
    #[error("token {token} is not below the model's vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// Generation was asked for where the logits after the last token are not known.
    #[error(
        "there is nothing to go on from: nothing was read yet, or the session was truncated or cancelled since; read at least one token before generating"
    )]
    NothingRead,
    /// The work was cancelled.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// A flag that stops a session from another thread; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the session to stop at the next layer.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Lets the session work again.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// One sequence: tokens read or generated so far, with their keys and values.
pub struct Session {
    decoder: Arc<Decoder>,
    team: Arc<ThreadTeam>,
    /// One for each layer.
    caches: Vec<KeyValueCache>,
    /// Tokens in the caches.
    tokens: Vec<u32>,
    first_passes: FirstPasses,
    /// Logits after the last token, `[vocabulary]`; empty when unknown.
    logits: Vec<f32>,
    state: DecoderState,
    context: usize,
    cancel: Cancel,
}

impl Session {
    /// An empty session.
    ///
    /// # Errors
    /// As [`SessionSettings::check`].
    pub fn new(decoder: Arc<Decoder>, team: Arc<ThreadTeam>, settings: &SessionSettings) -> Result<Self, SessionError> {
        let context = settings.check(decoder.config())?;
        let mut state = decoder.state(settings.chunk().min(context));
        state.set_method(settings.method);
        Ok(Self {
            caches: decoder.caches(settings.key_value_type),
            tokens: Vec::new(),
            first_passes: FirstPasses::default(),
            logits: Vec::new(),
            state,
            context,
            cancel: Cancel::default(),
            decoder,
            team,
        })
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Tokens held, in order.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Most tokens the session holds.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes of the key/value caches.
    pub fn cache_bytes(&self) -> usize {
        self.caches.iter().map(KeyValueCache::bytes).sum()
    }

    /// Those that hold tokens; see [`KeyValueCache::occupied_bytes`].
    pub fn occupied_cache_bytes(&self) -> usize {
        self.caches.iter().map(KeyValueCache::occupied_bytes).sum()
    }

    /// Bytes of what the methods keep beside the caches.
    pub fn index_bytes(&self) -> usize {
        self.caches.iter().map(KeyValueCache::index_bytes).sum()
    }

    /// Wall time spent so far, by kind of work.
    pub fn times(&self) -> PartTimes {
        self.state.times()
    }

    /// What attention did so far, over all layers and heads.
    pub fn report(&self) -> HeadReport {
        self.state.report()
    }

    /// What attention did so far, layer by layer.
    pub fn reports(&self) -> &[Report] {
        self.state.reports()
    }

    /// How attention chooses keys for tokens read or generated from here on: a long text can be read one way, the
    /// question behind it another.
    ///
    /// # Errors
    /// When the method's settings are out of range.
    pub fn set_method(&mut self, method: Method) -> Result<(), SessionError> {
        method.validate()?;
        self.state.set_method(method);
        Ok(())
    }

    /// Shows `observer` what attention is given for tokens read or generated from here on, until it is replaced; `None`:
    /// nobody looks. When it breaks, the read ends as cancelled.
    pub fn set_observer(&mut self, observer: Option<Box<dyn AttentionObserver>>) {
        self.state.set_observer(observer);
    }

    /// The flag that stops this session.
    pub fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Lets `cancel` stop this session from here on: one flag for several sessions.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    /// Logits after the last token, `[vocabulary]`; empty before the first read and after [`truncate`](Self::truncate).
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Drops all tokens from `length` on; nothing happens when fewer are held.
    pub fn truncate(&mut self, length: usize) {
        if length < self.tokens.len() {
            self.tokens.truncate(length);
            self.first_passes.truncate(length);
            self.logits.clear();
        }
        self.caches.iter_mut().for_each(|cache| cache.truncate(self.tokens.len()));
    }

    /// Makes the session hold `tokens`: keeps the longest common start and reads the rest, of which at least one token
    /// is read. Gives the number of tokens kept.
    ///
    /// With an int8 cache nothing is kept where the start is so short (up to 64 tokens) that a new session would have
    /// rounded its keys otherwise, unless the tokens go on from all of a longer sequence, as a chat does.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_from_start(
        &mut self,
        tokens: &[u32],
        progress: impl FnMut(usize, usize),
    ) -> Result<usize, SessionError> {
        self.check(tokens, 0)?;
        let common = self.tokens.iter().zip(tokens).take_while(|(held, token)| held == token).count();
        let mut kept = common.min(tokens.len() - 1);
        let goes_on = common == self.tokens.len() && common >= MEAN_KEYS;
        let rounds_together = self.caches.iter().any(|cache| cache.kind() == KeyValueType::Int8);
        if rounds_together && !goes_on && !self.first_passes.are_as_anew(kept, common, tokens.len(), self.state.chunk())
        {
            kept = 0;
        }
        let earlier = self.first_passes.clone();
        self.truncate(kept);
        self.read(&tokens[kept..], progress)?;
        self.first_passes.restore(&earlier, kept);
        Ok(kept)
    }

    /// Reads `tokens` behind those held, in chunks; `progress(done, total)` is told at each layer, where the layers that
    /// are done count as their share of the chunk's tokens.
    ///
    /// # Errors
    /// When they do not fit the context or are none (before any work), or the session is cancelled: whole chunks that
    /// were read then stay.
    pub fn read(&mut self, tokens: &[u32], mut progress: impl FnMut(usize, usize)) -> Result<(), SessionError> {
        self.check(tokens, self.tokens.len())?;
        self.reserve(tokens.len());
        let total = tokens.len();
        let layers = self.decoder.config().layers;
        let mut done = 0;
        for chunk in tokens.chunks(self.state.chunk()) {
            let wanted = if done + chunk.len() == total { LogitsFor::Last } else { LogitsFor::None };
            self.pass(chunk, wanted, |layer| progress(done + chunk.len() * layer / layers, total))?;
            done += chunk.len();
        }
        progress(total, total);
        Ok(())
    }

    /// Reads `tokens` behind those held and hands the logits after each of them, `[tokens of a chunk, vocabulary]`, to
    /// `logits`, chunk by chunk: for perplexity and comparisons.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_with_logits(&mut self, tokens: &[u32], mut logits: impl FnMut(&[f32])) -> Result<(), SessionError> {
        self.check(tokens, self.tokens.len())?;
        self.reserve(tokens.len());
        // Logits are as wide as the vocabulary.
        for chunk in tokens.chunks(self.state.chunk().min(CHUNK)) {
            let rows = self.pass(chunk, LogitsFor::All, |_| {})?;
            logits(rows);
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32], held: usize) -> Result<(), SessionError> {
        if tokens.is_empty() {
            return Err(SessionError::Empty);
        }
        if held + tokens.len() > self.context {
            return Err(SessionError::TooLong { tokens: tokens.len(), held, context: self.context });
        }
        let vocabulary = self.decoder.config().vocabulary;
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            Some(&token) => Err(SessionError::Token { token, vocabulary }),
            None => Ok(()),
        }
    }

    /// Makes room for `tokens` more in the caches.
    fn reserve(&mut self, tokens: usize) {
        self.caches.iter_mut().for_each(|cache| cache.reserve(tokens));
    }

    /// Runs one chunk; afterwards the caches hold it, or on an error what they held before.
    fn pass(
        &mut self,
        chunk: &[u32],
        wanted: LogitsFor,
        mut layers_done: impl FnMut(usize),
    ) -> Result<&[f32], SessionError> {
        let cancel = &self.cancel;
        let watch = |layer| {
            layers_done(layer);
            if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        match self.decoder.forward(chunk, wanted, &mut self.caches, &mut self.state, &self.team, watch) {
            Ok(logits) => {
                self.tokens.extend_from_slice(chunk);
                self.first_passes.read_to(self.tokens.len());
                self.logits.clear();
                let vocabulary = self.decoder.config().vocabulary;
                self.logits.extend_from_slice(&logits[logits.len().saturating_sub(vocabulary)..]);
                Ok(logits)
            }
            Err(cancelled) => {
                self.caches.iter_mut().for_each(|cache| cache.truncate(self.tokens.len()));
                Err(cancelled.into())
            }
        }
    }
}
