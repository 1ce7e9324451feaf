//! Cases: prompts with their place in an evaluation.

use crate::EvaluationError;
use crate::prompt::{Encoder, Prompt, PromptTokens};

/// One prompt of an evaluation, ready to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// The task, such as `lines`.
    pub task: String,
    /// Cases of a group are summed up together: the length asked for, or the name of a file.
    pub group: String,
    /// Number within task and group, from 0.
    pub number: usize,
    /// Where in the text the answer stands, 0 to 1; `None` where it stands in many places.
    pub depth: Option<f64>,
    /// What is read.
    pub prompt: Prompt,
    /// The same as token ids.
    pub tokens: PromptTokens,
}

/// A case that is made when its turn comes.
pub struct PlannedCase<'a> {
    /// Tokens it will have, about.
    pub tokens: usize,
    /// Most tokens it takes of the context, answer included.
    pub context: usize,
    /// Makes it.
    pub make: Box<dyn Fn() -> Result<Case, EvaluationError> + 'a>,
}

/// A prompt with its tokens; `None` where not even the least of it fits.
pub(crate) type Fitted = Result<Option<(Prompt, PromptTokens)>, EvaluationError>;

/// A prompt of at most `length` tokens, as large as it can be: `write(units)` writes it with so many sentences, rows or
/// words, up to `most` of them, and `estimate(units)` tells about how many tokens those have by themselves, growing with
/// `units`. Gives `None` where even one unit is too much.
pub(crate) fn fit(
    encoder: &Encoder<'_>,
    length: usize,
    most: usize,
    estimate: impl Fn(usize) -> f64,
    write: impl Fn(usize) -> Prompt,
) -> Fitted {
    // The largest number of units whose estimate stays within `tokens`, at least 1.
    let units_of = |tokens: f64| {
        let (mut low, mut high) = (1, 2);
        while estimate(high) <= tokens && high < 1 << 30 {
            (low, high) = (high, high * 2);
        }
        while high - low > 1 {
            let middle = low.midpoint(high);
            if estimate(middle) <= tokens { low = middle } else { high = middle }
        }
        low
    };
    let mut best = None;
    let (mut fits, mut too_long) = (0, most + 1);
    let mut units = units_of(length as f64);
    while fits + 1 < too_long {
        units = units.clamp(fits + 1, too_long - 1);
        let prompt = write(units);
        let tokens = encoder.encode(&prompt)?;
        let longest = tokens.longest();
        if longest <= length {
            (fits, best) = (units, Some((prompt, tokens)));
        } else {
            too_long = units;
        }
        // The estimate, corrected by what it missed here.
        let step = units_of(length as f64 - longest as f64 + estimate(units));
        units = if step == units && longest <= length { units + 1 } else { step };
    }
    Ok(best)
}
