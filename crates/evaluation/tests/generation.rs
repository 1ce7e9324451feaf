//! Generated prompts: the same for the same seed, as long as asked for, with their answer in them.

use std::path::Path;

use iceformer_engine::{ModelFiles, Tokenizer};
use iceformer_evaluation::needle::{self, NeedleSettings, Task};
use iceformer_evaluation::{Case, Encoder, PlannedCase, SourceText, longeval};

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn tokenizer() -> Tokenizer {
    ModelFiles::open(&repository().join("models/reference")).unwrap().tokenizer().unwrap()
}

fn novel() -> SourceText {
    let text = std::fs::read_to_string(repository().join("examples/texts/milly_and_olly.txt")).unwrap();
    SourceText::new("novel", &text).unwrap()
}

fn settings(seed: u64) -> NeedleSettings {
    NeedleSettings { tasks: Task::ALL.to_vec(), lengths: vec![5000, 1500], depths: vec![0.0, 0.5, 1.0], cases: 3, seed }
}

fn make(cases: &[PlannedCase<'_>]) -> Vec<Case> {
    cases.iter().map(|case| (case.make)().unwrap()).collect()
}

#[test]
fn needles_are_deterministic_and_as_long_as_asked_for() {
    let (tokenizer, source, settings) = (tokenizer(), novel(), settings(1));
    let encoder = Encoder { tokenizer: &tokenizer, template: None };
    let planned = needle::plan(&source, encoder, &settings).unwrap();
    let cases = make(&planned);
    assert_eq!(cases.len(), 2 * Task::ALL.len() * 3);
    assert_eq!(cases, make(&planned), "made twice");
    let other = NeedleSettings { seed: 2, ..settings.clone() };
    let others = make(&needle::plan(&source, encoder, &other).unwrap());
    // A sentence of this novel has up to 200 tokens, a row or word of a list fewer than 40.
    let slack = |task: &str| if task.ends_with("words") { 40 } else { 200 };
    for (index, (case, other)) in cases.iter().zip(&others).enumerate() {
        let length: usize = case.group.parse().unwrap();
        assert_eq!(length, if index < cases.len() / 2 { 1500 } else { 5000 }, "short ones first");
        let tokens = case.tokens.longest();
        let name = format!("{} {length} {}", case.task, case.number);
        assert!(tokens <= length && tokens + slack(&case.task) > length, "{name}: {tokens}");
        assert_ne!(case.prompt, other.prompt, "{name}");
        for (question, tokens) in case.prompt.questions.iter().zip(&case.tokens.questions) {
            let whole = format!("{}{}{}", case.prompt.text, question.question, question.answer_start);
            assert_eq!([&case.tokens.text[..], tokens].concat(), tokenizer.encode(&whole, true).unwrap(), "{name}");
            assert!(question.expected.iter().all(|answer| case.prompt.text.contains(answer)), "{name}");
        }
    }
}

#[test]
fn needles_lie_at_their_depth() {
    let (tokenizer, source, settings) = (tokenizer(), novel(), settings(7));
    let encoder = Encoder { tokenizer: &tokenizer, template: None };
    let cases = make(&needle::plan(&source, encoder, &settings).unwrap());
    let planted = cases.iter().filter(|case| case.depth.is_some());
    assert_eq!(planted.clone().count(), 2 * 2 * 3, "single and multi-key");
    for case in planted {
        let place = case.prompt.text.find(&case.prompt.questions[0].expected[0]).unwrap() as f64;
        let depth = place / case.prompt.text.len() as f64;
        assert!((depth - case.depth.unwrap()).abs() < 0.13, "{} at {depth}: {:?}", case.task, case.depth);
    }
    let of = |name: &str| cases.iter().find(|case| case.task == name).unwrap();
    assert_eq!(of("multi-value").prompt.questions[0].expected.len(), 4);
    assert_eq!(of("multi-query").prompt.questions.len(), 4, "one by one where text is continued");
    assert_eq!(of("multi-key").prompt.text.matches("special magic numbers").count(), 4);
    assert_eq!(of("variable-tracking").prompt.questions[0].expected.len(), 5);
}

#[test]
fn words_come_up_as_often_as_they_should() {
    let (tokenizer, source, settings) = (tokenizer(), novel(), settings(3));
    let encoder = Encoder { tokenizer: &tokenizer, template: None };
    for case in make(&needle::plan(&source, encoder, &settings).unwrap()) {
        let words: Vec<&str> = case.prompt.text.split_whitespace().collect();
        let count = |word: &str| words.iter().filter(|other| **other == word).count();
        let expected = &case.prompt.questions[0].expected;
        match case.task.as_str() {
            "common-words" => {
                let often = if case.group == "5000" { 30 } else { 10 };
                assert!(expected.len() == 10 && expected.iter().all(|word| count(word) >= often), "{}", case.group);
            }
            "frequent-words" => {
                let counts: Vec<usize> = expected.iter().map(|word| count(word)).collect();
                assert!(counts.len() == 3 && counts.is_sorted_by(|a, b| a > b) && counts[2] > 1, "{counts:?}");
            }
            _ => {}
        }
    }
}

#[test]
fn lengths_without_room_are_named() {
    let (tokenizer, source) = (tokenizer(), novel());
    let encoder = Encoder { tokenizer: &tokenizer, template: None };
    for task in Task::ALL {
        let settings = NeedleSettings { tasks: vec![task], lengths: vec![40], ..settings(0) };
        let planned = needle::plan(&source, encoder, &settings).unwrap();
        let error = (planned[0].make)().unwrap_err().to_string();
        assert!(error.starts_with(&format!("a length of 40 tokens has no room for task {}", task.name())), "{error}");
    }
}

#[test]
fn records_of_lines_are_deterministic() {
    let (tokenizer, source) = (tokenizer(), novel());
    let encoder = Encoder { tokenizer: &tokenizer, template: None };
    let cases = |seed| make(&longeval::plan(&source, encoder, seed, 2000, 3));
    let first = cases(1);
    assert_eq!(first, cases(1));
    for (case, other) in first.iter().zip(cases(2)) {
        assert_ne!(case.prompt, other.prompt);
        let question = &case.prompt.questions[0];
        let line = format!("{}: REGISTER_CONTENT is <{}>\n", asked(&question.answer_start), question.expected[0]);
        assert_eq!(case.prompt.text.matches(&line).count(), 1, "{line}");
        assert!((1960..=2000).contains(&case.tokens.longest()), "{}", case.tokens.longest());
    }
}

/// `line KEY` of the start of an answer.
fn asked(answer_start: &str) -> &str {
    let from = answer_start.find("line ").unwrap();
    answer_start[from..].strip_suffix(" is <").unwrap()
}

#[test]
fn published_cases_behind_a_mark_of_the_byte_order() {
    let (tokenizer, folder) = (tokenizer(), tempfile::tempdir().unwrap());
    let file = folder.path().join("cases.jsonl");
    let case = r#"{"random_idx": ["a-b", 7], "expected_number": 24, "prompt": "start\nline a-b: <24>\n\nNow the record is over. Tell me"}"#;
    std::fs::write(&file, format!("\u{FEFF}{case}\r\n\r\n{case}\r\n")).unwrap();
    let encoder = Encoder { tokenizer: &tokenizer, template: None };
    assert_eq!(longeval::read_cases(&file, 9, &encoder).unwrap().len(), 2);
}

#[test]
fn chat_templates_are_split_in_front_of_the_question() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(repository().join("models/reference").join(name), folder.path().join(name)).unwrap();
    }
    let template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let files = ModelFiles::open(folder.path()).unwrap();
    let (tokenizer, template, source) = (files.tokenizer().unwrap(), files.chat_template().unwrap(), novel());
    let encoder = Encoder { tokenizer: &tokenizer, template: template.as_ref() };
    let settings = NeedleSettings { tasks: vec![Task::MultiQuery], lengths: vec![900], ..settings(5) };
    let case = (needle::plan(&source, encoder, &settings).unwrap()[0].make)().unwrap();
    assert_eq!((case.prompt.questions.len(), case.prompt.questions[0].expected.len()), (1, 4), "asked at once");
    assert!((700..=900).contains(&case.tokens.longest()), "{}", case.tokens.longest());
    let (text, question) = (tokenizer.decode(&case.tokens.text), tokenizer.decode(&case.tokens.questions[0]));
    assert!(text.starts_with("Some special magic numbers are hidden") && !text.contains("What are all"), "{text}");
    assert!(question.trim_start().starts_with("What are all") && question.ends_with("text are:"), "{question}");
    let special = ["<|user|>", "<|end|>", "<|assistant|>"].map(|token| tokenizer.token_id(token).unwrap());
    assert_eq!(case.tokens.text[0], special[0]);
    assert!(special[1..].iter().all(|token| case.tokens.questions[0].contains(token)), "the template closes the turn");
}
