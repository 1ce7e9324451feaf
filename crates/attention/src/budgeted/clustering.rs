//! Clusters of keys: balanced bisection along the direction in which queries see the keys of a group differ most.

use iceformer_kernels::attention::KeyMoments;
use iceformer_kernels::rows::{Rows, add_weighted_rows, dot_chosen_rows, dot_rows};

use super::metric::QueryMetric;

/// Keys that a group's direction is found from.
const SAMPLE: usize = 64;
/// Steps of the power iteration. The direction need not be exact: it only orders the keys.
const STEPS: usize = 3;

/// Buffers of [`bisect`].
#[derive(Default)]
pub(super) struct BisectionScratch {
    /// Rows of the sample.
    sampled: Vec<u32>,
    moments: KeyMoments,
    /// `[SAMPLE][width]`, less the mean.
    sample: Vec<f32>,
    direction: Vec<f32>,
    next_direction: Vec<f32>,
    buffer: Vec<f32>,
    projections: Vec<f32>,
    /// Projection and row number of each member, in an integer that sorts as they do.
    ranks: Vec<u64>,
    ordered: Vec<u64>,
    high: Vec<u32>,
}

/// Orders the rows of `keys` `[keys][width]` so that each `cluster` consecutive ones lie close together: `order` becomes
/// their row numbers. A group is cut in half at the median along its main direction, as queries see it by `metric`, until
/// groups have `cluster` keys. `keys` is `cluster` times a power of two, and the width a multiple of 16.
pub(super) fn bisect(
    keys: &[f32],
    width: usize,
    cluster: usize,
    metric: &QueryMetric,
    order: &mut Vec<u32>,
    scratch: &mut BisectionScratch,
) {
    let count = keys.len() / width;
    debug_assert!(count.is_multiple_of(cluster) && (count / cluster).is_power_of_two());
    order.clear();
    order.extend(0..count as u32);
    let mut group = count;
    while group > cluster {
        for members in order.chunks_exact_mut(group) {
            scratch.cut(keys, width, metric, members);
        }
        group /= 2;
    }
}

impl BisectionScratch {
    /// Puts the half of `members` with the smaller projections first.
    fn cut(&mut self, keys: &[f32], width: usize, metric: &QueryMetric, members: &mut [u32]) {
        self.find_direction(keys, width, metric, members);
        self.projections.resize(members.len(), 0.0);
        dot_chosen_rows(&self.direction, Rows::F32(keys), members, &mut self.projections);
        // Equal projections keep the order of their keys, so that the result is one and the same.
        self.ranks.clear();
        let projected = self.projections.iter().zip(&*members);
        self.ranks.extend(projected.map(|(projection, row)| u64::from(sortable(*projection)) << 32 | u64::from(*row)));
        self.ordered.clone_from(&self.ranks);
        let middle = members.len() / 2;
        let border = *self.ordered.select_nth_unstable(middle).1;
        // Both halves stay in the order in which the keys lie in memory.
        self.high.clear();
        let mut low = 0;
        for (place, rank) in self.ranks.iter().enumerate() {
            let row = members[place];
            if *rank < border {
                members[low] = row;
                low += 1;
            } else {
                self.high.push(row);
            }
        }
        members[low..].copy_from_slice(&self.high);
    }

    /// Leaves in `self.direction` what to multiply keys by: the eigenvector of the largest eigenvalue of the metric times the
    /// covariance of a sample of `members`. Along it the keys differ most in the eyes of the queries.
    fn find_direction(&mut self, keys: &[f32], width: usize, metric: &QueryMetric, members: &[u32]) {
        let sampled = members.len().min(SAMPLE);
        self.sampled.clear();
        self.sampled.extend((0..sampled).map(|index| members[index * members.len() / sampled]));
        self.moments.take(&self.sampled, keys, width);
        self.sample.clear();
        for &row in &self.sampled {
            let key = &keys[row as usize * width..][..width];
            self.sample.extend(key.iter().zip(&self.moments.mean).map(|(value, mean)| value - mean));
        }
        // The key farthest from the mean points somewhere along the main direction, and is never zero unless all are.
        self.direction.clone_from(&self.moments.farthest);
        metric.apply(&mut self.direction, &mut self.next_direction);
        self.projections.resize(sampled, 0.0);
        for _ in 0..STEPS {
            let projections = &mut self.projections[..sampled];
            dot_rows(&self.direction, Rows::F32(&self.sample), projections);
            self.next_direction.clear();
            self.next_direction.resize(width, 0.0);
            add_weighted_rows(&mut self.next_direction, projections, Rows::F32(&self.sample));
            metric.apply(&mut self.next_direction, &mut self.buffer);
            let length = squared_norm(&self.next_direction).sqrt();
            if !(length > 0.0 && length.is_finite()) {
                break;
            }
            self.next_direction.iter_mut().for_each(|value| *value /= length);
            std::mem::swap(&mut self.direction, &mut self.next_direction);
        }
    }
}

/// `Σ valueᵢ²`
pub(super) fn squared_norm(values: &[f32]) -> f32 {
    sum_of_products(values, values, |a, b| a * b)
}

/// `Σ valueᵢ² · weightᵢ`, as far as both go.
pub(super) fn weighted_squared_norm(values: &[f32], weights: &[f32]) -> f32 {
    let len = values.len().min(weights.len());
    sum_of_products(&values[..len], &weights[..len], |value, weight| value * value * weight)
}

/// `Σ term(aᵢ, bᵢ)`, in sixteen sums that do not wait for one another.
fn sum_of_products(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0_f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let chunks = a.iter().zip(b).map(|(a, b)| (a.as_slice(), b.as_slice()));
    for (a, b) in chunks.chain([(a_rest, b_rest)]) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += term(*a, *b));
    }
    sums.iter().sum()
}

/// The bits of `value` as an integer that sorts as [`f32::total_cmp`] does.
fn sortable(value: f32) -> u32 {
    let bits = value.to_bits();
    // A negative number sorts the other way round, and before all positive ones.
    bits ^ if bits >> 31 == 1 { u32::MAX } else { 1 << 31 }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;

    #[test]
    fn every_key_is_in_one_cluster_and_clusters_are_tight() {
        let (width, count, cluster) = (32, 512, 32);
        let mut random = Random::new(7);
        // Sixteen centres, far apart, met in turn.
        let centres = random.normals(16 * width, 4.0);
        let noise = random.normals(count * width, 0.3);
        let keys: Vec<f32> = (0..count * width)
            .map(|index| centres[index / width % 16 * width + index % width] + noise[index])
            .collect();
        let (mut order, mut scratch) = (Vec::new(), BisectionScratch::default());
        bisect(&keys, width, cluster, &QueryMetric::default(), &mut order, &mut scratch);
        let mut seen = order.clone();
        seen.sort_unstable();
        assert!(seen.iter().enumerate().all(|(index, &row)| index == row as usize));
        let pure = order.chunks_exact(cluster).filter(|members| members.iter().all(|row| row % 16 == members[0] % 16));
        assert!(pure.count() >= 10, "most clusters hold one centre");
        let mut again = Vec::new();
        bisect(&keys, width, cluster, &QueryMetric::default(), &mut again, &mut BisectionScratch::default());
        assert_eq!(order, again);
    }

    #[test]
    fn integers_sort_as_the_numbers_do() {
        let values = [-f32::NAN, f32::NEG_INFINITY, -2.0, -0.0, 0.0, 1e-30, 3.0, f32::INFINITY, f32::NAN];
        assert!(values.is_sorted_by(|a, b| sortable(*a) < sortable(*b)));
    }

    #[test]
    fn equal_and_broken_keys_are_ordered_too() {
        for value in [0.0, f32::NAN, f32::INFINITY] {
            let keys = vec![value; 128 * 16];
            let mut order = Vec::new();
            bisect(&keys, 16, 16, &QueryMetric::default(), &mut order, &mut BisectionScratch::default());
            order.sort_unstable();
            assert!(order.iter().enumerate().all(|(index, &row)| index == row as usize), "{value}");
        }
    }
}
