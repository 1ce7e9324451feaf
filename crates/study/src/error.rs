//! The true error of a method, on sampled rows, against attention in f64. A *row* is one query of one head.

use std::ops::Range;

use crate::random::Random;
use crate::{Inputs, Shape};

/// A row that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index of the query token, from 0 at the first query.
    pub token: usize,
    /// Query head.
    pub head: usize,
}

/// `count` rows (or all, where there are fewer), spread evenly over the queries: one from each of `count` equal pieces
/// of the sequence of rows, in its order.
pub fn sample_rows(query_tokens: usize, query_heads: usize, count: usize, seed: u64) -> Vec<Row> {
    let rows = query_tokens * query_heads;
    let count = count.min(rows);
    let mut random = Random::new(seed);
    let pick = |piece: usize| {
        let (start, end) = (piece * rows / count, (piece + 1) * rows / count);
        let row = start + random.below(end - start);
        Row { token: row / query_heads, head: row % query_heads }
    };
    (0..count).map(pick).collect()
}

/// What exact attention gives for a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Truth {
    /// `[value_dim]`
    pub output: Vec<f64>,
    /// Root-mean-square distance of the visible values from their mean.
    pub value_spread: f64,
    /// Of the logits, in nats.
    pub log_sum_exp: f64,
}

/// How far a row's output is from the truth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowError {
    /// See [`Truth::error`].
    pub missed_mass: f64,
    /// `‖ô − o‖ / ‖o‖`
    pub relative: f64,
}

impl Truth {
    /// The truth of a row that sees the keys `visible`, all at once by the definition.
    ///
    /// # Panics
    /// When no key is visible, or `visible` reaches beyond the keys.
    pub fn new(inputs: &Inputs, shape: Shape, row: Row, visible: Range<usize>, scale: f64) -> Self {
        assert!(!visible.is_empty(), "a row that sees no key has no truth");
        let Shape { query_heads, kv_heads, key_dim, value_dim, .. } = shape;
        let kv_head = row.head / (query_heads / kv_heads);
        let query = &inputs.queries[(row.token * query_heads + row.head) * key_dim..][..key_dim];
        let key = |key: usize| &inputs.keys[(key * kv_heads + kv_head) * key_dim..][..key_dim];
        let mut weights: Vec<f64> = visible.clone().map(|index| scale * dot(query, key(index))).collect();
        let largest = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        weights.iter_mut().for_each(|weight| *weight = (*weight - largest).exp());
        let total: f64 = weights.iter().sum();

        let (mut output, mut mean) = (vec![0.0; value_dim], vec![0.0; value_dim]);
        let mut squares = 0.0;
        for (index, weight) in visible.clone().zip(&weights) {
            let value = &inputs.values[(index * kv_heads + kv_head) * value_dim..][..value_dim];
            for ((output, mean), &value) in output.iter_mut().zip(&mut mean).zip(value) {
                *output += weight * f64::from(value);
                *mean += f64::from(value);
            }
            squares += dot(value, value);
        }
        let count = visible.len() as f64;
        output.iter_mut().for_each(|output| *output /= total);
        let mean_square = mean.iter().map(|sum| (sum / count).powi(2)).sum::<f64>();
        // Where all values are one, what is left of the difference is rounding.
        let variance = squares / count - mean_square;
        let value_spread = if variance > 1e-12 * mean_square { variance.sqrt() } else { 0.0 };
        Self { output, value_spread, log_sum_exp: largest + total.ln() }
    }

    /// Error of `output` `[value_dim]`. Its missed mass is `‖ô − o‖ / (√2 · σ)`, at most 1, where σ is
    /// [`value_spread`](Self::value_spread): the share of softmax mass that would have to move from one typical value to
    /// another, independent one (two of them lie √2 · σ apart) to make that error. Where all values are the same no mass
    /// can be missed, and the relative error is taken instead.
    ///
    /// # Panics
    /// When `output` has another width.
    pub fn error(&self, output: &[f32]) -> RowError {
        assert_eq!(output.len(), self.output.len(), "an output of the row's width");
        let pairs = output.iter().zip(&self.output);
        let distance = pairs.map(|(&output, truth)| (f64::from(output) - truth).powi(2)).sum::<f64>().sqrt();
        let norm = self.output.iter().map(|value| value * value).sum::<f64>().sqrt();
        let relative = if distance == 0.0 { 0.0 } else { distance / norm };
        let missed = match self.value_spread {
            0.0 => relative,
            spread => distance / (std::f64::consts::SQRT_2 * spread),
        };
        // What is no number must not pass for a small error.
        RowError { missed_mass: if missed < 1.0 { missed } else { 1.0 }, relative }
    }
}

/// The truth of each row, which sees the keys that `visible` says for it, computed by `threads` threads.
///
/// # Panics
/// As [`Truth::new`], for any row.
pub fn truths(
    inputs: &Inputs,
    shape: Shape,
    rows: &[Row],
    visible: impl Fn(Row) -> Range<usize> + Sync,
    scale: f64,
    threads: usize,
) -> Vec<Truth> {
    let threads = threads.clamp(1, rows.len().max(1));
    let visible = &visible;
    // Later rows see more keys, so a thread takes every so manyth row.
    let work = |thread: usize| {
        let rows = rows.iter().skip(thread).step_by(threads);
        rows.map(|&row| Truth::new(inputs, shape, row, visible(row), scale)).collect::<Vec<_>>()
    };
    let work = &work;
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        let mut parts: Vec<_> =
            handles.into_iter().map(|handle| handle.join().expect("every row sees a key").into_iter()).collect();
        (0..rows.len()).map(|row| parts[row % threads].next().expect("a truth for each row")).collect()
    })
}

/// The smallest value that at least `share` of the values do not exceed; `None` without values.
pub fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = ((sorted.len() as f64 * share).ceil() as usize).max(1);
    sorted.get(rank.min(sorted.len()).wrapping_sub(1)).copied()
}

/// `Σ a·b` in f64, with independent sums so that the processor need not wait for each.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    let (chunks_a, chunks_b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest = chunks_a.remainder().iter().zip(chunks_b.remainder());
    let rest: f64 = rest.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        for lane in 0..8 {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape =
        Shape { query_tokens: 1, key_tokens: 2, query_heads: 1, kv_heads: 1, key_dim: 1, value_dim: 2 };
    const ROW: Row = Row { token: 0, head: 0 };

    /// Two keys of weights 3/4 and 1/4 with the values (1, 0) and (0, 1).
    fn two_keys() -> Inputs {
        Inputs { queries: vec![1.0], keys: vec![3f32.ln(), 0.0], values: vec![1.0, 0.0, 0.0, 1.0] }
    }

    #[test]
    fn a_case_by_hand() {
        let truth = Truth::new(&two_keys(), SHAPE, ROW, 0..2, 1.0);
        assert!((truth.output[0] - 0.75).abs() < 1e-6 && (truth.output[1] - 0.25).abs() < 1e-6);
        assert!((truth.log_sum_exp - 4f64.ln()).abs() < 1e-6);
        // Both values are half of √2 from their mean.
        assert!((truth.value_spread - 0.5f64.sqrt()).abs() < 1e-12);
        // Keeping the first key only moves a quarter of the mass by √2, and √2 · σ is 1.
        let error = truth.error(&[1.0, 0.0]);
        assert!((error.missed_mass - 0.25 * 2f64.sqrt()).abs() < 1e-6, "{error:?}");
        assert!((error.relative - 0.25 * 2f64.sqrt() / 0.625f64.sqrt()).abs() < 1e-6);
        assert!(truth.error(&[0.75, 0.25]).missed_mass < 1e-6);
        assert_eq!(truth.error(&[9.0, 9.0]).missed_mass, 1.0);
        assert_eq!(truth.error(&[f32::NAN, 0.0]).missed_mass, 1.0);
    }

    #[test]
    fn where_all_values_are_one_no_mass_is_missed() {
        let inputs = Inputs { values: vec![0.1, 0.2, 0.1, 0.2], ..two_keys() };
        for visible in [0..1, 0..2] {
            let truth = Truth::new(&inputs, SHAPE, ROW, visible, 1.0);
            assert_eq!(truth.value_spread, 0.0);
            assert!(truth.error(&[0.1, 0.2001]).missed_mass < 1e-3);
            assert_eq!(truth.error(&[0.5, 0.5]).missed_mass, 1.0);
        }
    }

    #[test]
    fn dropped_mass_bounds_missed_mass_of_independent_values() {
        // A diffuse softmax over many random values: what is dropped averages out, and much less is missed.
        let shape =
            Shape { query_tokens: 1, key_tokens: 4_000, query_heads: 2, kv_heads: 1, key_dim: 16, value_dim: 16 };
        let inputs = Inputs::new(crate::synthetic::Kind::Gauss, shape, 1);
        let row = Row { token: 0, head: 1 };
        let whole = Truth::new(&inputs, shape, row, 0..4_000, 0.25);
        let half = Truth::new(&inputs, shape, row, 0..2_000, 0.25);
        let dropped = 1.0 - (half.log_sum_exp - whole.log_sum_exp).exp();
        let output: Vec<f32> = half.output.iter().map(|&value| value as f32).collect();
        let missed = whole.error(&output).missed_mass;
        assert!((0.4..0.6).contains(&dropped) && missed < 0.1, "{missed} missed of {dropped} dropped");
    }

    #[test]
    fn samples_are_spread_and_threads_do_not_matter() {
        let rows = sample_rows(1_000, 3, 30, 5);
        for (piece, row) in rows.iter().enumerate() {
            assert_eq!((row.token * 3 + row.head) / 100, piece);
        }
        assert_eq!(sample_rows(2, 2, 30, 5).len(), 4);
        assert_eq!(rows, sample_rows(1_000, 3, 30, 5));
        let shape = Shape { query_tokens: 40, key_tokens: 40, query_heads: 4, kv_heads: 2, key_dim: 8, value_dim: 8 };
        let inputs = Inputs::new(crate::synthetic::Kind::Peaky, shape, 2);
        let rows = sample_rows(40, 4, 50, 1);
        let of = |threads| truths(&inputs, shape, &rows, |row| 0..row.token + 1, 0.3, threads);
        assert_eq!(of(1), of(3));
        assert_eq!(of(2)[7], Truth::new(&inputs, shape, rows[7], 0..rows[7].token + 1, 0.3));
    }

    #[test]
    fn quantiles_by_rank() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(
            [0.0, 0.01, 0.5, 0.99, 1.0].map(|share| quantile(&values, share)),
            [1.0, 1.0, 50.0, 99.0, 100.0].map(Some)
        );
        assert_eq!(quantile(&[], 0.5), None);
    }
}
