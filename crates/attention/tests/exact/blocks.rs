//! Exact attention over more keys than a block has, against the f64 reference on what the cache holds: few rows, which
//! take whole segments as blocks, and many; windows and padding that begin and end within blocks; soft caps.

use std::ops::ControlFlow;

use iceformer_attention::{
    ArrayScratch, Arrays, CacheShape, Elements, ElementsMut, KeyValueCache, KeyValueType, Mask, StridedView, ThreadTeam,
};
use iceformer_testing::compare::assert_close;
use iceformer_testing::random::Random;

use crate::case::{Case, Data};

const CASES: usize = 40;
const WIDTHS: [usize; 14] = [1, 4, 7, 16, 17, 32, 33, 48, 64, 80, 96, 100, 128, 144];

/// Mostly about a multiple of 256, half of a segment.
fn length(random: &mut Random) -> usize {
    match random.below(4) {
        0 => 1 + random.below(1_600),
        _ => 256 * (1 + random.below(6)) + 20 - random.below(40),
    }
}

impl Case {
    fn any(random: &mut Random) -> Self {
        let (kv_heads, group) = (1 + random.below(2), 1 + random.below(8));
        let tokens = if random.below(5) == 0 { 1 + random.below(50) } else { 1 + random.below(3) };
        let keys = length(random);
        let (key_dim, value_dim) = (WIDTHS[random.below(WIDTHS.len())], WIDTHS[random.below(WIDTHS.len())]);
        let window = (random.below(2) == 0).then(|| length(random));
        let unpadded = (random.below(3) == 0).then(|| {
            let (one, other) = (length(random).min(keys), length(random));
            one.min(other)..one.max(other)
        });
        let first_position = if random.below(3) == 0 { random.below(keys + 30) } else { keys.saturating_sub(tokens) };
        Self {
            tokens,
            keys,
            query_heads: kv_heads * group,
            shape: CacheShape { kv_heads, key_dim, value_dim },
            mask: Mask { causal: random.below(3) > 0, window, keys: unpadded },
            first_position,
            scale: [0.3, -0.2, 0.05][random.below(3)],
        }
    }

    fn uneven_data(&self, random: &mut Random) -> Data {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let size = [0.1, 1.0, 30.0][random.below(3)];
        let mut values = random.normals(self.keys * kv_heads * value_dim, size);
        if random.below(3) == 0 {
            // A block of values of very different sizes.
            let factor = [100.0, 1e-4, 1e6][random.below(3)];
            values.chunks_mut(value_dim).step_by(37).for_each(|value| value[0] *= factor);
        }
        Data {
            queries: random.normals(self.tokens * self.query_heads * key_dim, 1.0),
            keys: random.normals(self.keys * kv_heads * key_dim, 1.0),
            values,
        }
    }

    /// A cache of `data`, filled in chunks, cut and filled again.
    fn refilled(
        &self,
        data: &Data,
        kind: KeyValueType,
        (chunk, cut): (usize, usize),
        team: &ThreadTeam,
    ) -> KeyValueCache {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let (key, value) = (kv_heads * key_dim, kv_heads * value_dim);
        let mut cache = KeyValueCache::new(self.shape, kind);
        for (keys, values) in data.keys.chunks(chunk * key).zip(data.values.chunks(chunk * value)) {
            cache.append(keys, values, team);
        }
        // What is dropped must leave nothing behind, in no part of a segment.
        cache.append(&vec![f32::NAN; 700 * key], &vec![f32::NAN; 700 * value], team);
        cache.truncate(cut);
        cache.append(&data.keys[cut * key..], &data.values[cut * value..], team);
        cache
    }

    /// `data` as `cache` holds it.
    fn held(&self, data: &Data, cache: &KeyValueCache) -> Data {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let Data { queries, mut keys, mut values } =
            Data { queries: data.queries.clone(), keys: data.keys.clone(), values: data.values.clone() };
        for (place, key) in keys.chunks_exact_mut(key_dim).enumerate() {
            cache.read_key(place % kv_heads, place / kv_heads, key);
        }
        for (place, value) in values.chunks_exact_mut(value_dim).enumerate() {
            cache.read_value(place % kv_heads, place / kv_heads, value);
        }
        Data { queries, keys, values }
    }

    /// `[tokens, query_heads, value_dim]`, with logits soft-capped to `limit`.
    fn capped(&self, data: &Data, limit: f64) -> Vec<f64> {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let group = self.query_heads / kv_heads;
        let mut output = Vec::new();
        for (row, query) in data.queries.chunks_exact(key_dim).enumerate() {
            let (token, head) = (row / self.query_heads, row % self.query_heads);
            let (mut sum, mut total) = (vec![0.0; value_dim], 0.0);
            for key in self.mask.visible(self.first_position + token, self.keys) {
                let place = key * kv_heads + head / group;
                let products =
                    query.iter().zip(&data.keys[place * key_dim..]).map(|(a, b)| f64::from(*a) * f64::from(*b));
                let weight = (limit * (f64::from(self.scale) * products.sum::<f64>() / limit).tanh()).exp();
                total += weight;
                let value = &data.values[place * value_dim..][..value_dim];
                sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight * f64::from(*value));
            }
            output.extend(sum.into_iter().map(|sum| if total == 0.0 { 0.0 } else { sum / total }));
        }
        output
    }
}

#[test]
fn any_rows_windows_and_lengths() {
    let (team, mut random) = (ThreadTeam::new(2), Random::new(31));
    for number in 0..CASES {
        let case = Case::any(&mut random);
        let data = case.uneven_data(&mut random);
        let order = (1 + random.below(700), random.below(case.keys + 1));
        for kind in KeyValueType::ALL {
            let cache = case.refilled(&data, kind, order, &team);
            let expected = case.reference(&case.held(&data, &cache));
            let (output, log_sum_exp) = case.run(&data, &cache, &team);
            // Queries and weights are rounded beside narrower keys and values.
            let tolerance = if kind == KeyValueType::F32 { 1e-5 } else { 6e-2 };
            let what = format!("case {number}, {}, {case:?}", kind.name());
            assert_close(&output, &expected.output, tolerance, format!("output of {what}"));
            assert_close(&log_sum_exp, &expected.log_sum_exp, tolerance, format!("log-sum-exp of {what}"));
        }
    }
}

#[test]
fn any_rows_windows_and_lengths_under_a_soft_cap() {
    let (team, mut random, mut scratch) = (ThreadTeam::new(2), Random::new(32), ArrayScratch::default());
    for number in 0..CASES {
        let case = Case::any(&mut random);
        let data = case.uneven_data(&mut random);
        let limit = [0.5, 4.0, 30.0][random.below(3)];
        let CacheShape { kv_heads, key_dim, value_dim } = case.shape;
        let view = |data, heads: usize, tokens, width: usize| {
            StridedView::new(Elements::F32(data), [1, heads, tokens, width], [0, width, heads * width, 1])
                .expect("an array of this shape")
        };
        let expected = case.capped(&data, f64::from(limit));
        for kind in [KeyValueType::F32, KeyValueType::Bf16] {
            let arrays = Arrays {
                queries: view(&data.queries, case.query_heads, case.tokens, key_dim),
                keys: view(&data.keys, kv_heads, case.keys, key_dim),
                values: view(&data.values, kv_heads, case.keys, value_dim),
                key_value_type: Some(kind),
                first_position: case.first_position,
                key_ranges: None,
                soft_cap: Some(limit),
                sinks: None,
            };
            let mut output = vec![f32::NAN; arrays.output_len()];
            let numbers = ElementsMut::F32(&mut output);
            let proceed = &mut || ControlFlow::Continue(());
            let flow = case.attention().run_arrays(&arrays, numbers, &team, &mut scratch, proceed);
            assert!(flow.is_continue());
            let tolerance = if kind == KeyValueType::F32 { 1e-5 } else { 6e-2 };
            assert_close(&output, &expected, tolerance, format!("case {number}, {}, {limit}, {case:?}", kind.name()));
        }
    }
}
