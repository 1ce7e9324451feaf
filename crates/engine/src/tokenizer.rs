//! Text to token ids and back.

mod added_tokens;
mod bytes;
mod gguf;
mod hugging_face;
mod pre_tokenizers;
mod sentence_piece;
mod stream;

use std::collections::BTreeSet;

pub(crate) use added_tokens::TokenFiles;
pub use stream::TextStream;

use crate::panics::caught;
use crate::text::quoted;
use bytes::TokenText;
use sentence_piece::SentencePiece;

/// Turns text into token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    kind: String,
    encoder: Encoder,
    token_text: TokenText,
    vocabulary: usize,
    /// Rows of the model's token embedding.
    model_vocabulary: usize,
    special: BTreeSet<u32>,
    bos: Option<u32>,
    /// Tokens put around a text, where the library's own rules do not.
    added_before: Option<u32>,
    added_after: Option<u32>,
    end_tokens: Vec<u32>,
    end_of_turn_tokens: Vec<u32>,
}

#[derive(Debug)]
enum Encoder {
    HuggingFace(Box<tokenizers::Tokenizer>),
    SentencePiece(SentencePiece),
}

/// Tokens that end a turn of a chat in models that the engine runs.
const END_OF_TURN: [&str; 5] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>"];

impl Tokenizer {
    /// Token ids of `text`. Special tokens written out in the text become their ids, as in Hugging Face's tokenizers.
    /// With `add_special` the tokens that the model wants around a text (usually one at its start) are added.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on the text, such as an unknown character without a fallback, or when the text
    /// holds a token that was added to the tokenizer but not to the model.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::new();
        tokens.extend(self.added_before.filter(|_| add_special));
        match &self.encoder {
            Encoder::HuggingFace(tokenizer) => {
                // Some steps that a file may ask for panic: a map of characters that points outside of itself does.
                let encoding = caught(|| tokenizer.encode_fast(text, add_special))
                    .map_err(|words| TokenizerError::Encode(format!("the tokenizers library panicked: {words}")))?
                    .map_err(|error| TokenizerError::Encode(error.to_string()))?;
                tokens.extend_from_slice(encoding.get_ids());
            }
            Encoder::SentencePiece(model) => tokens.extend(model.encode(text)),
        }
        tokens.extend(self.added_after.filter(|_| add_special));
        match tokens.iter().find(|&&token| token as usize >= self.model_vocabulary) {
            None => Ok(tokens),
            Some(&id) => {
                let piece = self.token_piece(id).unwrap_or_default();
                Err(TokenizerError::NotInModel { piece, id, vocabulary: self.model_vocabulary })
            }
        }
    }

    /// Text of `tokens`, without special tokens. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary
    /// give nothing.
    pub fn decode(&self, tokens: &[u32]) -> String {
        if self.token_text == TokenText::Plain {
            return self.decode_joined(tokens);
        }
        let mut stream = self.text_stream();
        let mut text: String = tokens.iter().map(|&token| stream.push(token)).collect();
        text += &stream.finish();
        text
    }

    /// Text of `tokens` by the library's own decoder.
    fn decode_joined(&self, tokens: &[u32]) -> String {
        match &self.encoder {
            // Its errors are those of a decoder that expects other tokens. Some fail by a panic: stripping the end of an
            // empty token does.
            Encoder::HuggingFace(tokenizer) => {
                let decoded = caught(|| tokenizer.decode(tokens, true));
                decoded.ok().and_then(Result::ok).unwrap_or_default()
            }
            Encoder::SentencePiece(_) => String::new(),
        }
    }

    /// Decodes token by token, from the start of a text.
    pub fn text_stream(&self) -> TextStream<'_> {
        TextStream::new(self, false)
    }

    /// Decodes token by token what continues a text: a space at the start is kept where [`decode`](Self::decode) would
    /// strip it.
    pub fn text_stream_continuing(&self) -> TextStream<'_> {
        TextStream::new(self, true)
    }

    /// A token as the vocabulary writes it, such as `Ġthe` or `▁the`.
    pub fn token_piece(&self, token: u32) -> Option<String> {
        match &self.encoder {
            Encoder::HuggingFace(tokenizer) => tokenizer.id_to_token(token),
            Encoder::SentencePiece(model) => model.piece(token).map(str::to_owned),
        }
    }

    /// The id of a token as the vocabulary writes it.
    pub fn token_id(&self, piece: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::HuggingFace(tokenizer) => tokenizer.token_to_id(piece),
            Encoder::SentencePiece(model) => model.id(piece),
        }
    }

    /// The bytes a token stands for; none for special tokens.
    fn token_bytes(&self, token: u32) -> Vec<u8> {
        if self.special.contains(&token) {
            return Vec::new();
        }
        self.token_piece(token).map_or_else(Vec::new, |piece| self.token_text.bytes(piece))
    }

    /// Whether the token is a control token, which has no text.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// Token that starts a text.
    pub fn bos_token(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens that end a text: those the model's configuration names.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Tokens that end a turn of a chat: [`end_tokens`](Self::end_tokens) and those of the vocabulary that are known to
    /// end turns, such as `<|eot_id|>` and `<|im_end|>`.
    pub fn end_of_turn_tokens(&self) -> &[u32] {
        &self.end_of_turn_tokens
    }

    /// Number of token ids, added tokens counted.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary
    }

    /// What kind of tokenizer this is, in words.
    pub fn kind(&self) -> &str {
        &self.kind
    }
}

/// What is wrong with a tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The model has none.
    #[error("{file}: missing; a model folder needs its tokenizer")]
    Missing {
        /// The file that should be there.
        file: String,
    },
    /// It cannot be read or is malformed.
    #[error("{file}: {problem}")]
    Read {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// It has more tokens than the model.
    #[error("{file}: token id {id} is not below the model's vocabulary of {vocabulary}")]
    IdOutOfRange {
        /// The file.
        file: String,
        /// The id.
        id: u32,
        /// Rows of the token embedding.
        vocabulary: usize,
    },
    /// A text holds a token that the model does not have.
    #[error("the text holds token {} ({id}), but the model has only {vocabulary} tokens", quoted(.piece))]
    NotInModel {
        /// The token as the vocabulary writes it.
        piece: String,
        /// Its id.
        id: u32,
        /// Rows of the token embedding.
        vocabulary: usize,
    },
    /// A text cannot be encoded.
    #[error("the tokenizer failed on the text: {0}")]
    Encode(String),
}
