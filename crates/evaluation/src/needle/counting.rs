//! Tasks whose answer is how often words come up in a list.

use std::collections::BTreeSet;

use super::Plan;
use crate::case::Fitted;
use crate::prompt::{Prompt, Question};
use crate::text::SourceText;

/// Words that come up often.
const COMMON: usize = 10;
/// From this length on the words come up as often as in RULER; shorter lists keep the ratio.
const LONG: usize = 4096;

/// The ten words that come up ten times as often as the others.
pub fn common_words(plan: &Plan<'_>, source: &SourceText) -> Fitted {
    let (often, seldom) = if plan.length >= LONG { (30, 3) } else { (10, 1) };
    let mut random = plan.random();
    let mut words = source.words().to_vec();
    random.shuffle(&mut words);
    // Made-up words where the text has too few of its own.
    let most = plan.length / (2 * seldom) + COMMON;
    let mut taken: BTreeSet<String> = words.iter().cloned().collect();
    while words.len() < most {
        let word = random.letters(7);
        if taken.insert(word.clone()) {
            words.push(word);
        }
    }
    let (common, others) = words.split_at(COMMON);
    let seed_of_order = random.number(0, u64::MAX);
    let question = Question {
        question: format!("\nQuestion: What are the {COMMON} most common words in the above list?"),
        answer_start: format!(" Answer: The top {COMMON} words that appear most often in the list are:"),
        expected: common.to_vec(),
        max_tokens: plan.task.answer_tokens(plan.is_chat()),
        stop: vec!["\n".into()],
    };
    let write = |count: usize| {
        let repeated = |words: &'_ [String], times: usize| -> Vec<String> {
            words.iter().flat_map(|word| std::iter::repeat_n(word.clone(), times)).collect()
        };
        let mut list = repeated(common, often);
        list.extend(repeated(&others[..count], seldom));
        crate::random::Random::new(seed_of_order, "order", count, 0).shuffle(&mut list);
        let rows: Vec<String> = list.iter().enumerate().map(|(index, word)| format!("{}. {word}", index + 1)).collect();
        let introduction = "Below is a numbered list of words. In these words, some appear more often than others. \
                            Memorize the ones that appear most often.";
        Prompt { text: format!("{introduction}\n{}", rows.join(" ")), questions: vec![question.clone()] }
    };
    let sample = plan.encoder.encode(&write(others.len().min(64)))?.longest();
    let rows = COMMON * often + others.len().min(64) * seldom;
    plan.fit_even(others.len(), sample as f64 / rows as f64 * seldom as f64, write)
}

/// The three most frequent coded words: that of rank r comes up in proportion to r⁻².
pub fn frequent_words(plan: &Plan<'_>) -> Fitted {
    let mut random = plan.random();
    let mut taken = BTreeSet::new();
    let vocabulary = (plan.length / 50).max(8);
    while taken.len() < vocabulary {
        taken.insert(random.letters(6));
    }
    let mut words: Vec<String> = taken.into_iter().collect();
    random.shuffle(&mut words);
    let seed_of_order = random.number(0, u64::MAX);
    // As in RULER the most frequent is no word but dots.
    words.insert(0, "...".into());
    let weights: Vec<f64> = (1..=words.len()).map(|rank| (rank as f64).powi(-2)).collect();
    let whole: f64 = weights.iter().sum();
    let question = Question {
        question: "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most \
                   frequently appeared words in the above coded text?"
            .into(),
        answer_start: " Answer: According to the coded text above, the three most frequently appeared words are:"
            .into(),
        expected: words[1..4].to_vec(),
        max_tokens: plan.task.answer_tokens(plan.is_chat()),
        stop: vec!["\n".into()],
    };
    let write = |count: usize| {
        let times = |weight: f64| (count as f64 * weight / whole) as usize;
        let mut list: Vec<&str> = words
            .iter()
            .zip(&weights)
            .flat_map(|(word, &weight)| std::iter::repeat_n(word.as_str(), times(weight)))
            .collect();
        crate::random::Random::new(seed_of_order, "order", count, 0).shuffle(&mut list);
        let introduction = "Read the following coded text and track the frequency of each coded word. Find the three most \
                            frequently appeared coded words. ";
        Prompt { text: format!("{introduction}{}", list.join(" ")), questions: vec![question.clone()] }
    };
    let sample = plan.encoder.encode(&write(plan.length))?.longest();
    let fitted = plan.fit_even(2 * plan.length, sample as f64 / plan.length as f64, write)?;
    // The three must differ in their counts: 1/4, 1/9 and 1/16 of the dots, and 1/25 behind them.
    Ok(fitted.filter(|(prompt, _)| {
        let count = |word: &str| prompt.text.split(' ').filter(|other| *other == word).count();
        (1..4).all(|rank| count(&words[rank]) > count(&words[rank + 1]))
    }))
}
