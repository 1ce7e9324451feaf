//! `iceformer study` and `iceformer bench attention` from outside.

mod common;

use std::path::{Path, PathBuf};

use common::{iceformer, json_lines, stderr};
use iceformer_study::Dump;
use serde_json::Value;

/// The JSON lines of an output.
fn lines(arguments: &[&str]) -> Vec<Value> {
    json_lines(&iceformer(&[arguments, &["--json"]].concat()))
}

#[track_caller]
fn assert_error(arguments: &[&str], parts: &[&str]) {
    common::assert_error(&iceformer(arguments), 1, parts);
}

/// A dump of the reference model on the first tokens of the built-in novel.
fn dump(folder: &Path, tokens: usize) -> PathBuf {
    let path = folder.join("dump.safetensors");
    let (output, count) = (path.to_str().unwrap(), tokens.to_string());
    let line = &lines(&["study", "dump", "--output", output, "--tokens", &count, "--chunk", "64", "-q"])[0];
    assert_eq!((line["tokens"].as_u64(), line["layers"].as_u64()), (Some(tokens as u64), Some(8)));
    assert_eq!(line["bytes"].as_u64().unwrap(), std::fs::metadata(&path).unwrap().len());
    path
}

#[test]
fn a_dump_holds_every_layer() {
    let folder = tempfile::tempdir().unwrap();
    let path = dump(folder.path(), 150);
    let dump = Dump::open(&path).unwrap();
    let description = dump.description();
    assert_eq!((dump.layers(), description.scale, description.causal), (8, 0.125, true));
    assert_eq!(description.model, "built-in reference model");
    for layer in 0..8 {
        let layer = dump.read(layer).unwrap();
        let shape = layer.shape;
        assert_eq!((shape.key_tokens, shape.query_heads, shape.kv_heads, shape.key_dim), (150, 6, 2, 64));
        for part in [&layer.inputs.queries, &layer.inputs.keys, &layer.inputs.values] {
            assert!(part.chunks(64).all(|head| head.iter().any(|&value| value != 0.0)), "every row was written");
        }
    }

    let prompt = folder.path().join("prompt.safetensors");
    let output = prompt.to_str().unwrap();
    lines(&["study", "dump", "-o", output, "--prompt", "Milly and Olly", "--type", "f32", "-q"]);
    assert_eq!(Dump::open(&prompt).unwrap().description().source, "a prompt");
}

#[test]
fn dumps_that_cannot_be_made_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump.safetensors");
    let output = path.to_str().unwrap();
    let nowhere = folder.path().join("no/dump.safetensors");
    assert_error(&["study", "dump", "-q", "-o", nowhere.to_str().unwrap()], &["no/dump.safetensors"]);
    let nowhere = iceformer(&["study", "dump", "-o", nowhere.to_str().unwrap()]);
    let told = stderr(&nowhere);
    assert!(told.ends_with("no/dump.safetensors: No such file or directory (os error 2)\n"), "{told}");
    // Before the model reads, which would be told.
    let place = folder.path().to_str().unwrap();
    let told = stderr(&iceformer(&["study", "dump", "-o", place])).to_owned();
    assert_eq!(told, format!("error: {place}: is a folder; expected the name of a file\n"));
    // A pipe has no path of its own.
    #[cfg(target_os = "linux")]
    assert_error(&["study", "dump", "-q", "-o", "/dev/stdout"], &["/dev/stdout: is a device, pipe or socket"]);
    assert_error(&["study", "dump", "-q", "-o", output, "--model", "no/model"], &["no/model"]);
    assert_error(&["study", "dump", "-q", "-o", output, "--prompt", ""], &["the text is empty"]);
    let long = folder.path().join("long.txt");
    std::fs::write(&long, "Milly ".repeat(60_000)).unwrap();
    assert_error(
        &["study", "dump", "-q", "-o", output, "--file", long.to_str().unwrap()],
        &["context", "--tokens 65536"],
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the text is there");
}

const ONCE: [&str; 4] = ["--repeat", "1", "--threads", "2"];

#[test]
fn attention_on_a_dump_is_measured_layer_by_layer() {
    let folder = tempfile::tempdir().unwrap();
    let path = dump(folder.path(), 100);
    let from = ["bench", "attention", "--from", path.to_str().unwrap()];
    let more = ["--kv-type", "f32", "--against", "exact", "--tokens", "250", "--chunk", "64", "--samples", "40"];
    let measured = lines(&[&from[..], &more, &ONCE].concat());
    assert_eq!(measured.len(), 9, "a line for each layer and one for all");
    for (index, line) in measured.iter().enumerate() {
        let (layer, layers) = if index < 8 { (Value::from(index), 1) } else { ("all".into(), 8) };
        assert_eq!(line["layer"], layer);
        assert_eq!(line["allowed_keys"], 6 * layers * (1..=250).sum::<u64>());
        assert_eq!(line["samples"].as_u64(), Some(40 * layers));
        // Exact attention misses nothing.
        for field in ["missed_mass_p50", "missed_mass_p95", "missed_mass_p99", "relative_error"] {
            assert!(line[field].as_f64().unwrap() < 1e-5, "{field} of {line}");
        }
        assert_eq!((line["kept_share"].as_f64(), line["fallback_share"].as_f64()), (Some(1.0), Some(0.0)));
        assert_eq!((line["mask"].as_str(), line["heads"].as_u64()), (Some("causal"), Some(6)));
        assert!(line["exact_cpu_seconds"].as_f64().unwrap() > 0.0 && line["speedup"].as_f64().unwrap() > 0.0);
        for field in ["estimated_missed_mass_p95", "estimated_missed_mass_p99"] {
            assert!(line.get(field).is_some_and(Value::is_null), "exact estimates nothing");
        }
    }

    let decode = lines(&[&from[..], &["--queries", "1", "--samples", "0"], &ONCE].concat());
    let ceiling = |line: &Value| line["memory_gigabytes_per_second"].as_f64().unwrap();
    assert!(decode.iter().all(|line| ceiling(line) == ceiling(&decode[0])), "measured once");

    let one = ["--layer", "2", "--queries", "1", "--mask", "full", "--tokens", "900", "--tile-noise", "0.05"];
    let measured = lines(&[&from[..], &one, &ONCE].concat());
    assert_eq!((measured.len(), measured[0]["allowed_keys"].as_u64()), (1, Some(5400)));
    assert_eq!(measured[0]["samples"], 6, "all rows there are");
    assert_eq!(measured[0]["tile_noise"], 0.05);
}

#[test]
fn a_method_that_leaves_keys_out_misses_mass() {
    let shape = ["--tokens", "600", "--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--kv-type", "f32"];
    let measure = |generator: &str, method: &str, more: &[&str]| {
        let call = ["bench", "attention", "--generator", generator, "--method", method];
        lines(&[&call[..], &shape, &ONCE, more].concat()).remove(0)
    };
    let number = |line: &Value, field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field} in {line}"));
    for generator in ["gauss", "cluster", "peaky"] {
        let exact = measure(generator, "exact", &[]);
        assert!(number(&exact, "missed_mass_p99") < 1e-5 && exact["generator"] == generator);
        let dci = measure(generator, "dci", &["--chunk", "200"]);
        assert!(number(&dci, "kept_share") < 0.2, "{dci}");
        assert!(number(&dci, "missed_mass_p99") > 1e-4 && number(&dci, "relative_error") > 0.0, "{dci}");
        let masses = ["missed_mass_p50", "missed_mass_p95", "missed_mass_p99"].map(|field| number(&dci, field));
        assert!(masses.is_sorted() && masses[2] <= 1.0, "{dci}");
    }
    // In one call and in chunks the same rows see the same keys.
    let (whole, chunked) = (measure("peaky", "exact", &[]), measure("peaky", "exact", &["--chunk", "128"]));
    assert_eq!(whole["allowed_keys"], chunked["allowed_keys"]);
    assert!(measure("gauss", "exact", &["--samples", "0"])["missed_mass_p50"].is_null());
}

#[test]
fn what_is_read_first_is_known_while_decoding() {
    let folder = tempfile::tempdir().unwrap();
    // Every key comes sixty times: clusters of such keys lose nothing.
    let path = dump(folder.path(), 100);
    let case = ["bench", "attention", "--from", path.to_str().unwrap(), "--layer", "0", "--method", "budgeted"];
    let queries = ["--tokens", "6000", "--queries", "3", "--chunk", "1", "--samples", "18", "--budget", "0.05"];
    let measure = |more: &[&str]| lines(&[&case[..], &queries, &ONCE, more].concat()).remove(0);
    let number = |line: &Value, field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field} in {line}"));
    let (cold, warm) = (measure(&[]), measure(&["--read-first", "1000"]));
    assert_eq!((cold["read_first"].as_u64(), warm["read_first"].as_u64()), (Some(0), Some(1000)));
    assert_eq!((cold["allowed_keys"].as_u64(), cold["queries"].as_u64()), (warm["allowed_keys"].as_u64(), Some(3)));
    // Nothing is left to clusters before some tokens were measured.
    assert_eq!(number(&cold, "kept_share"), 1.0);
    assert!(number(&warm, "kept_share") < 0.5, "{warm}");
    assert!(number(&warm, "missed_mass_p99") <= 0.05, "{warm}");
}

#[test]
fn bad_dumps_and_settings_are_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = dump(folder.path(), 60);
    let name = path.to_str().unwrap();
    assert_error(&["bench", "attention", "--from", name, "--layer", "8"], &["--layer 8", "layers 0 to 7"]);
    assert_error(&["bench", "attention", "--from", name, "--queries", "61"], &["--queries 61"]);
    let first = ["--method", "budgeted", "--queries", "50", "--read-first", "11"];
    assert_error(&[&["bench", "attention", "--from", name][..], &first].concat(), &["--read-first 11", "10 of 60"]);
    let first = ["--tokens", "50", "--queries", "5", "--read-first", "5"];
    let bench = ["bench", "attention"];
    for methods in [&["--method", "exact"][..], &["--method", "dci", "--against", "budgeted"]] {
        assert_error(&[&bench[..], &first, methods].concat(), &["--read-first", "--method"]);
    }
    let full = ["--method", "budgeted", "--queries", "5", "--read-first", "5", "--mask", "full"];
    assert_error(&[&bench[..], &full].concat(), &["--read-first", "causal"]);
    assert_error(&["bench", "attention", "--from", "no/dump"], &["no/dump"]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.pop();
    std::fs::write(&path, &bytes).unwrap();
    assert_error(&["bench", "attention", "--from", name], &["dump.safetensors", "was cut"]);
    let usage = iceformer(&["bench", "attention", "--from", name, "--heads", "4"]);
    assert_eq!(usage.status.code(), Some(2));
    assert_eq!(iceformer(&["bench", "attention", "--layer", "1"]).status.code(), Some(2));
    assert_eq!(iceformer(&["bench", "attention", "--from", name, "--tile-noise", "-1"]).status.code(), Some(2));
    // A dump of its own length has no repeated keys.
    for command in [&["bench", "attention", "--from", name][..], &["study", "replay", name]] {
        let output = iceformer(&[command, &["--tile-noise", "0.5"]].concat());
        assert!(output.status.code() == Some(2) && stderr(&output).contains("--tokens"), "{}", stderr(&output));
    }
}

#[test]
fn a_replay_compares_choices() {
    let folder = tempfile::tempdir().unwrap();
    let path = dump(folder.path(), 100);
    let name = path.to_str().unwrap();
    assert_error(&["study", "replay", name], &["100 tokens", "2704", "--tokens"]);
    assert_error(&["study", "replay", name, "--layer", "8"], &["--layer 8", "layers 0 to 7"]);
    assert_error(&["study", "replay", "no/dump"], &["no/dump"]);
    assert_eq!(iceformer(&["study", "replay", name, "--share", "1.5"]).status.code(), Some(2));

    let replay = ["study", "replay", name, "--layer", "1", "--tokens", "2750", "--tiles", "1", "--share", "0.1,0.3"];
    let measured = lines(&replay);
    let (limits, choices) = measured.split_last().unwrap();
    let of = |scorer: &str, share: f64| {
        let wanted = |line: &&Value| {
            line["scorer"] == scorer && line["share"] == share && line["tail"] == "none" && line["tile"] == 1
        };
        choices.iter().find(wanted).unwrap_or_else(|| panic!("{scorer} at {share}"))
    };
    let scorers = ["oracle-keys", "page-mean", "centroid", "min-max", "four-bit", "second-order", "second-order-error"];
    for scorer in scorers {
        let (few, many) = (of(scorer, 0.1), of(scorer, 0.3));
        let number = |line: &Value, field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field} in {line}"));
        assert_eq!(few["rows"], 24, "four tokens of each tile, six heads");
        assert!(number(many, "retained_p50") >= number(few, "retained_p50"), "{few} {many}");
        assert!(
            number(many, "touched") > number(few, "touched") && number(many, "operations") > number(few, "operations")
        );
        for field in
            ["retained_p1", "retained_p5", "missed_mass_p50", "missed_mass_p95", "missed_mass_p99", "relative_error"]
        {
            assert!((0.0..=1.0 + 1e-6).contains(&number(few, field)), "{field} of {few}");
        }
    }
    for scorer in ["antidiagonal", "representatives", "dci"] {
        assert!(choices.iter().any(|line| line["scorer"] == scorer), "{scorer}");
    }
    assert_eq!(limits["needed_share"].as_array().unwrap().len(), 3);
    assert!(limits["far_keys"].as_f64().unwrap() >= 1024.0);

    let output = iceformer(&["study", "replay", name, "--layer", "1", "--tokens", "2750", "--tiles", "1"]);
    let table = std::str::from_utf8(&output.stdout).unwrap();
    assert!(table.starts_with("scorer") && table.contains("second-order-error") && table.contains("an oracle needs"));
}
