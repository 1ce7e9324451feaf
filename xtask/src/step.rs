//! One command as a step: announced, run in the workspace, its failure an error that names it.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// Where cargo puts what it builds.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), |folder| workspace().join(folder))
}

/// The cargo that runs this program.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs `command` in the workspace without standard input.
pub fn run(what: &str, command: &mut Command) -> Result<()> {
    println!("\n== {what}");
    let start = Instant::now();
    let status = command
        .current_dir(workspace())
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("{what}: {} does not start", command.get_program().display()))?;
    if !status.success() {
        bail!("{what}: failed with {status}");
    }
    println!("== {what}: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
