//! Whether a method continues a text as exact attention does.

use iceformer_attention::Method;
use iceformer_engine::{Sampler, SamplerSettings, Session};

use crate::EvaluationError;
use crate::driver::{Driver, Observer, Work, weight};
use crate::measurement::{Cost, Finding, Measurement, Place, Setup};
use crate::perplexity::start_tokens;
use crate::random::Random;

/// Prompts cut from a text, and how far they are continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgreementSettings {
    /// Tokens of a prompt, one or more lengths.
    pub lengths: Vec<usize>,
    /// Prompts of each length.
    pub cases: usize,
    /// Tokens to continue each by.
    pub generate: usize,
    /// Seed of the places in the text that prompts begin at.
    pub seed: u64,
}

/// Tokens at the end of a prompt that count as its question: read exactly where only the text is read by the method.
pub const QUESTION: usize = 64;

/// Continues prompts from `text` by the likeliest tokens, exact attention first, which must be the first of the driver's
/// methods. End tokens do not end a continuation.
///
/// # Errors
/// When a prompt does not fit the context or the text, the tokenizer fails on it, or the work is cancelled.
///
/// # Panics
/// When the first method is not exact.
pub fn run_agreement(
    driver: &Driver<'_>,
    name: &str,
    text: &str,
    settings: &AgreementSettings,
    observer: &mut dyn Observer,
) -> Result<(), EvaluationError> {
    assert_eq!(driver.methods.first(), Some(&Method::Exact), "other methods are compared with exact attention");
    let context = driver.settings.check(driver.model.decoder().config())?;
    let start = start_tokens(driver)?;
    let tokens = driver.model.tokenizer().encode(text, false)?;
    for &length in &settings.lengths {
        let error = |problem: String| EvaluationError::Length { length, problem };
        if length + settings.generate > context {
            let generate = settings.generate;
            return Err(error(format!("and {generate} to generate were asked for; the context takes {context}")));
        }
        if length <= QUESTION + start.len() {
            return Err(error(format!("leaves no text in front of the {QUESTION} tokens that count as the question")));
        }
        if tokens.len() < length - start.len() {
            let problem = format!("{} tokens; a length of {length} needs more text", tokens.len());
            return Err(EvaluationError::Text { name: name.into(), problem });
        }
    }
    let weights = settings.lengths.iter().map(|&length| weight(length)).sum::<f64>();
    let total = weights * (settings.cases * driver.methods.len()) as f64;
    let mut work = Work { observer, done: 0.0, total };
    for (index, &length) in settings.lengths.iter().enumerate() {
        for case in 0..settings.cases {
            work.observer.cases(index * settings.cases + case, settings.lengths.len() * settings.cases);
            let own = length - start.len();
            let first = Random::new(settings.seed, "agreement", length, case).index(tokens.len() - own + 1);
            let prompt: Vec<u32> = start.iter().chain(&tokens[first..first + own]).copied().collect();
            let place = Place {
                evaluation: "agreement",
                task: name.into(),
                group: length.to_string(),
                case,
                tokens: length,
                depth: None,
                source: Some(name.into()),
                first_token: Some(first),
            };
            let mut exact = Vec::new();
            for &method in driver.methods {
                run_case(driver, &place, &prompt, settings.generate, method, &mut exact, &mut work)?;
                work.finish(length);
            }
        }
    }
    Ok(())
}

/// `exact` holds the tokens of exact attention, which the exact method writes.
fn run_case(
    driver: &Driver<'_>,
    place: &Place,
    prompt: &[u32],
    generate: usize,
    method: Method,
    exact: &mut Vec<u32>,
    work: &mut Work<'_>,
) -> Result<(), EvaluationError> {
    let (text, question) = prompt.split_at(prompt.len() - QUESTION);
    let (mut session, text_cost) = driver.read_text(method, text, work)?;
    let after_text = session.reports().to_vec();
    for &setup in Driver::setups(method) {
        session.truncate(text.len());
        session.set_method(setup.method(method))?;
        let ((), question_cost) = Cost::of(|| {
            session.read(question, |_, _| {})?;
            Ok::<_, EvaluationError>(((), question.len()))
        })?;
        let (continuation, answer_cost) = Cost::of(|| {
            let before = session.tokens().len();
            let continuation = likeliest(&mut session, generate)?;
            Ok::<_, EvaluationError>((continuation, session.tokens().len() - before))
        })?;
        if method == Method::Exact {
            exact.clone_from(&continuation);
        }
        let first_difference = exact.iter().zip(&continuation).position(|(a, b)| a != b);
        let finding = Finding::Agreement { same: first_difference.is_none(), first_difference, continuation };
        let mut measurement = Measurement::new(place, method, setup, text_cost, finding);
        (measurement.question, measurement.answer) = (question_cost, answer_cost);
        let reports = if setup == Setup::Everything { session.reports() } else { &after_text };
        measurement.observe(reports);
        work.observer.measured(measurement, reports);
    }
    Ok(())
}

/// The likeliest `count` tokens behind what the session holds; the last of them is not read.
fn likeliest(session: &mut Session, count: usize) -> Result<Vec<u32>, EvaluationError> {
    let mut sampler = Sampler::new(SamplerSettings::default())?;
    let mut tokens = Vec::with_capacity(count);
    while tokens.len() < count {
        let token = sampler.sample(session.logits(), session.tokens())?;
        tokens.push(token);
        if tokens.len() < count {
            session.read(&[token], |_, _| {})?;
        }
    }
    Ok(tokens)
}
