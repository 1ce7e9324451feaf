//! Exact attention against an f64 reference: shapes, masks, cache types, order of appends, threads.

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, KeyValueCache, KeyValueType, Mask, Method, Queries, Sequence, ThreadTeam,
};

/// Deterministic values, roughly normal with unit variance.
fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5851_F42D_4C95_7F2D;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 1.414).collect()
}

struct Case {
    tokens: usize,
    keys: usize,
    query_heads: usize,
    shape: CacheShape,
    mask: Mask,
    first_position: usize,
}

struct Data {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Case {
    fn data(&self, seed: u64) -> Data {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        Data {
            queries: random(seed, self.tokens * self.query_heads * key_dim),
            keys: random(seed + 1, self.keys * kv_heads * key_dim),
            values: random(seed + 2, self.keys * kv_heads * value_dim),
        }
    }

    fn attention(&self) -> Attention {
        Attention { method: Method::Exact, mask: self.mask.clone(), scale: 1.0 / (self.shape.key_dim as f32).sqrt() }
    }

    /// Output and log-sum-exp in f64.
    fn reference(&self, data: &Data) -> (Vec<f64>, Vec<f64>) {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let group = self.query_heads / kv_heads;
        let scale = f64::from(self.attention().scale);
        let (mut output, mut log_sum_exp) = (Vec::new(), Vec::new());
        for token in 0..self.tokens {
            for head in 0..self.query_heads {
                let position = (self.first_position + token) as i64;
                let query = &data.queries[(token * self.query_heads + head) * key_dim..][..key_dim];
                let seen: Vec<usize> = (0..self.keys)
                    .filter(|&key| {
                        let distance = position - key as i64;
                        (!self.mask.causal || distance >= 0)
                            && self.mask.window.is_none_or(|window| distance.abs() < window as i64)
                            && self.mask.keys.as_ref().is_none_or(|keys| keys.contains(&key))
                    })
                    .collect();
                let logits: Vec<f64> = seen
                    .iter()
                    .map(|key| {
                        let key = &data.keys[(key * kv_heads + head / group) * key_dim..][..key_dim];
                        scale * query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                    })
                    .collect();
                let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
                log_sum_exp.push(largest + sum.ln());
                let mut row = vec![0.0; value_dim];
                for (key, logit) in seen.iter().zip(&logits) {
                    let value = &data.values[(key * kv_heads + head / group) * value_dim..][..value_dim];
                    let weight = (logit - largest).exp() / sum;
                    row.iter_mut().zip(value).for_each(|(target, value)| *target += weight * f64::from(*value));
                }
                output.extend(row);
            }
        }
        (output, log_sum_exp)
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

    fn run(&self, data: &Data, cache: &KeyValueCache, team: &ThreadTeam) -> (Vec<f32>, Vec<f32>) {
        let mut output = vec![f32::NAN; self.tokens * self.query_heads * self.shape.value_dim];
        let mut log_sum_exp = vec![f32::NAN; self.tokens * self.query_heads];
        let queries =
            Queries { data: &data.queries, query_heads: self.query_heads, first_position: self.first_position };
        let scratch = &mut AttentionScratch::default();
        self.attention().run(queries, cache, &mut output, Some(&mut log_sum_exp), team, scratch);
        (output, log_sum_exp)
    }

    fn check(&self, seed: u64) {
        let data = self.data(seed);
        let (expected, expected_lse) = self.reference(&data);
        let team = ThreadTeam::new(2);
        for (kind, tolerance) in [(KeyValueType::F32, 3e-6), (KeyValueType::Bf16, 2e-2), (KeyValueType::Int8, 4e-2)] {
            let cache = self.cache(&data, kind, self.keys.max(1), &team);
            let (output, log_sum_exp) = self.run(&data, &cache, &team);
            let context = format!(
                "{} tokens, {} keys, {} heads of {:?}, {:?} at {}, {}",
                self.tokens,
                self.keys,
                self.query_heads,
                self.shape,
                self.mask,
                self.first_position,
                kind.name()
            );
            for (index, (found, expected)) in output.iter().zip(&expected).enumerate() {
                let error = (f64::from(*found) - expected).abs();
                assert!(
                    error <= tolerance * (1.0 + expected.abs()),
                    "{context}: output {index} is {found}, not {expected}"
                );
            }
            for (index, (found, expected)) in log_sum_exp.iter().zip(&expected_lse).enumerate() {
                let close = (f64::from(*found) - expected).abs() <= tolerance * (1.0 + expected.abs());
                assert!(
                    close || f64::from(*found) == *expected,
                    "{context}: log-sum-exp {index} is {found}, not {expected}"
                );
            }
        }
    }
}

fn case(tokens: usize, keys: usize, query_heads: usize, shape: (usize, usize, usize), mask: Mask) -> Case {
    let (kv_heads, key_dim, value_dim) = shape;
    let first_position = keys.saturating_sub(tokens);
    Case { tokens, keys, query_heads, shape: CacheShape { kv_heads, key_dim, value_dim }, mask, first_position }
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
    let case = case(5, 333, 4, (2, 48, 48), Mask::causal());
    let mut data = case.data(3);
    let team = ThreadTeam::new(2);
    for kind in KeyValueType::ALL {
        let whole = case.run(&data, &case.cache(&data, kind, 333, &team), &team);
        for kept in [0, 1, 40, 64, 255, 256, 300, 333] {
            let mut cache = case.cache(&data, kind, 333, &team);
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
    let mut cache = case.cache(&data, KeyValueType::Bf16, 333, &team);
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
    let (expected, _) = case.reference(&data);
    let team = ThreadTeam::new(1);
    let (output, _) = case.run(&data, &case.cache(&data, KeyValueType::Int8, 500, &team), &team);
    let largest = output.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(largest < 0.1, "largest error {largest}");
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
    assert_eq!(report.kept_keys, report.allowed_keys);
    for (index, output) in outputs.iter().enumerate() {
        assert!(*output == cases[index].run(&data[index], &caches[index], &team).0, "sequence {index} differs");
    }
}
