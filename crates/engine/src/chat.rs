//! Chat templates.

use serde::Serialize;

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A model's chat template (Jinja), which turns messages into the text that the model was trained on.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
}

/// What is wrong with a chat template.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A file cannot be read or is malformed.
    #[error("{file}: {problem}")]
    Read {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// The template refused the messages, or failed.
    #[error("chat template: {0}")]
    Render(String),
}

impl ChatTemplate {
    pub(crate) fn from_hugging_face(
        template: Option<&[u8]>,
        config: Option<&[u8]>,
        file: &str,
    ) -> Result<Option<Self>, ChatError> {
        let _ = (template, config, file);
        Ok(None)
    }

    pub(crate) fn from_gguf(metadata: &crate::gguf::Metadata, file: &str) -> Result<Option<Self>, ChatError> {
        let _ = (metadata, file);
        Ok(None)
    }

    /// The text of a chat; with `add_generation_prompt` it ends where the assistant's answer begins. Encode it without
    /// adding special tokens: the template writes them.
    ///
    /// # Errors
    /// When the template refuses the messages (its own words are in the error), fails, or runs too long.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let _ = (messages, add_generation_prompt);
        Err(ChatError::Render("not there yet".into()))
    }

    /// The template's own text.
    pub fn source(&self) -> &str {
        &self.source
    }
}
