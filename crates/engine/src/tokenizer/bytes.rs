//! The bytes a token stands for, by the way its vocabulary is written.

/// How the tokens of a vocabulary are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenText {
    /// GPT-2's alphabet: each byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0xAB>` is a byte.
    SentencePiece {
        /// Whether a space at the start of a text was added by the encoder and is stripped.
        strips_first_space: bool,
    },
    /// As they are; words are joined by the tokenizer's own decoder.
    Plain,
}

impl TokenText {
    pub(super) fn bytes(self, piece: String) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                let bytes: Option<Vec<u8>> = piece.chars().map(byte_of_character).collect();
                // Added tokens need not be written in the alphabet.
                bytes.unwrap_or_else(|| piece.into_bytes())
            }
            Self::SentencePiece { .. } => match byte_token(&piece) {
                Some(byte) => vec![byte],
                None => piece.replace('▁', " ").into_bytes(),
            },
            Self::Plain => piece.into_bytes(),
        }
    }
}

/// The byte of a token such as `<0x0A>`.
pub(super) fn byte_token(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// Inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the other 68 bytes in order for the
/// characters from U+0100.
fn byte_of_character(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn alphabet_covers_every_byte_once() {
        let bytes: BTreeSet<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of_character).collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!((0..0x200).filter_map(char::from_u32).filter(|&c| byte_of_character(c).is_some()).count(), 256);
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert!(alphabet.into_iter().all(|character| byte_of_character(character).is_some()));
        assert_eq!(byte_of_character('Ġ'), Some(b' '));
        assert_eq!(byte_of_character('Ċ'), Some(b'\n'));
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xff>"), Some(255));
        for piece in ["<0x+1>", "<0xA>", "<0x0A", "<0x00A>", "0x0A"] {
            assert_eq!(byte_token(piece), None, "{piece}");
        }
    }
}
