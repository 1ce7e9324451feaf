//! `iceformer study`: what attention of a model looks like, and what choices of keys would cost.

mod arguments;
mod dump;
mod replay;

use arguments::Study;
pub use arguments::StudyArguments;

use super::Outcome;

/// Runs the command.
pub fn run(arguments: StudyArguments) -> anyhow::Result<Outcome> {
    match arguments.what {
        Study::Dump(arguments) => dump::run(&arguments),
        Study::Replay(arguments) => replay::run(&arguments),
    }
}
