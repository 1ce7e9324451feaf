//! What one method did with one case.

use std::time::Instant;

use iceformer_attention::{HeadReport, Method, Report};
use iceformer_kernels::ceilings::process_cpu_seconds;
use serde::Serialize;

/// What is read by the method under evaluation, and what exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Setup {
    /// Text, question and answer by the method: the answer is decoded sparsely too.
    Everything,
    /// The text by the method; question and answer by exact attention to all that was read.
    QuestionExact,
}

impl Setup {
    /// As tables show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Everything => "everything",
            Self::QuestionExact => "text only",
        }
    }

    /// What reads question and answer where `method` read the text.
    pub(crate) fn method(self, method: Method) -> Method {
        match self {
            Self::Everything => method,
            Self::QuestionExact => Method::Exact,
        }
    }
}

/// Time of one part of the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Tokens that went through the layers.
    pub tokens: usize,
    /// Wall time.
    pub seconds: f64,
    /// CPU time of the process, all threads together.
    pub cpu_seconds: f64,
}

impl Cost {
    /// What `work` costs; it gives the tokens that went through the layers beside its result.
    pub(crate) fn of<T, E>(work: impl FnOnce() -> Result<(T, usize), E>) -> Result<(T, Self), E> {
        let (wall, cpu) = (Instant::now(), process_cpu_seconds());
        let (result, tokens) = work()?;
        let cost = Self { tokens, seconds: wall.elapsed().as_secs_f64(), cpu_seconds: process_cpu_seconds() - cpu };
        Ok((result, cost))
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.seconds += other.seconds;
        self.cpu_seconds += other.cpu_seconds;
    }
}

/// What was found out.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Finding {
    /// Answers to the questions of a task.
    Answer {
        /// Share of what was expected that the answers hold, 0 to 1.
        score: f64,
        /// What the model said, question by question.
        answers: Vec<String>,
        /// What it should have said.
        expected: Vec<Vec<String>>,
    },
    /// The likeliest continuation, compared with that of exact attention.
    Agreement {
        /// Whether all tokens are the same.
        same: bool,
        /// The first token that differs, from 0; `None` where none does.
        first_difference: Option<usize>,
        /// The tokens themselves, to compare runs with other settings.
        continuation: Vec<u32>,
    },
    /// How likely the text is, and how far the distributions are from those of exact attention.
    Likelihood {
        /// Mean negative log-likelihood of the scored tokens, nats.
        nats_per_token: f64,
        /// Kullback-Leibler divergence of the method's distribution from that of exact attention, mean over the scored
        /// tokens, nats.
        divergence: f64,
        /// The divergence that 99 % of the scored tokens stay below, nats.
        divergence_p99: f64,
        /// Share of the scored tokens where both find the same token likeliest.
        same_likeliest: f64,
    },
}

/// What is measured: a case of a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Place {
    /// `longeval`, `needle`, `perplexity` or `agreement`.
    pub evaluation: &'static str,
    /// The task within it.
    pub task: String,
    /// Cases of a group are summed up together: the length asked for, or the name of a file.
    pub group: String,
    /// Number of the case within task and group, from 0.
    pub case: usize,
    /// Tokens of the prompt, or of the window.
    pub tokens: usize,
    /// Where in the text the answer stands, 0 to 1; `None` where it stands in many places or in none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// Of what was cut from a text: the text's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// And the first token of that text that belongs to it, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token: Option<usize>,
}

/// What one method did with one case in one set-up.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// The case.
    #[serde(flatten)]
    pub place: Place,
    /// Name of the method.
    pub method: String,
    /// Missed mass that a row may have, of method `budgeted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<f32>,
    /// What the method read.
    pub setup: Setup,
    /// What was found out.
    #[serde(flatten)]
    pub finding: Finding,
    /// Reading the text. Both set-ups of a method share it: it is done once.
    pub text: Cost,
    /// Reading the questions; of `perplexity` reading the scored tokens.
    pub question: Cost,
    /// Decoding the answers.
    pub answer: Cost,
    /// Share of the allowed keys whose own value entered the output, over all that the method read.
    pub kept_share: f64,
    /// Share of the rows that the method handed to exact attention.
    pub fallback_share: f64,
    /// Missed mass that 99 % of the rows stay below, as the method estimates it.
    pub estimated_missed_mass_p99: Option<f32>,
    /// Rows that were estimated.
    pub estimated_rows: u64,
    /// Missed mass that 99 % of the rows stay below that were also computed exactly.
    pub audited_missed_mass_p99: Option<f32>,
    /// Rows that were audited so.
    pub audited_rows: u64,
}

impl Measurement {
    /// What `finding` is about; the costs of question and answer and what attention tells are still to come.
    pub(crate) fn new(place: &Place, method: Method, setup: Setup, text: Cost, finding: Finding) -> Self {
        Self {
            place: place.clone(),
            method: method.name().into(),
            budget: budget(method),
            setup,
            finding,
            text,
            question: Cost::default(),
            answer: Cost::default(),
            kept_share: 1.0,
            fallback_share: 0.0,
            estimated_missed_mass_p99: None,
            estimated_rows: 0,
            audited_missed_mass_p99: None,
            audited_rows: 0,
        }
    }

    /// Fills in what attention tells of all that the method read.
    pub(crate) fn observe(&mut self, reports: &[Report]) {
        let mut total = HeadReport::default();
        reports.iter().for_each(|report| total += &report.total());
        self.kept_share = total.kept_share();
        self.fallback_share = total.fallback_share();
        self.estimated_missed_mass_p99 = total.estimated_missed_mass.quantile(0.99);
        self.estimated_rows = total.estimated_missed_mass.count();
        self.audited_missed_mass_p99 = total.audited_missed_mass.quantile(0.99);
        self.audited_rows = total.audited_missed_mass.count();
    }

    /// The method with its settings, as tables show it.
    pub fn label(&self) -> String {
        label(&self.method, self.budget)
    }
}

/// A method with its settings, as tables show it.
pub(crate) fn label(method: &str, budget: Option<f32>) -> String {
    budget.map_or_else(|| method.to_owned(), |budget| format!("{method} {budget}"))
}

/// Missed mass that a row of the method may have, where it has such a setting.
fn budget(method: Method) -> Option<f32> {
    match method {
        Method::Budgeted(settings) => Some(settings.budget),
        Method::Exact | Method::Dci(_) => None,
    }
}
