//! The text that needles are planted in: a run of sentences, from the start again where the text ends.

use crate::EvaluationError;
use crate::prompt::Encoder;
use crate::text::SourceText;

pub struct Haystack<'a> {
    sentences: &'a [String],
    /// Tokens in front of each sentence, and of all, each sentence encoded by itself.
    tokens_before: Vec<usize>,
}

impl<'a> Haystack<'a> {
    pub fn new(source: &'a SourceText, encoder: &Encoder<'_>) -> Result<Self, EvaluationError> {
        let sentences = source.sentences();
        let mut tokens_before = vec![0];
        for sentence in sentences {
            let tokens = encoder.tokenizer.encode(sentence, false)?.len();
            tokens_before.push(tokens_before[tokens_before.len() - 1] + tokens);
        }
        Ok(Self { sentences, tokens_before })
    }

    /// Sentences of the text.
    pub fn len(&self) -> usize {
        self.sentences.len()
    }

    /// Tokens of `count` sentences from `first` on, about.
    pub fn estimate(&self, first: usize, count: usize) -> f64 {
        let whole = self.tokens_before[self.len()];
        let end = first + count;
        let rounds = end / self.len();
        (rounds * whole + self.tokens_before[end % self.len()] - self.tokens_before[first]) as f64
    }

    /// `count` sentences from `first` on, with `needles` planted at their depths, 0 to 1, in order.
    pub fn text(&self, first: usize, count: usize, needles: &[(f64, String)]) -> String {
        // The sentence border nearest to the depth, counted in tokens.
        let whole = self.estimate(first, count);
        let distance = |depth: f64, place: usize| (self.estimate(first, place) - depth * whole).abs();
        let place = |(depth, _): &(f64, String)| {
            (0..=count).min_by(|&a, &b| distance(*depth, a).total_cmp(&distance(*depth, b))).unwrap_or(0)
        };
        let places: Vec<usize> = needles.iter().map(place).collect();
        let mut text = String::new();
        for index in 0..=count {
            for (_, (_, needle)) in places.iter().zip(needles).filter(|&(&place, _)| place == index) {
                text += " ";
                text += needle;
            }
            if index < count {
                let sentence = &self.sentences[(first + index) % self.len()];
                // The first sentence of the text has no white space in front of it.
                if !sentence.starts_with(char::is_whitespace) {
                    text += " ";
                }
                text += sentence;
            }
        }
        text.trim_start().to_owned()
    }
}
