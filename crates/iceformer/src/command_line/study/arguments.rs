//! The arguments of `iceformer study` as typed.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use iceformer_study::dump::NumberType;

use crate::command_line::arguments::{choice, size, threads};

#[derive(Debug, Args)]
pub struct StudyArguments {
    #[command(subcommand)]
    pub what: Study,
}

#[derive(Debug, Subcommand)]
pub enum Study {
    /// Runs a model on a text and writes the queries, keys and values of every layer to a file.
    Dump(DumpArguments),
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
    #[arg(long = "type", default_value = "f16", value_name = "TYPE", value_parser = number_type)]
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

fn number_type(text: &str) -> Result<NumberType, String> {
    choice(text, &NumberType::ALL, NumberType::name)
}
