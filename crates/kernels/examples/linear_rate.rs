//! Times one linear layer and prints its rate and the fraction of this machine's ceiling.
//!
//! `cargo run --release -p iceformer-kernels --example linear_rate -- TYPE ROWS IN OUT THREADS`, where TYPE may be
//! `all`.

use std::time::Instant;

use iceformer_kernels::ceilings::{Ceilings, process_cpu_seconds};
use iceformer_kernels::linear::{LinearScratch, LinearWeights, WeightType, blocks};
use iceformer_kernels::{InstructionSet, ThreadTeam};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: usize| {
        arguments.get(index).map_or(default, |text| text.parse().expect("ROWS IN OUT THREADS are numbers"))
    };
    let wanted = arguments.first().map_or("all", String::as_str);
    let (rows, inputs, outputs, threads) = (number(1, 512), number(2, 2048), number(3, 2048), number(4, 1));
    let team = ThreadTeam::new(threads);
    let ceilings = Ceilings::measure(&team).expect("memory for the measurement");
    println!("{ceilings:.1?}");
    for weight_type in WeightType::ALL.into_iter().filter(|t| wanted == "all" || wanted == t.name()) {
        let values: Vec<f32> =
            (0..inputs * 64).map(|i| ((i * 7919 + i / 13 * 31) % 2003) as f32 / 1000.0 - 1.0).collect();
        let bytes = blocks::quantise(weight_type, &values);
        let row = bytes.len() / 64;
        let weights =
            LinearWeights::pack(weight_type, outputs, inputs, |index| &bytes[index % 64 * row..][..row], &team)
                .expect("whole blocks");
        let input = vec![0.5_f32; rows * inputs];
        let mut output = vec![0.0_f32; rows * outputs];
        let mut scratch = LinearScratch::default();
        let mut best: Option<(f64, f64)> = None;
        let begin = Instant::now();
        while begin.elapsed().as_secs_f64() < 1.0 {
            let (wall, cpu) = (Instant::now(), process_cpu_seconds());
            weights.forward(&input, &mut output, &team, &mut scratch);
            let times = (process_cpu_seconds() - cpu, wall.elapsed().as_secs_f64());
            if best.is_none_or(|best| times.1 < best.1) {
                best = Some(times);
            }
        }
        let (cpu, wall) = best.expect("at least one run");
        let rate = 2.0 * rows as f64 * inputs as f64 * outputs as f64 / cpu * 1e-9;
        let kernel = weights.kernel_name(rows);
        let ceiling = match weight_type {
            WeightType::F32 => ceilings.f32_rate,
            WeightType::F16 | WeightType::Bf16 => ceilings.bf16_rate,
            _ if InstructionSet::current() >= InstructionSet::Avx512Vnni => ceilings.int8_rate,
            _ => ceilings.f32_rate,
        };
        let bandwidth = weights.bytes() as f64 / wall * 1e-9;
        println!(
            "{:5} {kernel:24} {rows}x{inputs}x{outputs}: {:9.1} us, {rate:7.1} G/s per core = {:.3} of ceiling; {bandwidth:6.2} GB/s = {:.3}",
            weight_type.name(),
            wall * 1e6,
            rate / ceiling,
            bandwidth / ceilings.memory_bandwidth
        );
    }
}
