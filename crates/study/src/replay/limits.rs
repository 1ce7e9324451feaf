//! What no choice can do better, and how errors of pages add.

use super::choice::Tail;
use super::{LOOKED_AT, Row, TILE, Tile, logits, softmax};

/// Of one tile and one key/value head.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Far keys.
    pub far_keys: usize,
    /// For each row that is looked at: fewest far keys that leave out at most [`DROPPED_MASS`] of the softmax, as a
    /// share of the far keys.
    pub needed: Vec<f64>,
    /// For each query head: the union of those keys over all rows of the tile, as a share of the far keys.
    pub union: Vec<f64>,
    /// For each row that is looked at, with every far page estimated: the length of the sum of the pages' errors over
    /// the root of the sum of their squares. 1 where they are independent, `√pages` where they all point one way.
    pub error_sum: Vec<f64>,
}

/// Mass that an oracle may leave out.
pub const DROPPED_MASS: f32 = 0.02;

impl Tile<'_> {
    pub(super) fn limits(&self) -> Limits {
        let mut limits =
            Limits { far_keys: self.far.len(), needed: Vec::new(), union: Vec::new(), error_sum: Vec::new() };
        for head in self.head.query_heads() {
            let mut union = vec![false; self.far.len()];
            for offset in 0..TILE {
                let row = Row { token: self.start + offset, head };
                let visible = self.head.layer.visible(row.token);
                let weights = softmax(&logits(self.head, &self.head.query(row), visible));
                let needed = needed(&weights[self.far.clone()]);
                needed.iter().for_each(|&key| union[key] = true);
                if LOOKED_AT.contains(&offset) {
                    limits.needed.push(needed.len() as f64 / self.far.len() as f64);
                }
            }
            limits.union.push(union.iter().filter(|&&needed| needed).count() as f64 / self.far.len() as f64);
        }
        limits.error_sum = self.rows.iter().map(|exact| self.error_sum(exact)).collect();
        limits
    }

    fn error_sum(&self, exact: &super::ExactRow) -> f64 {
        let query = self.head.query(exact.row);
        let log_sum_exp = exact.truth.log_sum_exp;
        let mut sum = vec![0.0; exact.truth.output.len()];
        let mut squares = 0.0;
        for (index, page) in self.clusters.pages.iter().take(self.far_pages(self.clusters)).enumerate() {
            let log_mass = Tail::SecondOrder.log_mass(page, self.clusters.size, &query).unwrap_or_default();
            let estimated = (f64::from(log_mass) - log_sum_exp).exp();
            // How far the page's part of `Σ weight · (value − output)` is off: what the output is off, to first order.
            let error: Vec<f64> = (exact.truth.output.iter().enumerate())
                .map(|(channel, output)| {
                    let of_key = |&key: &usize| {
                        f64::from(exact.weights[key]) * (f64::from(self.head.value(key)[channel]) - output)
                    };
                    let truth: f64 = self.clusters.keys_of(index).iter().map(of_key).sum();
                    estimated * (f64::from(page.value_mean[channel]) - output) - truth
                })
                .collect();
            sum.iter_mut().zip(&error).for_each(|(sum, error)| *sum += error);
            squares += error.iter().map(|error| error * error).sum::<f64>();
        }
        let length = sum.iter().map(|sum| sum * sum).sum::<f64>().sqrt();
        if squares > 0.0 { length / squares.sqrt() } else { 1.0 }
    }
}

/// The heaviest of `weights` (shares of a softmax), fewest that leave out at most [`DROPPED_MASS`].
fn needed(weights: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[a].total_cmp(&weights[b]).then(a.cmp(&b)));
    let mut dropped = 0.0;
    let least = order.iter().take_while(|&&key| (dropped += weights[key], dropped <= DROPPED_MASS).1).count();
    order.split_off(least)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_lightest_are_left_out() {
        let mut needed = super::needed(&[0.01, 0.5, 0.015, 0.3, 0.009]);
        needed.sort_unstable();
        assert_eq!(needed, [1, 2, 3]);
        assert!(super::needed(&[0.0009; 20]).is_empty());
    }
}
