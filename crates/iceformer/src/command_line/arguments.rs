//! The arguments as typed.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use iceformer_attention::{BudgetSettings, KeyValueType, Method};
use iceformer_kernels::linear::WeightType;
use iceformer_study::synthetic::Kind;
use serde_json::Value;

use super::eval::arguments::EvalArguments;
use super::study::StudyArguments;

/// Runs pretrained Transformers on long inputs on ordinary CPUs.
///
/// Without a command it shows itself at work: a small built-in model reads 17,000 tokens of a novel and answers a
/// question about it.
#[derive(Debug, Parser)]
#[command(name = "iceformer", version)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Reads a prompt and continues or answers it.
    Run(Box<RunArguments>),
    /// Shows what is in a model's files.
    Inspect(InspectArguments),
    /// Measures this machine, kernels, or whole prompts.
    Bench(BenchArguments),
    /// Compares what attention methods keep of a model's accuracy, and their time.
    Eval(EvalArguments),
    /// Looks at the attention of a model: dumps of its inputs, and what choices of keys would cost.
    Study(StudyArguments),
}

#[derive(Debug, Args)]
pub struct RunArguments {
    /// Hugging Face folder or GGUF file [default: the built-in reference model].
    #[arg(long, short)]
    pub model: Option<PathBuf>,
    /// File to read before the prompt; may be given several times; `-` reads standard input.
    #[arg(long, short)]
    pub file: Vec<PathBuf>,
    /// Text to read after the files. With neither files nor prompt, standard input is read, or a chat starts where it is
    /// a terminal.
    #[arg(long, short, allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Runs the built-in example: a novel with a question at its end.
    #[arg(long, conflicts_with_all = ["model", "file", "prompt", "chat", "system", "template_variable"])]
    pub example: bool,
    /// System message of the chat.
    #[arg(long, allow_hyphen_values = true, conflicts_with = "no_chat")]
    pub system: Option<String>,
    /// Uses the model's chat template [default: when the model has one]. Where standard input is a terminal, a chat goes on
    /// after the files and the prompt.
    #[arg(long, conflicts_with = "no_chat")]
    pub chat: bool,
    /// Variable of the chat template, such as `enable_thinking=false`: a value that is no JSON is a string; may be given
    /// several times.
    #[arg(long, value_name = "NAME=VALUE", value_parser = template_variable, conflicts_with = "no_chat")]
    pub template_variable: Vec<(String, Value)>,
    /// Continues the text as it is.
    #[arg(long)]
    pub no_chat: bool,
    /// Most tokens to generate.
    #[arg(long, short = 'n', default_value = "1024", value_name = "TOKENS", value_parser = count)]
    pub max_tokens: usize,
    /// Ends at this text, which is not shown; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = stop)]
    pub stop: Vec<String>,
    /// Goes on at the model's end tokens.
    #[arg(long)]
    pub ignore_end: bool,
    /// Writes one JSON object with the text and all figures to standard output when done, and no text before.
    #[arg(long)]
    pub json: bool,
    /// Writes neither progress nor figures to standard error.
    #[arg(long, short)]
    pub quiet: bool,
    #[command(flatten)]
    pub sampling: SamplingArguments,
    #[command(flatten)]
    pub method: MethodArguments,
    #[command(flatten)]
    pub machine: MachineArguments,
}

impl Arguments {
    /// The arguments of this process.
    ///
    /// # Errors
    /// What is wrong with them, or the help that they ask for.
    pub fn of_process() -> Result<Self, clap::Error> {
        let matches = numbers_may_be_negative(Self::command()).try_get_matches()?;
        Self::from_arg_matches(&matches)
    }
}

/// `command` whose options take `-1` for a value and not for an option, so that each says what it expected.
fn numbers_may_be_negative(command: clap::Command) -> clap::Command {
    let takes_values = |argument: &Arg| argument.get_action().takes_values();
    command
        .mut_args(|argument| match takes_values(&argument) {
            true => argument.allow_negative_numbers(true),
            false => argument,
        })
        .mut_subcommands(numbers_may_be_negative)
}

impl RunArguments {
    /// What `iceformer` without arguments does.
    pub fn example() -> Self {
        let Ok(Arguments { command: Some(Command::Run(run)) }) =
            Arguments::try_parse_from(["iceformer", "run", "--example"])
        else {
            unreachable!("the arguments of the example parse")
        };
        *run
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArguments {
    /// Divisor of the logits; 0 always takes the most probable token.
    #[arg(long, default_value = "0", value_name = "T")]
    pub temperature: f32,
    /// Keeps the K most probable tokens; 0 keeps all.
    #[arg(long, default_value = "40", value_name = "K", value_parser = count)]
    pub top_k: usize,
    /// Keeps the most probable tokens that reach this probability together.
    #[arg(long, default_value = "0.95", value_name = "P")]
    pub top_p: f32,
    /// Keeps tokens with at least this share of the best one's probability.
    #[arg(long, default_value = "0.05", value_name = "P")]
    pub min_p: f32,
    /// Makes tokens of the last `--repetition-window` less probable; 1 is off.
    #[arg(long, default_value = "1", value_name = "FACTOR")]
    pub repetition_penalty: f32,
    /// Tokens that the repetition penalty looks at.
    #[arg(long, default_value = "64", value_name = "TOKENS", value_parser = count)]
    pub repetition_window: usize,
    /// Seed of the sampler: the same seed gives the same text.
    #[arg(long, default_value = "0", value_parser = seed)]
    pub seed: u64,
}

#[derive(Clone, Debug, Args)]
pub struct MethodArguments {
    /// How attention chooses keys [default: budgeted where --budget is given, else exact].
    #[arg(long, value_name = "METHOD", value_parser = method(), help_heading = "Attention")]
    method: Option<Method>,
    /// Share of the softmax mass that a query may miss [default: 0.05].
    #[arg(long, value_name = "SHARE", value_parser = budget, help_heading = "Attention")]
    budget: Option<f32>,
}

impl MethodArguments {
    /// The method with its settings.
    pub fn method(&self) -> Result<Method, anyhow::Error> {
        match (self.method, self.budget) {
            (None | Some(Method::Budgeted(_)), Some(budget)) => Ok(Method::Budgeted(BudgetSettings { budget })),
            (method, None) => Ok(method.unwrap_or(Method::Exact)),
            (Some(method), Some(_)) => {
                anyhow::bail!("--budget is for --method budgeted; --method {} has no budget", method.name())
            }
        }
    }
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArguments {
    /// Threads [default: the cores this process may use].
    #[arg(long, short, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Element type of the key/value cache.
    #[arg(long, default_value = "int8", value_name = "TYPE", value_parser = kv_type())]
    pub kv_type: KeyValueType,
    /// Most tokens of prompt and answer together [default: what the model is made for].
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    pub context: Option<usize>,
    /// Tokens of the prompt that go through the layers together [default: 512; 2048 with method budgeted].
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    pub chunk: Option<usize>,
}

#[derive(Debug, Args)]
pub struct InspectArguments {
    /// Hugging Face folder or GGUF file.
    pub model: PathBuf,
    /// Lists every tensor.
    #[arg(long)]
    pub tensors: bool,
    /// Writes one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchArguments {
    #[command(subcommand)]
    pub what: Bench,
}

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// This machine's f32, bf16 and int8 rates per core, and its memory bandwidth.
    Ceilings(CeilingsArguments),
    /// One linear layer beside the ceilings.
    Linear(LinearArguments),
    /// One attention call beside the ceilings.
    Attention(AttentionArguments),
    /// A whole prompt and its continuation.
    Prompt(PromptArguments),
}

#[derive(Debug, Args)]
pub struct CeilingsArguments {
    #[command(flatten)]
    pub common: BenchCommon,
}

#[derive(Debug, Args)]
pub struct BenchCommon {
    /// Threads [default: the cores this process may use].
    #[arg(long, short, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Measurements, of which the median is given.
    #[arg(long, default_value = "5", value_parser = repeat, value_name = "N")]
    pub repeat: u32,
    /// Writes one line of JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LinearArguments {
    /// Type of the weights.
    #[arg(long, default_value = "bf16", value_name = "TYPE", value_parser = weight_type())]
    pub weights: WeightType,
    /// Rows of the input: tokens.
    #[arg(long, default_value = "512", value_parser = size)]
    pub rows: usize,
    /// Input features.
    #[arg(long = "in", default_value = "2048", value_name = "FEATURES", value_parser = size)]
    pub inputs: usize,
    /// Output features.
    #[arg(long = "out", default_value = "2048", value_name = "FEATURES", value_parser = size)]
    pub outputs: usize,
    #[command(flatten)]
    pub common: BenchCommon,
}

/// What synthetic inputs have. Beside them clap lets an option that requires `from` pass, with which they conflict: so
/// they conflict with that option too.
const SYNTHETIC: [&str; 4] = ["generator", "heads", "kv_heads", "head_dim"];

#[derive(Debug, Args)]
pub struct AttentionArguments {
    #[command(flatten)]
    pub method: MethodArguments,
    /// Synthetic queries, keys and values.
    #[arg(long, default_value = "gauss", value_name = "KIND", value_parser = generator())]
    pub generator: Kind,
    /// Queries, keys and values of a dump that `iceformer study dump` wrote, repeated to --tokens.
    #[arg(long, value_name = "DUMP", conflicts_with_all = SYNTHETIC)]
    pub from: Option<PathBuf>,
    /// Layer of the dump, counted from 0 [default: each in turn, then all together].
    #[arg(long, requires = "from", conflicts_with_all = SYNTHETIC, value_name = "L", value_parser = count)]
    pub layer: Option<usize>,
    /// Noise on the repeated keys and values of a dump, in standard deviations of each channel.
    #[arg(long, requires_all = ["from", "tokens"], conflicts_with_all = SYNTHETIC, default_value = "0", value_name = "SHARE", value_parser = noise)]
    pub tile_noise: f32,
    /// Keys in the cache [default: 8192, or as many as the dump has].
    #[arg(long, value_parser = size)]
    pub tokens: Option<usize>,
    /// Query heads.
    #[arg(long, default_value = "32", value_parser = size)]
    pub heads: usize,
    /// Key/value heads.
    #[arg(long, default_value = "8", value_parser = size)]
    pub kv_heads: usize,
    /// Width of a head.
    #[arg(long, default_value = "64", value_parser = size)]
    pub head_dim: usize,
    /// Element type of the cache.
    #[arg(long, default_value = "bf16", value_name = "TYPE", value_parser = kv_type())]
    pub kv_type: KeyValueType,
    /// Queries, at the last positions [default: as many as tokens].
    #[arg(long, value_parser = size)]
    pub queries: Option<usize>,
    /// Which keys a query sees [default: causal, or as the dump says].
    #[arg(long)]
    pub mask: Option<MaskKind>,
    /// Appends and attends to so many tokens at a time, as the engine does [default: all queries in one call].
    #[arg(long, value_name = "TOKENS", value_parser = size)]
    pub chunk: Option<usize>,
    /// Tokens before the queries that the method reads first, untimed and 512 at a time, as it reads a prompt: of
    /// decoding, what it knows of a text by then.
    #[arg(long, default_value = "0", value_name = "TOKENS", value_parser = count)]
    pub read_first: usize,
    /// Measures this method too, in turn with --method, and tells how much faster --method is.
    #[arg(long, value_name = "METHOD", value_parser = method())]
    pub against: Option<Method>,
    /// (query, head) rows whose true error is taken, against attention in f64; 0: none.
    #[arg(long, default_value = "256", value_name = "ROWS", value_parser = count)]
    pub samples: usize,
    /// Seed of inputs, noise and samples.
    #[arg(long, default_value = "0", value_parser = seed)]
    pub seed: u64,
    #[command(flatten)]
    pub common: BenchCommon,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MaskKind {
    /// No query sees a key behind its position.
    Causal,
    /// Every query sees every key.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 8 layers, width 1024, 16 heads, 4 key/value heads of 64.
    Small,
    /// Llama 3.2 1B with a vocabulary of 32,000.
    #[value(name = "llama-1b")]
    Llama1B,
    /// Llama 3.1 8B.
    #[value(name = "llama-8b")]
    Llama8B,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["model", "shape"]))]
pub struct PromptArguments {
    /// Hugging Face folder or GGUF file.
    #[arg(long, short)]
    pub model: Option<PathBuf>,
    /// Random weights of this shape.
    #[arg(long)]
    pub shape: Option<Shape>,
    /// Type of the random weights.
    #[arg(long, value_name = "TYPE", value_parser = weight_type(), conflicts_with = "model", default_value = "bf16")]
    pub weights: WeightType,
    /// Tokens of the prompt.
    #[arg(long, default_value = "4096", value_parser = size)]
    pub tokens: usize,
    /// Tokens to generate after it.
    #[arg(long, default_value = "32", value_name = "TOKENS", value_parser = count)]
    pub generate: usize,
    /// Element type of the key/value cache.
    #[arg(long, default_value = "int8", value_name = "TYPE", value_parser = kv_type())]
    pub kv_type: KeyValueType,
    #[command(flatten)]
    pub method: MethodArguments,
    /// Tokens that go through the layers together [default: 512; 2048 with method budgeted].
    #[arg(long, value_name = "TOKENS", value_parser = size)]
    pub chunk: Option<usize>,
    /// Threads [default: the cores this process may use].
    #[arg(long, short, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Measurements, of which the median is given.
    #[arg(long, default_value = "1", value_parser = repeat, value_name = "N")]
    pub repeat: u32,
    /// Writes one line of JSON.
    #[arg(long)]
    pub json: bool,
}

fn template_variable(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}

fn stop(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("expected a text of at least one character".into()) } else { Ok(text.to_owned()) }
}

pub fn threads(text: &str) -> Result<usize, String> {
    number(text, 1, 1024)
}

/// A number that may be zero.
pub fn count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "expected a whole number of at least 0".into())
}

fn repeat(text: &str) -> Result<u32, String> {
    number(text, 1, 1000).map(|repeat| repeat as u32)
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

/// Sizes of measurements: bounded so that products of them do not overflow.
pub fn size(text: &str) -> Result<usize, String> {
    number(text, 1, 1 << 20)
}

pub fn number(text: &str, least: usize, most: usize) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("expected a whole number from {least} to {most}"))
}

pub fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected a whole number from 0 to {}", u64::MAX))
}

pub fn kv_type() -> Choice<KeyValueType> {
    choice(&KeyValueType::ALL, KeyValueType::name)
}

fn weight_type() -> Choice<WeightType> {
    choice(&WeightType::ALL, WeightType::name)
}

pub fn method() -> Choice<Method> {
    choice(&Method::ALL, Method::name)
}

fn generator() -> Choice<Kind> {
    choice(&Kind::ALL, Kind::name)
}

pub fn noise(text: &str) -> Result<f32, String> {
    let noise = text.parse().ok().filter(|noise| (0.0..=1.0).contains(noise));
    noise.ok_or_else(|| "expected a share of the deviation from 0 to 1, such as 0.05".to_owned())
}

pub fn budget(text: &str) -> Result<f32, String> {
    let budget = text.parse().map_err(|_| "expected a share such as 0.05".to_owned())?;
    BudgetSettings { budget }.validate().map(|()| budget).map_err(|error| error.to_string())
}

/// Each of `values` once, in the order of their first appearance.
pub fn once<T: PartialEq>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut once = Vec::new();
    values.into_iter().for_each(|value| {
        if !once.contains(&value) {
            once.push(value);
        }
    });
    once
}

/// One of `all` by its name; help lists the names.
pub fn choice<T: Copy>(all: &'static [T], name: fn(T) -> &'static str) -> Choice<T> {
    Choice { all, name }
}

#[derive(Clone)]
pub struct Choice<T: 'static> {
    all: &'static [T],
    name: fn(T) -> &'static str,
}

impl<T: Copy + Send + Sync> TypedValueParser for Choice<T> {
    type Value = T;

    fn parse_ref(&self, command: &clap::Command, argument: Option<&Arg>, value: &OsStr) -> Result<T, clap::Error> {
        let Self { all, name } = *self;
        let parser = move |text: &str| {
            all.iter().copied().find(|&value| name(value) == text).ok_or_else(|| {
                let names: Vec<_> = all.iter().map(|&value| name(value)).collect();
                format!("expected one of {}", names.join(", "))
            })
        };
        parser.parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.all.iter().map(|&value| PossibleValue::new((self.name)(value)))))
    }
}
