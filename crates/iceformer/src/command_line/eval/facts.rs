//! What stands at the top of a report: command, machine, date, model.

use iceformer_attention::{KeyValueType, Method};
use iceformer_engine::{Model, ModelFiles};
use iceformer_kernels::InstructionSet;

use crate::command_line::report::kernels;
use crate::command_line::text::grouped;

/// Names and values.
pub fn facts(
    files: &ModelFiles,
    model: &Model,
    methods: &[Method],
    kv_type: KeyValueType,
) -> Vec<(&'static str, String)> {
    let summary = files.summary();
    let weights: Vec<&str> = summary.types.iter().map(|kind| kind.name).collect();
    let config = model.decoder().config();
    let threads = model.team().threads();
    vec![
        ("command", command()),
        ("program", format!("iceformer {}", env!("CARGO_PKG_VERSION"))),
        (
            "model",
            format!(
                "{}: {} parameters, {} layers, {} query heads and {} key/value heads of {}, weights {} ({})",
                summary.name,
                grouped(summary.parameters),
                config.layers,
                config.query_heads,
                config.kv_heads,
                config.head_dim,
                weights.join(", "),
                summary.format
            ),
        ),
        (
            "machine",
            format!("{}; {}, {threads} thread{}", processor(), InstructionSet::current().name(), plural(threads)),
        ),
        ("kernels", kernels(model.decoder(), methods, kv_type).join(", ")),
        ("cache", kv_type.name().to_owned()),
        ("date", jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string()),
    ]
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// The command as typed, with quotes where a shell needs them.
fn command() -> String {
    let plain = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "-_./,:=+".contains(c));
    let quoted = |word: String| if plain(&word) { word } else { format!("'{}'", word.replace('\'', "'\\''")) };
    let words = std::env::args_os().skip(1).map(|word| quoted(word.to_string_lossy().into_owned()));
    std::iter::once("iceformer".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// The processor's name where the system tells (Linux), and its number of cores.
fn processor() -> String {
    let information = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = information.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let name = named.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{name}, {cores} core{} for this process", plural(cores))
}
