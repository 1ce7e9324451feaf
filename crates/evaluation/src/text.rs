//! A text as the source of generated prompts: its sentences and its words.

use std::collections::BTreeSet;

use crate::EvaluationError;

/// Characters behind which a sentence ends at the next line break, then at the next space, then at once: texts without
/// punctuation must not be one sentence.
const LONG: [usize; 3] = [400, 800, 1600];

/// Different words that a text needs, so that keys made of two of them do not run out.
const LEAST_WORDS: usize = 100;

/// A text and how reports call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedText {
    /// Name in reports and errors.
    pub name: String,
    /// The text.
    pub text: String,
}

/// A text that prompts are generated from.
#[derive(Clone, Debug)]
pub struct SourceText {
    /// Sentences in order, each with the white space in front of it.
    sentences: Vec<String>,
    /// Different words of 4 to 9 lower-case letters, sorted.
    words: Vec<String>,
}

impl SourceText {
    /// Takes a text apart; `name` is how errors call it.
    ///
    /// # Errors
    /// When it has fewer than a hundred different words of 4 to 9 lower-case letters.
    pub fn new(name: &str, text: &str) -> Result<Self, EvaluationError> {
        let words: BTreeSet<&str> = text
            .split(|character: char| !character.is_alphanumeric())
            .filter(|word| (4..=9).contains(&word.chars().count()) && word.chars().all(char::is_lowercase))
            .collect();
        if words.len() < LEAST_WORDS {
            let count = words.len();
            let problem = format!(
                "{count} different words of 4 to 9 lower-case letters; expected at least {LEAST_WORDS}: give a longer text"
            );
            return Err(EvaluationError::Text { name: name.into(), problem });
        }
        Ok(Self { sentences: sentences(text), words: words.into_iter().map(str::to_owned).collect() })
    }

    /// Sentences in order, each with the white space in front of it.
    pub fn sentences(&self) -> &[String] {
        &self.sentences
    }

    /// Different words of 4 to 9 lower-case letters, sorted.
    pub fn words(&self) -> &[String] {
        &self.words
    }
}

/// Cuts behind marks that end a sentence, closing quotes and brackets included.
fn sentences(text: &str) -> Vec<String> {
    let mut sentences = Vec::new();
    let (mut start, mut length, mut ending) = (0, 0, false);
    for (index, character) in text.char_indices() {
        let space = character.is_whitespace();
        let cut = (ending && space)
            || (length > LONG[0] && character == '\n')
            || (length > LONG[1] && space)
            || length > LONG[2];
        if cut {
            sentences.push(text[start..index].to_owned());
            (start, length, ending) = (index, 0, false);
        }
        length += 1;
        match character {
            '.' | '!' | '?' | '…' | '。' | '！' | '？' => ending = true,
            '"' | '\'' | '”' | '’' | '»' | ')' | ']' => {}
            _ => ending = false,
        }
    }
    sentences.push(text[start..].to_owned());
    sentences.retain(|sentence| !sentence.trim().is_empty());
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_behind_marks_and_quotes() {
        let text = "\"Is it so?\" he asked. It was 3.5 miles!\nThey walked (slowly.) Then";
        let found = sentences(text);
        assert_eq!(found, ["\"Is it so?\"", " he asked.", " It was 3.5 miles!", "\nThey walked (slowly.)", " Then"]);
        assert_eq!(found.concat(), text);
    }

    #[test]
    fn texts_without_marks_are_cut_too() {
        for text in ["word ".repeat(1000), "x".repeat(5000), "line\n".repeat(1000)] {
            let found = sentences(&text);
            assert!(found.len() > 2 && found.iter().all(|sentence| sentence.len() <= LONG[2] + 1));
            assert_eq!(found.concat().trim_end(), text.trim_end());
        }
    }

    #[test]
    fn short_texts_are_refused() {
        let error = SourceText::new("notes.txt", "only four words here").unwrap_err().to_string();
        assert!(error.starts_with("notes.txt: 4 different words"), "{error}");
    }
}
