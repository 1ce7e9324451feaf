//! `bench ceilings`: what this machine can do at most.

use iceformer_attention::ThreadTeam;
use iceformer_kernels::InstructionSet;
use iceformer_kernels::ceilings::process_cpu_seconds;
use serde_json::json;

use super::measure;
use crate::command_line::arguments::CeilingsArguments;
use crate::command_line::{Outcome, print_json};

/// Runs the measurement.
pub fn run(arguments: &CeilingsArguments) -> anyhow::Result<Outcome> {
    let common = &arguments.common;
    let team = ThreadTeam::new(common.threads.unwrap_or_else(ThreadTeam::available));
    let (wall, cpu) = (std::time::Instant::now(), process_cpu_seconds());
    let ceilings = measure::ceilings(&team, common.repeat)?;
    let line = json!({
        "bench": "ceilings",
        "instruction_set": InstructionSet::current().name(),
        "f32_rate_per_core": ceilings.f32_rate,
        "bf16_rate_per_core": ceilings.bf16_rate,
        "int8_rate_per_core": ceilings.int8_rate,
        "memory_gigabytes_per_second": ceilings.memory_bandwidth,
        "threads": ceilings.memory_threads,
        "repeat": common.repeat,
        "cpu_seconds": process_cpu_seconds() - cpu,
        "wall_seconds": wall.elapsed().as_secs_f64(),
    });
    if common.json {
        print_json(&line)?;
    } else {
        super::print_table(&line)?;
    }
    Ok(Outcome::Done)
}
