//! The arguments of `iceformer study` as typed.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use iceformer_study::dump::NumberType;

use crate::command_line::arguments::{Choice, choice, count, noise, seed, size, threads};

#[derive(Debug, Args)]
pub struct StudyArguments {
    #[command(subcommand)]
    pub what: Study,
}

#[derive(Debug, Subcommand)]
pub enum Study {
    /// Runs a model on a text and writes the queries, keys and values of every layer to a file.
    Dump(DumpArguments),
    /// Replays choices of keys on a dump: what they keep, how far off they are, what they cost.
    Replay(ReplayArguments),
}

#[derive(Debug, Args)]
pub struct DumpArguments {
    /// File to write: safetensors, see docs/command-line.md.
    #[arg(long, short)]
    pub output: PathBuf,
    /// Hugging Face folder or GGUF file [default: the built-in reference model].
    #[arg(long, short)]
    pub model: Option<PathBuf>,
    /// Text to read, as it is, without a chat template; `-` reads standard input [default: the built-in novel with its
    /// question].
    #[arg(long, short)]
    pub file: Option<PathBuf>,
    /// Text to read behind the file.
    #[arg(long, short)]
    pub prompt: Option<String>,
    /// Reads the first N tokens of the text only.
    #[arg(long, value_name = "N", value_parser = size)]
    pub tokens: Option<usize>,
    /// Type of the numbers in the file.
    #[arg(long = "type", default_value = "f16", value_name = "TYPE", value_parser = number_type())]
    pub number_type: NumberType,
    /// Tokens that go through the layers together.
    #[arg(long, default_value = "512", value_name = "TOKENS", value_parser = size)]
    pub chunk: usize,
    /// Threads [default: the cores this process may use].
    #[arg(long, short, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Writes one JSON object about the dump to standard output.
    #[arg(long)]
    pub json: bool,
    /// Writes no progress to standard error.
    #[arg(long, short)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct ReplayArguments {
    /// File that `iceformer study dump` or `bench/dump_encoder.py` wrote.
    pub dump: PathBuf,
    /// Layer of the dump, counted from 0 [default: all together].
    #[arg(long, value_name = "L", value_parser = count)]
    pub layer: Option<usize>,
    /// Repeats the dump to so many tokens [default: as many as it has].
    #[arg(long, value_name = "N", value_parser = size)]
    pub tokens: Option<usize>,
    /// Noise on the repeated keys and values, in standard deviations of each channel.
    #[arg(long, requires = "tokens", default_value = "0", value_name = "SHARE", value_parser = noise)]
    pub tile_noise: f32,
    /// Shares of the far keys to keep, with commas between.
    #[arg(long, default_value = "0.1", value_name = "SHARES", value_delimiter = ',', value_parser = share)]
    pub share: Vec<f64>,
    /// Tiles of 128 tokens to look at in each layer, spread over the tokens that have far keys; four rows of each.
    #[arg(long, default_value = "8", value_name = "N", value_parser = size)]
    pub tiles: usize,
    /// Seed of the places of tiles and of the noise.
    #[arg(long, default_value = "0", value_parser = seed)]
    pub seed: u64,
    /// Threads [default: the cores this process may use].
    #[arg(long, short, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
    /// Writes one line of JSON for each choice.
    #[arg(long)]
    pub json: bool,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a share from 0 to 1, such as 0.1".to_owned())
}

fn number_type() -> Choice<NumberType> {
    choice(&NumberType::ALL, NumberType::name)
}
