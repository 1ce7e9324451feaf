//! Timing, medians, and the ceilings that a measurement is compared with.

use std::time::Instant;

use anyhow::Context;
use iceformer_kernels::ThreadTeam;
use iceformer_kernels::ceilings::{Ceilings, process_cpu_seconds};

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

/// Name and rate of the ceiling that a kernel is compared with: that of the instructions it multiplies with, as its name
/// tells. What is stored as bf16 is multiplied in f32 where that is faster, and by searches.
pub fn kernel_ceiling(kernel: &str, ceilings: &Ceilings) -> (&'static str, f64) {
    let has = |part: &str| kernel.split('-').any(|own| own == part);
    if has("vnni") || has("int8") {
        ("int8", ceilings.int8_rate)
    } else if has("bf16") && !has("f32") && !has("panels") {
        ("bf16", ceilings.bf16_rate)
    } else {
        ("f32", ceilings.f32_rate)
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
    use super::*;

    #[test]
    fn ceilings_are_those_of_the_kernel_that_runs() {
        let ceilings =
            Ceilings { f32_rate: 1.0, bf16_rate: 2.0, int8_rate: 3.0, memory_bandwidth: 4.0, memory_threads: 1 };
        for (kernel, expected) in [
            ("avx512-bf16-6x64", ("bf16", 2.0)),
            ("amx-bf16-32x32", ("bf16", 2.0)),
            ("avx512-f32-6x64", ("f32", 1.0)),
            ("avx512-f32-bf16-6x64", ("f32", 1.0)),
            ("panels-bf16-avx512", ("f32", 1.0)),
            ("portable-f32-6x16", ("f32", 1.0)),
            ("avx512-vnni-q4_k-6x32", ("int8", 3.0)),
            ("avx512-vnni-6x64", ("int8", 3.0)),
            ("amx-int8-32x32", ("int8", 3.0)),
        ] {
            assert_eq!(kernel_ceiling(kernel, &ceilings), expected, "{kernel}");
        }
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
    }
}
