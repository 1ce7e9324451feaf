//! What the program carries: the reference model, and a novel with a question.

use std::io::Write;

use anyhow::Context;
use iceformer_engine::{MemoryModel, ModelFiles};

/// How messages and figures call the built-in model.
pub const NAME: &str = "built-in reference model";
/// The number planted in the novel.
pub const PLANTED: &str = "9312021";
/// The answer ends here.
pub const STOP: &str = ".";

/// How reports call the built-in novel.
pub const NOVEL_NAME: &str = "Milly and Olly";
/// The built-in novel.
pub const NOVEL: &str = include_str!("../../../../examples/texts/milly_and_olly.txt");
/// Characters of the novel that are read: a little over 17,000 tokens.
const LENGTH: usize = 56_000;
/// Where the sentence is planted, as a share of the text.
const DEPTH: f64 = 0.4;
const KEY: &str = "winter-kettle";

/// The built-in reference model.
pub fn model() -> anyhow::Result<ModelFiles> {
    let files = MemoryModel {
        config: include_bytes!("../../../../models/reference/config.json").as_slice().into(),
        tokenizer: include_bytes!("../../../../models/reference/tokenizer.json").as_slice().into(),
        weights: include_bytes!("../../../../models/reference/model.safetensors").as_slice().into(),
        tokenizer_config: None,
    };
    ModelFiles::from_memory(NAME, files).context("the built-in model")
}

/// The built-in task: find a number planted in a novel.
pub struct Example {
    /// The novel with the planted sentence, and the question.
    pub prompt: String,
}

impl Example {
    /// Plants the sentence and asks for it.
    pub fn new() -> anyhow::Result<Self> {
        let end = sentence_end(LENGTH).context("the built-in novel is shorter than the example")?;
        let place = sentence_end((LENGTH as f64 * DEPTH) as usize).context("the built-in novel has sentences")?;
        let (before, after) = (&NOVEL[..place], &NOVEL[place..end]);
        let question = format!("What is the special magic number for {KEY} mentioned in the provided text?");
        let answer = format!("The special magic number for {KEY} mentioned in the provided text is: ");
        let needle = format!("One of the special magic numbers for {KEY} is: {PLANTED}.");
        Ok(Self { prompt: format!("{before} {needle}{after}\n{question} {answer}") })
    }

    /// Tells what is going to happen.
    pub fn introduce(&self) {
        let _ = writeln!(
            std::io::stderr(),
            "The built-in reference model reads {} characters of the novel \"Milly and Olly\" (Mrs. Humphry Ward, 1881), \
             in which one sentence was planted: that the special magic number for {KEY} is {PLANTED}. Then it is asked:\n\
             What is the special magic number for {KEY} mentioned in the provided text?",
            super::text::grouped(self.prompt.chars().count() as u64)
        );
    }

    /// Tells whether the answer is right.
    pub fn judge(&self, answer: &str) {
        let verdict = if answer.trim() == PLANTED { "right" } else { "wrong" };
        let _ = writeln!(std::io::stderr(), "\nThe answer is {verdict}: {PLANTED} was planted.");
    }
}

/// End of the first sentence that ends at or behind byte `start` of the novel.
fn sentence_end(start: usize) -> Option<usize> {
    let start = (start..NOVEL.len()).find(|&index| NOVEL.is_char_boundary(index))?;
    NOVEL[start..].find(". ").map(|offset| start + offset + 1)
}
