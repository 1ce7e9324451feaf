//! The arguments of `iceformer eval`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use iceformer_attention::{BudgetSettings, KeyValueType, Method};
use iceformer_evaluation::needle::Task;

use crate::command_line::arguments::{Choice, budget, choice, kv_type, method, number, once, seed, size, threads};

#[derive(Debug, Args)]
pub struct EvalArguments {
    #[command(subcommand)]
    pub what: Eval,
}

#[derive(Debug, Subcommand)]
pub enum Eval {
    /// Finds the number of one line in a long record of lines (LongEval).
    Longeval(LongevalArguments),
    /// Finds what is planted in a text, or counts words (RULER): seven tasks at any length and depth.
    Needle(NeedleArguments),
    /// How likely a text is, and how far each method's distributions are from those of exact attention.
    Perplexity(PerplexityArguments),
    /// Whether each method continues a text by the same tokens as exact attention.
    Agreement(AgreementArguments),
}

impl Eval {
    /// Name as reports show it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Longeval(_) => "longeval",
            Self::Needle(_) => "needle",
            Self::Perplexity(_) => "perplexity",
            Self::Agreement(_) => "agreement",
        }
    }

    /// What all have.
    pub fn common(&self) -> &EvalCommon {
        match self {
            Self::Longeval(arguments) => &arguments.common,
            Self::Needle(arguments) => &arguments.common,
            Self::Perplexity(arguments) => &arguments.common,
            Self::Agreement(arguments) => &arguments.common,
        }
    }
}

#[derive(Debug, Args)]
pub struct EvalCommon {
    /// Hugging Face folder or GGUF file [default: the built-in reference model].
    #[arg(long, short)]
    pub model: Option<PathBuf>,
    /// Text that prompts are made from; may be given several times [default: the built-in novel].
    #[arg(long, value_name = "FILE")]
    pub text: Vec<PathBuf>,
    /// Methods to compare. `perplexity` and `agreement` always run `exact`, which the others are compared with.
    #[arg(long, value_delimiter = ',', default_value = "exact,budgeted,dci", value_name = "METHODS", value_parser = method())]
    pub methods: Vec<Method>,
    /// Share of the softmax mass that a query of method `budgeted` may miss; several are compared [default: 0.05].
    #[arg(long, value_delimiter = ',', value_name = "SHARES", value_parser = budget)]
    pub budget: Vec<f32>,
    /// Threads [default: the cores this process may use].
    #[arg(long, short, value_name = "N", value_parser = threads, help_heading = "Machine")]
    pub threads: Option<usize>,
    /// Element type of the key/value cache.
    #[arg(long, default_value = "int8", value_name = "TYPE", value_parser = kv_type(), help_heading = "Machine")]
    pub kv_type: KeyValueType,
    /// Tokens of the prompt that go through the layers together [default: 512; 2048 of method budgeted].
    #[arg(long, value_name = "TOKENS", value_parser = size, help_heading = "Machine")]
    pub chunk: Option<usize>,
    /// Writes a page with plots and tables to this file, which any browser shows without a network.
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// Writes one line of JSON for each case, then one for each row of the table.
    #[arg(long)]
    pub json: bool,
    /// Writes no progress to standard error.
    #[arg(long, short)]
    pub quiet: bool,
}

impl EvalCommon {
    /// The methods with their settings, each once; `exact` first where it is among them or `needs_exact`.
    pub fn contestants(&self, needs_exact: bool) -> anyhow::Result<Vec<Method>> {
        let is_budgeted = |method: &Method| matches!(method, Method::Budgeted(_));
        anyhow::ensure!(
            self.budget.is_empty() || self.methods.iter().any(is_budgeted),
            "--budget is for method budgeted, which is not among --methods"
        );
        let mut contestants = Vec::new();
        if needs_exact || self.methods.contains(&Method::Exact) {
            contestants.push(Method::Exact);
        }
        for &method in &self.methods {
            let budgets = self.budget.iter().map(|&budget| Method::Budgeted(BudgetSettings { budget }));
            match is_budgeted(&method) && !self.budget.is_empty() {
                true => contestants.extend(budgets),
                false => contestants.push(method),
            }
        }
        Ok(once(contestants))
    }
}

/// What evaluations with generated prompts have.
#[derive(Debug, Args)]
pub struct GeneratedArguments {
    /// Seed of generated prompts: the same seed gives the same prompts.
    #[arg(long, default_value = "0", value_parser = seed)]
    pub seed: u64,
}

/// What evaluations that ask questions have.
#[derive(Debug, Args)]
pub struct AskedArguments {
    /// Continues the text as it is, though the model has a chat template.
    #[arg(long)]
    pub no_chat: bool,
}

#[derive(Debug, Args)]
pub struct LongevalArguments {
    /// Published cases: a `.jsonl` file, or a folder of them [default: records are generated].
    #[arg(long, value_name = "PATH", conflicts_with_all = ["lengths", "seed", "text"])]
    pub data: Option<PathBuf>,
    /// Tokens of generated records: whole numbers, or such as 16k.
    #[arg(long, value_delimiter = ',', default_value = "4k,8k,16k", value_name = "TOKENS", value_parser = length)]
    pub lengths: Vec<usize>,
    /// Cases of each length; of each file at most.
    #[arg(long, default_value = "25", value_name = "N", value_parser = size)]
    pub cases: usize,
    #[command(flatten)]
    pub generated: GeneratedArguments,
    #[command(flatten)]
    pub asked: AskedArguments,
    #[command(flatten)]
    pub common: EvalCommon,
}

#[derive(Debug, Args)]
pub struct NeedleArguments {
    /// Tasks, with commas between [default: all of them].
    #[arg(long, value_delimiter = ',', value_name = "TASKS", value_parser = task())]
    pub tasks: Vec<Task>,
    /// Tokens of a prompt: whole numbers, or such as 16k.
    #[arg(long, value_delimiter = ',', default_value = "4k,8k,16k", value_name = "TOKENS", value_parser = length)]
    pub lengths: Vec<usize>,
    /// Where in the text the answer of `single` and `multi-key` stands, in percent; the cases take them in turn.
    #[arg(long, value_delimiter = ',', default_value = "0,25,50,75,100", value_name = "PERCENT", value_parser = depth)]
    pub depths: Vec<f64>,
    /// Cases of each task and length.
    #[arg(long, default_value = "10", value_name = "N", value_parser = size)]
    pub cases: usize,
    #[command(flatten)]
    pub generated: GeneratedArguments,
    #[command(flatten)]
    pub asked: AskedArguments,
    #[command(flatten)]
    pub common: EvalCommon,
}

#[derive(Debug, Args)]
pub struct AgreementArguments {
    /// Tokens of a prompt: whole numbers, or such as 16k.
    #[arg(long, value_delimiter = ',', default_value = "16k", value_name = "TOKENS", value_parser = length)]
    pub lengths: Vec<usize>,
    /// Tokens that each prompt is continued by.
    #[arg(long, default_value = "50", value_name = "TOKENS", value_parser = size)]
    pub generate: usize,
    /// Prompts of each length.
    #[arg(long, default_value = "50", value_name = "N", value_parser = size)]
    pub cases: usize,
    #[command(flatten)]
    pub generated: GeneratedArguments,
    #[command(flatten)]
    pub common: EvalCommon,
}

#[derive(Debug, Args)]
pub struct PerplexityArguments {
    /// Tokens of a window: whole numbers, or such as 16k.
    #[arg(long, visible_alias = "context", value_delimiter = ',', default_value = "4k,16k", value_name = "TOKENS", value_parser = length)]
    pub lengths: Vec<usize>,
    /// Tokens from the start of one window of a text to that of the next [default: a window's length].
    #[arg(long, value_name = "TOKENS", value_parser = size)]
    pub stride: Option<usize>,
    /// Tokens at the end of each window that are scored [default: 1024, at most half of a window].
    #[arg(long, value_name = "TOKENS", value_parser = size)]
    pub scored: Option<usize>,
    /// Most windows of each length. Texts take turns: the first window of each, then the second of each that has one.
    #[arg(long, default_value = "4", value_name = "N", value_parser = size)]
    pub cases: usize,
    #[command(flatten)]
    pub common: EvalCommon,
}

fn task() -> Choice<Task> {
    choice(&Task::ALL, Task::name)
}

/// A share given in percent.
fn depth(text: &str) -> Result<f64, String> {
    let percent = text.parse().ok().filter(|percent| (0.0..=100.0).contains(percent));
    percent.map(|percent: f64| percent / 100.0).ok_or_else(|| "expected a number from 0 to 100, in percent".to_owned())
}

/// A number of tokens: `16384`, or `16k` for 16 · 1024.
fn length(text: &str) -> Result<usize, String> {
    let text = text.trim();
    match text.strip_suffix(['k', 'K']) {
        Some(thousands) => number(thousands, 1, 16_384).map(|thousands| thousands * 1024),
        None => number(text, 1, 1 << 24),
    }
    .map_err(|_| "expected a whole number of tokens, or one such as 16k".to_owned())
}
