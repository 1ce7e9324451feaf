//! The `iceformer` command line.

#![forbid(unsafe_code)]

mod command_line;

use std::process::ExitCode;

fn main() -> ExitCode {
    command_line::main()
}
