//! Development tasks: `cargo xtask test`.

#![forbid(unsafe_code)]

mod python;
mod rust;
mod step;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask COMMAND

Commands:
  test           Runs every test: Rust on each instruction set of this machine, doc tests, Python checks
  test --rust    The Rust tests and doc tests only
  test --python  The Python checks only";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        ["test"] => rust::test().and_then(|summary| python::test().map(|()| summary)).map(Some),
        ["test", "--rust"] => rust::test().map(Some),
        ["test", "--python"] => python::test().map(|()| None),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("error: unknown command {:?}\n\n{USAGE}", arguments.join(" "));
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(summary) => {
            if let Some(summary) = summary {
                println!("\n{summary}");
            }
            println!("All tests passed.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
