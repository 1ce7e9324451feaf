//! `iceformer eval` from outside.

mod common;

use common::{assert_error, damaged_model, iceformer, json_lines, records, spawn, stderr, stdout, unread};
use serde_json::Value;

#[test]
fn eval_compares_methods_on_generated_lines() {
    let arguments = ["eval", "longeval", "--lengths", "600", "--cases", "3", "--methods", "exact,budgeted,dci"];
    let lines = json_lines(&iceformer(&[&arguments[..], &["--json", "-q", "--threads", "1"]].concat()));
    let cases = records(&lines, "case");
    assert_eq!(cases.len(), 3 * 5, "exact once, the others in two set-ups");
    for case in &cases {
        let tokens = case["tokens"].as_u64().unwrap();
        assert!((570..=600).contains(&tokens), "{tokens}");
        let read = ["text", "question"].map(|part| case[part]["tokens"].as_u64().unwrap());
        assert_eq!(read.iter().sum::<u64>(), tokens);
        assert!(case["text"]["cpu_seconds"].as_f64().unwrap() > 0.0);
    }
    let of = |method: &str, setup: &str| -> Vec<f64> {
        let own = cases.iter().filter(|case| case["method"] == method && case["setup"] == setup);
        own.map(|case| case["score"].as_f64().unwrap()).collect()
    };
    let exact = of("exact", "everything");
    assert!(exact.iter().sum::<f64>() >= 2.0, "the reference model finds numbers in short records: {exact:?}");
    assert_eq!((exact.len(), of("dci", "question-exact").len()), (3, 3));
    let summaries = records(&lines, "summary");
    assert_eq!(summaries.len(), 5);
    assert_eq!(summaries[0]["retention"], 1.0);
    assert!(summaries[3]["kept_share"].as_f64().unwrap() < 0.5, "{}", summaries[3]);

    let table = iceformer(&[&arguments[..], &["--cases", "1", "-q"]].concat());
    assert_eq!(table.status.code(), Some(2), "--cases twice");
    let table = iceformer(&["eval", "longeval", "--lengths", "600", "--cases", "1", "--methods", "exact,dci"]);
    assert!(table.status.success(), "{}", stderr(&table));
    assert!(stdout(&table).contains("accuracy") && stdout(&table).contains("text only"), "{}", stdout(&table));
}

#[test]
fn eval_reads_published_cases() {
    let folder = tempfile::tempdir().unwrap();
    let case = |number: u32| {
        let prompt = format!(
            "Now the record start:\n\nline red-fox: REGISTER_CONTENT is <{number}>\nline tall-tree: REGISTER_CONTENT is \
             <77>\n\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line red-fox? I need the number."
        );
        serde_json::json!({"random_idx": ["red-fox", 0], "expected_number": number, "prompt": prompt}).to_string()
    };
    let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    write("lines_2.jsonl", format!("{}\n{}\n", case(4321), case(987)));
    let path = folder.path().to_str().unwrap();
    let eval = ["eval", "longeval", "--methods", "exact", "--json", "-q", "--data", path];
    let lines = json_lines(&iceformer(&eval));
    let cases = records(&lines, "case");
    assert_eq!((cases.len(), cases[0]["group"].as_str()), (2, Some("lines_2")));
    assert_eq!(cases[1]["expected"], serde_json::json!([["987"]]));

    let report = folder.path().join("report.html");
    assert!(iceformer(&[&eval[..], &["--report", report.to_str().unwrap()]].concat()).status.success());
    let page = std::fs::read_to_string(&report).unwrap();
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    assert!(page.contains("<dt>data</dt>") && page.contains(name) && !page.contains("Milly and Olly"), "{page}");

    write("lines_3.jsonl", case(1).replace("expected_number\":1", "expected_number\":\"12\""));
    assert_error(&iceformer(&eval), 1, &["lines_3.jsonl: line 1: expected_number is \"12\"; expected a whole number"]);
    std::fs::write(folder.path().join("lines_3.jsonl"), [case(1).as_bytes(), b"\n\xff"].concat()).unwrap();
    assert_error(&iceformer(&eval), 1, &["lines_3.jsonl: line 2: not UTF-8 text"]);
    write("lines_3.jsonl", "{}\n".into());
    assert_error(&iceformer(&eval), 1, &["lines_3.jsonl: line 1: prompt is missing"]);
    write("lines_3.jsonl", String::new());
    assert_error(&iceformer(&eval), 1, &["lines_3.jsonl: no cases"]);
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    assert_error(&iceformer(&["eval", "longeval", "--data", path]), 1, &["no .jsonl files"]);
}

#[test]
fn eval_measures_perplexity_and_divergence() {
    let arguments = ["eval", "perplexity", "--context", "300", "--scored", "64", "--cases", "2", "--methods", "dci"];
    let lines = json_lines(&iceformer(&[&arguments[..], &["--json", "-q"]].concat()));
    let summaries = records(&lines, "summary");
    assert_eq!(summaries.len(), 3, "exact runs though it was not asked for");
    let number = |index: usize, name: &str| summaries[index][name].as_f64().unwrap();
    assert_eq!((number(0, "divergence"), number(0, "perplexity_ratio")), (0.0, 1.0));
    assert!((5.0..500.0).contains(&number(0, "perplexity")), "{}", summaries[0]);
    // Up to 640 keys dci looks at all of them but keeps 20.
    assert!(number(1, "divergence") > number(2, "divergence") && number(2, "divergence") > 0.0);
    assert_eq!(records(&lines, "case").len(), 2 * 3);
}

#[test]
fn eval_takes_windows_of_all_texts_in_turn() {
    let folder = tempfile::tempdir().unwrap();
    let mut texts = Vec::new();
    for (name, sentences) in [("long", 60), ("short", 45), ("tiny", 1)] {
        let path = folder.path().join(name).with_extension("txt");
        std::fs::write(&path, "The old man walked slowly down to the river. ".repeat(sentences)).unwrap();
        texts.extend(["--text".to_owned(), path.to_str().unwrap().to_owned()]);
    }
    // The first once more, which would count its windows twice.
    texts.extend_from_within(..2);
    let report = folder.path().join("report.html");
    let run = ["eval", "perplexity", "--lengths", "200,200", "--scored", "20", "--methods", "exact", "--json"];
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let run = |more: &[&str]| iceformer(&[&run[..], &texts, more].concat());
    let output = run(&["--cases", "9", "--report", report.to_str().unwrap()]);
    let note = "instead of 9; too short for a window of 200 tokens: tiny";
    assert!(stderr(&output).contains(note), "{}", stderr(&output));
    let lines = json_lines(&output);
    let cases = records(&lines, "case");
    let place = |case: &&Value| (case["source"].as_str().unwrap().to_owned(), case["first_token"].as_u64().unwrap());
    let places: Vec<_> = cases.iter().map(place).collect();
    let expected = [("long", 0), ("short", 0), ("long", 200), ("short", 200)].map(|(name, at)| (name.to_owned(), at));
    assert!(places.starts_with(&expected) && places.len() < 9, "{places:?}");
    assert_eq!(cases.last().unwrap()["case"].as_u64(), Some(cases.len() as u64 - 1), "each length once");
    let page = std::fs::read_to_string(&report).unwrap();
    assert!(page.contains("Places in the texts") && page.contains(note), "{page}");

    let output = run(&["--cases", "1"]);
    assert!(stderr(&output).contains("no window of 200 tokens is read of short; ask for more cases"));
    assert_eq!(stderr(&run(&["--cases", "1", "-q"])), "");
}

#[test]
fn texts_whose_names_are_alike_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "The old man walked slowly down to the river. ".repeat(60)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (first, second, other) = (path("a/same.txt"), path("b/same.txt"), path("b/other.txt"));
    let texts = ["--text", &first, "--text", &second, "--text", &other];
    let run = ["eval", "perplexity", "--lengths", "200", "--cases", "3", "--methods", "exact", "--json", "-q"];
    let lines = json_lines(&iceformer(&[&run[..], &texts].concat()));
    let sources: Vec<_> = records(&lines, "case").iter().map(|case| case["source"].as_str().unwrap()).collect();
    assert_eq!(sources, [&first, &second, "other"]);
}

/// As `run` does, instead of a table of NaN.
#[test]
fn damaged_weights_are_no_measurement() {
    let folder = damaged_model();
    let model = folder.path().to_str().unwrap();
    let told = ["the model's logits are not numbers; the weights are damaged"];
    let perplexity = ["eval", "perplexity", "-m", model, "--lengths", "64", "--cases", "1", "-q"];
    assert_error(&iceformer(&perplexity), 1, &told);
    let prompt = ["bench", "prompt", "-m", model, "--tokens", "20", "--generate", "1"];
    assert_error(&iceformer(&prompt), 1, &told);
    assert_error(&iceformer(&["run", "-m", model, "-p", "x", "-q"]), 1, &told);
    let dump = folder.path().join("dump");
    let dump = ["study", "dump", "-m", model, "-p", "Once upon a time", "-q", "-o", dump.to_str().unwrap()];
    assert_error(
        &iceformer(&dump),
        1,
        &["layer.0.queries holds what is not a number; the model's weights are damaged"],
    );
}

#[cfg(unix)]
#[test]
fn an_interrupted_evaluation_tells_how_much_was_done() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Command;

    let needle = ["eval", "needle", "--tasks", "single", "--lengths", "400", "--cases", "5000", "--methods", "exact"];
    let mut child = spawn(&needle);
    let mut told = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    // The first line comes after some seconds of cases.
    told.read_line(&mut line).unwrap();
    assert!(line.contains(" left"), "{line}");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    told.read_to_string(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{line}");
    let last = line.lines().last().unwrap();
    assert!(last.starts_with("needle: cancelled after ") && last.contains(" of 5,000 cases in "), "{last}");
    let state = stdout(&output).lines().last().unwrap().to_owned();
    let done =
        state.strip_prefix("interrupted: ").unwrap().strip_suffix(" of 5000 cases are done by all methods").unwrap();
    assert!((1..5000).contains(&done.parse().unwrap()), "{state}");
}

#[test]
fn lengths_and_tasks_count_once() {
    let needle = ["eval", "needle", "--tasks", "single,single", "--lengths", "400,400", "--cases", "1"];
    let longeval = ["eval", "longeval", "--lengths", "600,600", "--cases", "1"];
    for arguments in [&needle[..], &longeval] {
        let output = iceformer(&[arguments, &["--methods", "exact", "--json", "-q"]].concat());
        assert_eq!(records(&json_lines(&output), "case").len(), 1, "{arguments:?}");
    }
}

#[test]
fn eval_plants_needles() {
    let arguments = ["eval", "needle", "--tasks", "single,multi-query", "--lengths", "600", "--cases", "2"];
    let more = ["--depths", "10,90", "--methods", "exact,budgeted", "--budget", "0.02,0.1", "--json", "-q"];
    let lines = json_lines(&iceformer(&[&arguments[..], &more].concat()));
    let cases = records(&lines, "case");
    assert_eq!(cases.len(), 2 * 2 * 5, "exact, and two budgets in two set-ups");
    assert_eq!((cases[0]["depth"].as_f64(), cases[5]["depth"].as_f64()), (Some(0.1), Some(0.9)));
    assert_eq!(cases[19]["answers"].as_array().unwrap().len(), 4, "{}", cases[19]);
    let summaries = records(&lines, "summary");
    assert!(summaries[0]["accuracy"].as_f64().unwrap() >= 0.5, "the reference model finds needles: {}", summaries[0]);
    // Cases and summaries join by method and budget.
    let of = |line: &Value| (line["method"].as_str().unwrap().to_owned(), line["budget"].as_f64());
    let methods: Vec<_> = summaries[..5].iter().map(|summary| of(summary)).collect();
    let budgeted = |budget| ("budgeted".to_owned(), Some(budget));
    let expected = [0.02, 0.02, 0.1, 0.1].map(budgeted);
    assert_eq!((methods[0].clone(), &methods[1..]), (("exact".to_owned(), None), &expected[..]));
    assert_eq!(cases[..5].iter().map(|case| of(case)).collect::<Vec<_>>(), methods);
    for case in &cases {
        assert!(case["estimated_rows"].is_u64() && case["audited_rows"].is_u64(), "{case}");
    }
    let retentions = records(&lines, "retention");
    assert_eq!(of(retentions[0]), budgeted(0.02));
    assert!((0.0..=1.5).contains(&retentions[0]["mean"].as_f64().unwrap()), "{}", retentions[0]);
}

#[test]
fn eval_reports_are_whole_pages() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.html");
    let report = path.to_str().unwrap();
    let common = ["--methods", "exact,budgeted,dci", "-q", "--report", report];
    let runs: [(&[&str], &[&str]); 3] = [
        (
            &["eval", "needle", "--tasks", "single", "--lengths", "400,600", "--cases", "1"],
            &["Accuracy against length", "Retention", "single"],
        ),
        (
            &["eval", "perplexity", "--lengths", "300", "--scored", "50", "--cases", "1"],
            &["Perplexity against length", "divergence"],
        ),
        (
            &["eval", "agreement", "--lengths", "300", "--cases", "1", "--generate", "4"],
            &["Agreement against length", "differs after"],
        ),
    ];
    for (arguments, parts) in runs {
        let output = iceformer(&[arguments, &common].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let page = std::fs::read_to_string(&path).unwrap();
        let more = ["exact", "budgeted 0.05, text only", "dci, everything", "Time against length", "Missed mass"];
        let facts = [
            "iceformer eval",
            "built-in reference model: 14,162,304 parameters",
            "Milly and Olly",
            "Kept share by layer and head",
            "thread",
        ];
        for part in parts.iter().chain(&more).chain(&facts) {
            assert!(page.contains(part), "{part:?} is not in the report of {arguments:?}");
        }
        for part in ["http", "<script", "<link", "NaN", "src="] {
            assert!(!page.contains(part), "{part:?} is in the report of {arguments:?}");
        }
        for name in ["svg", "table", "section", "figure", "dl", "text", "ul", "tr"] {
            let opened = page.matches(&format!("<{name} ")).count() + page.matches(&format!("<{name}>")).count();
            assert_eq!(opened, page.matches(&format!("</{name}>")).count(), "{name} in the report of {arguments:?}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left there");
    }
    let nowhere = folder.path().join("none/report.html");
    let eval = ["eval", "needle", "--report"];
    let output = iceformer(&[&eval[..], &[nowhere.to_str().unwrap()]].concat());
    assert_error(&output, 1, &["none/report.html: No such file"]);
    assert_eq!(stderr(&output).matches(folder.path().to_str().unwrap()).count(), 1, "not the temporary file");
    let path = folder.path().to_str().unwrap();
    assert_error(&iceformer(&[&eval[..], &[path]].concat()), 1, &["--report", "is a folder"]);
}

#[test]
fn eval_compares_continuations() {
    let arguments = ["eval", "agreement", "--lengths", "500", "--cases", "2", "--generate", "10", "--methods", "dci"];
    let lines = json_lines(&iceformer(&[&arguments[..], &["--json", "-q"]].concat()));
    let cases = records(&lines, "case");
    assert_eq!(cases.len(), 2 * 3);
    for case in &cases {
        assert_eq!(case["same"].as_bool().unwrap(), case["first_difference"].is_null(), "{case}");
        assert_eq!(case["text"]["tokens"].as_u64().unwrap() + case["question"]["tokens"].as_u64().unwrap(), 500);
        assert_eq!(case["answer"]["tokens"], 9);
        let exact = cases.iter().find(|exact| exact["method"] == "exact" && exact["case"] == case["case"]).unwrap();
        assert_eq!(case["continuation"].as_array().unwrap().len(), 10);
        assert_eq!(case["same"], case["continuation"] == exact["continuation"], "{case}");
    }
    assert_eq!(records(&lines, "summary")[0]["same_share"], 1.0, "exact is compared with itself");
}

#[test]
fn what_eval_cannot_do_is_told_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "Only a few words.").unwrap();
    let short = short.to_str().unwrap();
    for (arguments, code, parts) in [
        (&["eval", "longeval", "--methods", "none"][..], 2, &["expected one of exact, budgeted, dci"][..]),
        (&["eval", "needle", "--tasks", "many"], 2, &["expected one of single, multi-key"]),
        (&["eval", "needle", "--depths", "101"], 2, &["a number from 0 to 100, in percent"]),
        (&["eval", "needle", "--lengths", "30"], 1, &["a length of 30 tokens has no room for task single"]),
        (&["eval", "agreement", "--lengths", "64"], 1, &["a length of 64 tokens leaves no text"]),
        (&["eval", "agreement", "--lengths", "64k"], 1, &["the context takes 65536"]),
        (&["eval", "agreement", "--text", short, "--lengths", "2k"], 1, &["short:", "needs more text"]),
        (&["eval", "longeval", "--lengths", "x"], 2, &["a whole number of tokens, or one such as 16k"]),
        (&["eval", "longeval", "--budget", "0.1", "--methods", "exact"], 1, &["--budget is for method budgeted"]),
        (&["eval", "longeval", "--lengths", "64k", "--cases", "1"], 1, &["65536", "context of 65536"]),
        (&["eval", "longeval", "--lengths", "50"], 1, &["a length of 50 tokens has no room"]),
        (&["eval", "longeval", "--text", short], 1, &["short: 1 different words"]),
        (&["eval", "longeval", "--data", "nowhere.jsonl"], 1, &["nowhere.jsonl"]),
        (&["eval", "perplexity", "--text", short, "--lengths", "2k"], 1, &["short:", "needs more text"]),
        (
            &["eval", "perplexity", "--lengths", "600", "--scored", "599"],
            1,
            &["a length of 600 tokens leaves 1 in front of 599 scored ones; expected at least 2: score at most 598"],
        ),
        (&["eval", "perplexity", "--lengths", "600", "--scored", "700"], 1, &["leaves 0 in front of 700 scored ones"]),
        (&["eval", "perplexity", "--lengths", "2"], 1, &["a length of 2 tokens has no room for 2 of context"]),
        (&["eval", "perplexity", "--lengths", "65537"], 1, &["the context takes 65536"]),
    ] {
        assert_error(&iceformer(&[arguments, &["-q"]].concat()), code, parts);
    }
}

#[test]
fn a_report_is_written_though_nobody_reads_the_lines() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let needle =
        ["eval", "needle", "--tasks", "single", "--lengths", "400", "--cases", "2", "--methods", "exact", "-q"];
    let output = unread(&[&needle[..], &["--json", "--report", page.to_str().unwrap()]].concat());
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("interrupted: 1 of 2 cases are done by all methods"), "{page}");
}

#[test]
fn options_that_do_nothing_are_refused() {
    let data = ["eval", "longeval", "--data", "lines.jsonl"];
    for (arguments, option) in [
        (&[&data[..], &["--seed", "1"]].concat()[..], "--seed"),
        (&[&data[..], &["--text", "novel.txt"]].concat(), "--text"),
        (&[&data[..], &["--lengths", "600"]].concat(), "--lengths"),
        (&["eval", "perplexity", "--seed", "1"], "--seed"),
        (&["eval", "perplexity", "--no-chat"], "--no-chat"),
        (&["eval", "agreement", "--no-chat"], "--no-chat"),
    ] {
        assert_error(&iceformer(arguments), 2, &[option]);
    }
}
