//! How likely a text is under each method, and how far its distributions are from those of exact attention.
//!
//! A window of the text is read up to its last tokens, which are scored: the text before them is the long context. The
//! mean over a window hides what a sparse method does far from the start, so the first tokens are not scored.

use iceformer_attention::Method;
use iceformer_engine::{SamplerError, Session};

use crate::EvaluationError;
use crate::driver::{Driver, Observer, Work, weight};
use crate::measurement::{Cost, Finding, Measurement, Place, Setup};
use crate::text::NamedText;

/// Windows of texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerplexitySettings {
    /// Tokens of a window, one or more lengths.
    pub lengths: Vec<usize>,
    /// Tokens from the start of a window to that of the next; `None`: a window's length.
    pub stride: Option<usize>,
    /// Tokens at the end of each window that are scored; `None`: [`SCORED`], but at most half of a window.
    pub scored: Option<usize>,
    /// Most windows of each length, of all texts together.
    pub windows: usize,
}

/// Default of [`PerplexitySettings::scored`].
pub const SCORED: usize = 1024;

impl PerplexitySettings {
    /// Tokens of a window of `length` that are scored.
    fn scored_of(&self, length: usize) -> usize {
        self.scored.unwrap_or_else(|| SCORED.min(length / 2))
    }
}

/// Tokens that the model wants in front of a text.
pub(crate) fn start_tokens(driver: &Driver<'_>) -> Result<Vec<u32>, EvaluationError> {
    let tokenizer = driver.model.tokenizer();
    let (with, without) = (tokenizer.encode("a", true)?, tokenizer.encode("a", false)?);
    let start = with.windows(without.len()).position(|window| window == without).unwrap_or(0);
    Ok(with[..start].to_vec())
}

/// Runs every method on windows of `texts`, which take turns: the first window of each, then the second of each that has
/// one, until there are as many as asked for. Exact attention runs first and must be the first of the driver's methods.
/// Windows that were asked for but do not exist, and texts that none was taken from, are told as a note.
///
/// # Errors
/// When a length does not fit the context or any of the texts, the tokenizer fails on one, or the work is cancelled.
///
/// # Panics
/// When the first method is not exact, or there are no texts.
pub fn run_perplexity(
    driver: &Driver<'_>,
    texts: &[NamedText],
    settings: &PerplexitySettings,
    observer: &mut dyn Observer,
) -> Result<(), EvaluationError> {
    assert_eq!(driver.methods.first(), Some(&Method::Exact), "other methods are compared with exact attention");
    assert!(!texts.is_empty(), "windows are cut from a text");
    let context = driver.settings.check(driver.model.decoder().config())?;
    let start = start_tokens(driver)?;
    let encoded = |text: &NamedText| driver.model.tokenizer().encode(&text.text, false);
    let tokens = texts.iter().map(encoded).collect::<Result<Vec<_>, _>>()?;
    let mut windows = Vec::new();
    for &length in &settings.lengths {
        let error = |problem: String| EvaluationError::Length { length, problem };
        if length > context {
            return Err(error(format!("was asked for; the context takes {context}")));
        }
        // The prediction of the first scored token comes from the token before it, which is read with those scored; at
        // least one more is context.
        let (scored, needed) = (settings.scored_of(length), start.len() + 2);
        if scored == 0 || length <= needed {
            return Err(error(format!("has no room for {needed} of context and one to score: ask for longer ones")));
        }
        if length < scored + needed {
            let front = length.saturating_sub(scored);
            return Err(error(format!(
                "leaves {front} in front of {scored} scored ones; expected at least {needed}: score at most {}",
                length - needed
            )));
        }
        let own = length - start.len();
        let stride = settings.stride.unwrap_or(length);
        let has = |tokens: &Vec<u32>| tokens.len().checked_sub(own).map_or(0, |rest| rest / stride + 1);
        let counts: Vec<usize> = tokens.iter().map(has).collect();
        let taken = in_turn(&counts, settings.windows);
        if taken.is_empty() {
            return Err(too_short(texts, &tokens, length));
        }
        if let Some(note) = shortfall(texts, &counts, &taken, length, settings.windows) {
            observer.note(note);
        }
        let name = texts.iter().map(|text| text.name.as_str()).collect::<Vec<_>>().join(" + ");
        windows.extend(taken.into_iter().enumerate().map(|(case, (text, window))| {
            let place = Place {
                evaluation: "perplexity",
                task: name.clone(),
                group: length.to_string(),
                case,
                tokens: length,
                depth: None,
                source: Some(texts[text].name.clone()),
                first_token: Some(window * stride),
            };
            (text, place)
        }));
    }
    let total = driver.methods.len() as f64 * windows.iter().map(|(_, place)| weight(place.tokens)).sum::<f64>();
    let mut work = Work { observer, done: 0.0, total };
    let count = windows.len();
    for (index, (text, place)) in windows.into_iter().enumerate() {
        work.observer.cases(index, count);
        let first = place.first_token.unwrap_or(0);
        let own = &tokens[text][first..first + place.tokens - start.len()];
        let whole = [&start[..], own].concat();
        let scored = settings.scored_of(place.tokens);
        let window = Window { place, tokens: &whole, scored };
        let mut exact = Vec::new();
        for &method in driver.methods {
            run_window(driver, &window, method, &mut exact, &mut work)?;
            work.finish(whole.len());
        }
    }
    Ok(())
}

/// The first `most` windows where texts take turns, as (text, window of it); a text that has no window left is passed
/// over. `counts` tells how many windows each text has.
fn in_turn(counts: &[usize], most: usize) -> Vec<(usize, usize)> {
    let rounds = counts.iter().copied().max().unwrap_or(0);
    let round = |window| (0..counts.len()).filter(move |&text| window < counts[text]).map(move |text| (text, window));
    (0..rounds).flat_map(round).take(most).collect()
}

/// No text has a window.
fn too_short(texts: &[NamedText], tokens: &[Vec<u32>], length: usize) -> EvaluationError {
    let longest = (0..texts.len()).max_by_key(|&text| tokens[text].len()).unwrap_or(0);
    let others = if texts.len() > 1 { ", the other texts fewer" } else { "" };
    let problem = format!("{} tokens{others}; a length of {length} needs more text", tokens[longest].len());
    EvaluationError::Text { name: texts[longest].name.clone(), problem }
}

/// What is missing of `most` windows, and of texts.
fn shortfall(
    texts: &[NamedText],
    counts: &[usize],
    taken: &[(usize, usize)],
    length: usize,
    most: usize,
) -> Option<String> {
    let names = |left_out: &dyn Fn(usize) -> bool| {
        let names = texts.iter().enumerate().filter(|&(text, _)| left_out(text)).map(|(_, text)| text.name.as_str());
        Some(names.collect::<Vec<_>>().join(", ")).filter(|names| !names.is_empty())
    };
    let mut parts = Vec::new();
    if taken.len() < most {
        let count = taken.len();
        parts.push(format!("{count} window{} of {length} tokens instead of {most}", if count == 1 { "" } else { "s" }));
    }
    if let Some(names) = names(&|text| counts[text] == 0) {
        parts.push(format!("too short for a window of {length} tokens: {names}"));
    }
    if let Some(names) = names(&|text| counts[text] > 0 && !taken.iter().any(|&(other, _)| other == text)) {
        parts.push(format!("no window of {length} tokens is read of {names}; ask for more cases"));
    }
    Some(parts.join("; ")).filter(|note| !note.is_empty())
}

struct Window<'a> {
    place: Place,
    tokens: &'a [u32],
    scored: usize,
}

/// `exact` holds the log-probabilities of exact attention, `[scored, vocabulary]`; the exact method writes them.
fn run_window(
    driver: &Driver<'_>,
    window: &Window<'_>,
    method: Method,
    exact: &mut Vec<f32>,
    work: &mut Work<'_>,
) -> Result<(), EvaluationError> {
    let (text, scored) = window.tokens.split_at(window.tokens.len() - window.scored - 1);
    let (mut session, text_cost) = driver.read_text(method, text, work)?;
    let after_text = session.reports().to_vec();
    for &setup in Driver::setups(method) {
        session.set_method(setup.method(method))?;
        session.truncate(text.len());
        let (finding, question) = score(&mut session, scored, method == Method::Exact, exact)?;
        let mut measurement = Measurement::new(&window.place, method, setup, text_cost, finding);
        measurement.question = question;
        let reports = if setup == Setup::Everything { session.reports() } else { &after_text };
        measurement.observe(reports);
        work.observer.measured(measurement, reports);
    }
    Ok(())
}

/// Reads all but the last of `tokens` and scores the prediction of each one's successor. Fails where logits are not numbers.
fn score(
    session: &mut Session,
    tokens: &[u32],
    is_exact: bool,
    exact: &mut Vec<f32>,
) -> Result<(Finding, Cost), EvaluationError> {
    let vocabulary = session.decoder().config().vocabulary;
    let read = &tokens[..tokens.len() - 1];
    let (mut nats, mut divergences, mut same) = (0.0, Vec::with_capacity(read.len()), 0usize);
    let mut next = 0;
    let mut row_log = vec![0.0f32; vocabulary];
    let mut are_numbers = true;
    let ((), cost) = Cost::of(|| {
        session.read_with_logits(read, |logits| {
            for row in logits.chunks_exact(vocabulary) {
                are_numbers &= log_softmax(row, &mut row_log);
                nats -= f64::from(row_log[tokens[next + 1] as usize]);
                if is_exact {
                    exact.extend_from_slice(&row_log);
                }
                let reference = &exact[next * vocabulary..][..vocabulary];
                divergences.push(divergence(reference, &row_log));
                same += usize::from(likeliest(reference) == likeliest(&row_log));
                next += 1;
            }
        })?;
        Ok::<_, EvaluationError>(((), read.len()))
    })?;
    if !are_numbers {
        return Err(SamplerError::NotANumber.into());
    }
    let count = read.len() as f64;
    let divergence = divergences.iter().sum::<f64>() / count;
    divergences.sort_by(f64::total_cmp);
    let p99 = divergences[(divergences.len() * 99).div_ceil(100).max(1) - 1];
    let finding = Finding::Likelihood {
        nats_per_token: nats / count,
        divergence,
        divergence_p99: p99,
        same_likeliest: same as f64 / count,
    };
    Ok((finding, cost))
}

/// Log-probabilities of logits; `false` where one is not a number, or none is finite.
fn log_softmax(logits: &[f32], log_probabilities: &mut [f32]) -> bool {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let shift = f64::from(largest) + sum.ln();
    for (log_probability, &logit) in log_probabilities.iter_mut().zip(logits) {
        *log_probability = (f64::from(logit) - shift) as f32;
    }
    shift.is_finite()
}

/// Kullback-Leibler divergence of `other` from `reference`, both log-probabilities, in nats.
fn divergence(reference: &[f32], other: &[f32]) -> f64 {
    let terms = reference.iter().zip(other).map(|(&p, &q)| {
        let p = f64::from(p);
        if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - f64::from(q)) }
    });
    // Rounding of equal distributions may leave a trace below zero.
    terms.sum::<f64>().max(0.0)
}

/// The first of the largest.
fn likeliest(values: &[f32]) -> usize {
    let best = |best: usize, (index, value): (usize, &f32)| if *value > values[best] { index } else { best };
    values.iter().enumerate().fold(0, best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_windows_are_scored_by_half() {
        let settings = |scored| PerplexitySettings { lengths: Vec::new(), stride: None, scored, windows: 1 };
        assert_eq!([600, 2048, 16_384].map(|length| settings(None).scored_of(length)), [300, 1024, 1024]);
        assert_eq!(settings(Some(599)).scored_of(600), 599);
    }

    #[test]
    fn texts_take_turns() {
        assert_eq!(in_turn(&[3, 1, 2], 9), [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]);
        assert_eq!(in_turn(&[9, 9], 3), [(0, 0), (1, 0), (0, 1)]);
        assert_eq!(in_turn(&[0, 2], 9), [(1, 0), (1, 1)]);
        assert!(in_turn(&[0, 0], 9).is_empty());
    }

    #[test]
    fn windows_and_texts_that_are_left_out_are_told() {
        let texts = ["a", "b", "c"].map(|name| NamedText { name: name.into(), text: String::new() });
        let told = |counts: &[usize], most| shortfall(&texts, counts, &in_turn(counts, most), 64, most);
        assert_eq!(told(&[1, 1, 1], 3), None);
        assert_eq!(told(&[2, 0, 1], 3).unwrap(), "too short for a window of 64 tokens: b");
        assert_eq!(told(&[1, 1, 1], 5).unwrap(), "3 windows of 64 tokens instead of 5");
        assert_eq!(told(&[5, 5, 5], 2).unwrap(), "no window of 64 tokens is read of c; ask for more cases");
    }

    #[test]
    fn divergences_of_known_distributions() {
        let log = |p: [f32; 2]| p.map(f32::ln);
        let known = 0.5 * (0.5f64 / 0.9).ln() + 0.5 * (0.5f64 / 0.1).ln();
        assert!((divergence(&log([0.5, 0.5]), &log([0.9, 0.1])) - known).abs() < 1e-6);
        assert_eq!(divergence(&log([0.3, 0.7]), &log([0.3, 0.7])), 0.0);
        let mut row = [0.0; 3];
        assert!(log_softmax(&[1000.0, 1000.0, -1e30], &mut row));
        assert!((row[0] - 0.5f32.ln()).abs() < 1e-6 && row[2] < -1e29);
        assert_eq!(likeliest(&[1.0, 3.0, 3.0]), 1);
        for none in [[0.0, f32::NAN, 0.0], [f32::NEG_INFINITY; 3], [0.0, f32::INFINITY, 0.0]] {
            assert!(!log_softmax(&none, &mut row), "{none:?}");
        }
        assert!(log_softmax(&[0.0, f32::NEG_INFINITY, 0.0], &mut row));
    }
}
