//! A model ready to run: decoder, tokenizer and chat template.

use std::path::Path;
use std::sync::Arc;

use iceformer_kernels::ThreadTeam;

use crate::chat::{ChatError, ChatTemplate};
use crate::decoder::Decoder;
use crate::joined_linear::DecoderError;
use crate::model_files::{ModelFiles, OpenError};
use crate::session::{Session, SessionError, SessionSettings};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// A model ready to run.
pub struct Model {
    decoder: Arc<Decoder>,
    tokenizer: Tokenizer,
    /// What is wrong with a template is told to who wants to chat.
    chat_template: Result<Option<ChatTemplate>, ChatError>,
    team: Arc<ThreadTeam>,
}

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The files cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The tokenizer is missing or malformed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The weights cannot be packed.
    #[error(transparent)]
    Decoder(#[from] DecoderError),
}

impl Model {
    /// Opens and loads the model at `path`: see [`ModelFiles::open`] and [`Model::from_files`].
    ///
    /// # Errors
    /// As both.
    pub fn load(path: &Path, team: Arc<ThreadTeam>, progress: impl FnMut(usize, usize)) -> Result<Self, LoadError> {
        Self::from_files(&ModelFiles::open(path)?, team, progress)
    }

    /// Reads tokenizer and chat template and packs the weights; `progress(done, total)` is told about each layer.
    ///
    /// # Errors
    /// When the tokenizer is missing, or a file is malformed or unreadable; of a chat template
    /// [`chat_template`](Self::chat_template) tells.
    pub fn from_files(
        files: &ModelFiles,
        team: Arc<ThreadTeam>,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        // Before the weights, which take longer.
        let (tokenizer, chat_template) = (files.tokenizer()?, files.chat_template());
        let decoder = Arc::new(Decoder::load(files, &team, progress)?);
        Ok(Self { decoder, tokenizer, chat_template, team })
    }

    /// [`from_files`](Self::from_files) with a tokenizer and chat template that were read before, so that a caller can
    /// look at a prompt before the weights are loaded.
    ///
    /// # Errors
    /// When the weights are malformed or unreadable.
    pub fn with_tokenizer(
        files: &ModelFiles,
        tokenizer: Tokenizer,
        chat_template: Option<ChatTemplate>,
        team: Arc<ThreadTeam>,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let decoder = Arc::new(Decoder::load(files, &team, progress)?);
        Ok(Self { decoder, tokenizer, chat_template: Ok(chat_template), team })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Arc<Decoder> {
        &self.decoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template, where the model has one.
    ///
    /// # Errors
    /// When it has one that cannot be used.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>, &ChatError> {
        self.chat_template.as_ref().map(Option::as_ref)
    }

    /// The threads that run it.
    pub fn team(&self) -> &Arc<ThreadTeam> {
        &self.team
    }

    /// An empty session.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn session(&self, settings: &SessionSettings) -> Result<Session, SessionError> {
        Session::new(Arc::clone(&self.decoder), Arc::clone(&self.team), settings)
    }
}
