//! Text from outside, within bounds: a device or pipe without an end must not fill the memory.

use std::io::{Error, ErrorKind, Read};

/// Most bytes of a text or of a file of cases: some fifty million tokens, beyond any context.
pub const MOST_BYTES: u64 = 256 << 20;

/// All of `input`.
///
/// # Errors
/// When it cannot be read, or has more than [`MOST_BYTES`].
pub fn read_limited(input: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        let problem = format!("more than {} MiB; expected a text of at most that", MOST_BYTES >> 20);
        return Err(Error::new(ErrorKind::FileTooLarge, problem));
    }
    Ok(bytes)
}

/// `bytes` as text, without a mark of the byte order at its start, which editors of some systems put there.
///
/// # Errors
/// When they are no UTF-8: a sentence that names line and byte.
pub fn decode(bytes: Vec<u8>) -> Result<String, String> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..place].iter().filter(|&&byte| byte == b'\n').count();
        format!("line {line}: not UTF-8 text (byte {place}); convert it first")
    })?;
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_without_an_end_is_refused() {
        let error = read_limited(std::io::repeat(0)).unwrap_err().to_string();
        assert_eq!(error, "more than 256 MiB; expected a text of at most that");
        assert_eq!(read_limited(&b"abc"[..]).unwrap(), b"abc");
    }

    #[test]
    fn what_is_no_text_is_named_by_its_line() {
        let error = decode(b"one\ntwo\nthr\xffee".to_vec()).unwrap_err();
        assert_eq!(error, "line 3: not UTF-8 text (byte 11); convert it first");
        assert_eq!(decode("\u{feff}one".into()).unwrap(), "one");
    }
}
