//! Every type, level, number of rows and odd size against an f64 reference.

use half::bf16;

use super::*;

/// Numbers in −1..1 from a fixed sequence (splitmix64).
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ bits >> 31) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn levels() -> impl Iterator<Item = InstructionSet> {
    InstructionSet::ALL.into_iter().filter(|&level| level <= InstructionSet::detected())
}

struct Case {
    weights: LinearWeights,
    /// What the packed weights stand for, `[out_features, in_features]`.
    values: Vec<f32>,
    input: Vec<f32>,
    rows: usize,
}

fn case(level: InstructionSet, weight_type: WeightType, rows: usize, inputs: usize, outputs: usize) -> Case {
    let bytes = blocks::quantise(weight_type, &noise(1, inputs * outputs));
    let mut values = vec![0.0; inputs * outputs];
    blocks::dequantise(weight_type, &bytes, &mut values);
    if weight_type == WeightType::F16 {
        values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
    }
    let row = bytes.len() / outputs;
    let weights = LinearWeights::pack_for(
        level,
        weight_type,
        outputs,
        inputs,
        |index| &bytes[index * row..][..row],
        &ThreadTeam::new(2),
    )
    .unwrap();
    Case { weights, values, input: noise(2, rows * inputs), rows }
}

impl Case {
    fn run(&self, threads: usize) -> Vec<f32> {
        let mut output = vec![f32::NAN; self.rows * self.weights.out_features()];
        self.weights.forward(&self.input, &mut output, &ThreadTeam::new(threads), &mut LinearScratch::default());
        output
    }

    /// The activations as the kernel sees them: rounded to bf16, or to 8 bits in blocks of 32.
    fn seen(&self) -> Vec<f64> {
        let name = self.name();
        if name.starts_with("avx512-bf16") || name.starts_with("amx-bf16") {
            self.input.iter().map(|&value| bf16::from_f32(value).to_f64()).collect()
        } else if name.starts_with("avx512-vnni") || name.starts_with("avx2-q") {
            let block = |values: &[f32]| {
                let scale = values.iter().fold(0.0_f32, |max, value| max.max(value.abs())) / 127.0;
                values.iter().map(|value| f64::from((value / scale).round_ties_even() * scale)).collect::<Vec<_>>()
            };
            self.input.chunks_exact(32).flat_map(block).collect()
        } else {
            self.input.iter().map(|&value| f64::from(value)).collect()
        }
    }

    fn name(&self) -> &'static str {
        self.weights.kernel_name(self.rows)
    }

    fn check(&self) {
        let inputs = self.weights.in_features();
        let output = self.run(2);
        let seen = self.seen();
        for (row, output) in output.chunks_exact(self.weights.out_features()).enumerate() {
            let seen = &seen[row * inputs..][..inputs];
            for (column, &value) in output.iter().enumerate() {
                let weights = &self.values[column * inputs..][..inputs];
                let products = seen.iter().zip(weights).map(|(a, &w)| a * f64::from(w));
                let expected: f64 = products.clone().sum();
                let magnitude: f64 = products.map(f64::abs).sum();
                let error = (f64::from(value) - expected).abs();
                assert!(
                    error <= 2e-6 * magnitude + 1e-12,
                    "{} {} row {row} of {}, column {column}, {inputs} inputs: {value}, expected {expected}",
                    self.name(),
                    self.weights.weight_type().name(),
                    self.rows,
                );
            }
        }
    }
}

fn sizes(weight_type: WeightType) -> &'static [(usize, usize)] {
    match weight_type.block_weights() {
        1 => &[(1, 1), (2, 17), (3, 16), (33, 130), (70, 65), (300, 33), (64, 33), (1056, 70)],
        32 => &[(32, 1), (64, 17), (96, 70), (288, 130)],
        _ => &[(256, 1), (256, 130), (512, 33), (768, 70)],
    }
}

#[test]
fn every_type_level_and_row_count_matches_the_reference() {
    for level in levels() {
        for weight_type in WeightType::ALL {
            for &(inputs, outputs) in sizes(weight_type) {
                for rows in (1..=20).chain([31, 50]) {
                    case(level, weight_type, rows, inputs, outputs).check();
                }
            }
        }
    }
}

/// Sums of a block are whole numbers, whichever instructions make them.
#[test]
#[cfg(target_arch = "x86_64")]
fn bytes_are_multiplied_to_the_same_bits_with_avx2_and_with_vnni() {
    if InstructionSet::detected() < InstructionSet::Avx512Vnni {
        return;
    }
    for weight_type in WeightType::ALL.into_iter().filter(|weight_type| weight_type.block_weights() > 1) {
        for rows in [1, 4, 6, 50] {
            let of_level = |level| case(level, weight_type, rows, 1024, 70).run(2);
            let bytes = of_level(InstructionSet::Avx2);
            assert_eq!(bytes, of_level(InstructionSet::Avx512Vnni), "{}, {rows} rows", weight_type.name());
        }
    }
}

#[test]
fn output_bits_do_not_depend_on_threads_or_on_other_rows() {
    for level in levels() {
        for weight_type in WeightType::ALL {
            let many = case(level, weight_type, 50, 512, 200);
            let expected = many.run(1);
            for threads in [2, 3, 5] {
                assert_eq!(expected, many.run(threads), "{} {threads} threads", many.name());
            }
            for rows in [1, 2, 6, 7, 13, 29] {
                let few = case(level, weight_type, rows, 512, 200);
                assert_eq!(expected[..rows * 200], few.run(2), "{} {rows} rows", many.name());
            }
        }
    }
}

#[test]
fn rows_come_back_as_the_format_defines_them() {
    for weight_type in WeightType::ALL {
        let case = case(InstructionSet::detected(), weight_type, 1, 768, 37);
        for index in 0..37 {
            let mut row = vec![0.0; 768];
            case.weights.row(index, &mut row);
            assert_eq!(row, case.values[index * 768..][..768], "{} row {index}", weight_type.name());
        }
    }
}

#[test]
fn packed_weights_take_little_more_than_the_file() {
    for weight_type in WeightType::ALL {
        let case = case(InstructionSet::detected(), weight_type, 1, 768, 64);
        let file = weight_type.row_bytes(768).unwrap() * 64;
        assert!(case.weights.bytes() * 100 <= file * 103, "{}: {} of {file}", weight_type.name(), case.weights.bytes());
    }
}

#[test]
fn quantised_weights_are_near_the_numbers_they_stand_for() {
    let values = noise(3, 2048);
    let bound = [1e-9, 1e-3, 4e-3, 5e-3, 0.08, 0.07, 0.035, 0.034, 0.07, 0.035, 0.02];
    for (weight_type, bound) in WeightType::ALL.into_iter().zip(bound) {
        let bytes = blocks::quantise(weight_type, &values);
        let mut back = vec![0.0; values.len()];
        blocks::dequantise(weight_type, &bytes, &mut back);
        let worst = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= bound, "{}: {worst}", weight_type.name());
        assert_eq!(blocks::quantise(weight_type, &vec![0.0; 2048]).len(), bytes.len());
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let team = ThreadTeam::new(1);
    let row = [0_u8; 34];
    let pack = |inputs, bytes: &'static [u8]| {
        LinearWeights::pack(WeightType::Q8_0, 3, inputs, move |_| bytes, &team).map(|_| ()).unwrap_err()
    };
    assert_eq!(pack(33, &[]), PackError::RowLength { in_features: 33, weight_type: "q8_0", block: 32 });
    assert_eq!(
        pack(32, &[0; 33]),
        PackError::ByteLength { row: 0, given: 33, expected: 34, in_features: 32, weight_type: "q8_0" }
    );
    // Rows of one panel and of the next.
    for wrong in [1, 15, 16, 39] {
        let row_bytes = |index: usize| if index < wrong { &row[..] } else { &row[..33] };
        let error = LinearWeights::pack(WeightType::Q8_0, 40, 32, row_bytes, &team).map(|_| ()).unwrap_err();
        let (given, expected, in_features) = (33, 34, 32);
        assert_eq!(error, PackError::ByteLength { row: wrong, given, expected, in_features, weight_type: "q8_0" });
    }
    let huge = LinearWeights::pack(WeightType::Q8_0, usize::MAX, 32, |_| &row[..0], &team).map(|_| ());
    assert!(matches!(huge, Err(PackError::ByteLength { row: 0, .. })));
}

#[test]
fn empty_shapes_give_empty_or_zero_outputs() {
    let team = ThreadTeam::new(2);
    let weights = LinearWeights::pack(WeightType::F32, 3, 0, |_| &[], &team).unwrap();
    let mut output = [1.0; 6];
    weights.forward(&[], &mut output, &team, &mut LinearScratch::default());
    assert_eq!(output, [0.0; 6]);
    let weights = LinearWeights::pack(WeightType::F32, 0, 3, |_| &[], &team).unwrap();
    weights.forward(&[], &mut [], &team, &mut LinearScratch::default());
}

/// Bytes of a type and the numbers that they hold (`testing/golden/scripts/blocks.py`).
macro_rules! golden {
    ($name:literal) => {
        (
            include_bytes!(concat!("../../../../testing/golden/blocks/", $name, ".bytes")).as_slice(),
            include_bytes!(concat!("../../../../testing/golden/blocks/", $name, ".f32")).as_slice(),
        )
    };
}

#[test]
fn blocks_read_as_the_gguf_package_reads_them() {
    for (weight_type, (bytes, numbers)) in [
        (WeightType::Q8_0, golden!("q8_0")),
        (WeightType::Q4_0, golden!("q4_0")),
        (WeightType::Q4_1, golden!("q4_1")),
        (WeightType::Q5_0, golden!("q5_0")),
        (WeightType::Q5_1, golden!("q5_1")),
        (WeightType::Q4_K, golden!("q4_k")),
        (WeightType::Q5_K, golden!("q5_k")),
        (WeightType::Q6_K, golden!("q6_k")),
    ] {
        let expected: Vec<f32> = bytemuck::pod_collect_to_vec(numbers);
        let mut values = vec![0.0; expected.len()];
        blocks::dequantise(weight_type, bytes, &mut values);
        assert_eq!(values, expected, "{}", weight_type.name());
    }
}

#[test]
fn rows_written_anew_keep_the_numbers_that_the_gguf_package_reads() {
    for (kind, (bytes, numbers), tolerance) in [
        (RecodedType::Q2_K, golden!("q2_k"), 1.0 / 250.0),
        (RecodedType::Q3_K, golden!("q3_k"), 0.0),
        (RecodedType::Iq4_Nl, golden!("iq4_nl"), 0.0),
        (RecodedType::Iq4_Xs, golden!("iq4_xs"), 1.0 / 2048.0),
    ] {
        let expected: Vec<f32> = bytemuck::pod_collect_to_vec(numbers);
        let mut values = vec![0.0; expected.len()];
        blocks::dequantise(kind.weight_type(), &kind.recode(bytes), &mut values);
        for (index, (values, expected)) in values.chunks(32).zip(expected.chunks(32)).enumerate() {
            let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
            for (value, expected) in values.iter().zip(expected) {
                let about = format!("{}, block {index}: {value} and {expected}", kind.name());
                assert!((value - expected).abs() <= tolerance * largest, "{about}");
            }
        }
    }
}

#[test]
fn activations_that_are_no_numbers_spoil_their_row_and_no_other() {
    for level in levels() {
        for weight_type in WeightType::ALL {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut case = case(level, weight_type, 3, 256, 20);
                let clean = case.run(1);
                case.input[256 + 77] = bad;
                let output = case.run(1);
                let name = case.name();
                assert!(output[20..40].iter().all(|value| !value.is_finite()), "{name} {bad}: {:?}", &output[20..40]);
                assert_eq!(output[..20], clean[..20], "{name} {bad}");
                assert_eq!(output[40..], clean[40..], "{name} {bad}");
            }
        }
    }
}

#[test]
fn tiny_and_zero_activations_give_tiny_or_zero_outputs() {
    for level in levels() {
        for weight_type in WeightType::ALL {
            for tiny in [0.0, f32::MIN_POSITIVE / 4.0, 1e-37, 1e-30] {
                let mut case = case(level, weight_type, 2, 256, 20);
                case.input.fill(tiny);
                let output = case.run(1);
                assert!(output.iter().all(|value| value.abs() <= 256.0 * 1.1 * tiny + 1e-32), "{tiny}: {output:?}");
            }
        }
    }
}

#[test]
fn a_layer_wider_than_one_chunk_of_inputs_matches_the_reference() {
    for level in levels() {
        for weight_type in WeightType::ALL {
            case(level, weight_type, 14, 4096 + 512, 34).check();
            case(level, weight_type, 38, 4096 + 512, 34).check();
        }
    }
    // Panels that outgrow the cache.
    for weight_type in [WeightType::F32, WeightType::Bf16, WeightType::Q8_0] {
        case(InstructionSet::detected(), weight_type, 40, 16_384 + 96, 34).check();
    }
}
