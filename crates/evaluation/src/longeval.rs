//! LongEval's lines: a record of lines with a number each, and a question for one of them.
//!
//! Cases of the published kind are read from files ([Li et al. 2023](https://lmsys.org/blog/2023-06-29-longchat/)), or
//! generated at any length with keys made of a text's own words.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use serde_json::Value;

use crate::EvaluationError;
use crate::case::{Case, PlannedCase, fit};
use crate::input::{decode, read_limited};
use crate::prompt::{Encoder, Prompt, Question};
use crate::random::Random;
use crate::text::SourceText;

/// Name of the task.
const TASK: &str = "lines";
/// Tokens of an answer: a number of five digits and what closes it; a chat may say more.
const ANSWER: usize = 12;
const CHAT_ANSWER: usize = 48;
/// Largest number of a generated line, as in the published cases.
const LARGEST: u64 = 50_000;
/// Where the question of a published case begins.
const QUESTION: &str = "\nNow the record is over.";

const INTRODUCTION: &str = "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' \
    and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its \
    corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding \
    <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n";

/// Reads the published cases in a `.jsonl` file, or in all of a folder's, the shortest file first; `most` of each file.
///
/// # Errors
/// When a file cannot be read, has no cases, or a line is not a case.
pub fn read_cases(path: &Path, most: usize, encoder: &Encoder<'_>) -> Result<Vec<Case>, EvaluationError> {
    let problem = |problem: String| EvaluationError::Cases { file: path.display().to_string(), problem };
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(|error| problem(error.to_string()))?;
        files = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "jsonl"));
        if files.is_empty() {
            return Err(problem("no .jsonl files in this folder; expected LongEval cases".into()));
        }
        files.sort_by_key(|file| (file.metadata().map_or(0, |metadata| metadata.len()), file.clone()));
    }
    let mut cases = Vec::new();
    for file in files {
        let name = file.display().to_string();
        let problem = |problem: String| EvaluationError::Cases { file: name.clone(), problem };
        let bytes = File::open(&file).and_then(read_limited).map_err(|error| problem(error.to_string()))?;
        let text = decode(bytes).map_err(problem)?;
        let group = file.file_stem().map_or_else(|| name.clone(), |stem| stem.to_string_lossy().into_owned());
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(most);
        for (number, (line, text)) in lines.enumerate() {
            let prompt =
                published(text, encoder.is_chat()).map_err(|what| problem(format!("line {}: {what}", line + 1)))?;
            let tokens = encoder.encode(&prompt)?;
            cases.push(Case { task: TASK.into(), group: group.clone(), number, depth: None, prompt, tokens });
        }
        if cases.last().is_none_or(|case| case.group != group) {
            return Err(problem("no cases; expected one JSON object a line".into()));
        }
    }
    Ok(cases)
}

/// Plans `count` generated cases of `length` tokens each.
pub fn plan<'a>(
    source: &'a SourceText,
    encoder: Encoder<'a>,
    seed: u64,
    length: usize,
    count: usize,
) -> Vec<PlannedCase<'a>> {
    let case = move |number| PlannedCase {
        tokens: length,
        context: length + answer_tokens(encoder.is_chat()),
        make: Box::new(move || generate(source, &encoder, seed, length, number)),
    };
    (0..count).map(case).collect()
}

/// Plans cases that are there already.
pub fn plan_read(cases: Vec<Case>) -> Vec<PlannedCase<'static>> {
    let planned = |case: Case| {
        let tokens = case.tokens.longest();
        let answer = case.prompt.questions.iter().map(|question| question.max_tokens).max().unwrap_or(0);
        PlannedCase { tokens, context: tokens + answer, make: Box::new(move || Ok(case.clone())) }
    };
    cases.into_iter().map(planned).collect()
}

fn answer_tokens(chat: bool) -> usize {
    if chat { CHAT_ANSWER } else { ANSWER }
}

/// What follows the record. The answer begins with what stands in front of the number, so that a model that only
/// continues text answers too.
fn question(question: String, key: &str, number: u64, chat: bool) -> Question {
    Question {
        question,
        answer_start: format!("\nThe <REGISTER_CONTENT> in line {key} is <"),
        expected: vec![number.to_string()],
        max_tokens: answer_tokens(chat),
        stop: vec![">".into(), "\n".into()],
    }
}

fn generate(
    source: &SourceText,
    encoder: &Encoder<'_>,
    seed: u64,
    length: usize,
    number: usize,
) -> Result<Case, EvaluationError> {
    // Rows of a longer record begin with those of a shorter one; the row asked for is a share of them.
    let mut random = Random::new(seed, TASK, length, number);
    let share = random.number(0, 1 << 20) as f64 / ((1 << 20) + 1) as f64;
    let mut taken = BTreeSet::new();
    // A row takes 8 tokens at the very least; half of all keys stay unused, so that drawing them ends soon.
    let most = (length / 8 + 1).min(source.words().len().pow(2) / 2);
    let rows: Vec<(String, u64)> =
        (0..most).map(|_| (random.key(source.words(), &mut taken), random.number(1, LARGEST))).collect();
    let line = |(key, value): &(String, u64)| format!("line {key}: REGISTER_CONTENT is <{value}>\n");
    let sample: String = rows.iter().take(64).map(line).collect();
    let per_row = encoder.tokenizer.encode(&sample, false)?.len() as f64 / rows.len().min(64) as f64;
    let write = |units: usize| {
        let rows = &rows[..units];
        let (key, value) = &rows[(rows.len() as f64 * share) as usize];
        let asked = format!("{QUESTION} Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number. ");
        let text = format!("{INTRODUCTION}{}", rows.iter().map(line).collect::<String>());
        Prompt { text, questions: vec![question(asked, key, *value, encoder.is_chat())] }
    };
    let fitted = fit(encoder, length, most, |units| units as f64 * per_row, write)?;
    let Some((prompt, tokens)) = fitted else {
        let problem = "has no room for a record of lines; expected at least 300".into();
        return Err(EvaluationError::Length { length, problem });
    };
    Ok(Case { task: TASK.into(), group: length.to_string(), number, depth: Some(share), prompt, tokens })
}

/// A line of a published file.
fn published(line: &str, chat: bool) -> Result<Prompt, String> {
    let case: Value = serde_json::from_str(line).map_err(|error| format!("not valid JSON: {error}"))?;
    let prompt = case["prompt"].as_str().ok_or_else(|| unfit(&case, "prompt", "a text"))?;
    let expected = case["expected_number"].as_u64();
    let expected =
        expected.ok_or_else(|| unfit(&case, "expected_number", "a whole number without quotes, such as 24"))?;
    let key = match &case["random_idx"] {
        Value::Array(parts) => parts.first().and_then(Value::as_str),
        other => other.as_str(),
    };
    let key = key.ok_or_else(|| unfit(&case, "random_idx", "the key of the line asked for, first in a list"))?;
    let split = prompt.rfind(QUESTION).ok_or_else(|| format!("prompt has no {:?}", QUESTION.trim()))?;
    let (text, asked) = prompt.split_at(split);
    Ok(Prompt { text: text.to_owned(), questions: vec![question(asked.to_owned(), key, expected, chat)] })
}

/// What is wrong with a field that is not what was expected.
fn unfit(case: &Value, field: &str, expected: &str) -> String {
    const SHOWN: usize = 40;
    if !case.is_object() {
        return "expected a JSON object with prompt, expected_number and random_idx".into();
    }
    let Some(value) = case.get(field) else { return format!("{field} is missing; expected {expected}") };
    let told = value.to_string();
    let shown: String = told.chars().take(SHOWN).collect();
    let rest = if shown.len() < told.len() { "…" } else { "" };
    format!("{field} is {shown}{rest}; expected {expected}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_lines_are_split_before_the_question() {
        let line = r#"{"random_idx": ["a-b", 7], "expected_number": 24, "prompt": "start\nline a-b: <24>\n\nNow the record is over. Tell me"}"#;
        let prompt = published(line, false).unwrap();
        assert_eq!(prompt.text, "start\nline a-b: <24>\n");
        let question = &prompt.questions[0];
        assert_eq!(question.question, "\nNow the record is over. Tell me");
        assert_eq!(question.answer_start, "\nThe <REGISTER_CONTENT> in line a-b is <");
        assert_eq!(question.expected, ["24"]);
    }

    #[test]
    fn what_is_no_case_is_named() {
        for (line, part) in [
            ("{", "not valid JSON"),
            ("{}", "prompt is missing"),
            ("[1]", "expected a JSON object"),
            (r#"{"prompt": 5}"#, "prompt is 5; expected a text"),
            (r#"{"prompt": "a"}"#, "expected_number is missing"),
            (r#"{"prompt": "a", "expected_number": "12"}"#, "expected_number is \"12\"; expected a whole number"),
            (r#"{"prompt": "a", "expected_number": -5}"#, "expected_number is -5; expected a whole number"),
            (r#"{"prompt": "a", "expected_number": 1e30}"#, "expected_number is 1e+30; expected a whole number"),
            (r#"{"prompt": "a", "expected_number": 1, "random_idx": [7]}"#, "random_idx is [7]; expected the key"),
            (r#"{"prompt": "a", "expected_number": 1}"#, "random_idx is missing"),
            (r#"{"prompt": "a", "expected_number": 1, "random_idx": ["k"]}"#, "has no \"Now the record is over.\""),
        ] {
            let error = published(line, false).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
