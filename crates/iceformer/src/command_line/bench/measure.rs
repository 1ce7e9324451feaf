//! Timing, medians, and the ceilings that a measurement is compared with.

use std::time::Instant;

use anyhow::Context;
use iceformer_attention::KeyValueType;
use iceformer_kernels::ThreadTeam;
use iceformer_kernels::ceilings::{Ceilings, process_cpu_seconds};
use iceformer_kernels::linear::WeightType;

/// CPU time one measurement takes at least, so that the clock's grain does not matter.
pub const LEAST_SECONDS: f64 = 0.2;

/// Times of one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// CPU time of the process, all threads together.
    pub cpu_seconds: f64,
    pub wall_seconds: f64,
}

/// Times one call of `work`, repeated within the measurement until it is long enough.
pub fn time(calls: u32, mut work: impl FnMut()) -> Times {
    let (wall, cpu) = (Instant::now(), process_cpu_seconds());
    (0..calls).for_each(|_| work());
    let calls = f64::from(calls);
    Times { cpu_seconds: (process_cpu_seconds() - cpu) / calls, wall_seconds: wall.elapsed().as_secs_f64() / calls }
}

/// Measures `work` and the ceilings in turn, `repeat` times; gives the medians.
pub fn beside_ceilings(team: &ThreadTeam, repeat: u32, mut work: impl FnMut()) -> anyhow::Result<(Times, Ceilings)> {
    // The first call warms caches and buffers, the second tells how many make a measurement.
    work();
    let once = time(1, &mut work);
    let calls = (LEAST_SECONDS / once.wall_seconds.max(1e-7)).ceil().clamp(1.0, 1e6) as u32;
    let (mut times, mut ceilings) = (Vec::new(), Vec::new());
    for _ in 0..repeat {
        ceilings.push(measure_ceilings(team)?);
        times.push(time(calls, &mut work));
    }
    let times = Times {
        cpu_seconds: median(times.iter().map(|times| times.cpu_seconds)),
        wall_seconds: median(times.iter().map(|times| times.wall_seconds)),
    };
    Ok((times, median_ceilings(&ceilings)))
}

/// The ceilings, measured `repeat` times; gives the medians.
pub fn ceilings(team: &ThreadTeam, repeat: u32) -> anyhow::Result<Ceilings> {
    let measured = (0..repeat).map(|_| measure_ceilings(team)).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(median_ceilings(&measured))
}

/// The ceilings, measured once.
pub fn measure_ceilings(team: &ThreadTeam) -> anyhow::Result<Ceilings> {
    Ceilings::measure(team).context("measuring memory bandwidth takes 256 MiB")
}

/// The medians of at least one measurement.
pub fn median_ceilings(measured: &[Ceilings]) -> Ceilings {
    let of = |field: fn(&Ceilings) -> f64| median(measured.iter().map(field));
    Ceilings {
        f32_rate: of(|ceilings| ceilings.f32_rate),
        bf16_rate: of(|ceilings| ceilings.bf16_rate),
        int8_rate: of(|ceilings| ceilings.int8_rate),
        memory_bandwidth: of(|ceilings| ceilings.memory_bandwidth),
        memory_threads: measured[0].memory_threads,
    }
}

/// Name and rate of the ceiling that linear layers of a type are compared with.
pub fn weight_ceiling(weight_type: WeightType, ceilings: &Ceilings) -> (&'static str, f64) {
    match weight_type {
        WeightType::F32 => ("f32", ceilings.f32_rate),
        WeightType::Bf16 | WeightType::F16 => ("bf16", ceilings.bf16_rate),
        _ => ("int8", ceilings.int8_rate),
    }
}

/// Name and rate of the ceiling that attention over a cache is compared with.
pub fn cache_ceiling(kv_type: KeyValueType, ceilings: &Ceilings) -> (&'static str, f64) {
    match kv_type {
        KeyValueType::F32 => ("f32", ceilings.f32_rate),
        KeyValueType::Bf16 | KeyValueType::Int8 => ("bf16", ceilings.bf16_rate),
    }
}

/// The middle of at least one value, the mean of both middles of an even number.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
    }
}
