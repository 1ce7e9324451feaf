//! A call and its data, beside exact attention.

use std::ops::Range;

use iceformer_attention::{
    Attention, AttentionScratch, BudgetSettings, CacheShape, HeadReport, KeyValueCache, KeyValueType, Mask, Method,
    Queries, ThreadTeam,
};
use iceformer_testing::random::Random;
use iceformer_testing::synthetic::{Inputs, Kind, Shape};

pub const BUDGET: f32 = 0.05;
pub const BUDGETED: Method = Method::Budgeted(BudgetSettings { budget: BUDGET });

pub struct Case {
    pub shape: Shape,
    pub inputs: Inputs,
    pub mask: Mask,
}

pub fn shape(query_tokens: usize, key_tokens: usize, key_dim: usize, value_dim: usize) -> Shape {
    Shape { query_tokens, key_tokens, query_heads: 4, kv_heads: 2, key_dim, value_dim }
}

/// Keys like those of a model: around centres, which the queries also point to, on a few of the directions.
pub fn topical(shape: Shape, mask: Mask) -> Case {
    let Shape { query_tokens, key_tokens, query_heads, kv_heads, key_dim, value_dim } = shape;
    let mut random = Random::new(11);
    let centres = random.normals(40 * key_dim, 1.0);
    let value_centres = random.normals(40 * value_dim, 1.0);
    let (mut keys, mut values, mut queries) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..key_tokens * kv_heads {
        let topic = random.below(40);
        let around = |centres: &[f32], dim: usize, noise: Vec<f32>| -> Vec<f32> {
            centres[topic * dim..][..dim].iter().zip(noise).map(|(centre, noise)| centre + noise).collect()
        };
        keys.extend(around(&centres, key_dim, random.normals(key_dim, 0.25)));
        values.extend(around(&value_centres, value_dim, random.normals(value_dim, 0.5)));
    }
    // A topic for several queries in a row, as text has it, and topics enough that one alone is no percentile.
    for token in 0..query_tokens {
        for head in 0..query_heads {
            let topic = (token / 16 * 7 + head * 3) % 40;
            let noise = random.normals(key_dim, 0.3);
            queries
                .extend(centres[topic * key_dim..][..key_dim].iter().zip(noise).map(|(centre, noise)| centre + noise));
        }
    }
    Case { shape, inputs: Inputs { queries, keys, values }, mask }
}

pub fn synthetic(kind: Kind, shape: Shape, mask: Mask) -> Case {
    Case { shape, inputs: Inputs::new(kind, shape, 5), mask }
}

impl Case {
    pub fn cache(&self, kind: KeyValueType, tokens: Range<usize>, team: &ThreadTeam) -> KeyValueCache {
        let Shape { kv_heads, key_dim, value_dim, .. } = self.shape;
        let mut cache = KeyValueCache::new(CacheShape { kv_heads, key_dim, value_dim }, kind);
        self.append(&mut cache, tokens, team);
        cache
    }

    pub fn append(&self, cache: &mut KeyValueCache, tokens: Range<usize>, team: &ThreadTeam) {
        let Shape { kv_heads, key_dim, value_dim, .. } = self.shape;
        let (key, value) = (kv_heads * key_dim, kv_heads * value_dim);
        let keys = &self.inputs.keys[tokens.start * key..tokens.end * key];
        cache.append(keys, &self.inputs.values[tokens.start * value..tokens.end * value], team);
    }

    /// Runs queries `tokens`, of which the last is that of the last key of a full cache.
    pub fn run(
        &self,
        method: Method,
        cache: &KeyValueCache,
        tokens: Range<usize>,
        team: &ThreadTeam,
    ) -> (Vec<f32>, Vec<f32>, HeadReport) {
        let first_position = self.shape.key_tokens - self.shape.query_tokens + tokens.start;
        self.run_at(first_position, &self.mask, method, cache, tokens, team)
    }

    /// Runs queries `tokens` as those of the keys from `first_position` on.
    pub fn run_at(
        &self,
        first_position: usize,
        mask: &Mask,
        method: Method,
        cache: &KeyValueCache,
        tokens: Range<usize>,
        team: &ThreadTeam,
    ) -> (Vec<f32>, Vec<f32>, HeadReport) {
        self.run_in(&mut AttentionScratch::default(), first_position, mask, method, cache, tokens, team)
    }

    /// As [`run_at`](Self::run_at), in buffers of earlier calls.
    #[expect(clippy::too_many_arguments, reason = "a call and where it runs")]
    pub fn run_in(
        &self,
        scratch: &mut AttentionScratch,
        first_position: usize,
        mask: &Mask,
        method: Method,
        cache: &KeyValueCache,
        tokens: Range<usize>,
        team: &ThreadTeam,
    ) -> (Vec<f32>, Vec<f32>, HeadReport) {
        let Shape { query_heads, key_dim, value_dim, .. } = self.shape;
        let attention = Attention { method, mask: mask.clone(), scale: 1.0 / (key_dim as f32).sqrt() };
        let row = query_heads * key_dim;
        let queries =
            Queries { data: &self.inputs.queries[tokens.start * row..tokens.end * row], query_heads, first_position };
        let mut output = vec![f32::NAN; tokens.len() * query_heads * value_dim];
        let mut log_sum_exp = vec![f32::NAN; tokens.len() * query_heads];
        let report = attention.run(queries, cache, &mut output, Some(&mut log_sum_exp), team, scratch);
        (output, log_sum_exp, report.total())
    }

    /// Moves `keys` in one direction, and has `queries` look for that alone: their logits are `nats` above all others.
    pub fn look_for_keys_apart(
        &mut self,
        keys: impl Iterator<Item = usize>,
        queries: impl Iterator<Item = usize>,
        nats: f32,
    ) {
        let Shape { query_heads, kv_heads, key_dim, .. } = self.shape;
        let direction = Random::new(4).normals(key_dim, 1.0);
        let length = direction.iter().map(|value| value * value).sum::<f32>().sqrt();
        let along = |size: f32| direction.iter().map(move |value| value / length * size);
        let moved = 2.0;
        for key in keys {
            for key in self.inputs.keys[key * kv_heads * key_dim..][..kv_heads * key_dim].chunks_exact_mut(key_dim) {
                key.iter_mut().zip(along(moved)).for_each(|(key, more)| *key += more);
            }
        }
        let sharp = nats / moved * (key_dim as f32).sqrt();
        for query in queries {
            let heads = &mut self.inputs.queries[query * query_heads * key_dim..][..query_heads * key_dim];
            heads
                .chunks_exact_mut(key_dim)
                .for_each(|query| query.iter_mut().zip(along(sharp)).for_each(|(q, s)| *q = s));
        }
    }

    /// Missed mass of every row.
    pub fn missed(&self, exact: &[f32], output: &[f32]) -> Vec<f64> {
        let Shape { kv_heads, query_heads, value_dim, key_tokens, .. } = self.shape;
        let spread = |kv_head: usize| {
            let values = |channel: usize| {
                (0..key_tokens)
                    .map(move |key| f64::from(self.inputs.values[(key * kv_heads + kv_head) * value_dim + channel]))
            };
            let variance = |channel: usize| {
                let mean = values(channel).sum::<f64>() / key_tokens as f64;
                values(channel).map(|value| (value - mean).powi(2)).sum::<f64>() / key_tokens as f64
            };
            (0..value_dim).map(variance).sum::<f64>().sqrt()
        };
        let spreads: Vec<f64> = (0..kv_heads).map(spread).collect();
        let rows = exact.chunks_exact(value_dim).zip(output.chunks_exact(value_dim)).enumerate();
        rows.map(|(row, (exact, output))| {
            let square: f64 = exact.iter().zip(output).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            square.sqrt() / (2.0_f64.sqrt() * spreads[row % query_heads / (query_heads / kv_heads)])
        })
        .collect()
    }
}

/// Share of the rows that missed more than the budget.
pub fn share_over(missed: &[f64]) -> f64 {
    let kept = missed.iter().filter(|missed| **missed <= f64::from(BUDGET)).count();
    1.0 - kept as f64 / missed.len() as f64
}

/// Rows come in sixteens that are alike, so that of some hundred more may miss the budget than the one in a hundred of many.
pub fn assert_kept(missed: &[f64], what: &str) {
    let over = share_over(missed);
    assert!(over <= 0.02, "{what}: {over} of the rows missed more than the budget, {} at worst", quantile(missed, 1.0));
}

pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// Largest difference between outputs or log-sum-exps.
pub fn difference(a: &(Vec<f32>, Vec<f32>, HeadReport), b: &(Vec<f32>, Vec<f32>, HeadReport)) -> f32 {
    let pairs = a.0.iter().zip(&b.0).chain(a.1.iter().zip(&b.1));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
