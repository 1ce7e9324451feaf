//! Measurements summed up: each method beside exact attention.

use iceformer_attention::Report;
use serde::Serialize;

use crate::driver::Observer;
use crate::measurement::{Cost, Finding, Measurement, Place, Setup, label};

/// Tasks that exact attention does less well than this say nothing about a method.
pub const LEAST_ACCURACY: f64 = 0.5;

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// In the order they were measured.
    pub measurements: Vec<Measurement>,
    /// What attention did over all cases where everything was read by one method, layer by layer; by method.
    pub heads: Vec<(String, Vec<Report>)>,
}

/// One method in one set-up on one task and group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The evaluation.
    pub evaluation: &'static str,
    /// The task.
    pub task: String,
    /// The length asked for, or the name of a file.
    pub group: String,
    /// Tokens of a prompt, mean.
    pub tokens: f64,
    /// Name of the method.
    pub method: String,
    /// Missed mass that a row may have, of method `budgeted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<f32>,
    /// What the method read.
    pub setup: Setup,
    /// Cases.
    pub cases: usize,
    /// How well it did.
    #[serde(flatten)]
    pub quality: Quality,
    /// Reading the text, mean.
    pub text: Cost,
    /// Reading the questions, mean.
    pub question: Cost,
    /// Decoding the answers, mean.
    pub answer: Cost,
    /// Share of the allowed keys kept, mean.
    pub kept_share: f64,
    /// Share of the rows that fell back to exact attention, mean.
    pub fallback_share: f64,
}

/// How well a method did. Comparisons with exact attention are `None` where that was not run or did nothing right.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Quality {
    /// Of tasks with answers.
    Accuracy {
        /// Mean score, 0 to 1.
        accuracy: f64,
        /// Accuracy divided by that of exact attention on the same cases.
        retention: Option<f64>,
    },
    /// Of continuations.
    Agreement {
        /// Share of the cases where all tokens equal those of exact attention.
        same_share: f64,
        /// Tokens in front of the first that differs, mean, of the cases where one does.
        mean_first_difference: Option<f64>,
    },
    /// Of texts.
    Likelihood {
        /// Exponential of the mean nats per token over all cases.
        perplexity: f64,
        /// Perplexity divided by that of exact attention on the same windows.
        perplexity_ratio: Option<f64>,
        /// Divergence from exact attention, mean, nats per token.
        divergence: f64,
        /// 99th percentile of the divergence, the largest of all windows.
        divergence_p99: f64,
        /// Share of the scored tokens where both find the same token likeliest.
        same_likeliest: f64,
    },
}

/// What a method keeps of the accuracy of exact attention over all tasks and lengths.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Retention {
    /// Name of the method.
    pub method: String,
    /// Missed mass that a row may have, of method `budgeted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<f32>,
    /// What the method read.
    pub setup: Setup,
    /// Tasks and groups that exact attention does at least half right.
    pub tasks: usize,
    /// Mean retention over them.
    pub mean: f64,
    /// The least of them.
    pub least: f64,
    /// Where that was: task and group.
    pub least_at: String,
}

impl Summary {
    /// The method with its settings, as tables show it.
    pub fn label(&self) -> String {
        label(&self.method, self.budget)
    }
}

impl Retention {
    /// The method with its settings, as tables show it.
    pub fn label(&self) -> String {
        label(&self.method, self.budget)
    }
}

impl Results {
    /// Takes in one measurement and what attention did for it.
    pub fn add(&mut self, measurement: Measurement, reports: &[Report]) {
        if measurement.setup == Setup::Everything {
            let label = measurement.label();
            let index = self.heads.iter().position(|(name, _)| *name == label).unwrap_or_else(|| {
                self.heads.push((label, vec![Report::default(); reports.len()]));
                self.heads.len() - 1
            });
            self.heads[index].1.iter_mut().zip(reports).for_each(|(sum, report)| *sum += report);
        }
        self.measurements.push(measurement);
    }

    /// One summary for each task, group, method and set-up, in the order they were first measured.
    pub fn summaries(&self) -> Vec<Summary> {
        let mut groups: Vec<Vec<&Measurement>> = Vec::new();
        for measurement in &self.measurements {
            let same = |group: &&mut Vec<&Measurement>| {
                let first = group[0];
                first.is_beside(measurement) && first.label() == measurement.label() && first.setup == measurement.setup
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.push(measurement),
                None => groups.push(vec![measurement]),
            }
        }
        // Rows of a task and group stay together, whatever was measured between them.
        let mut order: Vec<&Measurement> = Vec::new();
        for group in &groups {
            if !order.iter().any(|first| first.is_beside(group[0])) {
                order.push(group[0]);
            }
        }
        groups.sort_by_key(|group| order.iter().position(|first| first.is_beside(group[0])));
        groups.iter().map(|group| self.summary(group)).collect()
    }

    fn summary(&self, group: &[&Measurement]) -> Summary {
        let first = group[0];
        let mean =
            |field: &dyn Fn(&Measurement) -> f64| group.iter().map(|m| field(m)).sum::<f64>() / group.len() as f64;
        let cost = |part: fn(&Measurement) -> &Cost| Cost {
            tokens: mean(&|m| part(m).tokens as f64).round() as usize,
            seconds: mean(&|m| part(m).seconds),
            cpu_seconds: mean(&|m| part(m).cpu_seconds),
        };
        // Exact attention on the same cases: after Ctrl-C it may have run one more.
        let exact: Vec<&Measurement> = self
            .measurements
            .iter()
            .filter(|m| {
                m.method == "exact" && m.is_beside(first) && group.iter().any(|other| other.place.case == m.place.case)
            })
            .collect();
        Summary {
            evaluation: first.place.evaluation,
            task: first.place.task.clone(),
            group: first.place.group.clone(),
            tokens: mean(&|m| m.place.tokens as f64),
            method: first.method.clone(),
            budget: first.budget,
            setup: first.setup,
            cases: group.len(),
            quality: Quality::of(group, &exact),
            text: cost(|m| &m.text),
            question: cost(|m| &m.question),
            answer: cost(|m| &m.answer),
            kept_share: mean(&|m| m.kept_share),
            fallback_share: mean(&|m| m.fallback_share),
        }
    }

    /// Retention of each method and set-up over the tasks that exact attention does at least half right, in the order
    /// they were first measured.
    pub fn retentions(&self) -> Vec<Retention> {
        let summaries = self.summaries();
        let mut retentions: Vec<Retention> = Vec::new();
        for summary in summaries.iter().filter(|summary| summary.method != "exact") {
            let Quality::Accuracy { retention: Some(retention), .. } = summary.quality else { continue };
            let is_exact = |other: &&Summary| {
                other.method == "exact" && other.task == summary.task && other.group == summary.group
            };
            let exact = summaries.iter().find(is_exact).map(|exact| &exact.quality);
            if !matches!(exact, Some(&Quality::Accuracy { accuracy, .. }) if accuracy >= LEAST_ACCURACY) {
                continue;
            }
            let at = format!("{} {}", summary.task, summary.group);
            match retentions.iter_mut().find(|r| r.label() == summary.label() && r.setup == summary.setup) {
                Some(all) => {
                    all.mean = (all.mean * all.tasks as f64 + retention) / (all.tasks + 1) as f64;
                    all.tasks += 1;
                    if retention < all.least {
                        (all.least, all.least_at) = (retention, at);
                    }
                }
                None => retentions.push(Retention {
                    method: summary.method.clone(),
                    budget: summary.budget,
                    setup: summary.setup,
                    tasks: 1,
                    mean: retention,
                    least: retention,
                    least_at: at,
                }),
            }
        }
        retentions
    }
}

impl Observer for Results {
    fn progress(&mut self, _done: f64, _total: f64) {}

    fn measured(&mut self, measurement: Measurement, reports: &[Report]) {
        self.add(measurement, reports);
    }
}

impl Measurement {
    /// Whether both are of one task and group.
    fn is_beside(&self, other: &Self) -> bool {
        let key = |place: &Place| (place.evaluation, place.task.clone(), place.group.clone());
        key(&self.place) == key(&other.place)
    }
}

impl Quality {
    fn of(group: &[&Measurement], exact: &[&Measurement]) -> Self {
        let mean = |group: &[&Measurement], field: &dyn Fn(&Finding) -> f64| {
            group.iter().map(|m| field(&m.finding)).sum::<f64>() / group.len().max(1) as f64
        };
        match group[0].finding {
            Finding::Answer { .. } => {
                let score = |finding: &Finding| if let Finding::Answer { score, .. } = finding { *score } else { 0.0 };
                let (accuracy, of_exact) = (mean(group, &score), mean(exact, &score));
                Self::Accuracy { accuracy, retention: (of_exact > 0.0).then(|| accuracy / of_exact) }
            }
            Finding::Agreement { .. } => {
                let same =
                    |finding: &Finding| f64::from(u8::from(matches!(finding, Finding::Agreement { same: true, .. })));
                let differences: Vec<f64> = group
                    .iter()
                    .filter_map(|m| match m.finding {
                        Finding::Agreement { first_difference, .. } => first_difference.map(|token| token as f64),
                        _ => None,
                    })
                    .collect();
                let count = differences.len();
                Self::Agreement {
                    same_share: mean(group, &same),
                    mean_first_difference: (count > 0).then(|| differences.iter().sum::<f64>() / count as f64),
                }
            }
            Finding::Likelihood { .. } => {
                let parts = |finding: &Finding| match *finding {
                    Finding::Likelihood { nats_per_token, divergence, divergence_p99, same_likeliest } => {
                        [nats_per_token, divergence, divergence_p99, same_likeliest]
                    }
                    _ => [f64::NAN; 4],
                };
                let nats = |finding: &Finding| parts(finding)[0];
                let (own, of_exact) = (mean(group, &nats), mean(exact, &nats));
                Self::Likelihood {
                    perplexity: own.exp(),
                    perplexity_ratio: (!exact.is_empty()).then(|| (own - of_exact).exp()),
                    divergence: mean(group, &|finding| parts(finding)[1]),
                    divergence_p99: group.iter().map(|m| parts(&m.finding)[2]).fold(0.0, f64::max),
                    same_likeliest: mean(group, &|finding| parts(finding)[3]),
                }
            }
        }
    }
}
