//! f64 reference of attention, written as its definition: every logit, then softmax, then the weighted mean.

use std::ops::Range;

use crate::elementwise::{log_sum_exp, softmax};

/// One attention problem. Query head `h` reads key/value head `h / (query_heads / kv_heads)`.
#[derive(Clone, Debug)]
pub struct Problem<'a> {
    /// `[query_tokens, query_heads, key_dim]`.
    pub queries: &'a [f32],
    /// `[key_tokens, kv_heads, key_dim]`.
    pub keys: &'a [f32],
    /// `[key_tokens, kv_heads, value_dim]`.
    pub values: &'a [f32],
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of queries and keys.
    pub key_dim: usize,
    /// Width of values.
    pub value_dim: usize,
    /// Factor on the logits.
    pub scale: f64,
    /// Position of the first query among the keys.
    pub first_position: usize,
    /// A query sees no key behind its position.
    pub causal: bool,
    /// A query sees keys less than this many positions away only.
    pub window: Option<usize>,
    /// Keys that are no padding; `None`: all.
    pub unpadded: Option<Range<usize>>,
}

/// What [`Problem::solve`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// `[query_tokens, query_heads, value_dim]`; zero for a query that sees no key.
    pub output: Vec<f64>,
    /// `[query_tokens, query_heads]` in nats; −∞ for a query that sees no key.
    pub log_sum_exp: Vec<f64>,
    /// (query, head, key) triples that the mask allows.
    pub allowed_keys: u64,
}

impl Problem<'_> {
    /// Whether the query at `position` may see `key`.
    pub fn allows(&self, position: usize, key: usize) -> bool {
        (!self.causal || key <= position)
            && self.window.is_none_or(|window| key.abs_diff(position) < window)
            && self.unpadded.as_ref().is_none_or(|range| range.contains(&key))
    }

    /// Output and log-sum-exp by the definition, in f64.
    ///
    /// # Panics
    /// When a slice has another length than its shape takes.
    pub fn solve(&self) -> Solution {
        let (query_row, key_row, value_row) =
            (self.query_heads * self.key_dim, self.kv_heads * self.key_dim, self.kv_heads * self.value_dim);
        let (query_tokens, key_tokens) = (self.queries.len() / query_row, self.keys.len() / key_row);
        assert_eq!(self.queries.len(), query_tokens * query_row, "whole query rows");
        assert_eq!(self.keys.len(), key_tokens * key_row, "whole key rows");
        assert_eq!(self.values.len(), key_tokens * value_row, "one value for each key");
        assert!(self.query_heads.is_multiple_of(self.kv_heads), "whole groups of query heads");
        let mut solution = Solution { output: Vec::new(), log_sum_exp: Vec::new(), allowed_keys: 0 };
        for query_head in 0..query_tokens * self.query_heads {
            let (token, head) = (query_head / self.query_heads, query_head % self.query_heads);
            let kv_head = head / (self.query_heads / self.kv_heads);
            let query = &self.queries[query_head * self.key_dim..][..self.key_dim];
            let seen: Vec<usize> = (0..key_tokens).filter(|&k| self.allows(self.first_position + token, k)).collect();
            let logit = |&key: &usize| {
                let key = &self.keys[key * key_row + kv_head * self.key_dim..][..self.key_dim];
                self.scale * query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
            };
            let logits: Vec<f64> = seen.iter().map(logit).collect();
            let mut output = vec![0.0; self.value_dim];
            for (key, weight) in seen.iter().zip(softmax(&logits)) {
                let value = &self.values[key * value_row + kv_head * self.value_dim..][..self.value_dim];
                output.iter_mut().zip(value).for_each(|(output, &value)| *output += weight * f64::from(value));
            }
            solution.output.extend(output);
            solution.log_sum_exp.push(log_sum_exp(&logits));
            solution.allowed_keys += seen.len() as u64;
        }
        solution
    }
}
