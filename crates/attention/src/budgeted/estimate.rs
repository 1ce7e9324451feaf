//! What is estimated of the clusters of a micro-tile, and which of them its limits leave to that.

use std::ops::Range;

use iceformer_kernels::attention::{
    AttentionTile, ClusterQueries, MICRO_ROWS, add_squared_errors, largest, masses_in_place, sum_of_squared_errors,
};
use iceformer_kernels::rows::add_scaled;

use super::region::CLUSTER_KEYS;
use super::selection::select;
use super::tile::Work;

/// Square of what the error of a row among rows of other heads may be, in units of its limit, …
const MOST_OF_LIMIT: f32 = 1.8;
/// … which is brought about by selecting again, with more weight on such rows, at most so often.
const MOST_SELECTIONS: usize = 3;

/// How far above the largest logit that was computed the logit of a cluster may be said to be, in nats. Means and variances are
/// rounded to eight bits, so that large ones are off by as much as other logits differ; and 9 nats further a weight is 0.
const MOST_ABOVE: f32 = 60.0;

/// Estimates of one micro-tile, in buffers that are used again.
#[derive(Default)]
pub(super) struct Estimate {
    queries: ClusterQueries,
    /// `[key_dim]`
    query: Vec<f32>,
    /// The queries, each times the factor on the logits and the mass that is left to the estimate. `[rows of a
    /// micro-tile][key_dim]`, padded
    weights: Vec<f32>,
    /// Relative to each row's largest logit. `[rows of a micro-tile][clusters]`
    masses: Vec<f32>,
    /// `[rows of a micro-tile][clusters]`
    uncertainties: Vec<f32>,
    /// Softmax sums of the rows: near keys and all clusters.
    totals: [f32; MICRO_ROWS],
    /// The squared error that each cluster would add, in units of the row's limit: the mean over the rows. `[clusters]`
    errors: Vec<f32>,
    /// Numbers of the clusters that are computed, ascending.
    selected: Vec<u32>,
    /// The masses of those, once the others were added. `[rows of a micro-tile][selected]`
    taken: Vec<f32>,
}

impl Estimate {
    /// Estimates the clusters of a micro-tile whose near keys are in `tile`, which learns the largest logits. False when
    /// a softmax sum is no number, or a cluster is said to have a logit far above all that was computed.
    pub fn begin(&mut self, work: &Work<'_>, micro_tile: usize, tile: &mut AttentionTile) -> bool {
        let call = &work.budgeted.call;
        let (rows, clusters) = (work.rows_of(micro_tile), work.clusters());
        let Self { queries, query, masses, uncertainties, totals, .. } = self;
        queries.begin(rows.len(), call.cache.shape().padded_key_dim());
        for row in rows.clone() {
            queries.set_row(row - rows.start, work.query(row, query), call.attention.scale);
        }
        masses.resize(rows.len() * clusters, 0.0);
        uncertainties.resize(rows.len() * clusters, 0.0);
        let mut first = 0;
        for region in work.regions() {
            queries.estimate(region.summaries(), masses, uncertainties, clusters, first);
            first += region.clusters();
        }
        for ((row, total), masses) in rows.zip(totals).zip(masses.chunks_exact_mut(clusters)) {
            let reference = largest(masses).max(tile.maximum(row));
            // Were the estimate wrong, what the row sees near it would be lost beside it.
            if tile.sum(row) > 0.0 && reference - tile.maximum(row) > MOST_ABOVE {
                return false;
            }
            tile.raise_maximum(row, reference);
            *total = tile.sum(row) + masses_in_place(masses, reference, CLUSTER_KEYS as f32);
            if !(total.is_finite() && *total > 0.0) {
                return false;
            }
        }
        true
    }

    /// Selects as few clusters as leave each head's rows within its entry of `limits` on average. Rows of one head are
    /// neighbours, and stand in for one another where limits are measured; where rows are of several heads, each keeps its
    /// own limit, or the head that errs most would take what the others do not need.
    pub fn select(&mut self, work: &Work<'_>, micro_tile: usize, limits: &[f32]) {
        let mut weights = [1.0; MICRO_ROWS];
        self.select_weighted(work, micro_tile, limits, &weights);
        let heads = work.heads_of(micro_tile);
        if heads.start() == heads.end() {
            return;
        }
        for _ in 0..MOST_SELECTIONS {
            let left = self.squared_errors_of_others(work);
            let mut is_within = true;
            for ((row, weight), left) in work.rows_of(micro_tile).zip(&mut weights).zip(left) {
                let times_limit = left / limits[work.task.head_and_token(row).0].powi(2);
                if times_limit > MOST_OF_LIMIT {
                    *weight *= times_limit;
                    is_within = false;
                }
            }
            if is_within {
                break;
            }
            self.select_weighted(work, micro_tile, limits, &weights);
        }
    }

    /// Selects as few clusters as leave a mean of 1 to the squared errors of the rows, in units of the squares of their
    /// limits and times their weights.
    fn select_weighted(&mut self, work: &Work<'_>, micro_tile: usize, limits: &[f32], weights: &[f32; MICRO_ROWS]) {
        let (rows, clusters) = (work.rows_of(micro_tile), work.clusters());
        let count = rows.len() as f32;
        self.errors.clear();
        self.errors.resize(clusters, 0.0);
        let matrices = self.masses.chunks_exact(clusters).zip(self.uncertainties.chunks_exact(clusters));
        for (((row, weight), total), (masses, uncertainties)) in rows.zip(weights).zip(self.totals).zip(matrices) {
            let limit = limits[work.task.head_and_token(row).0];
            let factor = weight * squared_error_factor(total) / (limit * limit * count);
            add_squared_errors(masses, uncertainties, factor, &mut self.errors);
        }
        select(&self.errors, 1.0, &mut self.selected);
    }

    /// Takes the selected clusters out of the masses. Returns the sum of the squared errors of the others by row.
    fn take_selected(&mut self, work: &Work<'_>) -> [f32; MICRO_ROWS] {
        let clusters = work.clusters();
        self.taken.clear();
        let mut squares = [0.0; MICRO_ROWS];
        let matrices = self.masses.chunks_exact_mut(clusters).zip(self.uncertainties.chunks_exact(clusters));
        for ((square, total), (masses, uncertainties)) in squares.iter_mut().zip(self.totals).zip(matrices) {
            self.taken.extend(self.selected.iter().map(|&cluster| std::mem::take(&mut masses[cluster as usize])));
            *square = squared_error_factor(total) * sum_of_squared_errors(masses, uncertainties);
        }
        squares
    }

    /// The sum of the squared errors, as estimated, of the clusters that are not selected, by row.
    fn squared_errors_of_others(&mut self, work: &Work<'_>) -> [f32; MICRO_ROWS] {
        let squares = self.take_selected(work);
        self.put_back(work);
        squares
    }

    /// Numbers of the clusters that are computed, ascending.
    pub fn selected(&self) -> &[u32] {
        &self.selected
    }

    /// Adds the clusters that were not selected to `tile`. Returns the root of the sum of their squared errors, as
    /// estimated, by row.
    pub fn add_others(&mut self, work: &Work<'_>, micro_tile: usize, tile: &mut AttentionTile) -> [f32; MICRO_ROWS] {
        let (rows, clusters) = (work.rows_of(micro_tile), work.clusters());
        let errors = self.take_selected(work).map(f32::sqrt);
        let before = std::array::from_fn(|row| if row < rows.len() { tile.sum(rows.start + row) } else { 0.0 });
        let mut first = 0;
        for region in work.regions() {
            tile.add_clusters(rows.start, rows.len(), &self.masses[first..], clusters, region.summaries().values);
            first += region.clusters();
        }
        self.add_first_order(work, rows, before, tile);
        errors
    }

    /// Adds what the weighted mean of a cluster's values differs by from their mean, as far as all clusters have it in common
    /// ([`cross_covariance`](super::cross_covariance)). The softmax sums of `rows` were `before` without the clusters that were
    /// left to the estimate.
    fn add_first_order(
        &mut self,
        work: &Work<'_>,
        rows: Range<usize>,
        before: [f32; MICRO_ROWS],
        tile: &mut AttentionTile,
    ) {
        let call = &work.budgeted.call;
        let key_dim = call.cache.shape().padded_key_dim();
        self.weights.clear();
        self.weights.resize(rows.len() * key_dim, 0.0);
        for ((row, before), weights) in rows.clone().zip(before).zip(self.weights.chunks_exact_mut(key_dim)) {
            let query = work.query(row, &mut self.query);
            let factor = call.attention.scale * (tile.sum(row) - before);
            add_scaled(&mut weights[..query.len()], factor, query);
        }
        tile.add_values(rows.start, rows.len(), &self.weights, key_dim, work.cross_covariance());
    }

    /// Makes ready for other limits, once the clusters that were not selected were added.
    pub fn put_back(&mut self, work: &Work<'_>) {
        let taken = self.taken.chunks_exact(self.selected.len().max(1));
        for (masses, taken) in self.masses.chunks_exact_mut(work.clusters()).zip(taken) {
            self.selected.iter().zip(taken).for_each(|(&cluster, mass)| masses[cluster as usize] = *mass);
        }
        self.taken.clear();
    }

    /// Adds the clusters of a micro-tile that `limits` leave to the estimate, and returns their errors as
    /// [`add_others`](Self::add_others) does. `None`, with nothing added, where more than `most` would be computed, or a number
    /// is none.
    pub fn add(
        &mut self,
        work: &Work<'_>,
        micro_tile: usize,
        limits: &[f32],
        most: usize,
        tile: &mut AttentionTile,
    ) -> Option<[f32; MICRO_ROWS]> {
        if !self.begin(work, micro_tile, tile) {
            return None;
        }
        self.select(work, micro_tile, limits);
        (self.selected.len() <= most).then(|| self.add_others(work, micro_tile, tile))
    }
}

/// Factor on (mass² · uncertainty) that makes it the squared error of a cluster: with independent keys, the weighted
/// mean of its values is off by the standard deviation of its weights over the square root of their number.
fn squared_error_factor(total: f32) -> f32 {
    2.0 / (CLUSTER_KEYS as f32 * total * total)
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;
    use crate::budgeted::tile::Budgeted;
    use crate::budgeted::tile::distance;
    use crate::budgeted::tile::tests::{KEYS, WIDTH, look_at_work, look_at_work_on};
    use crate::tiles::{self, Call};
    use crate::{Attention, KeyValueType};

    /// Beside a logit that is far too large all others would be lost, and the row be zeros.
    #[test]
    fn an_estimate_far_above_all_that_was_computed_spoils_nothing() {
        let mut random = Random::new(6);
        look_at_work(KeyValueType::F32, (1, MICRO_ROWS), 0, &mut random, |work| {
            let attention = Attention { scale: 1e6, ..work.budgeted.call.attention.clone() };
            let budgeted = Budgeted {
                call: Call { attention: &attention, ..work.budgeted.call },
                settings: work.budgeted.settings,
                index: work.budgeted.index,
                audits_last: false,
            };
            let work = Work { budgeted: &budgeted, ..*work };
            let [mut tile, mut exact] = [AttentionTile::default(), AttentionTile::default()];
            let seen = tiles::begin(&mut tile, &budgeted.call, work.task);
            budgeted.accumulate_near(&mut tile, work.task, work.regions, seen);
            assert!(!Estimate::default().begin(&work, 0, &mut tile));
            tiles::attend_to_all(&mut exact, &budgeted.call, work.task);
            work.accumulate_exactly(&mut tile, |_| true);
            for row in work.rows_of(0) {
                let (sum, exact) = (tile.log_sum_exp(row), exact.log_sum_exp(row));
                assert!((sum - exact).abs() <= 1e-6 * exact.abs(), "row {row}: {sum} and {exact}");
            }
        });
    }

    #[test]
    fn a_row_keeps_its_own_limit_beside_rows_of_other_heads() {
        let mut random = Random::new(9);
        let (heads, exceeded) = (4, std::cell::Cell::new(false));
        for _ in 0..20 {
            look_at_work(KeyValueType::F32, (heads, 1), 0, &mut random, |work| {
                let (mut tile, mut estimate) = (AttentionTile::default(), Estimate::default());
                let seen = tiles::begin(&mut tile, &work.budgeted.call, work.task);
                work.budgeted.accumulate_near(&mut tile, work.task, work.regions, seen);
                assert!(estimate.begin(work, 0, &mut tile));
                for limits in [[0.01; 4], [0.004, 0.02, 0.02, 0.02], [0.05, 0.01, 0.003, 0.01]] {
                    let most = |estimate: &mut Estimate| {
                        let left = estimate.squared_errors_of_others(work);
                        left.iter().zip(limits).map(|(left, limit)| left / (limit * limit)).fold(0.0, f32::max)
                    };
                    estimate.select_weighted(work, 0, &limits, &[1.0; MICRO_ROWS]);
                    exceeded.set(exceeded.get() | (most(&mut estimate) > MOST_OF_LIMIT));
                    estimate.select(work, 0, &limits);
                    let most = most(&mut estimate);
                    assert!(most <= MOST_OF_LIMIT, "{most} times the square of the limit of {limits:?}");
                }
            });
        }
        assert!(exceeded.get(), "the mean over the rows alone keeps them all");
    }

    /// Of clusters that are all left to the estimate, what values that go with their keys differ by from their mean.
    #[test]
    fn values_go_with_keys_as_queries_weigh_them() {
        let mut random = Random::new(12);
        let keys = random.normals(KEYS * WIDTH, 1.0);
        // Each is its key, the channels in another order, and some noise of its own.
        let mut values = random.normals(KEYS * WIDTH, 0.3);
        for (value, key) in values.chunks_exact_mut(WIDTH).zip(keys.chunks_exact(WIDTH)) {
            let turned = key.iter().cycle().skip(3);
            value.iter_mut().zip(turned).for_each(|(value, key)| *value += key);
        }
        for kind in KeyValueType::ALL {
            look_at_work_on(kind, (1, MICRO_ROWS), 0, [&keys, &values], &mut random, |work| {
                let [mut tile, mut exact] = [AttentionTile::default(), AttentionTile::default()];
                let mut estimate = Estimate::default();
                tiles::begin(&mut tile, &work.budgeted.call, work.task);
                tiles::begin(&mut exact, &work.budgeted.call, work.task);
                work.accumulate_exactly(&mut exact, |_| true);
                assert!(estimate.begin(work, 0, &mut tile));
                estimate.select(work, 0, &[f32::MAX]);
                assert!(estimate.selected().is_empty());
                let missed = |tile: &AttentionTile| {
                    let (mut output, mut expected) = ([0.0; WIDTH], [0.0; WIDTH]);
                    work.rows_of(0)
                        .map(|row| {
                            tile.finish_row(row, &mut output);
                            exact.finish_row(row, &mut expected);
                            distance(&output, &expected)
                        })
                        .sum::<f32>()
                };
                let mut means = AttentionTile::default();
                tiles::begin(&mut means, &work.budgeted.call, work.task);
                means.copy_rows(&tile, work.rows_of(0));
                let mut first = 0;
                for region in work.regions() {
                    let (masses, values) = (&estimate.masses[first..], region.summaries().values);
                    means.add_clusters(0, MICRO_ROWS, masses, work.clusters(), values);
                    first += region.clusters();
                }
                estimate.add_others(work, 0, &mut tile);
                let (missed, of_means) = (missed(&tile), missed(&means));
                assert!(missed < 0.5 * of_means, "{}: {missed} of {of_means}", kind.name());
            });
        }
    }
}
