//! Linear layers of a 1B model: every weight type, decode (1 row) and prompt (64 rows), one thread.
//!
//! `cargo bench -p iceformer-kernels --bench linear`. Wall time; the example `linear_rate` prints CPU time and
//! fractions of the ceilings.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use iceformer_kernels::ThreadTeam;
use iceformer_kernels::linear::{LinearScratch, LinearWeights, WeightType, blocks};

fn linear(criterion: &mut Criterion) {
    const SIZE: usize = 2048;
    let team = ThreadTeam::new(1);
    let values: Vec<f32> = (0..SIZE * 16).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect();
    for rows in [1, 64] {
        let mut group = criterion.benchmark_group(format!("linear_{rows}x{SIZE}x{SIZE}"));
        group.throughput(Throughput::Elements((2 * rows * SIZE * SIZE) as u64));
        for weight_type in WeightType::ALL {
            let bytes = blocks::quantise(weight_type, &values);
            let row = bytes.len() / 16;
            let weights =
                LinearWeights::pack(weight_type, SIZE, SIZE, |index| &bytes[index % 16 * row..][..row], &team)
                    .expect("whole blocks");
            let (input, mut output) = (vec![0.5_f32; rows * SIZE], vec![0.0_f32; rows * SIZE]);
            let mut scratch = LinearScratch::default();
            group.bench_function(BenchmarkId::from_parameter(weight_type.name()), |bencher| {
                bencher.iter(|| weights.forward(&input, &mut output, &team, &mut scratch));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, linear);
criterion_main!(benches);
