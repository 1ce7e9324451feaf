//! Why an evaluation cannot go on.

use iceformer_engine::{ChatError, GenerationError, SamplerError, SessionError, TokenizerError};

/// Why an evaluation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError {
    /// The session cannot go on.
    #[error(transparent)]
    Session(SessionError),
    /// The logits hold no number.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A text cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template does not take a question.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A file of cases cannot be read or is malformed.
    #[error("{file}: {problem}")]
    Cases {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A text does not serve.
    #[error("{name}: {problem}")]
    Text {
        /// The text.
        name: String,
        /// What is wrong, and what is needed.
        problem: String,
    },
    /// A length does not serve.
    #[error("a length of {length} tokens {problem}")]
    Length {
        /// Tokens asked for.
        length: usize,
        /// What is wrong, and what is needed.
        problem: String,
    },
    /// The work was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl From<SessionError> for EvaluationError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Cancelled(_) => Self::Cancelled,
            other => Self::Session(other),
        }
    }
}

impl From<GenerationError> for EvaluationError {
    fn from(error: GenerationError) -> Self {
        match error {
            GenerationError::Session(error) => error.into(),
            GenerationError::Sampler(error) => error.into(),
        }
    }
}
