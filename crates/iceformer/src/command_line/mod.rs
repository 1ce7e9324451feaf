//! The commands, one file each, and what they share.

mod arguments;
mod attention_figures;
mod bar;
mod bench;
mod chat;
mod destination;
mod embedded;
mod eval;
mod inspect;
mod interrupt;
mod memory;
mod progress;
mod report;
mod run;
mod study;
mod text;
mod unread_input;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::error::ErrorKind;
use iceformer_engine::silence_caught_panics;
use iceformer_kernels::InstructionSet;

use arguments::{Arguments, Command, RunArguments};

/// How a command ended, when it did not fail.
enum Outcome {
    Done,
    /// The user pressed Ctrl-C.
    Interrupted,
}

/// Parses the arguments, runs the command and turns its end into an exit code: 0 fine, 1 error, 2 wrong usage, 130
/// Ctrl-C. A reader that closes standard output early is no error.
pub fn main() -> ExitCode {
    let arguments = match Arguments::of_process() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    match execute(arguments) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(130),
        Err(error) => failed(&error),
    }
}

fn execute(arguments: Arguments) -> anyhow::Result<Outcome> {
    silence_caught_panics();
    InstructionSet::from_environment().map_err(anyhow::Error::msg)?;
    interrupt::install()?;
    match arguments.command {
        None => run::run(RunArguments::example()),
        Some(Command::Run(run)) => run::run(*run),
        Some(Command::Inspect(inspect)) => inspect::run(&inspect),
        Some(Command::Bench(bench)) => bench::run(bench.what),
        Some(Command::Eval(eval)) => eval::run(&eval.what),
        Some(Command::Study(study)) => study::run(study),
    }
}

/// Prints help, version, or what is wrong with the arguments in one line.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return match error.print().context("standard output") {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        };
    }
    let rendered = error.render().to_string();
    let told = rendered
        .split("\n\n")
        .filter(|part| !part.starts_with("Usage:") && !part.starts_with("For more information"))
        .flat_map(str::split_whitespace)
        .collect::<Vec<_>>()
        .join(" ");
    let told = if told.starts_with("error: ") { told } else { "error: a command is missing".to_owned() };
    let _ = writeln!(std::io::stderr(), "{told} (see --help)");
    ExitCode::from(2)
}

/// Tells what went wrong; a reader of standard output that went away early is nothing wrong.
fn failed(error: &anyhow::Error) -> ExitCode {
    if is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    // One line, whatever a file put into the message.
    let message = format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ");
    let _ = writeln!(std::io::stderr(), "error: {message}");
    ExitCode::FAILURE
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// Writes one line of JSON to standard output.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print_text(&(serde_json::to_string(value)? + "\n"))
}

/// Writes to standard output.
fn print_text(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).context("standard output")
}
