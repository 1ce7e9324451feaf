//! How values go with keys within the clusters of a head.
//!
//! A query weighs the keys of a cluster differently, and where their values go with that the weighted mean of the values is
//! not their mean: were keys and values normally distributed together it would be `v̄ + Cov(v, k) · q`, with `q` times the
//! factor on the logits. Of one cluster the covariance would take as much memory as its keys, and of 64 of them be mostly
//! noise. But what is left to the estimate are many clusters, over which noise averages out, and what they have in common
//! does not: the mean covariance within all clusters of the head.

use iceformer_kernels::AlignedBuffer;
use iceformer_kernels::attention::{KeyMoments, add_cross_moments};

use super::summaries::set_value;

/// Covariances are smaller than this: far below the largest brain float, so that none becomes infinite.
const MOST: f32 = 1e30;

/// The covariance of keys and values within the clusters of some keys, the mean over these.
#[derive(Default)]
pub(super) struct CrossMoments {
    /// `[key_dim][value_dim]`, padded.
    moments: Vec<f32>,
    value_dim: usize,
}

impl CrossMoments {
    /// None yet, of these padded widths.
    pub fn new(key_dim: usize, value_dim: usize) -> Self {
        Self { moments: vec![0.0; key_dim * value_dim], value_dim }
    }

    /// Adds a cluster of the rows `members` of `keys`, with their `moments` and `values` `[members][value_dim]`; `share` is
    /// that of one key among all.
    pub fn add(&mut self, members: &[u32], keys: &[f32], moments: &KeyMoments, values: &[f32], share: f32) {
        add_cross_moments(members, keys, &moments.mean, values, share, &mut self.moments);
    }
}

/// The mean covariance of keys and values within the clusters of a head.
#[derive(Default)]
pub(super) struct CrossCovariance {
    /// `[key_dim][value_dim]`, padded; empty before any cluster was seen.
    mean: Vec<f32>,
    value_dim: usize,
    /// Keys that it is the mean over.
    keys: usize,
    /// What of it is in use: brain floats `[key_dim / 2][value_dim][2]`.
    values: AlignedBuffer<u16>,
    /// Whether the mean has changed since.
    has_learnt: bool,
}

impl CrossCovariance {
    /// Takes in the moments of the clusters of `keys` keys, which `are_new` or are clustered anew: then they take the place of
    /// so many others on average. What is no number, or too large for a brain float, tells nothing.
    pub fn learn(&mut self, CrossMoments { moments, value_dim }: &CrossMoments, keys: usize, are_new: bool) {
        if moments.is_empty() || !moments.iter().all(|value| value.abs() < MOST) {
            return;
        }
        self.mean.resize(moments.len(), 0.0);
        self.value_dim = *value_dim;
        self.keys = if are_new { self.keys + keys } else { self.keys.max(keys) };
        let share = keys as f32 / self.keys as f32;
        self.mean.iter_mut().zip(moments).for_each(|(mean, moment)| *mean += share * (moment - *mean));
        self.has_learnt = true;
    }

    /// Puts what was learnt to use. Under a causal mask that is before more is learnt from keys that come after queries: what
    /// their values are must not tell in the output of a query before them.
    pub fn put_to_use(&mut self) {
        if !std::mem::take(&mut self.has_learnt) {
            return;
        }
        if self.values.is_empty() {
            self.values = AlignedBuffer::zeroed(self.mean.len());
        }
        for (channel, mean) in self.mean.chunks_exact(self.value_dim).enumerate() {
            set_value(&mut self.values, channel, mean);
        }
    }

    /// Notes that no more than `keys` keys are left, of those that it is the mean over. Which they are makes no difference: it is
    /// of one head on one text, and what comes next counts as much as it would have.
    pub fn truncate(&mut self, keys: usize) {
        self.keys = self.keys.min(keys);
    }

    /// `[key_dim / 2][value_dim][2]`, brain floats: the values that a query's channels weigh; empty before any were put to use.
    pub fn values(&self) -> &[u16] {
        &self.values
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&*self.mean) + self.values.bytes()
    }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;

    const KEY_DIM: usize = 4;
    const VALUE_DIM: usize = 16;

    fn widened(brain_float: u16) -> f32 {
        f32::from_bits(u32::from(brain_float) << 16)
    }

    fn moments(value: f32) -> CrossMoments {
        CrossMoments { moments: vec![value; KEY_DIM * VALUE_DIM], value_dim: VALUE_DIM }
    }

    #[test]
    fn every_key_counts_as_much() {
        let mut covariance = CrossCovariance::default();
        covariance.put_to_use();
        assert!(covariance.values().is_empty());
        let mut expect = |moments: CrossMoments, keys, are_new, expected: f32| {
            let before = covariance.values().to_vec();
            covariance.learn(&moments, keys, are_new);
            assert_eq!(covariance.values(), before, "not put to use yet");
            covariance.put_to_use();
            assert_eq!(covariance.values().len(), KEY_DIM * VALUE_DIM);
            for value in covariance.values() {
                assert!((widened(*value) - expected).abs() < 0.01 * expected, "{} for {expected}", widened(*value));
            }
        };
        expect(moments(8.0), 1024, true, 8.0);
        expect(moments(2.0), 1024, true, 5.0);
        for broken in [f32::NAN, f32::INFINITY, -1e38] {
            expect(moments(broken), 1024, true, 5.0);
        }
        expect(CrossMoments::default(), 1024, true, 5.0);
        expect(moments(20.0), 1024, true, 10.0);
        expect(moments(1.0), 1024, false, 7.0);
        expect(moments(3.0), 4096, false, 3.0);
        // Many, each of which changes little.
        (0..996).for_each(|_| expect(moments(3.0), 1024, true, 3.0));
        (0..1000).for_each(|_| covariance.learn(&moments(4.0), 1024, true));
        covariance.put_to_use();
        assert_eq!(widened(covariance.values()[0]), 3.5);
        // Of a text that was cut off, less counts.
        covariance.truncate(1024);
        covariance.learn(&moments(4.5), 1024, true);
        covariance.put_to_use();
        assert_eq!(widened(covariance.values()[0]), 4.0);
    }

    /// Values that are a matrix times their keys: what a query shifts them by is that matrix times what it shifts keys by.
    #[test]
    fn values_that_go_with_keys() {
        let (members, width) = (64, 16);
        let mut random = Random::new(5);
        let keys = random.normals(members * width, 1.0);
        let matrix = random.normals(KEY_DIM * VALUE_DIM, 1.0);
        let mut values = vec![3.0; members * VALUE_DIM];
        for (value, key) in values.chunks_exact_mut(VALUE_DIM).zip(keys.chunks_exact(width)) {
            for (weights, key) in matrix.chunks_exact(VALUE_DIM).zip(key) {
                value.iter_mut().zip(weights).for_each(|(value, weight)| *value += key * weight);
            }
        }
        let rows: Vec<u32> = (0..members as u32).collect();
        let mut of_keys = KeyMoments::default();
        of_keys.take(&rows, &keys, width);
        let mut moments = CrossMoments::new(KEY_DIM, VALUE_DIM);
        moments.add(&rows, &keys, &of_keys, &values, 1.0 / members as f32);
        let mut covariance = CrossCovariance::default();
        covariance.learn(&moments, members, true);
        covariance.put_to_use();
        assert_eq!(covariance.values().len(), KEY_DIM * VALUE_DIM);
        for (at, value) in covariance.values().iter().enumerate() {
            let (channel, column) = (at / (2 * VALUE_DIM) * 2 + at % 2, at / 2 % VALUE_DIM);
            let share = |row: &[f32]| {
                let deviation = |channel: usize| row[channel] - of_keys.mean[channel];
                let value: f32 = (0..KEY_DIM).map(|other| deviation(other) * matrix[other * VALUE_DIM + column]).sum();
                deviation(channel) * value / members as f32
            };
            let expected: f32 = keys.chunks_exact(width).map(share).sum();
            assert!((widened(*value) - expected).abs() < 0.02, "{at}: {} for {expected}", widened(*value));
        }
    }
}
