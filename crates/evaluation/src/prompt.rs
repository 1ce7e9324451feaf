//! What a model is given to read, and how it becomes tokens.

use iceformer_engine::{ChatTemplate, Message, Tokenizer};

use crate::EvaluationError;

/// A text and what is asked about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// The long part.
    pub text: String,
    /// Questions about it, each asked by itself behind the text.
    pub questions: Vec<Question>,
}

/// A question about a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The question as it follows the text.
    pub question: String,
    /// How the answer begins; the model continues it.
    pub answer_start: String,
    /// Words or numbers that the answer should hold.
    pub expected: Vec<String>,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// Where the answer of a model without chat template ends.
    pub stop: Vec<String>,
}

/// Token ids of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptTokens {
    /// The text, up to where all questions part.
    pub text: Vec<u32>,
    /// What follows it for each question.
    pub questions: Vec<Vec<u32>>,
}

impl PromptTokens {
    /// Tokens of the text with the longest question.
    pub fn longest(&self) -> usize {
        self.text.len() + self.questions.iter().map(Vec::len).max().unwrap_or(0)
    }
}

/// Turns prompts into tokens as the model wants them: through its chat template where it has one, else as they are.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The chat template to use; `None`: the text is continued as it is.
    pub template: Option<&'a ChatTemplate>,
}

impl Encoder<'_> {
    /// Whether prompts go through a chat template.
    pub fn is_chat(&self) -> bool {
        self.template.is_some()
    }

    /// Tokens of a prompt. The text with a question behind it is encoded as a whole and then split, so that the model
    /// reads the same tokens as without a split.
    ///
    /// # Errors
    /// When the chat template or the tokenizer fails on it.
    pub fn encode(&self, prompt: &Prompt) -> Result<PromptTokens, EvaluationError> {
        let mut wholes = Vec::with_capacity(prompt.questions.len());
        let mut split = usize::MAX;
        for question in &prompt.questions {
            let (whole, text_bytes) = self.written(&prompt.text, question)?;
            let tokens = self.tokenizer.encode(&whole, !self.is_chat())?;
            let text = self.tokenizer.encode(&whole[..text_bytes], !self.is_chat())?;
            let common = text.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
            // Something is left to read, whatever the tokenizer made of it.
            split = split.min(common).min(tokens.len().saturating_sub(1));
            wholes.push(tokens);
        }
        let text = wholes.first().map_or_else(Vec::new, |tokens| tokens[..split].to_vec());
        Ok(PromptTokens { text, questions: wholes.into_iter().map(|tokens| tokens[split..].to_vec()).collect() })
    }

    /// Text, question and start of the answer as the model reads them, and the bytes in front of the question.
    fn written(&self, text: &str, question: &Question) -> Result<(String, usize), EvaluationError> {
        let Question { question, answer_start, .. } = question;
        let Some(template) = self.template else {
            return Ok((format!("{text}{question}{answer_start}"), text.len()));
        };
        let asked = question.trim();
        let rendered = template.render(&[Message::new("user", format!("{text}\n{asked}"))], true)?;
        // A template that rewrites the question leaves nothing to split at: then all of it counts as the question.
        let text_bytes = rendered.rfind(asked).unwrap_or(0);
        Ok((format!("{rendered}{}", answer_start.trim()), text_bytes))
    }
}
