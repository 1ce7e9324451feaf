//! How much of what matters a method that leaves keys out has found, seen from outside.
//!
//! A method's output is `Σ weight · value` over the keys it kept. With values that undo the weights of the best keys and
//! are zero for all others, the output counts the best keys among the kept; and the log-sum-exp gives the mass kept.

use std::ops::Range;

use crate::elementwise::{log_sum_exp, softmax};

/// Values that make recall visible, for one head and some sampled queries: channel `s` of the values belongs to sample
/// `s`.
pub struct RecallProbe {
    /// `[keys, samples]`
    pub values: Vec<f32>,
    /// Share of the softmax that the best keys carry. `[samples]`
    pub best_mass: Vec<f64>,
    /// `[samples]`
    log_sum_exp: Vec<f64>,
    best: usize,
    seen: Vec<Range<usize>>,
}

impl RecallProbe {
    /// A probe for the `best` keys of each of `queries` `[samples, key_dim]` among the keys `[keys, key_dim]` that it
    /// sees.
    ///
    /// # Panics
    /// When `seen` has another length than there are queries.
    pub fn new(queries: &[f32], keys: &[f32], key_dim: usize, scale: f64, seen: &[Range<usize>], best: usize) -> Self {
        let samples = queries.len() / key_dim;
        assert_eq!(seen.len(), samples, "a range of keys for each query");
        let mut values = vec![0.0; keys.len() / key_dim * samples];
        let (mut all_log_sum_exp, mut best_mass) = (Vec::new(), Vec::new());
        for (sample, (query, seen)) in queries.chunks_exact(key_dim).zip(seen).enumerate() {
            let logit = |key: usize| {
                let key = &keys[key * key_dim..][..key_dim];
                scale * key.iter().zip(query).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
            };
            let logits: Vec<f64> = seen.clone().map(logit).collect();
            let total = log_sum_exp(&logits);
            let weights = softmax(&logits);
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            order.truncate(best);
            for &key in &order {
                values[(seen.start + key) * samples + sample] = (total - logits[key]).exp() as f32;
            }
            best_mass.push(order.iter().map(|&key| weights[key]).sum());
            all_log_sum_exp.push(total);
        }
        Self { values, best_mass, log_sum_exp: all_log_sum_exp, best, seen: seen.to_vec() }
    }

    /// Share of the best keys of `sample` that were kept, from its output `[samples]` and log-sum-exp.
    pub fn recall(&self, sample: usize, output: &[f32], log_sum_exp: f32) -> f64 {
        let kept = f64::from(output[sample]) * (f64::from(log_sum_exp) - self.log_sum_exp[sample]).exp();
        kept / self.best.min(self.seen[sample].len()) as f64
    }

    /// Share of the softmax of `sample` that the kept keys carry.
    pub fn mass(&self, sample: usize, log_sum_exp: f32) -> f64 {
        (f64::from(log_sum_exp) - self.log_sum_exp[sample]).exp()
    }
}
