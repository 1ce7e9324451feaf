//! `bench linear`: one linear layer.

use anyhow::Context;
use iceformer_attention::ThreadTeam;
use iceformer_kernels::InstructionSet;
use iceformer_kernels::linear::{LinearScratch, LinearWeights, blocks};
use serde_json::json;

use super::measure;
use crate::command_line::arguments::LinearArguments;
use crate::command_line::memory::ensure_room;
use crate::command_line::{Outcome, print_json};

/// Different rows of weights; more would only take longer to make.
const ROWS: usize = 61;

/// Runs the measurement.
pub fn run(arguments: &LinearArguments) -> anyhow::Result<Outcome> {
    let LinearArguments { weights: weight_type, rows, inputs, outputs, ref common } = *arguments;
    let row_bytes = weight_type.row_bytes(inputs).with_context(|| {
        format!("--in {inputs} is no whole number of {} blocks of {}", weight_type.name(), weight_type.block_weights())
    })?;
    let largest = inputs.saturating_mul(outputs).max(rows.saturating_mul(inputs.max(outputs)));
    anyhow::ensure!(
        largest <= 1 << 33,
        "{rows} × {inputs} × {outputs} is too large; keep each matrix below 2³³ numbers"
    );
    let weight_bytes = row_bytes as u64 * outputs as u64;
    let needed = weight_bytes + 4 * (rows * (inputs + outputs)) as u64;
    ensure_room(needed, &format!("a layer of {rows} × {inputs} × {outputs} in {}", weight_type.name()))?;
    let team = ThreadTeam::new(common.threads.unwrap_or_else(ThreadTeam::available));

    let pool = blocks::quantise(weight_type, &super::random(ROWS * inputs, 1));
    let row = |index: usize| &pool[index % ROWS * row_bytes..][..row_bytes];
    let weights = LinearWeights::pack(weight_type, outputs, inputs, row, &team)?;
    let input = super::random(rows * inputs, 2);
    let mut output = vec![0.0; rows * outputs];
    let mut scratch = LinearScratch::default();
    let (times, ceilings) = measure::beside_ceilings(&team, common.repeat, || {
        weights.forward(&input, &mut output, &team, &mut scratch);
    })?;

    let rate = 2.0 * rows as f64 * inputs as f64 * outputs as f64 / times.cpu_seconds * 1e-9;
    let (ceiling_name, ceiling) = measure::kernel_ceiling(weights.kernel_name(rows), &ceilings);
    let read = weights.bytes() as f64 / times.wall_seconds * 1e-9;
    let mut line = json!({
        "bench": "linear",
        "weights": weight_type.name(),
        "rows": rows,
        "in": inputs,
        "out": outputs,
        "threads": team.threads(),
        "repeat": common.repeat,
        "instruction_set": InstructionSet::current().name(),
        "kernel": weights.kernel_name(rows),
        "cpu_seconds": times.cpu_seconds,
        "wall_seconds": times.wall_seconds,
        "rate_per_core": rate,
        "ceiling": ceiling_name,
        "ceiling_rate_per_core": ceiling,
        "ceiling_fraction": rate / ceiling,
        "weight_bytes": weights.bytes(),
    });
    if rows == 1 {
        super::add_bandwidth(&mut line, read, &ceilings);
    }
    if common.json {
        print_json(&line)?
    } else {
        super::print_table(&line)?
    }
    Ok(Outcome::Done)
}
