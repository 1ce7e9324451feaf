//! Tasks whose answer is planted in the text: keys with numbers, and variables.

use std::collections::BTreeSet;

use super::haystack::Haystack;
use super::{Plan, Task};
use crate::case::{Fitted, fit};
use crate::prompt::{Prompt, Question};
use crate::random::Random;
use crate::text::SourceText;

/// Keys of `multi-key` and `multi-query`, numbers of `multi-value`.
const NEEDLES: usize = 4;
/// Variables of a chain.
const VARIABLES: usize = 5;

const INTRODUCTION: &str = "Some special magic numbers are hidden within the following text. Make sure to memorize it. \
    I will quiz you about the numbers afterwards.\n";
const TRACK: &str = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";

/// Depth and prompt of a case, where it fits.
pub fn plant(plan: &Plan<'_>, source: &SourceText, haystack: &Haystack<'_>) -> (Option<f64>, Fitted) {
    let mut random = plan.random();
    let first = random.index(haystack.len());
    let Planted { introduction, needles, questions, depth } = match plan.task {
        Task::VariableTracking => variables(plan, &mut random),
        _ => numbers(plan, source, &mut random),
    };
    let write = |sentences: usize| Prompt {
        text: format!("{introduction}{}", haystack.text(first, sentences, &needles)),
        questions: questions.clone(),
    };
    let estimate = |sentences: usize| haystack.estimate(first, sentences);
    // A sentence takes one token at the very least.
    (depth, fit(plan.encoder, plan.length, plan.length, estimate, write))
}

struct Planted {
    introduction: String,
    /// Depth and sentence, in the order of their depths.
    needles: Vec<(f64, String)>,
    questions: Vec<Question>,
    depth: Option<f64>,
}

/// A share from 0 to 1.
fn share(random: &mut Random) -> f64 {
    random.number(0, 1 << 20) as f64 / (1 << 20) as f64
}

fn numbers(plan: &Plan<'_>, source: &SourceText, random: &mut Random) -> Planted {
    let (keys, values) = match plan.task {
        Task::Single => (1, 1),
        Task::MultiValue => (1, NEEDLES),
        _ => (NEEDLES, 1),
    };
    let mut taken = BTreeSet::new();
    let keys: Vec<String> = (0..keys).map(|_| random.key(source.words(), &mut taken)).collect();
    let mut numbers = BTreeSet::new();
    let mut pairs: Vec<(&String, String)> = Vec::new();
    for key in &keys {
        for _ in 0..values {
            let mut number = random.number(1_000_000, 9_999_999);
            while !numbers.insert(number) {
                number = random.number(1_000_000, 9_999_999);
            }
            pairs.push((key, number.to_string()));
        }
    }
    // The key asked for is the first, which stands at the depth of the case; what stands beside it is spread.
    let depth = matches!(plan.task, Task::Single | Task::MultiKey).then_some(plan.depth);
    let place = |index: usize, random: &mut Random| depth.filter(|_| index == 0).unwrap_or_else(|| share(random));
    let mut needles: Vec<(f64, String)> = pairs
        .iter()
        .enumerate()
        .map(|(index, (key, value))| {
            (place(index, random), format!("One of the special magic numbers for {key} is: {value}."))
        })
        .collect();
    needles.sort_by(|a, b| a.0.total_cmp(&b.0));

    let ask = |asked: &str, several: bool, expected: Vec<String>| {
        let (is, all, plural) = if several { ("are", "are all", "s") } else { ("is", "is", "") };
        Question {
            question: format!(
                "\nWhat {all} the special magic number{plural} for {asked} mentioned in the provided text?"
            ),
            answer_start: format!(
                " The special magic number{plural} for {asked} mentioned in the provided text {is}: "
            ),
            expected,
            max_tokens: plan.task.answer_tokens(plan.is_chat()),
            stop: if several { vec!["\n".into()] } else { vec![".".into(), "\n".into()] },
        }
    };
    let all_values = || pairs.iter().map(|(_, value)| value.clone()).collect::<Vec<_>>();
    let questions = match plan.task {
        Task::MultiValue => vec![ask(&keys[0], true, all_values())],
        Task::MultiQuery if plan.is_chat() => {
            let asked = format!("{}, and {}", keys[..NEEDLES - 1].join(", "), keys[NEEDLES - 1]);
            vec![ask(&asked, true, all_values())]
        }
        Task::MultiQuery => pairs.iter().map(|(key, value)| ask(key, false, vec![value.clone()])).collect(),
        _ => vec![ask(&keys[0], false, vec![pairs[0].1.clone()])],
    };
    // RULER's introduction is for models that follow instructions; text that is continued begins as text.
    let introduction = if plan.is_chat() { INTRODUCTION.to_owned() } else { String::new() };
    Planted { introduction, needles, questions, depth }
}

fn variables(plan: &Plan<'_>, random: &mut Random) -> Planted {
    let ask = |value: u64| {
        (
            format!("\nQuestion: Find all variables that are assigned the value {value} in the text above."),
            format!(
                " Answer: According to the chain(s) of variable assignment in the text above, {VARIABLES} variables are \
                 assigned the value {value}, they are: "
            ),
        )
    };
    let chain = |random: &mut Random| {
        let value = random.number(10_000, 99_999);
        let mut taken = BTreeSet::new();
        while taken.len() < VARIABLES {
            taken.insert(random.letters(5).to_uppercase());
        }
        let mut names: Vec<String> = taken.into_iter().collect();
        random.shuffle(&mut names);
        let assign = |index: usize| match index {
            0 => format!("VAR {} = {value}.", names[0]),
            _ => format!("VAR {} = VAR {}.", names[index], names[index - 1]),
        };
        let sentences: Vec<String> = (0..VARIABLES).map(assign).collect();
        (value, names, sentences)
    };
    // As in RULER, an example with its answer stands in front.
    let (value, names, sentences) = chain(random);
    let (question, answer) = ask(value);
    let example = format!("{TRACK}{}{question}{answer}{}\n\n{TRACK}", sentences.join(" "), names.join(" "));

    let (value, names, sentences) = chain(random);
    let (question, answer_start) = ask(value);
    let mut depths: Vec<f64> = (0..VARIABLES).map(|_| share(random)).collect();
    depths.sort_by(f64::total_cmp);
    let max_tokens = plan.task.answer_tokens(plan.is_chat());
    Planted {
        introduction: example,
        needles: depths.into_iter().zip(sentences).collect(),
        questions: vec![Question { question, answer_start, expected: names, max_tokens, stop: vec!["\n".into()] }],
        depth: None,
    }
}
