//! Token-by-token decoding that never shows half a character.

use super::{Encoder, TokenText, Tokenizer};

/// Decodes token by token. Bytes of a character that is not complete yet are held back.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Utf8Pieces,
    /// Whether the next text is the first and loses a leading space.
    strip_space: bool,
    /// Tokens decoded together, for tokenizers whose decoder joins words.
    window: Vec<u32>,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, continuing: bool) -> Self {
        let strip_space =
            !continuing && matches!(tokenizer.token_text, TokenText::SentencePiece { strips_first_space: true });
        Self { tokenizer, pending: Utf8Pieces::default(), strip_space, window: Vec::new() }
    }

    /// Takes the next token and gives the text that is complete with it, often empty.
    pub fn push(&mut self, token: u32) -> String {
        if self.tokenizer.token_text == TokenText::Plain {
            return self.push_joined(token);
        }
        let mut bytes = self.tokenizer.token_bytes(token);
        if self.strip_space && !bytes.is_empty() {
            self.strip_space = false;
            if bytes[0] == b' ' {
                bytes.remove(0);
            }
        }
        self.pending.push(&bytes)
    }

    /// What two tokens give together, less what the first gives alone: a decoder that joins words looks no further
    /// back.
    fn push_joined(&mut self, token: u32) -> String {
        if self.tokenizer.is_special(token) {
            return String::new();
        }
        let Encoder::HuggingFace(tokenizer) = &self.tokenizer.encoder else { return String::new() };
        let decode = |tokens: &[u32]| tokenizer.decode(tokens, true).unwrap_or_default();
        let before = decode(&self.window);
        self.window.push(token);
        let after = decode(&self.window);
        if self.window.len() > 4 {
            self.window.remove(0);
        }
        after.strip_prefix(before.as_str()).map_or_else(String::new, Into::into)
    }

    /// Ends the stream: a character that was never completed becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        self.pending.finish()
    }
}

/// Splits bytes into complete characters.
#[derive(Debug, Default)]
pub(super) struct Utf8Pieces {
    pending: Vec<u8>,
}

impl Utf8Pieces {
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text += valid;
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text += &String::from_utf8_lossy(valid);
                    match error.error_len() {
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[length..];
                        }
                        None => {
                            rest = after;
                            break;
                        }
                    }
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    pub(super) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_join_to_the_lossy_text(bytes in proptest::collection::vec(
            prop_oneof![any::<u8>(), Just(0xE2), Just(0x82), Just(0xAC), Just(0xF0), Just(0x9F)], 0..40), cut in 1usize..5)
        {
            let mut pieces = Utf8Pieces::default();
            let mut text: String = bytes.chunks(cut).map(|chunk| pieces.push(chunk)).collect();
            text += &pieces.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
