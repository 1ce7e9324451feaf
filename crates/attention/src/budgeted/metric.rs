//! How the queries of a key/value head tell keys apart: what keys differ in and no query looks at need not be told apart.

use iceformer_kernels::rows::{ROW_MULTIPLE, Rows, add_scaled, add_weighted_rows, dot_rows};

use super::clustering::squared_norm;
use crate::tiles::Call;

/// Tokens of a call whose queries are looked at.
const TOKENS: usize = 64;
/// Fewer tell nothing: decoded ones, which go on with one matter for a while.
const LEAST_TOKENS: usize = 8;
/// Tokens that count as many as the guess that is made before any was seen: that queries look at all channels alike.
const GUESSED_TOKENS: f32 = 16.0;

/// Second moments of queries: those of each head of the group in relation to its own norm, so that a sharp head counts no
/// more than a diffuse one. Where two keys differ by `δ` the mean square of what their logits differ by is in proportion to
/// `δᵀ M δ`.
#[derive(Default)]
pub(super) struct QueryMetric {
    /// `[width][width]`, of trace 1; empty before any query was seen.
    moments: Vec<f32>,
    width: usize,
    /// Tokens that the moments stand for.
    tokens: f32,
}

impl QueryMetric {
    /// Takes in the queries of `call` to key/value head `kv_head`: of tokens spread over it. Later ones count as much as
    /// all before.
    pub fn learn(&mut self, call: &Call<'_>, kv_head: usize) {
        let (group, width) = (call.group(), call.cache.shape().key_dim.next_multiple_of(ROW_MULTIPLE));
        let count = TOKENS.min(call.tokens());
        if count < LEAST_TOKENS {
            return;
        }
        let mut buffer = Vec::new();
        // Queries `[count][width]`, and one channel of each.
        let (mut queries, mut channel_values) = (vec![0.0; count * width], vec![0.0; count]);
        let mut learnt = vec![0.0; width * width];
        for head in kv_head * group..(kv_head + 1) * group {
            for (index, row) in queries.chunks_exact_mut(width).enumerate() {
                let query = call.query(head, index * call.tokens() / count, &mut buffer);
                row[..query.len()].copy_from_slice(query);
            }
            // Queries that are zero, or no numbers, tell nothing.
            let share = 1.0 / (squared_norm(&queries) * group as f32);
            if !(share > 0.0 && share.is_normal()) {
                return;
            }
            for (channel, moments) in learnt.chunks_exact_mut(width).enumerate() {
                for (value, query) in channel_values.iter_mut().zip(queries.chunks_exact(width)) {
                    *value = share * query[channel];
                }
                add_weighted_rows(moments, &channel_values, Rows::F32(&queries));
            }
        }
        if !learnt.iter().all(|value| value.is_finite()) {
            return;
        }
        if self.moments.is_empty() {
            (self.moments, self.width, self.tokens) = (vec![0.0; width * width], width, GUESSED_TOKENS);
            self.moments.iter_mut().step_by(width + 1).for_each(|value| *value = 1.0 / width as f32);
        }
        let share = count as f32 / (self.tokens + count as f32);
        self.moments.iter_mut().for_each(|value| *value *= 1.0 - share);
        add_scaled(&mut self.moments, share, &learnt);
        self.tokens = (self.tokens + count as f32).min(TOKENS as f32);
    }

    /// Replaces `direction`, along which keys differ, by that in which queries see it: `M · direction`.
    pub fn apply(&self, direction: &mut Vec<f32>, buffer: &mut Vec<f32>) {
        if self.moments.is_empty() {
            return;
        }
        buffer.resize(self.width, 0.0);
        dot_rows(direction, Rows::F32(&self.moments), buffer);
        std::mem::swap(direction, buffer);
    }

    /// Mean square of what the logits of two keys differ by, in proportion, where keys differ by `variance` channel by channel.
    pub fn spread(&self, variance: &[f32]) -> f32 {
        match self.moments.is_empty() {
            true => variance.iter().sum(),
            false => {
                self.moments.iter().step_by(self.width + 1).zip(variance).map(|(moment, value)| moment * value).sum()
            }
        }
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&*self.moments)
    }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;
    use crate::budgeted::clustering::{BisectionScratch, bisect};
    use crate::strided::StridedView;
    use crate::{Attention, CacheShape, KeyValueCache, KeyValueType, Mask, Method};

    const WIDTH: usize = 16;

    /// The metric after calls of two query heads each.
    fn learnt(calls: &[Vec<f32>]) -> QueryMetric {
        let attention = Attention { method: Method::Exact, mask: Mask::causal(), scale: 1.0 };
        let shape = CacheShape { kv_heads: 1, key_dim: WIDTH, value_dim: WIDTH };
        let cache = KeyValueCache::new(shape, KeyValueType::F32);
        let mut metric = QueryMetric::default();
        for queries in calls {
            let tokens = queries.len() / (2 * WIDTH);
            let queries = StridedView::token_major(queries, tokens, 2, WIDTH);
            metric.learn(&Call { attention: &attention, queries, first_position: 0, cache: &cache, soft_cap: None }, 0);
        }
        metric
    }

    /// Queries that look at channel 3 alone: the first head at a hundred times the second's size.
    fn queries_of_one_channel(tokens: usize) -> Vec<f32> {
        let mut queries = vec![0.0; tokens * 2 * WIDTH];
        for (row, query) in queries.chunks_exact_mut(WIDTH).enumerate() {
            query[3] = if row % 2 == 0 { 100.0 } else { 1.0 };
        }
        queries
    }

    #[test]
    fn keys_are_told_apart_by_what_queries_look_at() {
        let metric = learnt(&[queries_of_one_channel(200)]);
        // Keys differ little in channel 3, and four times as much in channel 5.
        let mut random = Random::new(2);
        let mut keys = random.normals(256 * WIDTH, 0.01);
        for (index, key) in keys.chunks_exact_mut(WIDTH).enumerate() {
            key[3] += if index % 3 == 0 { 1.0 } else { -1.0 };
            key[5] += if index % 2 == 0 { 4.0 } else { -4.0 };
        }
        // Clusters with keys of both sides.
        let mixed = |metric: &QueryMetric, channel: usize| {
            let mut order = Vec::new();
            bisect(&keys, WIDTH, 64, metric, &mut order, &mut BisectionScratch::default());
            let is_positive = |key: &u32| keys[*key as usize * WIDTH + channel] > 0.0;
            let is_mixed = |cluster: &&[u32]| cluster.iter().any(is_positive) && !cluster.iter().all(is_positive);
            order.chunks_exact(64).filter(is_mixed).count()
        };
        // 86 of 256 lie on the one side of channel 3: one cluster has others too.
        assert_eq!(mixed(&metric, 3), 1);
        assert!(mixed(&QueryMetric::default(), 3) > 1);
    }

    #[test]
    fn the_trace_stays_one_and_heads_count_alike() {
        let trace = |metric: &QueryMetric| metric.moments.iter().step_by(WIDTH + 1).sum::<f32>();
        let mut random = Random::new(3);
        let mut calls = vec![queries_of_one_channel(LEAST_TOKENS)];
        for count in [LEAST_TOKENS, 21, 64, 300] {
            calls.push(random.normals(count * 2 * WIDTH, 3.0));
            assert!((trace(&learnt(&calls)) - 1.0).abs() < 1e-4);
        }
        // The first head looks at channel 0, the second, a thousandth as sharp, at channel 1.
        let queries: Vec<f32> = (0..64 * 2 * WIDTH)
            .map(|index| match (index / WIDTH % 2, index % WIDTH) {
                (0, 0) => 1000.0,
                (1, 1) => 1.0,
                _ => 0.0,
            })
            .collect();
        let metric = learnt(&[queries]);
        assert!((metric.moments[0] / metric.moments[WIDTH + 1] - 1.0).abs() < 1e-4);
    }

    #[test]
    fn queries_that_are_nothing_teach_nothing() {
        let known = learnt(&[queries_of_one_channel(64)]).moments;
        for nothing in [0.0, f32::NAN, f32::INFINITY, 1e30] {
            assert!(learnt(&[vec![nothing; 64 * 2 * WIDTH]]).moments.is_empty(), "{nothing}");
            let both = learnt(&[queries_of_one_channel(64), vec![nothing; 64 * 2 * WIDTH]]);
            assert_eq!(both.moments, known, "{nothing}");
        }
        assert!(learnt(&[queries_of_one_channel(LEAST_TOKENS - 1)]).moments.is_empty(), "too few");
    }
}
