//! The program, run as a user would, and what it printed.
#![allow(dead_code, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/reference")
}

/// A folder with the files of the reference model.
pub fn copied_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// The reference model with weights of which none is a number.
pub fn damaged_model() -> tempfile::TempDir {
    let folder = copied_model();
    let weights = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // As bf16 and as f32 NaN.
    bytes[data..].fill(0xff);
    std::fs::write(&weights, bytes).unwrap();
    folder
}

/// The reference model with a chat template.
pub fn chat_model() -> tempfile::TempDir {
    let folder = copied_model();
    let template = r#"{"chat_template": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), template).unwrap();
    folder
}

pub fn iceformer(arguments: &[&str]) -> Output {
    with_input(arguments, "")
}

pub fn with_input(arguments: &[&str], input: &str) -> Output {
    assert_cmd::Command::cargo_bin("iceformer").unwrap().args(arguments).write_stdin(input).output().unwrap()
}

/// The program at work, with nothing on its standard input.
pub fn spawn(arguments: &[&str]) -> Child {
    Command::new(assert_cmd::cargo::cargo_bin("iceformer"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What comes of it when nobody reads standard output.
pub fn unread(arguments: &[&str]) -> Output {
    let mut child = spawn(arguments);
    drop(child.stdout.take());
    child.wait_with_output().unwrap()
}

pub fn on_reference(arguments: &[&str]) -> Output {
    let model = model();
    iceformer(&[&["run", "--model", model.to_str().unwrap()], arguments].concat())
}

pub fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

pub fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

pub fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_str(stdout(output)).unwrap()
}

/// Asserts one `error: ` line that holds `parts`, and the exit code.
#[track_caller]
pub fn assert_error(output: &Output, code: i32, parts: &[&str]) {
    let told = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{told}");
    assert!(told.starts_with("error: ") && told.lines().count() == 1, "{told}");
    assert!(stdout(output).is_empty());
    for part in parts {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
}

pub fn json_lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", stderr(output));
    stdout(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn records<'a>(lines: &'a [Value], record: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["record"] == record).collect()
}
