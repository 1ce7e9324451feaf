//! Exact attention against an f64 reference: shapes, masks, cache types, order of appends, threads.

mod blocks;
mod case;

use case::{Case, Data};
use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, KeyValueCache, KeyValueType, Mask, Queries, Sequence, ThreadTeam,
};
use iceformer_testing::compare::assert_close;
use iceformer_testing::random::Random;
use proptest::prelude::*;

impl Case {
    fn data(&self, seed: u64) -> Data {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let mut random = Random::new(seed);
        Data {
            queries: random.normals(self.tokens * self.query_heads * key_dim, 1.0),
            keys: random.normals(self.keys * kv_heads * key_dim, 1.0),
            values: random.normals(self.keys * kv_heads * value_dim, 1.0),
        }
    }

    fn cache(&self, data: &Data, kind: KeyValueType, chunk: usize, team: &ThreadTeam) -> KeyValueCache {
        let mut cache = KeyValueCache::new(self.shape, kind);
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let keys = data.keys.chunks(chunk * kv_heads * key_dim);
        for (keys, values) in keys.zip(data.values.chunks(chunk * kv_heads * value_dim)) {
            cache.append(keys, values, team);
        }
        assert_eq!(cache.len(), self.keys);
        cache
    }

    fn check(&self, seed: u64) {
        let data = self.data(seed);
        let expected = self.reference(&data);
        let team = ThreadTeam::new(2);
        for (kind, tolerance) in [(KeyValueType::F32, 3e-6), (KeyValueType::Bf16, 5e-2), (KeyValueType::Int8, 6e-2)] {
            let cache = self.cache(&data, kind, self.keys.max(1), &team);
            let (output, log_sum_exp) = self.run(&data, &cache, &team);
            let what = format!("{self:?} with a cache of {}", kind.name());
            assert_close(&output, &expected.output, tolerance, format!("output of {what}"));
            assert_close(&log_sum_exp, &expected.log_sum_exp, tolerance, format!("log-sum-exp of {what}"));
        }
    }
}

fn usual_scale(key_dim: usize) -> f32 {
    1.0 / (key_dim as f32).sqrt()
}

fn case(tokens: usize, keys: usize, query_heads: usize, shape: (usize, usize, usize), mask: Mask) -> Case {
    let (kv_heads, key_dim, value_dim) = shape;
    let first_position = keys.saturating_sub(tokens);
    let shape = CacheShape { kv_heads, key_dim, value_dim };
    Case { tokens, keys, query_heads, shape, mask, first_position, scale: usual_scale(key_dim) }
}

#[test]
fn every_length_up_to_seventy() {
    for length in 1..=70 {
        case(length, length, 2, (1, 16, 16), Mask::causal()).check(length as u64);
        case(1, length, 4, (2, 20, 8), Mask::causal()).check(length as u64);
        case(3, length, 1, (1, 8, 24), Mask::default()).check(length as u64);
    }
}

#[test]
fn widths_that_are_no_multiple_of_anything() {
    for (key_dim, value_dim) in
        [(16, 16), (7, 7), (64, 64), (80, 80), (96, 40), (128, 128), (33, 100), (256, 256), (1, 1)]
    {
        case(37, 300, 6, (2, key_dim, value_dim), Mask::causal()).check(key_dim as u64);
    }
}

#[test]
fn windows_padding_and_offsets() {
    let masks = [
        Mask { causal: true, window: Some(5), keys: None },
        Mask { causal: true, window: Some(100), keys: None },
        Mask { causal: false, window: Some(33), keys: None },
        Mask { causal: true, window: None, keys: Some(17..300) },
        Mask { causal: false, window: None, keys: Some(0..211) },
        Mask { causal: true, window: Some(64), keys: Some(130..290) },
        Mask { causal: false, window: None, keys: Some(5..5) },
    ];
    for mask in masks {
        for tokens in [1, 50, 300] {
            case(tokens, 300, 4, (2, 32, 32), mask.clone()).check(tokens as u64);
        }
    }
}

/// Few rows read keys in longer blocks than a prompt's.
#[test]
fn few_queries_see_windows_across_long_blocks() {
    let windows = [5, 500, 513, 700].map(|window| Mask { causal: true, window: Some(window), keys: None });
    let padded = [17..1_090, 500..1_030, 512..513].map(|keys| Mask { causal: true, window: None, keys: Some(keys) });
    for mask in windows.into_iter().chain(padded) {
        for tokens in [1, 2, 3] {
            case(tokens, 1_100, 4, (1, 32, 80), mask.clone()).check(tokens as u64);
        }
    }
}

/// The sums of a block of int8 values hold the largest there are, whatever the number of rows.
#[test]
fn equal_largest_values_of_long_blocks_are_their_own_mean() {
    let team = ThreadTeam::new(1);
    for (tokens, sign) in [(1, 1.0), (1, -1.0), (2, 1.0), (3, -1.0), (20, 1.0)] {
        let case = case(tokens, 1_100, 4, (1, 16, 16), Mask::default());
        let mut data = case.data(7);
        data.keys.fill(0.25);
        data.values.fill(sign);
        for kind in KeyValueType::ALL {
            let (output, _) = case.run(&data, &case.cache(&data, kind, 1_100, &team), &team);
            assert_close(&output, &vec![sign.into(); output.len()], 1e-3, format!("{tokens} tokens, {}", kind.name()));
        }
    }
}

#[test]
fn more_queries_than_keys_and_no_keys() {
    let mut longer = case(40, 10, 2, (2, 16, 16), Mask::default());
    longer.check(1);
    longer.first_position = 0;
    longer.mask = Mask::causal();
    longer.check(2);
    case(3, 0, 2, (1, 16, 16), Mask::default()).check(3);
    case(0, 30, 2, (1, 16, 16), Mask::default()).check(4);
}

#[test]
fn a_window_behind_the_last_position_is_empty() {
    let mask = |causal| Mask { window: Some(4), causal, ..Mask::default() };
    for causal in [false, true] {
        for position in [usize::MAX - 1, usize::MAX] {
            assert!(mask(causal).visible(position, 100).is_empty());
        }
    }
    assert_eq!(Mask::causal().visible(usize::MAX, 100), 0..100);
}

#[test]
#[should_panic(
    expected = "the first position is 18446744073709551615 for 1 queries; expected a sum of both of at most"
)]
#[cfg(target_pointer_width = "64")]
fn a_position_that_is_no_number_is_named() {
    let case = Case { first_position: usize::MAX, ..case(1, 10, 2, (2, 16, 16), Mask::causal()) };
    let (data, team) = (case.data(1), ThreadTeam::new(1));
    case.run(&data, &case.cache(&data, KeyValueType::F32, 10, &team), &team);
}

#[test]
#[should_panic(expected = "head 2 of a cache of 2 key/value heads")]
fn a_head_that_is_not_there_is_named() {
    let case = case(1, 10, 2, (2, 16, 16), Mask::causal());
    let (data, team) = (case.data(1), ThreadTeam::new(1));
    case.cache(&data, KeyValueType::F32, 10, &team).read_value(2, 0, &mut [0.0; 16]);
}

#[test]
fn decode_over_many_ranges() {
    for keys in [1_023, 1_024, 1_025, 5_000] {
        case(1, keys, 8, (2, 64, 64), Mask::causal()).check(keys as u64);
    }
    case(700, 3_000, 4, (2, 64, 64), Mask::causal()).check(9);
}

#[test]
fn chunks_and_single_tokens_fill_the_same_cache() {
    let case = case(5, 333, 4, (2, 48, 48), Mask::causal());
    let data = case.data(3);
    let team = ThreadTeam::new(2);
    for kind in KeyValueType::ALL {
        let whole = case.run(&data, &case.cache(&data, kind, 333, &team), &team);
        for chunk in [1, 7, 16, 64, 100] {
            assert_eq!(
                case.run(&data, &case.cache(&data, kind, chunk, &team), &team),
                whole,
                "{} by {chunk}",
                kind.name()
            );
        }
    }
}

#[test]
fn truncated_and_refilled_is_as_if_never_longer() {
    let case = case(5, 650, 4, (2, 48, 48), Mask::causal());
    let mut data = case.data(3);
    let team = ThreadTeam::new(2);
    for kind in KeyValueType::ALL {
        let whole = case.run(&data, &case.cache(&data, kind, 650, &team), &team);
        for kept in [0, 1, 40, 64, 511, 512, 513, 600, 650] {
            let mut cache = case.cache(&data, kind, 650, &team);
            // What is dropped must leave nothing behind, not even a NaN.
            cache.append(&[f32::NAN; 3 * 96], &[f32::NAN; 3 * 96], &team);
            cache.truncate(kept);
            assert_eq!(cache.len(), kept);
            let width = 96;
            cache.append(&data.keys[kept * width..], &data.values[kept * width..], &team);
            assert!(case.run(&data, &cache, &team) == whole, "{} cut to {kept} differs", kind.name());
        }
    }
    data.values[20 * 96] = f32::NAN;
    let mut cache = case.cache(&data, KeyValueType::Bf16, 650, &team);
    cache.truncate(20);
    let (output, _) = case.run(&data, &cache, &team);
    assert!(output.iter().all(|value| value.is_finite()), "a dropped NaN shows");
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for (tokens, keys) in [(1, 4_000), (100, 2_000), (6, 5_000)] {
        let case = case(tokens, keys, 8, (2, 64, 64), Mask::causal());
        let data = case.data(5);
        for kind in KeyValueType::ALL {
            let runs = [1, 2, 3, 8].map(|threads| {
                let team = ThreadTeam::new(threads);
                case.run(&data, &case.cache(&data, kind, keys, &team), &team)
            });
            assert!(runs.iter().all(|run| *run == runs[0]), "{} differs by threads", kind.name());
        }
    }
}

#[test]
fn large_and_shared_key_offsets_cost_int8_nothing() {
    // Keys with a large common part, as the biases of Qwen2 give them: the mean takes it out.
    let case = case(8, 500, 2, (1, 64, 64), Mask::causal());
    let mut data = case.data(11);
    for key in data.keys.chunks_exact_mut(64) {
        key[3] += 200.0;
        key[40] -= 90.0;
    }
    let expected = case.reference(&data);
    let team = ThreadTeam::new(1);
    let (output, _) = case.run(&data, &case.cache(&data, KeyValueType::Int8, 500, &team), &team);
    assert_close(&output, &expected.output, 2e-2, "int8 with shared offsets");
}

#[test]
fn int8_keeps_the_small_weights_of_a_long_tail() {
    // One key takes most of the mass of the first block; thousands of small ones carry a quarter of it together.
    let case = case(6, 8_192, 1, (1, 64, 64), Mask::default());
    let mut data = case.data(12);
    data.queries.iter_mut().for_each(|query| *query *= 0.5);
    for query in data.queries.chunks_exact_mut(64) {
        query[0] = 8.0;
    }
    data.keys[0] = 10.0;
    data.values.chunks_exact_mut(64).skip(1).for_each(|value| value[5] += 1.0);
    let expected = case.reference(&data);
    let team = ThreadTeam::new(1);
    for kind in KeyValueType::ALL {
        let (output, _) = case.run(&data, &case.cache(&data, kind, 8_192, &team), &team);
        assert_close(&output, &expected.output, 2e-2, format!("a long tail in {}", kind.name()));
    }
}

#[test]
fn nan_and_infinity_show() {
    let case = case(2, 100, 1, (1, 16, 16), Mask::default());
    let team = ThreadTeam::new(1);
    for kind in KeyValueType::ALL {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut data = case.data(1);
            data.queries[3] = bad;
            let (output, _) = case.run(&data, &case.cache(&data, kind, 100, &team), &team);
            assert!(output[..16].iter().all(|value| value.is_nan()), "{}: {bad} in a query is lost", kind.name());
            assert!(
                output[16..].iter().all(|value| value.is_finite()),
                "{}: {bad} spreads to another query",
                kind.name()
            );
            let mut data = case.data(1);
            data.values[50 * 16 + 3] = bad;
            let (output, _) = case.run(&data, &case.cache(&data, kind, 100, &team), &team);
            assert!(!output[3].is_finite(), "{}: {bad} in a value is lost", kind.name());
        }
    }
}

#[test]
fn nan_and_infinity_show_over_many_ranges_of_keys() {
    let team = ThreadTeam::new(2);
    for (tokens, keys) in [(1, 3_000), (2, 5_000)] {
        let case = case(tokens, keys, 1, (1, 16, 16), Mask::causal());
        for kind in KeyValueType::ALL {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut data = case.data(1);
                data.queries[3] = bad;
                let (output, log_sum_exp) = case.run(&data, &case.cache(&data, kind, keys, &team), &team);
                assert!(output[..16].iter().all(|value| value.is_nan()), "{}: {bad} in a query", kind.name());
                assert!(log_sum_exp[0].is_nan(), "{}: {bad} in a query, {}", kind.name(), log_sum_exp[0]);
                let mut data = case.data(1);
                data.keys[10 * 16 + 3] = bad;
                let (output, _) = case.run(&data, &case.cache(&data, kind, keys, &team), &team);
                // −∞ is a logit like any other.
                if bad.is_nan() || kind == KeyValueType::Int8 {
                    assert!(output.iter().all(|value| value.is_nan()), "{}: {bad} in a key", kind.name());
                }
            }
        }
    }
}

/// As tokens of padding and heads that are set to zero have them: the mean of the values that are seen.
#[test]
fn queries_of_zeros_see_all_keys_alike() {
    let team = ThreadTeam::new(1);
    for (tokens, keys, mask) in [
        (40, 40, Mask::causal()),
        (1, 40, Mask::default()),
        (7, 300, Mask { keys: Some(5..290), ..Mask::default() }),
        (7, 300, Mask { keys: Some(9..9), ..Mask::default() }),
    ] {
        let case = case(tokens, keys, 2, (1, 16, 16), mask);
        let mut data = case.data(3);
        let queries = data.queries.clone();
        data.queries.fill(0.0);
        let expected = case.reference(&data);
        for kind in KeyValueType::ALL {
            let cache = case.cache(&data, kind, keys, &team);
            let about = || format!("zeros in {}", kind.name());
            let (output, log_sum_exp) = case.run(&data, &cache, &team);
            assert_close(&output, &expected.output, 2e-2, about());
            assert_close(&log_sum_exp, &expected.log_sum_exp, 1e-3, about());
            // A scale of zero does the same.
            let mut scaled = vec![f32::NAN; output.len()];
            let queries = Queries { data: &queries, query_heads: 2, first_position: case.first_position };
            let attention = Attention { scale: 0.0, ..case.attention() };
            attention.run(queries, &cache, &mut scaled, None, &team, &mut AttentionScratch::default());
            assert_eq!(scaled, output, "{}", about());
        }
    }
}

/// Values that a row does not see, or hardly attends to, leave those that it sees as they are, however large they are.
#[test]
fn large_values_that_are_not_seen_change_nothing() {
    let team = ThreadTeam::new(1);
    for (tokens, keys, hidden, mask) in [
        (7, 200, 150..200, Mask { keys: Some(0..150), ..Mask::default() }),
        (3, 200, 150..200, Mask { keys: Some(0..150), ..Mask::default() }),
        (40, 200, 199..200, Mask::causal()),
    ] {
        let case = case(tokens, keys, 2, (1, 16, 16), mask);
        let small = case.data(5);
        for factor in [1e2, 1e4, 1e8, 1e30] {
            let mut data = case.data(5);
            data.values[hidden.start * 16..hidden.end * 16].iter_mut().for_each(|value| *value *= factor);
            // All rows but the last, which sees its own key.
            let seeing_less = (tokens - 1) * 2 * 16;
            for kind in KeyValueType::ALL {
                let (output, _) = case.run(&data, &case.cache(&data, kind, keys, &team), &team);
                let (expected, _) = case.run(&small, &case.cache(&small, kind, keys, &team), &team);
                let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                let about = format!("{} with values of {factor}", kind.name());
                assert_close(&output[..seeing_less], &expected[..seeing_less], 2e-3, about);
            }
        }
    }
}

/// Integers of weights are relative to the largest value: one of which 1/32,767 is no number must not turn them over.
#[test]
fn values_next_to_nothing_keep_their_sign_and_size() {
    let team = ThreadTeam::new(1);
    let case = case(3, 200, 2, (1, 16, 16), Mask { keys: Some(0..150), ..Mask::default() });
    for (seen, hidden) in [(1e-33, 1e-33), (1e-19, 1e20), (1e-33, 1.0), (1e-30, 1e-36)] {
        let mut data = case.data(6);
        data.values.fill(hidden);
        data.values[..150 * 16].fill(seen);
        for kind in KeyValueType::ALL {
            let (output, _) = case.run(&data, &case.cache(&data, kind, 200, &team), &team);
            let is_fair = |value: &f32| (0.0..=1.02 * seen).contains(value);
            assert!(output.iter().all(is_fair), "{}, values of {seen} and {hidden}: {}", kind.name(), output[0]);
        }
    }
}

/// A NaN may carry any bits, which must not reach the integers of a query.
#[test]
fn bits_of_a_nan_count_for_nothing_under_a_negative_scale() {
    let (team, case) = (ThreadTeam::new(1), case(1, 30, 1, (1, 16, 16), Mask::default()));
    let mut data = case.data(2);
    data.queries[3] = f32::from_bits(0x7fc0_0080);
    for kind in KeyValueType::ALL {
        let (cache, mut output) = (case.cache(&data, kind, 30, &team), [0.0; 16]);
        let attention = Attention { scale: -0.25, ..case.attention() };
        let queries = Queries { data: &data.queries, query_heads: 1, first_position: 29 };
        attention.run(queries, &cache, &mut output, None, &team, &mut AttentionScratch::default());
        assert!(output.iter().all(|value| value.is_nan()), "{}", kind.name());
    }
}

#[test]
fn ragged_batch_is_each_sequence_alone() {
    let team = ThreadTeam::new(2);
    let cases = [
        case(20, 40, 4, (2, 32, 32), Mask { keys: Some(7..40), ..Mask::causal() }),
        case(33, 33, 4, (2, 32, 32), Mask::causal()),
        case(1, 90, 4, (2, 32, 32), Mask { keys: Some(0..61), ..Mask::default() }),
    ];
    let data: Vec<Data> = (0..3).map(|index| cases[index].data(index as u64)).collect();
    let caches: Vec<_> = (0..3).map(|index| cases[index].cache(&data[index], KeyValueType::F32, 16, &team)).collect();
    let mut outputs: Vec<Vec<f32>> = cases.iter().map(|case| vec![0.0; case.tokens * 4 * 32]).collect();
    let mut batch: Vec<Sequence<'_>> = outputs
        .iter_mut()
        .enumerate()
        .map(|(index, output)| Sequence {
            queries: Queries {
                data: &data[index].queries,
                query_heads: 4,
                first_position: cases[index].first_position,
            },
            cache: &caches[index],
            mask: cases[index].mask.clone(),
            output,
            log_sum_exp: None,
        })
        .collect();
    let report = cases[0].attention().run_batch(&mut batch, &team, &mut AttentionScratch::default());
    let report = report.total();
    assert_eq!(report.kept_keys, report.allowed_keys);
    for (index, output) in outputs.iter().enumerate() {
        assert!(*output == cases[index].run(&data[index], &caches[index], &team).0, "sequence {index} differs");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_mask_and_order_of_appends(
        (tokens, keys) in (0_usize..60, 0_usize..400),
        (kv_heads, group) in (1_usize..4, 1_usize..9),
        (key_dim, value_dim) in (1_usize..140, 1_usize..140),
        (causal, window, padding) in (any::<bool>(), prop::option::of(1_usize..200), prop::option::of((0_usize..400, 0_usize..400))),
        (first_position, chunk, kept) in (0_usize..450, 1_usize..90, 0_usize..400),
        seed in any::<u64>(),
    ) {
        let keys_range = padding.map(|(a, b)| a.min(b)..a.max(b));
        let case = Case {
            tokens,
            keys,
            query_heads: kv_heads * group,
            shape: CacheShape { kv_heads, key_dim, value_dim },
            mask: Mask { causal, window, keys: keys_range },
            first_position,
            scale: usual_scale(key_dim),
        };
        case.check(seed);
        let data = case.data(seed);
        let team = ThreadTeam::new(2);
        for kind in KeyValueType::ALL {
            let whole = case.run(&data, &case.cache(&data, kind, keys.max(1), &team), &team);
            let mut cache = case.cache(&data, kind, chunk, &team);
            let kept = kept.min(keys);
            cache.truncate(kept);
            cache.append(&data.keys[kept * kv_heads * key_dim..], &data.values[kept * kv_heads * value_dim..], &team);
            prop_assert!(case.run(&data, &cache, &team) == whole, "{case:?} cut to {kept} and refilled");
        }
    }
}
