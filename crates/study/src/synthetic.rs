//! Synthetic attention inputs of three kinds, each hard in its own way for a method that leaves keys out.
//!
//! All are meant for the usual scale `1/√key_dim`, and values are independent normal numbers.

use crate::random::Random;
pub use crate::{Inputs, Shape};

/// Deviations of the keys of [`Kind::Peaky`] in the directions that their logits vary in.
const PEAKY_SPREAD: [f64; 7] = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7];
/// Standard deviation of the logits of [`Kind::Peaky`].
const PEAKY_DEVIATION: f64 = 12.0;
/// Deviation, in each channel, of what is added to the keys of [`Kind::Peaky`] and is seen in no logit by design.
const PEAKY_NOISE: f64 = 0.1;

/// How queries and keys are related.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Independent normal queries and keys: the softmax is diffuse, and no small set of keys stands for the others.
    Gauss,
    /// `√tokens` normal centres, keys spread around them with a third of their deviation, and queries along a centre:
    /// the softmax is spread over the `√tokens` keys of one centre, whatever their order.
    Cluster,
    /// Keys that differ in seven random directions (and a little everywhere), and independent queries in the same
    /// directions, long enough that logits have a standard deviation of about 12: a few keys carry nearly all of the softmax
    /// (the best 20 carry .997 and more at up to 16,384 keys), and nothing but their logit tells which.
    ///
    /// Seven directions make the search about as hard as the input that the published IceFormer code was measured on:
    /// k-means with `√n` centroids that may compare 1,015 of 16,384 keys with a query finds .78 of the best 20 there and
    /// here (.83 with six directions).
    Peaky,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Gauss, Self::Cluster, Self::Peaky];

    /// Name as the command line takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gauss => "gauss",
            Self::Cluster => "cluster",
            Self::Peaky => "peaky",
        }
    }
}

impl Inputs {
    /// Inputs of `kind`; the same seed gives the same numbers. Every key/value head has its own centres or directions.
    ///
    /// # Panics
    /// When `query_heads` is no multiple of `kv_heads`.
    pub fn new(kind: Kind, shape: Shape, seed: u64) -> Self {
        let Shape { query_tokens, key_tokens, query_heads, kv_heads, key_dim, value_dim } = shape;
        assert!(query_heads.is_multiple_of(kv_heads), "whole groups of query heads");
        let mut random = Random::new(seed);
        let mut queries = vec![0.0; query_tokens * query_heads * key_dim];
        let mut keys = vec![0.0; key_tokens * kv_heads * key_dim];
        for kv_head in 0..kv_heads {
            let maker = Maker::new(kind, key_tokens, key_dim, &mut random);
            for token in 0..key_tokens {
                let key = &mut keys[(token * kv_heads + kv_head) * key_dim..][..key_dim];
                maker.key(key, &mut random);
            }
            let group = query_heads / kv_heads;
            for token in 0..query_tokens {
                for head in kv_head * group..(kv_head + 1) * group {
                    let query = &mut queries[(token * query_heads + head) * key_dim..][..key_dim];
                    maker.query(query, &mut random);
                }
            }
        }
        let values = random.normals(key_tokens * kv_heads * value_dim, 1.0);
        Self { queries, keys, values }
    }
}

/// What the keys and queries of one head have in common.
struct Maker {
    kind: Kind,
    key_dim: usize,
    /// Centres of clusters, or orthonormal directions. `[count][key_dim]`
    basis: Vec<f32>,
}

impl Maker {
    fn new(kind: Kind, key_tokens: usize, key_dim: usize, random: &mut Random) -> Self {
        let basis = match kind {
            Kind::Gauss => Vec::new(),
            Kind::Cluster => random.normals(key_tokens.isqrt().max(1) * key_dim, 1.0),
            Kind::Peaky => orthonormal(PEAKY_SPREAD.len().min(key_dim), key_dim, random),
        };
        Self { kind, key_dim, basis }
    }

    fn one_of_basis(&self, random: &mut Random) -> &[f32] {
        let count = self.basis.len() / self.key_dim;
        &self.basis[random.below(count) * self.key_dim..][..self.key_dim]
    }

    /// Writes `Σ coordinates · directions + noise`.
    fn combine(&self, coordinates: &[f64], noise: f64, output: &mut [f32], random: &mut Random) {
        for (channel, output) in output.iter_mut().enumerate() {
            let directions = self.basis.chunks_exact(self.key_dim);
            let sum: f64 =
                coordinates.iter().zip(directions).map(|(c, direction)| c * f64::from(direction[channel])).sum();
            *output = (sum + noise * random.normal()) as f32;
        }
    }

    fn key(&self, key: &mut [f32], random: &mut Random) {
        match self.kind {
            Kind::Gauss => key.copy_from_slice(&random.normals(key.len(), 1.0)),
            Kind::Cluster => {
                let centre = self.one_of_basis(random);
                key.iter_mut().zip(centre).for_each(|(key, centre)| *key = centre + random.normal() as f32 / 3.0);
            }
            Kind::Peaky => {
                let directions = self.basis.len() / self.key_dim;
                let coordinates: Vec<f64> =
                    PEAKY_SPREAD.iter().take(directions).map(|spread| spread * random.normal()).collect();
                self.combine(&coordinates, PEAKY_NOISE, key, random);
            }
        }
    }

    fn query(&self, query: &mut [f32], random: &mut Random) {
        match self.kind {
            Kind::Gauss => query.copy_from_slice(&random.normals(query.len(), 1.0)),
            Kind::Cluster => {
                let centre = self.one_of_basis(random);
                query
                    .iter_mut()
                    .zip(centre)
                    .for_each(|(query, centre)| *query = 1.5 * centre + random.normal() as f32 / 3.0);
            }
            Kind::Peaky => {
                let mut coordinates: Vec<f64> = (0..self.basis.len() / self.key_dim).map(|_| random.normal()).collect();
                // All of one length, so that every row is as peaked as the next.
                let norm = coordinates.iter().map(|c| c * c).sum::<f64>().sqrt();
                let length = PEAKY_DEVIATION * (self.key_dim as f64).sqrt();
                coordinates.iter_mut().for_each(|c| *c *= length / norm);
                self.combine(&coordinates, 0.0, query, random);
            }
        }
    }
}

/// `count` orthonormal rows of `width` numbers, by Gram and Schmidt.
fn orthonormal(count: usize, width: usize, random: &mut Random) -> Vec<f32> {
    let mut rows: Vec<Vec<f64>> = Vec::new();
    for _ in 0..count {
        let mut row: Vec<f64> = (0..width).map(|_| random.normal()).collect();
        for earlier in &rows {
            let product: f64 = row.iter().zip(earlier).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(earlier).for_each(|(a, b)| *a -= product * b);
        }
        let norm = row.iter().map(|a| a * a).sum::<f64>().sqrt();
        rows.push(row.into_iter().map(|a| a / norm).collect());
    }
    rows.into_iter().flatten().map(|value| value as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn softmax(logits: &[f64]) -> Vec<f64> {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        logits.iter().map(|logit| (logit - largest).exp() / sum).collect()
    }

    /// Smallest number of keys that carry `share` of the softmax, averaged over the queries of one head.
    fn keys_that_carry(kind: Kind, share: f64) -> f64 {
        let shape =
            Shape { query_tokens: 20, key_tokens: 4_096, query_heads: 1, kv_heads: 1, key_dim: 64, value_dim: 1 };
        let inputs = Inputs::new(kind, shape, 7);
        let count = |query: &[f32]| {
            let product = |key: &[f32]| key.iter().zip(query).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            let logits: Vec<f64> = inputs.keys.chunks_exact(64).map(|key| product(key) / 8.0).collect();
            let mut weights = softmax(&logits);
            weights.sort_by(|a, b| b.total_cmp(a));
            let mut sum = 0.0;
            weights.iter().take_while(|&&weight| (sum < share, sum += weight).0).count()
        };
        inputs.queries.chunks_exact(64).map(|query| count(query) as f64).sum::<f64>() / 20.0
    }

    #[test]
    fn mass_is_where_the_descriptions_say() {
        let gauss = keys_that_carry(Kind::Gauss, 0.9);
        assert!(gauss > 1_500.0, "{gauss} keys carry a diffuse softmax");
        let cluster = keys_that_carry(Kind::Cluster, 0.9);
        assert!((15.0..64.0).contains(&cluster), "{cluster} keys carry a cluster of 64");
        let peaky = keys_that_carry(Kind::Peaky, 0.9);
        assert!((1.0..5.0).contains(&peaky), "{peaky} keys carry a peaked softmax");
        assert!(keys_that_carry(Kind::Peaky, 0.997) <= 20.0);
    }

    #[test]
    fn same_seed_same_numbers() {
        let shape = Shape { query_tokens: 3, key_tokens: 9, query_heads: 4, kv_heads: 2, key_dim: 7, value_dim: 5 };
        for kind in Kind::ALL {
            assert_eq!(Inputs::new(kind, shape, 1), Inputs::new(kind, shape, 1), "{}", kind.name());
            assert_ne!(Inputs::new(kind, shape, 1), Inputs::new(kind, shape, 2), "{}", kind.name());
        }
    }
}
