//! Retrieval tasks generated from any text in RULER's manner ([Hsieh et al. 2024](https://arxiv.org/abs/2404.06654)).
//!
//! Wordings are RULER's; keys are made of words of the text instead of a fixed list. A model without chat template gets
//! the text and the question to continue; questions for several keys are then asked one by one behind the same text.

mod counting;
mod haystack;
mod planted;

use crate::EvaluationError;
use crate::case::{Case, Fitted, PlannedCase, fit};
use crate::prompt::{Encoder, Prompt};
use crate::text::SourceText;
use haystack::Haystack;

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// One key with a number, at each depth in turn.
    Single,
    /// Four keys with a number each, one of them asked for, at each depth in turn.
    MultiKey,
    /// One key with four numbers, all asked for.
    MultiValue,
    /// Four keys with a number each, all asked for.
    MultiQuery,
    /// Five variables, each assigned the one before: all that have the value of the first.
    VariableTracking,
    /// The ten words of a list that come up ten times as often as the others.
    CommonWords,
    /// The three most frequent made-up words, whose frequencies fall with the square of their rank.
    FrequentWords,
}

impl Task {
    /// All tasks.
    pub const ALL: [Self; 7] = [
        Self::Single,
        Self::MultiKey,
        Self::MultiValue,
        Self::MultiQuery,
        Self::VariableTracking,
        Self::CommonWords,
        Self::FrequentWords,
    ];

    /// Name as the command line takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::MultiKey => "multi-key",
            Self::MultiValue => "multi-value",
            Self::MultiQuery => "multi-query",
            Self::VariableTracking => "variable-tracking",
            Self::CommonWords => "common-words",
            Self::FrequentWords => "frequent-words",
        }
    }

    /// Most tokens of an answer.
    fn answer_tokens(self, chat: bool) -> usize {
        match self {
            Self::Single | Self::MultiKey | Self::MultiQuery if !chat => 24,
            Self::Single | Self::MultiKey | Self::MultiValue | Self::MultiQuery => 128,
            Self::VariableTracking => 64,
            Self::CommonWords => 120,
            Self::FrequentWords => 64,
        }
    }
}

/// The cases to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct NeedleSettings {
    /// Tasks.
    pub tasks: Vec<Task>,
    /// Tokens of a prompt: at most so many, and as near as whole sentences, rows or words allow.
    pub lengths: Vec<usize>,
    /// Depths of the answer in the text, 0 to 1, which the cases of `single` and `multi-key` take in turn. The other
    /// tasks have theirs all over the text.
    pub depths: Vec<f64>,
    /// Cases of each task and length.
    pub cases: usize,
    /// Seed: the same seed gives the same prompts.
    pub seed: u64,
}

/// Plans the cases, the shortest lengths first.
///
/// # Errors
/// When the tokenizer fails on the text.
///
/// # Panics
/// When there are no depths.
pub fn plan<'a>(
    source: &'a SourceText,
    encoder: Encoder<'a>,
    settings: &'a NeedleSettings,
) -> Result<Vec<PlannedCase<'a>>, EvaluationError> {
    assert!(!settings.depths.is_empty(), "cases need a depth");
    let haystack = std::rc::Rc::new(Haystack::new(source, &encoder)?);
    let mut lengths = settings.lengths.clone();
    lengths.sort_unstable();
    let mut cases = Vec::new();
    for length in lengths {
        for &task in &settings.tasks {
            for number in 0..settings.cases {
                let haystack = std::rc::Rc::clone(&haystack);
                cases.push(PlannedCase {
                    tokens: length,
                    context: length + task.answer_tokens(encoder.is_chat()),
                    make: Box::new(move || {
                        let depth = settings.depths[number % settings.depths.len()];
                        let plan = Plan { encoder: &encoder, seed: settings.seed, task, length, number, depth };
                        plan.case(source, &haystack)
                    }),
                });
            }
        }
    }
    Ok(cases)
}

/// What a case depends on.
struct Plan<'a> {
    encoder: &'a Encoder<'a>,
    seed: u64,
    task: Task,
    length: usize,
    number: usize,
    depth: f64,
}

impl Plan<'_> {
    fn case(&self, source: &SourceText, haystack: &Haystack<'_>) -> Result<Case, EvaluationError> {
        let (depth, fitted) = match self.task {
            Task::CommonWords => (None, counting::common_words(self, source)),
            Task::FrequentWords => (None, counting::frequent_words(self)),
            _ => planted::plant(self, source, haystack),
        };
        let Some((prompt, tokens)) = fitted? else {
            let problem = format!("has no room for task {}; ask for a greater length", self.task.name());
            return Err(EvaluationError::Length { length: self.length, problem });
        };
        let (task, group) = (self.task.name().into(), self.length.to_string());
        Ok(Case { task, group, number: self.number, depth, prompt, tokens })
    }

    fn is_chat(&self) -> bool {
        self.encoder.is_chat()
    }

    fn random(&self) -> crate::random::Random {
        crate::random::Random::new(self.seed, self.task.name(), self.length, self.number)
    }

    /// The largest prompt that fits, of up to `most` units of about `per_unit` tokens.
    fn fit_even(&self, most: usize, per_unit: f64, write: impl Fn(usize) -> Prompt) -> Fitted {
        fit(self.encoder, self.length, most, |units| units as f64 * per_unit, write)
    }
}
