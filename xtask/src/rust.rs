//! The Rust tests, on every instruction set that the machine has.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use iceformer_kernels::InstructionSet;

use crate::step;

/// Crates whose results depend on the instruction set; with nextest the others are tested once, on the highest.
const NUMERIC: [&str; 3] = ["iceformer-kernels", "iceformer-attention", "iceformer-engine"];

/// Runs every Rust test and returns a sentence that names the instruction sets tested.
pub fn test() -> Result<String> {
    let detected = InstructionSet::detected();
    let levels: Vec<_> = InstructionSet::ALL.into_iter().filter(|&level| level <= detected).collect();

    // A test of the kernels crate leaves a file here that is named like the level it really ran on.
    let record = step::target_folder().join("tested-instruction-sets");
    if record.exists() {
        fs::remove_dir_all(&record).with_context(|| format!("{} cannot be cleared", record.display()))?;
    }
    fs::create_dir_all(&record).with_context(|| format!("{} cannot be made", record.display()))?;

    let nextest = has_nextest();
    for &level in levels.iter().rev() {
        let mut command = step::cargo();
        // Always the whole workspace: another choice of packages would be compiled anew with other features.
        command.args(if nextest { &["nextest", "run", "--no-fail-fast"][..] } else { &["test", "--no-fail-fast"] });
        command.args(["--locked", "--workspace", "--all-targets"]);
        if level == detected {
            // The tests that are left out of a plain run because they take long, too.
            command.args(if nextest { &["--run-ignored", "all"][..] } else { &["--", "--include-ignored"] });
        } else if nextest {
            let numeric: Vec<_> = NUMERIC.iter().map(|name| format!("package({name})")).collect();
            command.args(["--filterset", &numeric.join(" | ")]);
        }
        command.env("ICEFORMER_ISA", level.name()).env("ICEFORMER_TEST_RECORD", &record);
        step::run(&format!("Rust tests on {}", level.name()), &mut command)?;
    }
    step::run("Rust doc tests", step::cargo().args(["test", "--locked", "--workspace", "--doc"]))?;

    let missing: Vec<_> = levels.iter().map(|level| level.name()).filter(|name| !record.join(name).exists()).collect();
    if !missing.is_empty() {
        bail!("this machine has {}, and no test ran on it", missing.join(", "));
    }
    let tested: Vec<_> = levels.iter().map(|level| level.name()).collect();
    let absent: Vec<_> =
        InstructionSet::ALL.into_iter().filter(|&level| level > detected).map(InstructionSet::name).collect();
    let absent = if absent.is_empty() { "none".to_owned() } else { absent.join(", ") };
    Ok(format!("Instruction sets tested: {} (not on this machine: {absent}).", tested.join(", ")))
}

fn has_nextest() -> bool {
    let probe: &mut Command = &mut step::cargo();
    probe.args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}
