//! The figures of a run: a table for people, an object for programs.

use std::io::Write;

use iceformer_attention::{KeyValueType, Method};
use iceformer_engine::{Decoder, Finish, PartTimes};
use iceformer_kernels::InstructionSet;
use serde::Serialize;

use super::arguments::once;
use super::attention_figures::AttentionFigures;
use super::memory::peak_resident_bytes;
use super::text::{bytes, grouped, rate, seconds};

/// What one run did. Field names are those of the JSON output.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Path of the model, or the name of the built-in one.
    pub model: String,
    /// Text generated.
    pub text: String,
    /// Why it ended: `end`, `stop`, `length`, `context` or `cancelled`.
    pub finish: &'static str,
    pub load_seconds: f64,
    pub prompt_tokens: usize,
    pub prompt_seconds: f64,
    pub prompt_tokens_per_second: Option<f64>,
    pub generated_tokens: usize,
    pub decode_seconds: f64,
    /// Passes through the layers per second; the first token comes from the prompt's pass.
    pub decode_tokens_per_second: Option<f64>,
    /// Shares of the wall time of all passes.
    pub attention_share: f64,
    pub linear_share: f64,
    pub rest_share: f64,
    /// What attention kept and missed.
    pub attention: AttentionFigures,
    pub peak_resident_bytes: Option<u64>,
    pub weight_bytes: usize,
    pub cache_bytes: usize,
    pub kv_type: &'static str,
    pub threads: usize,
    pub instruction_set: &'static str,
    pub kernels: Vec<&'static str>,
    pub seed: u64,
    /// Of the built-in example: the number planted in the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<&'static str>,
}

/// `tokens / seconds`, where that means something.
pub fn per_second(tokens: usize, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}

/// Shares of attention, linear layers and the rest in the time of passes.
pub fn shares(times: &PartTimes) -> [f64; 3] {
    let total = times.total().as_secs_f64().max(f64::MIN_POSITIVE);
    [times.attention, times.linear, times.rest].map(|part| part.as_secs_f64() / total)
}

/// Names of the kernels that run, each once: linear layers, then attention by each of `methods`.
pub fn kernels(decoder: &Decoder, methods: &[Method], kv_type: KeyValueType) -> Vec<&'static str> {
    let attention = methods.iter().map(|method| method.kernel_name(kv_type));
    once(decoder.linear_kernels().into_iter().chain(attention))
}

impl Figures {
    /// Writes the closing table to standard error.
    pub fn print_table(&self) {
        let mut table = format!("\n{:8}{:>10}{:>12}{:>12}\n", "", "tokens", "time", "tokens/s");
        let mut row = |name: &str, tokens: Option<usize>, time: f64, per_second: Option<f64>| {
            let tokens = tokens.map_or("–".into(), |count| grouped(count as u64));
            let per_second = per_second.map_or("–".into(), rate);
            let time = if time < 0.1 { format!("{:.0} ms", time * 1e3) } else { seconds(time) };
            table += &format!("{name:8}{tokens:>10}{time:>12}{per_second:>12}\n");
        };
        row("load", None, self.load_seconds, None);
        row("prompt", Some(self.prompt_tokens), self.prompt_seconds, self.prompt_tokens_per_second);
        row("decode", Some(self.generated_tokens), self.decode_seconds, self.decode_tokens_per_second);
        table += &format!(
            "time      attention {:.0} %, linear layers {:.0} %, rest {:.0} %\n",
            100.0 * self.attention_share,
            100.0 * self.linear_share,
            100.0 * self.rest_share
        );
        if let Some(line) = self.attention.line() {
            table += &format!("attention {line}\n");
        }
        let peak = self.peak_resident_bytes.map_or("unknown".into(), bytes);
        table += &format!(
            "memory    {peak} at most; weights {}, cache {} ({})\n",
            bytes(self.weight_bytes as u64),
            bytes(self.cache_bytes as u64),
            self.kv_type
        );
        table += &format!(
            "machine   {}, {} thread{}; kernels {}\n",
            self.instruction_set,
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.kernels.join(", ")
        );
        if self.finish == Finish::Length.name() {
            table += "ended     at --max-tokens\n";
        } else if self.finish == Finish::Context.name() {
            table += "ended     the context is full\n";
        } else if self.finish == Finish::Cancelled.name() {
            table += "ended     cancelled\n";
        }
        let _ = write!(std::io::stderr(), "{table}");
    }

    /// Fills in what the process and the machine tell.
    pub fn observe(&mut self, decoder: &Decoder, method: Method, kv_type: KeyValueType, times: &PartTimes) {
        [self.attention_share, self.linear_share, self.rest_share] = shares(times);
        self.peak_resident_bytes = peak_resident_bytes();
        self.weight_bytes = decoder.weight_bytes();
        self.kv_type = kv_type.name();
        self.instruction_set = InstructionSet::current().name();
        self.kernels = kernels(decoder, &[method], kv_type);
    }
}
