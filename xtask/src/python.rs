//! The Python checks: files and answers of ours against the packages that define the formats, and the Python package
//! against torch and transformers.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::step;

/// Makes a virtual environment in the target folder (kept while the requirements stay) and runs `testing/python` and
/// the tests of the Python package in it.
pub fn test() -> Result<()> {
    let requirements = step::workspace().join("testing/python/requirements.txt");
    let wanted = fs::read_to_string(&requirements).with_context(|| format!("{}", requirements.display()))?;
    let environment = step::target_folder().join("venv");
    let stamp = environment.join("installed-requirements.txt");
    let bin = environment.join(if cfg!(windows) { "Scripts" } else { "bin" });
    let python = bin.join("python");
    if fs::read_to_string(&stamp).ok().as_deref() != Some(wanted.as_str()) {
        make_environment(&environment, &python, &requirements)?;
        fs::write(&stamp, wanted).with_context(|| format!("{}", stamp.display()))?;
    }

    // All of it, as the Rust tests have built it: another choice of packages would be compiled anew with other features.
    let build = ["build", "--locked", "--workspace", "--all-targets"];
    step::run("Building the command line", step::cargo().args(build))?;
    let binary = step::target_folder().join("debug").join(format!("iceformer{}", std::env::consts::EXE_SUFFIX));
    let mut command = Command::new(&python);
    command.args(["-m", "pytest", "--quiet", "-p", "no:cacheprovider", "testing/python"]);
    command.env("ICEFORMER", binary).env("PYTHONDONTWRITEBYTECODE", "1");
    step::run("Python checks", &mut command)?;
    test_package(&environment, &python)
}

/// Builds the Python package into the environment and runs its tests.
fn test_package(environment: &Path, python: &Path) -> Result<()> {
    let mut build = Command::new(python);
    build.args(["-m", "maturin", "develop", "--quiet", "--locked", "--manifest-path", "crates/python/Cargo.toml"]);
    // Only so does maturin know where to install to, as a shell with the environment activated would tell it.
    build.env("VIRTUAL_ENV", environment);
    step::run("Building the Python package", &mut build)?;
    let mut tests = Command::new(python);
    tests.args(["-m", "pytest", "--quiet", "-p", "no:cacheprovider", "crates/python/tests"]);
    tests.env("PYTHONDONTWRITEBYTECODE", "1");
    step::run("Tests of the Python package", &mut tests)
}

fn make_environment(environment: &Path, python: &Path, requirements: &Path) -> Result<()> {
    let system = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let mut make = Command::new(system);
    make.args(["-m", "venv", "--clear"]).arg(environment);
    step::run("Making a Python environment", &mut make)
        .context("Python 3 with its venv module is needed; the variable PYTHON may name it")?;
    let mut install = Command::new(python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]).arg(requirements);
    step::run("Installing the Python packages", &mut install)
}
