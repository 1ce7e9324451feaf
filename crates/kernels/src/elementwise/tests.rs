//! The element-wise kernels against f64, on every instruction set of the machine, at every length around a vector.

use iceformer_testing::compare::{assert_close, units_in_last_place};
use iceformer_testing::elementwise as reference;
use iceformer_testing::random::Random;

use crate::activation::{Activation, silu_multiply, silu_multiply_at, silu_multiply_joined};
use crate::add::{add, add_at, add_bias_rows};
use crate::norm::{rms_norm, rms_norm_at, rms_norm_in_place, rms_norm_rows};
use crate::rope::{RopeScaling, RopeTable, Rotations, rotate_at};
use crate::simd::exponential::exp2;
use crate::simd::{self, Operation, Simd, map_in_place};
use crate::softmax::{exp_at, log_sum_exp_at, soft_cap_at, softmax_at};
use crate::{InstructionSet, ThreadTeam};

const LENGTHS: std::ops::RangeInclusive<usize> = 0..=70;

/// Calls `check(level, length, random)` for every level of the machine and every length, and a few long ones.
fn everywhere(check: impl Fn(InstructionSet, usize, &mut Random)) {
    let levels = super::levels();
    assert_eq!(levels.last(), Some(&InstructionSet::detected()), "the highest level is among those tested");
    for level in levels {
        for length in LENGTHS.chain([1023, 1024, 1025, 5000]) {
            check(level, length, &mut Random::new(length as u64));
        }
    }
}

/// Values that stress an exponential: all magnitudes, the limits, zeros, infinities and NaN.
fn hard_values() -> Vec<f32> {
    let mut values =
        vec![0.0, -0.0, 1.0, -1.0, 88.0, 88.722, 88.723, 88.73, 89.5, 128.0, 1e30, f32::MAX, f32::INFINITY];
    values.extend([-87.0, -87.34, -90.0, -100.0, -103.0, -103.9, -104.1, -1e30, f32::MIN, f32::NEG_INFINITY, f32::NAN]);
    values.extend([1e-30, -1e-30, f32::MIN_POSITIVE, 1e-45, 0.346_57, -0.346_58, 0.346_58]);
    let mut random = Random::new(7);
    values.extend((0..40_000).map(|_| random.uniform(-104.0, 88.72) as f32));
    values.extend((0..10_000).map(|_| random.uniform(-1.0, 1.0) as f32));
    values
}

#[test]
fn exponential_is_right_to_the_last_places() {
    for level in super::levels() {
        let inputs = hard_values();
        let mut outputs = inputs.clone();
        exp_at(level, &mut outputs);
        for (input, output) in inputs.into_iter().zip(outputs) {
            let expected = f64::from(input).exp();
            let error = units_in_last_place(output, expected);
            let is_small = expected < 2.0 * f64::from(f32::MIN_POSITIVE);
            assert!(
                error <= 2.0 || is_small && output == 0.0,
                "{level:?}: exp({input}) = {output}, {error} units in the last place"
            );
            assert!(!output.is_subnormal(), "{level:?}: exp({input}) = {output}");
        }
    }
}

struct PowersOfTwo<'a>(&'a mut [f32]);

impl Operation for PowersOfTwo<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        map_in_place(
            simd,
            self.0,
            #[inline(always)]
            |x| exp2(simd, x),
        );
    }
}

#[test]
fn powers_of_two_are_right_to_the_last_places() {
    for level in super::levels() {
        let mut inputs = vec![0.0, -0.0, -1e-30, -1.0, -0.5, -0.499, -126.0, -126.5, -140.25, -149.0, -150.5, -1e30];
        inputs.extend([f32::MIN, f32::NEG_INFINITY, f32::NAN, 1.0, 126.75, 127.0]);
        let mut random = Random::new(9);
        inputs.extend((0..40_000).map(|_| random.uniform(-150.0, 127.0) as f32));
        inputs.extend((0..10_000).map(|_| random.uniform(-2.0, 0.0) as f32));
        let mut outputs = inputs.clone();
        simd::run(level, PowersOfTwo(&mut outputs));
        assert_eq!(outputs[0], 1.0, "{level:?}: the weight of the largest score");
        for (input, output) in inputs.into_iter().zip(outputs) {
            let error = units_in_last_place(output, if input < -100.0 { 0.0 } else { f64::from(input).exp2() });
            assert!(error <= 3.0, "{level:?}: 2^{input} = {output}, {error} units in the last place");
        }
    }
}

/// A subnormal weight would make every product with it take a hundred times as long.
#[test]
fn no_weight_is_a_subnormal_number() {
    for level in super::levels() {
        let logits: Vec<f32> = (0..2000).map(|index| -0.1 * index as f32).collect();
        let mut weights = logits.clone();
        softmax_at(level, &mut weights);
        let mut masses = logits.clone();
        simd::run(level, PowersOfTwo(&mut masses));
        for ((logit, weight), mass) in logits.into_iter().zip(weights).zip(masses) {
            assert!(weight == 0.0 || weight >= 1e-32, "{level:?}: weight {weight} of logit {logit}");
            assert!(mass == 0.0 || mass >= 7e-31, "{level:?}: 2^{logit} = {mass}");
            assert_eq!(weight == 0.0, logit < -69.65, "{level:?}: weight {weight} of logit {logit}");
        }
    }
}

#[test]
fn exponential_of_every_length() {
    everywhere(|level, length, random| {
        let input = random.normals(length, 20.0);
        let mut output = input.clone();
        exp_at(level, &mut output);
        for (&input, &output) in input.iter().zip(&output) {
            let expected = f64::from(input).exp();
            let is_small = expected < 2.0 * f64::from(f32::MIN_POSITIVE) && output == 0.0;
            assert!(is_small || units_in_last_place(output, expected) <= 2.0, "{level:?}, length {length}");
        }
    });
}

#[test]
fn softmax_and_log_sum_exp() {
    everywhere(|level, length, random| {
        for deviation in [1.0, 30.0] {
            let logits = random.normals(length, deviation);
            let wide = reference::widen(&logits);
            let expected = reference::log_sum_exp(&wide);
            let mut output = logits.clone();
            assert_close(&[softmax_at(level, &mut output)], &[expected], 2e-7, format!("{level:?} {length} sum"));
            assert_close(&[log_sum_exp_at(level, &logits)], &[expected], 2e-7, format!("{level:?} {length} sum"));
            assert_close(&output, &reference::softmax(&wide), 1e-6, format!("{level:?} {length}"));
        }
    });
}

#[test]
fn soft_caps_of_every_length() {
    for level in super::levels() {
        for length in 0..=70 {
            let values = Random::new(length as u64).normals(length, 40.0);
            for limit in [0.1_f32, 50.0, 1e4, 1e8, 1e30] {
                let mut output = values.clone();
                soft_cap_at(level, &mut output, limit);
                for (actual, &x) in output.iter().zip(&values) {
                    let expected = f64::from(limit) * (f64::from(x) / f64::from(limit)).tanh();
                    let error = (f64::from(*actual) - expected).abs();
                    assert!(error <= 5e-7 * expected.abs(), "{level:?}: {actual} for {expected}, capped at {limit}");
                }
            }
        }
        let mut limits = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, 1e30, -1e30];
        soft_cap_at(level, &mut limits, 3.0);
        assert_eq!((limits[0], limits[1], limits[3], limits[4], limits[5]), (3.0, -3.0, 0.0, 3.0, -3.0));
        assert!(limits[2].is_nan());
    }
}

#[test]
fn softmax_at_the_limits() {
    for level in super::levels() {
        for length in 1..=35 {
            let mut none = vec![f32::NEG_INFINITY; length];
            assert_eq!(softmax_at(level, &mut none), f32::NEG_INFINITY);
            assert_eq!(none, vec![0.0; length]);

            let mut one = vec![f32::NEG_INFINITY; length];
            one[length / 2] = -3e38;
            assert_eq!(softmax_at(level, &mut one), -3e38);
            assert_eq!(one.iter().sum::<f32>(), 1.0);
            assert_eq!(one[length / 2], 1.0);

            for bad in [f32::NAN, f32::INFINITY] {
                let mut values = vec![1.0; length];
                values[length - 1] = bad;
                assert!(log_sum_exp_at(level, &values).is_nan());
                assert!(softmax_at(level, &mut values).is_nan());
                assert!(values.iter().all(|value| value.is_nan()), "{level:?} {length} {bad}");
            }
        }
    }
}

#[test]
fn root_mean_square_norm() {
    everywhere(|level, length, random| {
        if length == 0 {
            return;
        }
        let (input, weight) = (random.normals(3 * length, 4.0), random.normals(length, 1.0));
        let mut output = input.clone();
        rms_norm_at(level, &mut output, &weight, 1e-5);
        let expected = reference::rms_norm(&input, &weight, f64::from(1e-5f32));
        assert_close(&output, &expected, 5e-7, format!("{level:?} {length}"));
    });
    let mut zero = vec![0.0; 20];
    rms_norm(&[0.0; 20], &[1.0; 20], 1e-6, &mut zero);
    assert_eq!(zero, vec![0.0; 20]);
}

#[test]
fn activations() {
    type Reference = fn(f64) -> f64;
    let all: [(Activation, Reference); 3] = [
        (Activation::Silu, reference::silu),
        (Activation::Gelu, reference::gelu),
        (Activation::GeluTanh, reference::gelu_tanh),
    ];
    for (activation, expected) in all {
        everywhere(|level, length, random| {
            let input = random.normals(length, 3.0);
            let mut output = input.clone();
            activation.apply_at(level, &mut output);
            for (&input, &output) in input.iter().zip(&output) {
                // The far negative tail is the difference of an exponential's argument: relative to |x|, not to itself.
                let error = (f64::from(output) - expected(f64::from(input))).abs();
                assert!(error <= 3e-7 * f64::from(input.abs()), "{activation:?} {level:?}: {input} became {output}");
            }
        });
        for level in super::levels() {
            let mut values = [0.0, f32::INFINITY, f32::NAN, 1e30, -1e30, -50.0];
            activation.apply_at(level, &mut values);
            assert_eq!(values[0], 0.0);
            assert_eq!(values[1], f32::INFINITY, "{activation:?} {level:?}");
            assert!(values[2].is_nan(), "{activation:?} {level:?}");
            assert_eq!(values[3], 1e30);
            assert_eq!(values[4], 0.0, "{activation:?} {level:?}");
            assert!(values[5].abs() < 1e-15);
        }
    }
}

#[test]
fn gated_activation_and_sums() {
    everywhere(|level, length, random| {
        let (gate, up) = (random.normals(length, 2.0), random.normals(length, 2.0));
        let mut output = gate.clone();
        silu_multiply_at(level, &mut output, &up);
        let expected: Vec<f64> =
            gate.iter().zip(&up).map(|(&g, &u)| reference::silu(f64::from(g)) * f64::from(u)).collect();
        assert_close(&output, &expected, 3e-7, format!("{level:?} {length}"));

        let mut rows = [gate.clone(), up.clone()].concat();
        add_at(level, &mut rows, &up);
        let sums = gate.iter().zip(&up).map(|(g, u)| g + u).chain(up.iter().map(|u| u + u));
        assert_eq!(rows, sums.collect::<Vec<_>>(), "{level:?} {length}");
    });
}

#[test]
fn rotation_of_every_width() {
    everywhere(|level, pairs, random| {
        if pairs == 0 || pairs > 70 {
            return;
        }
        let (heads, head_dim, tokens, first) = (2, 2 * pairs + pairs % 3, 3, 1_000_000);
        let table = RopeTable::new(2 * pairs, 10_000.0, &RopeScaling::None).unwrap();
        let mut rotations = Rotations::default();
        table.rotations(first, tokens, &mut rotations, &ThreadTeam::new(1));
        let data = random.normals(tokens * heads * head_dim, 1.0);
        let mut output = data.clone();
        rotate_at(level, &mut output, &rotations, heads, head_dim);
        let frequencies: Vec<f64> = (0..pairs).map(|i| 10_000f64.powf(-(i as f64) / pairs as f64)).collect();
        for (row, (output, data)) in output.chunks(head_dim).zip(data.chunks(head_dim)).enumerate() {
            let expected = reference::rotate(data, first + row / heads, &frequencies, 1.0);
            assert_close(output, &expected, 3e-7, format!("{level:?} {pairs} pairs, row {row}"));
        }
    });
}

/// Whatever the number of threads and whether rows are grouped: the same bits as row by row.
#[test]
fn threads_do_not_change_a_bit() {
    let (rows, width) = (300, 192);
    let mut random = Random::new(3);
    let (data, other) = (random.normals(rows * width, 1.0), random.normals(rows * width, 1.0));
    let weight = random.normals(width, 1.0);
    let level = InstructionSet::current();
    let results: Vec<Vec<Vec<f32>>> = [1, 2, 4]
        .map(|threads| {
            let team = ThreadTeam::new(threads);
            let mut normed = vec![0.0; rows * width];
            rms_norm_rows(&data, &weight, 1e-5, &mut normed, &team);
            let mut in_place = data.clone();
            rms_norm_in_place(&mut in_place, &weight, 1e-5, &team);
            assert_eq!(normed, in_place);
            let mut sum = data.clone();
            add(&mut sum, &other, &team);
            add_bias_rows(&mut sum, &weight, &team);
            let mut gated = data.clone();
            silu_multiply(&mut gated, &other, &team);
            let joined: Vec<f32> =
                data.chunks(width).zip(other.chunks(width)).flat_map(|(a, b)| [a, b].concat()).collect();
            let mut from_joined = vec![0.0; rows * width];
            silu_multiply_joined(&joined, width, &mut from_joined, &team);
            let mut activated = data.clone();
            Activation::Gelu.apply(&mut activated, &team);
            let mut rotations = Rotations::default();
            RopeTable::new(32, 1e4, &RopeScaling::None).unwrap().rotations(5, rows, &mut rotations, &team);
            let mut turned = data.clone();
            rotations.apply(&mut turned, width / 64, 64, &team);
            vec![normed, sum, gated, from_joined, activated, turned]
        })
        .into();
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
    assert_eq!(results[0][2], results[0][3], "joined gate and up give what separate ones give");

    let mut expected = data.clone();
    expected.chunks_mut(width).for_each(|row| rms_norm_at(level, row, &weight, 1e-5));
    assert_eq!(results[0][0], expected);
    let mut expected = data.clone();
    for (i, row) in expected.chunks_mut(width).enumerate() {
        add_at(level, row, &other[i * width..][..width]);
        add_at(level, row, &weight);
    }
    assert_eq!(results[0][1], expected);
}
