//! `iceformer bench`: each measurement beside the ceiling of the same run.

mod attention;
mod ceilings;
mod linear;
mod measure;
mod prompt;

use std::fmt::Write;

use iceformer_kernels::ceilings::Ceilings;
use serde_json::Value;

use super::arguments::Bench;
use super::{Outcome, print_text};

/// Runs the command.
pub fn run(what: Bench) -> anyhow::Result<Outcome> {
    match what {
        Bench::Ceilings(arguments) => ceilings::run(&arguments),
        Bench::Linear(arguments) => linear::run(&arguments),
        Bench::Attention(arguments) => attention::run(&arguments),
        Bench::Prompt(arguments) => prompt::run(&arguments),
    }
}

/// `count` random numbers from −1 to 1.
fn random(count: usize, seed: u64) -> Vec<f32> {
    // SplitMix64 (Steele, Lea and Flood 2014): measurements need no better numbers.
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Adds what a run that only streams memory reached, beside the measured memory bandwidth.
fn add_bandwidth(line: &mut Value, gigabytes_per_second: f64, ceilings: &Ceilings) {
    line["gigabytes_per_second"] = gigabytes_per_second.into();
    line["memory_gigabytes_per_second"] = ceilings.memory_bandwidth.into();
    line["bandwidth_fraction"] = (gigabytes_per_second / ceilings.memory_bandwidth).into();
}

/// The number as it was typed: 0.05, where the nearest f32 is 0.0500000007.
fn as_typed(number: f32) -> f64 {
    number.to_string().parse().unwrap_or_else(|_| f64::from(number))
}

/// Prints the fields of a line for people, one in each row.
fn print_table(line: &Value) -> anyhow::Result<()> {
    let mut table = String::new();
    for (name, value) in line.as_object().into_iter().flatten() {
        let value = match value {
            Value::String(text) => text.clone(),
            Value::Array(values) => values.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
            Value::Number(number) if number.is_f64() => {
                let number = number.as_f64().unwrap_or_default();
                if name.ends_with("_seconds") { format!("{number:.6}") } else { format!("{number:.3}") }
            }
            other => other.to_string(),
        };
        let _ = writeln!(table, "{:30}{value}", name.replace('_', " "));
    }
    print_text(&table)
}
