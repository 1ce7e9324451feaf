//! Token-by-token decoding that never shows half a character.

use super::{TokenText, Tokenizer};

/// Decodes token by token. Bytes of a character that is not complete yet are held back.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Utf8Pieces,
    /// Whether the next text is the first and loses a leading space.
    strip_space: bool,
    joined: JoinedTokens,
}

/// Tokens before a new one that the decoder may look at.
const CONTEXT: usize = 4;
/// Tokens that are kept where they cannot be told from those before, or wait for a character to be complete.
const MOST_TOKENS: usize = 64;

/// The last tokens, of a tokenizer whose decoder joins words.
#[derive(Debug, Default)]
struct JoinedTokens {
    tokens: Vec<u32>,
    /// What was shown of their text.
    shown: String,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, continuing: bool) -> Self {
        let strip_space =
            !continuing && matches!(tokenizer.token_text, TokenText::SentencePiece { strips_first_space: true });
        Self { tokenizer, pending: Utf8Pieces::default(), strip_space, joined: JoinedTokens::default() }
    }

    /// Takes the next token and gives the text that is complete with it, often empty.
    pub fn push(&mut self, token: u32) -> String {
        if self.tokenizer.token_text == TokenText::Plain {
            let tokenizer = self.tokenizer;
            return match tokenizer.is_special(token) {
                true => String::new(),
                false => self.joined.push(token, |tokens| tokenizer.decode_joined(tokens)),
            };
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

    /// Ends the stream: a character that was never completed becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let tokenizer = self.tokenizer;
        let joined = std::mem::take(&mut self.joined).rest(|tokens| tokenizer.decode_joined(tokens));
        self.pending.finish() + &joined
    }
}

impl JoinedTokens {
    /// What the tokens give together, less what was shown of it; nothing while it ends in half a character.
    fn push(&mut self, token: u32, decode: impl Fn(&[u32]) -> String) -> String {
        self.tokens.push(token);
        let text = decode(&self.tokens);
        let is_full = self.tokens.len() >= MOST_TOKENS;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && !is_full {
            return String::new();
        }
        let new = self.unshown(&text);
        // Not within a character's bytes: they would give other text.
        let kept = &self.tokens[self.tokens.len().saturating_sub(CONTEXT)..];
        let shown = decode(kept);
        if is_full || text.ends_with(&shown) {
            (self.tokens, self.shown) = (kept.to_vec(), shown);
        } else {
            self.shown = text;
        }
        new
    }

    /// What was not shown at the end.
    fn rest(self, decode: impl Fn(&[u32]) -> String) -> String {
        self.unshown(&decode(&self.tokens))
    }

    fn unshown(&self, text: &str) -> String {
        let same = self.shown.chars().zip(text.chars()).take_while(|(shown, new)| shown == new).count();
        text.chars().skip(same).collect()
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
