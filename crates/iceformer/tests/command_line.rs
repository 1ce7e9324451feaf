//! The program from outside: output, errors and exit codes.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Output, Stdio};

use common::{
    assert_error, chat_model, copied_model, iceformer, json, model, on_reference, stderr, stdout, unread, with_input,
};
use serde_json::Value;

#[test]
fn text_goes_to_stdout_and_figures_to_stderr() {
    let output = on_reference(&["--prompt", "The little girl looked at the", "-n", "12"]);
    assert!(output.status.success());
    assert!(stdout(&output).len() > 12 && stdout(&output).ends_with('\n'));
    let told = stderr(&output);
    for part in
        ["loading: 8 layers in", "reading: ", "prompt", "decode", "tokens/s", "attention", "int8", "--max-tokens"]
    {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    assert!(!told.contains('\r') && !told.contains('\u{1b}'), "plain lines where no terminal is");
    let quiet = on_reference(&["--prompt", "The little girl looked at the", "-n", "12", "--quiet"]);
    assert_eq!((stdout(&quiet), stderr(&quiet)), (stdout(&output), ""));
}

#[test]
fn json_holds_text_and_figures() {
    let plain = on_reference(&["--prompt", "Once upon a time", "-n", "10", "-q"]);
    let value = json(&on_reference(&["--prompt", "Once upon a time", "-n", "10", "--json", "-q", "--threads", "1"]));
    assert_eq!(format!("{}\n", value["text"].as_str().unwrap()), stdout(&plain));
    assert_eq!((value["finish"].as_str(), value["generated_tokens"].as_u64()), (Some("length"), Some(10)));
    let built_in = json(&iceformer(&["run", "--prompt", "Once", "-n", "1", "--json", "-q"]));
    assert_eq!(built_in["model"], "built-in reference model");
    assert_eq!((value["threads"].as_u64(), value["kv_type"].as_str()), (Some(1), Some("int8")));
    let shares: f64 =
        ["attention_share", "linear_share", "rest_share"].map(|n| value[n].as_f64().unwrap()).iter().sum();
    assert!((shares - 1.0).abs() < 1e-6);
    assert!(value["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(value["cache_bytes"].as_u64().unwrap() > 0 && !value["kernels"].as_array().unwrap().is_empty());
}

#[test]
fn kernels_are_listed_once() {
    let kernels = |method: &str| {
        let run = ["--prompt", "Once", "-n", "1", "--json", "-q", "--kv-type", "f32", "--method", method];
        json(&on_reference(&run))["kernels"].as_array().unwrap().clone()
    };
    let exact = kernels("exact");
    let repeated = exact.iter().enumerate().any(|(index, kernel)| exact[..index].contains(kernel));
    assert!(!exact.is_empty() && !repeated, "{exact:?}");
    assert!(kernels("dci").last().unwrap().as_str().unwrap().starts_with("panels-"), "the search");
}

#[test]
fn the_report_tells_what_attention_kept() {
    let text = (0..480).map(|line| format!("Line {line} tells of the {} hill.\n", line * 37 % 101)).collect::<String>();
    let run = |more: &[&str]| with_input(&[&["run", "-n", "2", "--threads", "2"], more].concat(), &text);
    // A budget asks for the method that keeps it.
    let output = run(&["--budget", "0.2", "--json"]);
    assert!(stderr(&output).contains("budgeted kept "), "{}", stderr(&output));
    let value = json(&output);
    let tokens = value["prompt_tokens"].as_u64().unwrap();
    assert!(tokens > 5_200, "{tokens} tokens are too few for clusters");
    let attention = &value["attention"];
    assert_eq!((&attention["method"], &attention["layers"].as_array().unwrap().len()), (&"budgeted".into(), &8));
    let kept = attention["kept_share"].as_f64().unwrap();
    assert!(kept < 1.0, "kept {kept}");
    let of_heads: Vec<f64> = attention["layers"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|layer| layer.as_array().unwrap())
        .map(|head| head["kept_share"].as_f64().unwrap())
        .collect();
    assert_eq!(of_heads.len(), 48);
    assert!(of_heads.iter().any(|&of_head| of_head <= kept) && of_heads.iter().any(|&of_head| of_head >= kept));
    assert!(attention["estimated_missed_mass_p99"].as_f64().unwrap() < 0.5);

    let exact = json(&on_reference(&["--prompt", "Once", "-n", "1", "--json", "-q"]));
    assert_eq!((&exact["attention"]["kept_share"], &exact["attention"]["layers"]), (&1.0.into(), &Value::Null));
    assert_error(&run(&["--method", "exact", "--budget", "0.1"]), 1, &["--budget is for --method budgeted"]);
    assert_error(&run(&["--method", "budgeted", "--budget", "7"]), 2, &["--budget", "above 0 and up to 1"]);
}

#[test]
fn files_prompt_and_standard_input_are_one_text() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "\u{feff}One two three.").unwrap();
    let count = |output: &Output| json(output)["prompt_tokens"].as_u64().unwrap();
    let run = ["run", "-n", "1", "--json", "-q"];
    let file = file.to_str().unwrap();
    let whole = count(&iceformer(&[&run[..], &["--prompt", "One two three.\n\nFour five."]].concat()));
    assert_eq!(count(&iceformer(&[&run[..], &["--file", file, "--prompt", "Four five."]].concat())), whole);
    assert_eq!(count(&with_input(&[&run[..], &["--file", file, "--file", "-"]].concat(), "Four five.")), whole);
    assert_eq!(count(&with_input(&run, "One two three.\n\nFour five.")), whole);
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let run = |seed: &str, threads: &str| {
        let sampling = ["--temperature", "1.2", "--top-k", "0", "--seed", seed, "--threads", threads];
        let output = on_reference(&[&["--prompt", "The house by the", "-n", "30", "-q"], &sampling[..]].concat());
        stdout(&output).to_owned()
    };
    assert_eq!(run("3", "1"), run("3", "2"));
    assert_ne!(run("3", "1"), run("4", "1"));
}

#[test]
fn stop_strings_end_the_text() {
    let whole = on_reference(&["--prompt", "It was a", "-n", "40", "-q"]);
    let stop: String = stdout(&whole).chars().skip(15).take(6).collect();
    let value = json(&on_reference(&["--prompt", "It was a", "-n", "40", "-q", "--json", "--stop", &stop]));
    assert_eq!(value["finish"], "stop");
    let text = value["text"].as_str().unwrap();
    assert!(stdout(&whole).starts_with(text) && !text.contains(&stop));
}

#[test]
fn errors_are_one_line_and_exit_with_1() {
    assert_error(&iceformer(&["run", "--model", "no/such/model", "-p", "x"]), 1, &["no/such/model", "No such file"]);
    assert_error(&on_reference(&["-p", "x", "--file", "no/such/file"]), 1, &["no/such/file"]);
    assert_error(&on_reference(&["-p", ""]), 1, &["prompt is empty"]);
    assert_error(&on_reference(&["-p", "x", "--temperature", "-1"]), 1, &["temperature is -1", "0 to 100"]);
    assert_error(&on_reference(&["-p", "x", "--top-p", "0"]), 1, &["top-p is 0"]);
    assert_error(&on_reference(&["-p", "x", "--context", "70000"]), 1, &["70000", "65536"]);
    let long = on_reference(&["-p", "one two three four", "--context", "3"]);
    assert_error(&long, 1, &["the prompt has ", " tokens; the context takes 3"]);
    assert!(!stderr(&long).contains("held"), "{}", stderr(&long));
    assert_error(&on_reference(&["-f", "/dev/null", "-p", ""]), 1, &["prompt is empty"]);
    assert_error(&on_reference(&["-f", "-", "-f", "-"]), 1, &["--file - is given 2 times"]);
    assert_error(&on_reference(&["-p", "x", "--chat"]), 1, &["no chat template"]);
    assert_error(&iceformer(&["inspect", "no/such/model"]), 1, &["no/such/model"]);
    assert_error(&iceformer(&["bench", "linear", "--weights", "q4_k", "--in", "100"]), 1, &["--in 100", "256"]);
    assert_error(&iceformer(&["bench", "attention", "--heads", "3", "--kv-heads", "2"]), 1, &["--heads 3"]);
}

#[test]
fn damaged_models_are_named() {
    let folder = copied_model();
    let path = folder.path().to_str().unwrap();
    let run = || iceformer(&["run", "--model", path, "-p", "x", "-n", "1", "-q"]);
    assert!(run().status.success());

    let tokenizer = folder.path().join("tokenizer.json");
    let kept = std::fs::read(&tokenizer).unwrap();
    std::fs::remove_file(&tokenizer).unwrap();
    assert_error(&run(), 1, &["tokenizer.json", "missing"]);
    std::fs::write(&tokenizer, kept).unwrap();

    let weights = folder.path().join("model.safetensors");
    let kept = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &kept[..kept.len() / 2]).unwrap();
    assert_error(&run(), 1, &["model.safetensors"]);
    std::fs::write(&weights, kept).unwrap();

    let config = folder.path().join("config.json");
    let kept = std::fs::read_to_string(&config).unwrap();
    let other = kept.replace("\"model_type\": \"llama\"", "\"model_type\": \"parrot\"");
    assert_ne!(other, kept);
    std::fs::write(&config, other.replace("LlamaForCausalLM", "ParrotForCausalLM")).unwrap();
    assert_error(&run(), 1, &["config.json", "parrot", "llama"]);
}

#[test]
fn wrong_usage_is_one_line_and_exits_with_2() {
    assert_error(&iceformer(&["run", "--threads", "0"]), 2, &["--threads", "1 to 1024"]);
    assert_error(&iceformer(&["run", "--chunk", "0"]), 2, &["--chunk", "at least 1"]);
    assert_error(&iceformer(&["run", "--context", "0"]), 2, &["--context", "at least 1"]);
    assert_error(&iceformer(&["run", "--kv-type", "int3"]), 2, &["--kv-type", "f32, bf16, int8"]);
    assert_error(&iceformer(&["run", "--chat", "--no-chat"]), 2, &["--no-chat"]);
    assert_error(&iceformer(&["run", "-p", "x", "--stop", ""]), 2, &["--stop", "at least one character"]);
    assert_error(&iceformer(&["walk"]), 2, &["walk"]);
    for command in [&["run", "-p", "x"][..], &["eval", "needle"], &["bench", "attention"], &["study", "replay", "x"]] {
        let output = iceformer(&[command, &["--seed", "-1"]].concat());
        assert_error(&output, 2, &["'-1' for '--seed", "expected a whole number from 0 to 18446744073709551615"]);
    }
    for (arguments, option) in [
        (&["run", "-n", "-1"][..], "--max-tokens"),
        (&["run", "-t", "-1"], "--threads"),
        (&["run", "--top-k", "-1"], "--top-k"),
        (&["eval", "needle", "--depths", "-1"], "--depths"),
        (&["eval", "longeval", "--lengths", "600,-1"], "--lengths"),
        (&["bench", "linear", "--repeat", "-1"], "--repeat"),
        (&["bench", "attention", "--layer", "-1"], "--layer"),
        (&["study", "replay", "x", "--share", "-1"], "--share"),
    ] {
        assert_error(&iceformer(arguments), 2, &["'-1' for '", option, "expected a"]);
    }
    assert_error(&iceformer(&["bench"]), 2, &["command"]);
    assert_error(&iceformer(&["bench", "prompt"]), 2, &["--shape", "--model"]);
    assert_error(&iceformer(&["bench", "linear", "--weights", "q3"]), 2, &["--weights", "q4_k"]);
    let mut wrong_set = assert_cmd::Command::cargo_bin("iceformer").unwrap();
    let output = wrong_set.args(["run", "-p", "x"]).env("ICEFORMER_ISA", "mmx").output().unwrap();
    assert_error(&output, 1, &["ICEFORMER_ISA", "mmx", "portable"]);
}

#[test]
fn help_and_version_exit_with_0() {
    let help = iceformer(&["--help"]);
    assert!(help.status.success() && stdout(&help).contains("inspect") && stderr(&help).is_empty());
    assert!(stdout(&iceformer(&["--version"])).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_chat_template_is_used_where_the_model_has_one() {
    let folder = chat_model();
    let path = folder.path().to_str().unwrap();
    let count = |more: &[&str]| {
        let run = ["run", "--model", path, "-p", "Hello", "-n", "1", "--json", "-q"];
        json(&iceformer(&[&run[..], more].concat()))["prompt_tokens"].as_u64().unwrap()
    };
    let plain = count(&["--no-chat"]);
    assert_eq!(count(&[]), plain + 2, "<|user|> and <|end|> around the text");
    assert_eq!(count(&["--chat"]), plain + 2);
    assert!(count(&["--system", "Be brief."]) > plain + 4);
    assert_eq!(
        count(&["--template-variable", "verbose=true"]),
        plain + 2,
        "a variable that this template does not know"
    );

    // One that cannot be used is in the way of chats only.
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"chat_template": "{% for"}"#).unwrap();
    assert_eq!(count(&["--no-chat"]), plain);
    let run = iceformer(&["run", "--model", path, "-p", "Hello", "-n", "1", "-q"]);
    assert_error(&run, 1, &["tokenizer_config.json: chat template", "--no-chat"]);
    let told = json(&iceformer(&["inspect", path, "--json"]));
    assert!(told["chat_template"].is_null());
    assert!(told["chat_template_error"].as_str().unwrap().contains("tokenizer_config.json: chat template"));
    assert!(stdout(&iceformer(&["inspect", path])).contains("unusable: "));
    let perplexity = ["eval", "perplexity", "-m", path, "--lengths", "64", "--scored", "8", "--cases", "1", "-q"];
    assert!(iceformer(&perplexity).status.success());
    let longeval = ["eval", "longeval", "-m", path, "--lengths", "1k", "--cases", "1", "-q"];
    assert_error(&iceformer(&longeval), 1, &["tokenizer_config.json: chat template", "--no-chat"]);
}

#[test]
fn variables_reach_the_chat_template() {
    let folder = chat_model();
    let template =
        "{{ messages[0].content }}{% if mood is defined %} {{ mood }}{% endif %}{% if loud is true %} LOUD{% endif %}";
    let config = serde_json::json!({ "chat_template": template }).to_string();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let run = |prompt: &str, variables: &[&str]| {
        let named: Vec<&str> = variables.iter().flat_map(|variable| ["--template-variable", *variable]).collect();
        let run = ["run", "-m", folder.path().to_str().unwrap(), "-p", prompt, "-n", "8", "-q"];
        iceformer(&[&run[..], &named].concat())
    };
    for (variables, text) in [
        (&["mood=glad"][..], "Hello glad"),
        (&["mood=\"glad\"", "loud=true"], "Hello glad LOUD"),
        (&["mood=a=b", "loud=yes"], "Hello a=b"),
        (&["mood="], "Hello "),
    ] {
        assert_eq!(stdout(&run("Hello", variables)), stdout(&run(text, &[])), "{variables:?}");
    }
    for wrong in ["mood", "=glad"] {
        assert_error(&run("Hello", &[wrong]), 2, &["--template-variable", "expected NAME=VALUE"]);
    }
    assert_error(&run("Hello", &["mood=1", "mood=2"]), 1, &["--template-variable mood is given twice"]);
    assert_error(&run("Hello", &["messages=1"]), 1, &["variable messages is set already"]);
    assert_error(&on_reference(&["-p", "x", "--template-variable", "a=1"]), 1, &["no chat template"]);
    assert_error(&on_reference(&["-p", "x", "--no-chat", "--template-variable", "a=1"]), 2, &["--no-chat"]);
}

#[cfg(unix)]
#[test]
fn input_that_is_not_read_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.txt");
    std::fs::write(&path, "One two three.").unwrap();
    let file = path.to_str().unwrap();
    let empty = folder.path().join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let told = |input: Stdio, more: &[&str]| {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("iceformer"));
        let output = command.args(["run", "-n", "1"]).args(more).stdin(input).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output).contains("warning: standard input is not read; --file - reads it\n")
    };
    let opened = |path: &std::path::Path| Stdio::from(std::fs::File::open(path).unwrap());
    // A pipe whose other end stays open: to read it would be to wait.
    let (pipe, _writer) = std::io::pipe().unwrap();
    assert!(told(pipe.into(), &["-p", "x"]));
    assert!(told(opened(&path), &["-p", "x"]) && told(opened(&path), &["-f", file]));
    assert!(!told(opened(&path), &["-p", "x", "-q"]));
    assert!(!told(opened(&path), &["-p", "x", "-f", "-"]) && !told(opened(&path), &[]));
    assert!(!told(opened(&empty), &["-p", "x"]) && !told(Stdio::null(), &["-p", "x"]));
}

#[test]
fn inspect_tells_what_is_in_the_files() {
    let path = model();
    let table = iceformer(&["inspect", path.to_str().unwrap(), "--tensors"]);
    for part in ["llama", "14,162,304", "65,536 tokens", "74 of bf16", "model.layers.7.mlp.down_proj.weight"] {
        assert!(stdout(&table).contains(part), "{part:?} is not in {}", stdout(&table));
    }
    let value = json(&iceformer(&["inspect", path.to_str().unwrap(), "--json", "--tensors"]));
    assert_eq!((value["family"].as_str(), value["parameters"].as_u64()), (Some("llama"), Some(14_162_304)));
    assert_eq!(value["tensors"].as_array().unwrap().len(), 74);
    assert_eq!(value["config"]["kv_heads"], 2);
    assert_eq!(value["tokenizer"]["vocabulary"], 4096);
}

/// What begins beyond the trained context is not applied, and must not look as if there were none.
#[test]
fn dynamic_scaling_is_told() {
    let folder = chat_model();
    let (config, path) = (folder.path().join("config.json"), folder.path().to_str().unwrap());
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    value["rope_scaling"] = serde_json::json!({"rope_type": "dynamic", "factor": 2.0});
    value["max_position_embeddings"] = 20.into();
    std::fs::write(&config, value.to_string()).unwrap();
    let told = "dynamic, factor 2, not applied: no text beyond 20 tokens is read";
    assert!(stdout(&iceformer(&["inspect", path])).contains(told));
    assert_eq!(json(&iceformer(&["inspect", path, "--json"]))["config"]["rope_scaling"], told);
    let long = iceformer(&["run", "-m", path, "-p", &"word ".repeat(40)]);
    assert_error(&long, 1, &["the context takes 20 (it asks for dynamic rope scaling beyond that"]);
}

/// Some types take more memory than their files.
#[test]
fn inspect_tells_of_types_that_are_computed_as_another() {
    let file = "../../testing/golden/parity_gguf/llama-tied-q3_k.gguf";
    let table = iceformer(&["inspect", file]);
    assert!(
        stdout(&table).contains("of q3_k, ") && stdout(&table).contains(", computed as q6_k"),
        "{}",
        stdout(&table)
    );
    let value = json(&iceformer(&["inspect", file, "--json", "--tensors"]));
    let kind = &value["types"][0];
    assert_eq!((kind["name"].as_str(), kind["computed_as"].as_str()), (Some("q3_k"), Some("q6_k")));
    assert!(value["tensors"].as_array().unwrap().iter().any(|tensor| tensor["computed_as"] == "q6_k"));
    assert!(iceformer(&["run", "-m", file, "-p", "Once", "--max-tokens", "2", "-q"]).status.success());
}

#[test]
fn bench_lines_carry_their_fields() {
    let numbers = |value: &Value, names: &[&str]| {
        for name in names {
            assert!(value[name].as_f64().is_some_and(|number| number > 0.0), "{name} in {value}");
        }
    };
    let timed = ["cpu_seconds", "wall_seconds"];
    let rated = ["cpu_seconds", "wall_seconds", "rate_per_core", "ceiling_fraction"];
    let ceilings = json(&iceformer(&["bench", "ceilings", "--repeat", "1", "--threads", "1", "--json"]));
    numbers(&ceilings, &timed);
    numbers(
        &ceilings,
        &["f32_rate_per_core", "bf16_rate_per_core", "int8_rate_per_core", "memory_gigabytes_per_second"],
    );

    let once = ["--repeat", "1", "--threads", "1", "--json"];
    let linear = ["bench", "linear", "--weights", "q8_0", "--rows", "1", "--in", "256", "--out", "64"];
    let linear = json(&iceformer(&[&linear[..], &once].concat()));
    numbers(&linear, &rated);
    numbers(&linear, &["bandwidth_fraction"]);
    assert!(linear["kernel"].as_str().unwrap().contains('-'));

    let attention = ["bench", "attention", "--method", "exact", "--tokens", "64", "--heads", "2", "--kv-heads", "1"];
    let attention = [&attention[..], &["--head-dim", "32", "--kv-type", "int8", "--queries", "16"], &once].concat();
    let attention = json(&iceformer(&attention));
    numbers(&attention, &rated);
    assert_eq!(attention["allowed_keys"], 2 * (49..=64).sum::<u64>());
    // One page of keys and values of 36 bytes each is read, of the 512 that there is room for.
    let decode = ["bench", "attention", "--method", "exact", "--tokens", "16", "--heads", "2", "--kv-heads", "1"];
    let decode = [&decode[..], &["--head-dim", "32", "--kv-type", "int8", "--queries", "1"], &once].concat();
    let decode = json(&iceformer(&decode));
    numbers(&decode, &["bandwidth_fraction"]);
    let read = decode["gigabytes_per_second"].as_f64().unwrap() * decode["wall_seconds"].as_f64().unwrap() * 1e9;
    assert!((read - 16.0 * 2.0 * 36.0).abs() < 1.0, "{read} bytes");
    assert_eq!(decode["cache_bytes"], 512 * 2 * 36);

    let path = model();
    let prompt = ["bench", "prompt", "--model", path.to_str().unwrap(), "--tokens", "100", "--generate", "4"];
    let prompt = json(&iceformer(&[&prompt[..], &once].concat()));
    numbers(&prompt, &timed);
    let names = [
        "prompt_cpu_seconds",
        "prompt_tokens_per_second",
        "decode_tokens_per_second",
        "attention_share",
        "load_seconds",
    ];
    numbers(&prompt, &names);
    assert_eq!(prompt["tokens"], 100);
    numbers(&prompt, &["bandwidth_fraction", "ceiling_fraction"]);
    assert_eq!((prompt["method"].as_str(), &prompt["budget"]), (Some("exact"), &Value::Null));
    assert_eq!((prompt["kept_share"].as_f64(), prompt["index_bytes"].as_u64()), (Some(1.0), Some(0)));
    let sparse = ["bench", "prompt", "--model", path.to_str().unwrap(), "--tokens", "6000", "--budget", "0.2"];
    let sparse = json(&iceformer(&[&sparse[..], &["--generate", "2"], &once].concat()));
    assert_eq!((sparse["method"].as_str(), sparse["budget"].as_f64()), (Some("budgeted"), Some(0.2)));
    assert!(sparse["kept_share"].as_f64().is_some_and(|share| share < 1.0), "{sparse}");
    numbers(&sparse, &["index_bytes"]);
    assert!(sparse["fallback_share"].is_f64() && sparse.get("bandwidth_fraction").is_none(), "{sparse}");
    if cfg!(target_os = "linux") {
        numbers(&prompt, &["peak_resident_bytes"]);
    }
    // Before minutes of work.
    let long = ["bench", "prompt", "--model", path.to_str().unwrap(), "--tokens", "1000000", "--generate", "4"];
    assert_error(&iceformer(&long), 1, &["--tokens 1000000", "1000004 together", "the model takes 65536"]);
    for more in [&[][..], &["--generator", "gauss"], &["--heads", "2"]] {
        let told = if more.is_empty() { "--from" } else { "cannot be used with" };
        assert_error(&iceformer(&[&["bench", "attention", "--layer", "1"], more].concat()), 2, &[told]);
        let noise = ["bench", "attention", "--tile-noise", "0.1", "--tokens", "64"];
        assert_error(&iceformer(&[&noise[..], more].concat()), 2, &[told]);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_and_endless_files_are_named() {
    let model = model();
    for arguments in [
        &["run", "-p", "Once", "-n", "1", "-q"][..],
        &["run", "-p", "Once", "-n", "1", "-q", "--json"],
        &["inspect", model.to_str().unwrap()],
        &["inspect", model.to_str().unwrap(), "--json"],
        &["run", "--help"],
        &["eval", "needle", "--tasks", "single", "--lengths", "400", "--cases", "1", "--methods", "exact", "-q"],
    ] {
        let output = std::process::Command::new(assert_cmd::cargo::cargo_bin("iceformer"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create("/dev/full").unwrap())
            .output()
            .unwrap();
        assert_error(&output, 1, &["standard output: No space left"]);
    }
    for arguments in [
        &["eval", "longeval", "--data", "/dev/zero", "-q"][..],
        &["eval", "needle", "--text", "/dev/zero", "-q"],
        &["run", "--file", "/dev/zero", "-q"],
    ] {
        assert_error(&iceformer(arguments), 1, &["/dev/zero: more than 256 MiB; expected a text"]);
    }
}

#[test]
fn a_closed_reader_is_no_error() {
    let output = unread(&["run", "-p", "Once upon a time", "-n", "200", "-q"]);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
}

#[cfg(unix)]
#[test]
fn ctrl_c_exits_with_130() {
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("iceformer"))
        .args(["run", "--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Longer than the context would be refused; this takes far more seconds to read than pass until the first line.
    let text = "All that day they walked along the river and over the hills. ".repeat(3500);
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let told = lines.next().unwrap();
    assert!(told.starts_with("reading: ") && told.contains(" left"), "{told}");
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let start = std::time::Instant::now();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(start.elapsed().as_secs() < 10 && stdout(&output).is_empty());
    let last = lines.last().unwrap();
    assert!(last.starts_with("reading: cancelled after ") && last.contains(" of ") && last.contains(" tokens in "));
}

/// The built-in example as a whole. Slow without optimisation: `cargo test --release` runs it.
#[cfg_attr(debug_assertions, ignore = "slow without optimisation")]
#[test]
fn without_arguments_the_example_is_answered() {
    let output = iceformer(&[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output).trim(), "9312021");
    assert!(stderr(&output).contains("The answer is right"));
}
