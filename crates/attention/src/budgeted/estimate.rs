//! What is estimated of the clusters of a micro-tile, and which of them its limits leave to that.

use iceformer_kernels::attention::{
    AttentionTile, ClusterQueries, MICRO_ROWS, add_squared_errors, largest, masses_in_place, sum_of_squared_errors,
};

use super::region::CLUSTER_KEYS;
use super::selection::select;
use super::tile::Work;

/// Estimates of one micro-tile, in buffers that are used again.
#[derive(Default)]
pub(super) struct Estimate {
    queries: ClusterQueries,
    /// `[key_dim]`
    query: Vec<f32>,
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
    /// a softmax sum is no number.
    pub fn begin(&mut self, work: &Work<'_>, micro_tile: usize, tile: &mut AttentionTile) -> bool {
        let call = &work.budgeted.call;
        let (rows, clusters) = (work.rows_of(micro_tile), work.clusters());
        let Self { queries, query, masses, uncertainties, totals, .. } = self;
        queries.begin(rows.len(), call.cache.shape().padded_key_dim());
        for row in rows.clone() {
            let (head, token) = work.task.head_and_token(row);
            let query = call.query(work.task.kv_head * call.group() + head, token, query);
            queries.set_row(row - rows.start, query, call.attention.scale);
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
            tile.raise_maximum(row, reference);
            *total = tile.sum(row) + masses_in_place(masses, reference, CLUSTER_KEYS as f32);
            if !(total.is_finite() && *total > 0.0) {
                return false;
            }
        }
        true
    }

    /// Selects as few clusters as leave each head's rows within its entry of `limits` on average.
    pub fn select(&mut self, work: &Work<'_>, micro_tile: usize, limits: &[f32]) {
        let (rows, clusters) = (work.rows_of(micro_tile), work.clusters());
        let count = rows.len() as f32;
        self.errors.clear();
        self.errors.resize(clusters, 0.0);
        let matrices = self.masses.chunks_exact(clusters).zip(self.uncertainties.chunks_exact(clusters));
        for ((row, total), (masses, uncertainties)) in rows.zip(self.totals).zip(matrices) {
            let limit = limits[work.task.head_and_token(row).0];
            let factor = squared_error_factor(total) / (limit * limit * count);
            add_squared_errors(masses, uncertainties, factor, &mut self.errors);
        }
        select(&self.errors, 1.0, &mut self.selected);
    }

    /// Numbers of the clusters that are computed, ascending.
    pub fn selected(&self) -> &[u32] {
        &self.selected
    }

    /// Adds the clusters that were not selected to `tile`. Returns the root of the sum of their squared errors, as
    /// estimated, by row.
    pub fn add_others(&mut self, work: &Work<'_>, micro_tile: usize, tile: &mut AttentionTile) -> [f32; MICRO_ROWS] {
        let (rows, clusters) = (work.rows_of(micro_tile), work.clusters());
        self.taken.clear();
        let mut errors = [0.0; MICRO_ROWS];
        let matrices = self.masses.chunks_exact_mut(clusters).zip(self.uncertainties.chunks_exact(clusters));
        for ((error, total), (masses, uncertainties)) in errors.iter_mut().zip(self.totals).zip(matrices) {
            self.taken.extend(self.selected.iter().map(|&cluster| std::mem::take(&mut masses[cluster as usize])));
            *error = (squared_error_factor(total) * sum_of_squared_errors(masses, uncertainties)).sqrt();
        }
        let mut first = 0;
        for region in work.regions() {
            tile.add_clusters(rows.start, rows.len(), &self.masses[first..], clusters, region.summaries().values);
            first += region.clusters();
        }
        errors
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
