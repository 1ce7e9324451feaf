//! Clusters of keys that a softmax sees as one: their mass estimated from two moments, their values by the mean.
//!
//! For a query `q` (times the factor on the logits) and the `n` keys of a cluster with mean `c` and channel variances
//! `s`, the mass `Σ exp(q · k)` is about `n · exp(q · c + ½ Σ qᵢ² sᵢ)`: the mean of a lognormal distribution whose
//! variance takes the channels as uncorrelated.
//!
//! Two moments do not see a key that stands apart from the rest in a direction of its own: spread over all channels, it
//! adds next to nothing to the variance of each, and a query that looks for it and no other would find its cluster of no
//! account. So the key that is farthest from the mean is known as it is, and where its mass is more than that of all
//! others together, it counts.

use super::MICRO_ROWS;
#[cfg(target_arch = "x86_64")]
use super::clusters_bf16::{self, BrainEstimate, BrainSum};
use crate::simd::exponential::exp;
use crate::simd::{self, Operation, Simd};
use crate::{AlignedBuffer, InstructionSet};

/// Clusters of a panel: the lanes of a vector, as keys are in a page.
pub const PANEL_CLUSTERS: usize = 16;

/// Largest half variance of logits that is believed: the mass of a cluster is at most e⁶ times what its mean says. Where
/// more would be needed, a few keys outweigh the rest and no estimate from moments holds.
pub(super) const MOST_HALF_VARIANCE: f32 = 6.0;
/// Nats beyond it, at most, by which the mass may be larger than estimated where errors are told.
pub(super) const MOST_EXCESS: f32 = 6.0;
/// Up to so many rows two vectors of clusters are estimated at a time.
pub(super) const MOST_ROWS_OF_PAIRS: usize = 4;

/// Summaries of whole panels of clusters, as brain floats, in the layouts of a page of bf16 keys and values.
#[derive(Clone, Copy)]
pub struct ClusterSummaries<'a> {
    /// Keys of each cluster.
    pub keys: usize,
    /// Mean key of each cluster. `[panels][key_dim / 2][16][2]`
    pub means: &'a [u16],
    /// Variance of the keys of each cluster, channel by channel. `[panels][key_dim / 2][16][2]`
    pub variances: &'a [u16],
    /// The key of each cluster that is farthest from the mean, less the mean. `[panels][key_dim / 2][16][2]`
    pub farthest: &'a [u16],
    /// Mean value of each cluster. `[panels · 8][value_dim][2]`
    pub values: &'a [u16],
}

/// Queries of a micro-tile as the estimate wants them: times the factor on the logits, and half their squares.
#[derive(Default)]
pub struct ClusterQueries {
    rows: usize,
    key_dim: usize,
    /// `[rows][key_dim]`
    queries: AlignedBuffer<f32>,
    /// `[rows][key_dim]`
    half_squares: AlignedBuffer<f32>,
    /// Both as brain floats, where there is a kernel that multiplies those.
    brain_queries: AlignedBuffer<u16>,
    brain_half_squares: AlignedBuffer<u16>,
}

impl ClusterQueries {
    /// Starts anew for up to six rows of keys of width `key_dim` (as padded in a page).
    ///
    /// # Panics
    /// When there are more rows.
    pub fn begin(&mut self, rows: usize, key_dim: usize) {
        assert!(rows <= MICRO_ROWS, "{rows} rows are more than a micro-tile has");
        (self.rows, self.key_dim) = (rows, key_dim);
        self.queries.grow(rows * key_dim);
        self.half_squares.grow(rows * key_dim);
        self.brain_queries.grow(rows * key_dim);
        self.brain_half_squares.grow(rows * key_dim);
    }

    /// Sets row `row`: its query (at most `key_dim` long, the rest counts as zero) and the factor on its logits.
    pub fn set_row(&mut self, row: usize, query: &[f32], scale: f32) {
        let range = row * self.key_dim..(row + 1) * self.key_dim;
        let (queries, half_squares) = (&mut self.queries[range.clone()], &mut self.half_squares[range.clone()]);
        queries[query.len()..].fill(0.0);
        half_squares[query.len()..].fill(0.0);
        for ((target, half_square), value) in queries.iter_mut().zip(half_squares).zip(query) {
            *target = value * scale;
            *half_square = 0.5 * *target * *target;
        }
        #[cfg(target_arch = "x86_64")]
        if multiplies_brains(InstructionSet::detected_once()) {
            // SAFETY: the machine has the level.
            unsafe {
                clusters_bf16::round(&self.queries[range.clone()], &mut self.brain_queries[range.clone()]);
                clusters_bf16::round(&self.half_squares[range.clone()], &mut self.brain_half_squares[range]);
            }
        }
    }

    /// Writes for every row and cluster the logarithm of the estimated mass of a key (that of the cluster, less the
    /// logarithm of its number of keys) and its uncertainty, to column `first` and on of matrices with
    /// rows of `stride`. The uncertainty is half the variance of the logits, as far as the mass believes it; beyond, it
    /// grows as the square of the mass that is not believed. Where the farthest key is a large part of the mass, or all of
    /// it, so is its value of the error, and the uncertainty half the number of keys times the square of that part. A dot product does not depend on the other rows, to the last bit.
    ///
    /// # Panics
    /// When the summaries are no whole panels of this width, or the matrices are too small.
    pub fn estimate(
        &self,
        summaries: ClusterSummaries<'_>,
        log_masses: &mut [f32],
        uncertainties: &mut [f32],
        stride: usize,
        first: usize,
    ) {
        self.estimate_at(InstructionSet::current(), summaries, log_masses, uncertainties, stride, first);
    }

    fn estimate_at(
        &self,
        level: InstructionSet,
        summaries: ClusterSummaries<'_>,
        log_masses: &mut [f32],
        uncertainties: &mut [f32],
        stride: usize,
        first: usize,
    ) {
        let panel = PANEL_CLUSTERS * self.key_dim;
        assert!(summaries.means.len().is_multiple_of(panel), "means are whole panels");
        assert_eq!(summaries.means.len(), summaries.variances.len(), "as many variances as means");
        assert_eq!(summaries.means.len(), summaries.farthest.len(), "as many farthest keys as means");
        let clusters = summaries.means.len() / self.key_dim;
        if self.rows == 0 {
            return;
        }
        let fits = self.rows.checked_mul(stride).is_some_and(|places| log_masses.len() >= places);
        assert!(first + clusters <= stride && fits, "the clusters fit the matrix");
        assert_eq!(log_masses.len(), uncertainties.len(), "both matrices are of one size");
        assert!(level <= InstructionSet::detected(), "this machine has no {}", level.name());
        #[cfg(target_arch = "x86_64")]
        if multiplies_brains(level) {
            let estimate = BrainEstimate {
                queries: self.brain_queries.as_ptr(),
                half_squares: self.brain_half_squares.as_ptr(),
                key_dim: self.key_dim,
                means: summaries.means.as_ptr(),
                variances: summaries.variances.as_ptr(),
                farthest: summaries.farthest.as_ptr(),
                keys: summaries.keys as f32,
                panels: clusters / PANEL_CLUSTERS,
                log_masses: log_masses[first..].as_mut_ptr(),
                uncertainties: uncertainties[first..].as_mut_ptr(),
                stride,
            };
            // SAFETY: the machine has the level; the queries have `rows` rows of `key_dim`, and the assertions above
            // hold the panels within the summaries and the columns within the matrices.
            unsafe { clusters_bf16::estimate_rows(self.rows, &estimate) };
            return;
        }
        simd::run(level, Estimate { queries: self, summaries, log_masses, uncertainties, stride, first, clusters });
    }
}

/// Whether `level` multiplies brain floats here, rather than widen them.
#[cfg(target_arch = "x86_64")]
fn multiplies_brains(level: InstructionSet) -> bool {
    level >= InstructionSet::Avx512Bf16 && !InstructionSet::brain_dots_are_slow()
}

struct Estimate<'a> {
    queries: &'a ClusterQueries,
    summaries: ClusterSummaries<'a>,
    log_masses: &'a mut [f32],
    uncertainties: &'a mut [f32],
    stride: usize,
    first: usize,
    clusters: usize,
}

impl Operation for Estimate<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, simd: S) {
        match self.queries.rows {
            1 => self.rows::<S, 1>(simd),
            2 => self.rows::<S, 2>(simd),
            3 => self.rows::<S, 3>(simd),
            4 => self.rows::<S, 4>(simd),
            5 => self.rows::<S, 5>(simd),
            _ => self.rows::<S, 6>(simd),
        }
    }
}

impl Estimate<'_> {
    #[inline(always)]
    fn rows<S: Simd, const ROWS: usize>(&mut self, simd: S) {
        let mut cluster = 0;
        while cluster < self.clusters {
            // Twice three vectors of sums of up to four rows fill 24 of the 32 registers of AVX-512.
            if ROWS <= MOST_ROWS_OF_PAIRS && S::LANES == PANEL_CLUSTERS && self.clusters - cluster >= 2 * PANEL_CLUSTERS
            {
                self.vectors::<S, ROWS, 2>(simd, cluster);
                cluster += 2 * S::LANES;
            } else {
                self.vectors::<S, ROWS, 1>(simd, cluster);
                cluster += S::LANES;
            }
        }
    }

    #[inline(always)]
    fn vectors<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, cluster: usize) {
        if self.queries.rows < ROWS {
            return;
        }
        let width = self.queries.key_dim;
        let means = self.summaries.means.as_chunks::<{ 2 * PANEL_CLUSTERS }>().0;
        let variances = self.summaries.variances.as_chunks::<{ 2 * PANEL_CLUSTERS }>().0;
        let farthest = self.summaries.farthest.as_chunks::<{ 2 * PANEL_CLUSTERS }>().0;
        let mut queries = [&self.queries.queries[..0]; ROWS];
        let mut half_squares = [&self.queries.half_squares[..0]; ROWS];
        for row in 0..ROWS {
            queries[row] = &self.queries.queries[row * width..][..width];
            half_squares[row] = &self.queries.half_squares[row * width..][..width];
        }
        let mut panels = [([&means[..0]; 3], 0); VECTORS];
        for (vector, panel) in panels.iter_mut().enumerate() {
            let place = cluster + vector * S::LANES;
            let steps = place / PANEL_CLUSTERS * width / 2;
            let of_panel = [means, variances, farthest].map(|summary| &summary[steps..][..width / 2]);
            *panel = (of_panel, 2 * (place % PANEL_CLUSTERS));
        }
        let mut logits = [[simd.splat(0.0); VECTORS]; ROWS];
        let mut halves = [[simd.splat(0.0); VECTORS]; ROWS];
        let mut lone = [[simd.splat(0.0); VECTORS]; ROWS];
        for step in 0..width / 2 {
            for vector in 0..VECTORS {
                let ([means, variances, farthest], lane) = panels[vector];
                let means = simd.load_brain_pairs(&means[step][lane..]);
                let variances = simd.load_brain_pairs(&variances[step][lane..]);
                let farthest = simd.load_brain_pairs(&farthest[step][lane..]);
                for row in 0..ROWS {
                    let (logit, half) = (&mut logits[row][vector], &mut halves[row][vector]);
                    let lone = &mut lone[row][vector];
                    let (query, half_square) = (&queries[row][2 * step..], &half_squares[row][2 * step..]);
                    let (even, odd) = (simd.splat(query[0]), simd.splat(query[1]));
                    *logit = simd.mul_add(even, means.0, *logit);
                    *logit = simd.mul_add(odd, means.1, *logit);
                    *half = simd.mul_add(simd.splat(half_square[0]), variances.0, *half);
                    *half = simd.mul_add(simd.splat(half_square[1]), variances.1, *half);
                    *lone = simd.mul_add(even, farthest.0, *lone);
                    *lone = simd.mul_add(odd, farthest.1, *lone);
                }
            }
        }
        let keys = self.summaries.keys as f32;
        let (log_keys, half_keys) = (simd.splat(keys.ln()), simd.splat(0.5 * keys));
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                let place = row * self.stride + self.first + cluster + vector * S::LANES;
                // The half variance is the second operand of `min`, so that a NaN stays.
                let half = simd.min(simd.splat(MOST_HALF_VARIANCE), halves[row][vector]);
                let excess = simd.min(simd.splat(MOST_EXCESS), simd.sub(halves[row][vector], half));
                let uncertainty = simd.mul(half, exp(simd, simd.add(excess, excess)));
                // Its mass beside that of all keys.
                let lone = simd.sub(lone[row][vector], log_keys);
                let part = simd.min(simd.splat(0.0), simd.sub(lone, half));
                let uncertainty = simd.max(uncertainty, simd.mul(half_keys, exp(simd, simd.add(part, part))));
                let half = simd.max(half, lone);
                simd.store(uncertainty, &mut self.uncertainties[place..]);
                simd.store(simd.add(logits[row][vector], half), &mut self.log_masses[place..]);
            }
        }
    }
}

/// Weighted sums of cluster values, or of others, for the rows of a micro-tile: `output += masses · values`. The number of
/// clusters is even.
pub(super) struct WeightedClusters<'a> {
    /// Rows of `stride`, from the first cluster on.
    pub masses: &'a [f32],
    pub stride: usize,
    pub rows: usize,
    /// `[clusters / 2][value_dim][2]`
    pub values: &'a [u16],
    pub value_dim: usize,
    /// `[rows][value_dim]`
    pub output: &'a mut [f32],
}

impl WeightedClusters<'_> {
    /// Adds the sums with the instructions of `level`; `rounded` holds the weights of a few clusters where they are
    /// multiplied as brain floats.
    pub fn run(self, level: InstructionSet, rounded: &mut [u16]) {
        let clusters = self.values.len() / self.value_dim;
        assert!(clusters.is_multiple_of(2), "whole pairs of clusters");
        assert_eq!(self.output.len(), self.rows * self.value_dim, "one output for each row");
        #[cfg(target_arch = "x86_64")]
        if multiplies_brains(level) {
            let block = rounded.len() / self.rows / 2 * 2;
            for first in (0..clusters).step_by(block) {
                let count = block.min(clusters - first);
                for row in 0..self.rows {
                    let masses = &self.masses[row * self.stride + first..][..count];
                    // SAFETY: the machine has the level, or no tile would have begun with it.
                    unsafe { clusters_bf16::round(masses, &mut rounded[row * block..][..count]) };
                }
                let sum = BrainSum {
                    weights: rounded.as_ptr(),
                    stride: block,
                    values: self.values[first * self.value_dim..].as_ptr(),
                    pairs: count / 2,
                    value_dim: self.value_dim,
                    output: self.output.as_mut_ptr(),
                };
                // SAFETY: as above; `rounded` holds `rows` rows of `block`, of which `count` are weights, the values
                // `clusters − first` clusters, the output `rows` rows of `value_dim`.
                unsafe { clusters_bf16::sum_rows(self.rows, &sum) };
            }
            return;
        }
        let _ = rounded;
        simd::run(level, self);
    }
}

impl Operation for WeightedClusters<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, simd: S) {
        match self.rows {
            1 => self.rows::<S, 1>(simd),
            2 => self.rows::<S, 2>(simd),
            3 => self.rows::<S, 3>(simd),
            4 => self.rows::<S, 4>(simd),
            5 => self.rows::<S, 5>(simd),
            _ => self.rows::<S, 6>(simd),
        }
    }
}

impl WeightedClusters<'_> {
    #[inline(always)]
    fn rows<S: Simd, const ROWS: usize>(&mut self, simd: S) {
        let mut column = 0;
        while column < self.value_dim {
            if S::LANES == 16 && self.value_dim - column >= 4 * S::LANES {
                self.columns::<S, ROWS, 4>(simd, column);
                column += 4 * S::LANES;
            } else {
                self.columns::<S, ROWS, 1>(simd, column);
                column += S::LANES;
            }
        }
    }

    #[inline(always)]
    fn columns<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, column: usize) {
        let clusters = self.values.len() / self.value_dim;
        let mut masses = [&self.masses[..0]; ROWS];
        for (row, masses) in masses.iter_mut().enumerate() {
            *masses = &self.masses[row * self.stride..][..clusters];
        }
        let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (vector, sum) in sums.iter_mut().enumerate() {
                *sum = simd.load(&self.output[row * self.value_dim + column + vector * S::LANES..]);
            }
        }
        for pair in 0..clusters / 2 {
            let source = &self.values[2 * (pair * self.value_dim + column)..][..2 * VECTORS * S::LANES];
            for vector in 0..VECTORS {
                let (even, odd) = simd.load_brain_pairs(&source[2 * vector * S::LANES..]);
                for row in 0..ROWS {
                    let (sum, mass) = (&mut sums[row][vector], &masses[row][2 * pair..]);
                    *sum = simd.mul_add(simd.splat(mass[0]), even, *sum);
                    *sum = simd.mul_add(simd.splat(mass[1]), odd, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                simd.store(*sum, &mut self.output[row * self.value_dim + column + vector * S::LANES..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use iceformer_testing::compare::assert_close;
    use iceformer_testing::random::Random;

    use super::*;
    use crate::elementwise::levels;

    fn brain(values: &[f32]) -> (Vec<u16>, Vec<f64>) {
        let bits: Vec<u16> = values.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
        let widened = bits.iter().map(|&bits| f64::from(bf16::from_bits(bits).to_f32())).collect();
        (bits, widened)
    }

    /// `value` as the kernel of `level` multiplies it.
    fn seen(level: InstructionSet, value: f32) -> f64 {
        match level {
            #[cfg(target_arch = "x86_64")]
            _ if multiplies_brains(level) => bf16::from_f32(value).to_f64(),
            _ => f64::from(value),
        }
    }

    #[test]
    fn estimates_of_every_shape() {
        let mut seen_lone = [false; 2];
        for level in levels() {
            for (rows, width, panels) in [(1, 64, 1), (2, 4, 2), (3, 128, 3), (4, 20, 2), (5, 64, 4), (6, 36, 3)] {
                // With long queries the variance of the logits passes what is believed.
                let scale = if rows % 2 == 0 { 0.3_f32 } else { 3.0 };
                let mut random = Random::new(rows as u64);
                let clusters = panels * PANEL_CLUSTERS;
                let (means, mean_values) = brain(&random.normals(clusters * width, 1.0));
                let squares: Vec<f32> =
                    random.normals(clusters * width, 0.3).iter().map(|value| value * value).collect();
                let (variances, variance_values) = brain(&squares);
                // Of every second cluster one key stands far apart.
                let far = |index: usize| if (index / 2).is_multiple_of(2) { 0.2 } else { 4.0 };
                let apart: Vec<f32> = random.normals(clusters * width, 1.0);
                let apart: Vec<f32> = apart.iter().enumerate().map(|(index, value)| value * far(index)).collect();
                let (farthest, farthest_values) = brain(&apart);
                let data = random.normals(rows * width, 1.0);
                let mut queries = ClusterQueries::default();
                queries.begin(rows, width);
                // One channel fewer than the padded width.
                (0..rows).for_each(|row| queries.set_row(row, &data[row * width..][..width - 1], scale));
                let (stride, first) = (clusters + 5, 3);
                let (mut masses, mut halves) = (vec![0.0; rows * stride], vec![0.0; rows * stride]);
                let summaries = ClusterSummaries {
                    keys: 64,
                    means: &means,
                    variances: &variances,
                    farthest: &farthest,
                    values: &[],
                };
                queries.estimate_at(level, summaries, &mut masses, &mut halves, stride, first);
                for row in 0..rows {
                    for cluster in 0..clusters {
                        let place = |channel: usize| {
                            let pair = cluster / PANEL_CLUSTERS * width / 2 + channel / 2;
                            2 * (pair * PANEL_CLUSTERS + cluster % PANEL_CLUSTERS) + channel % 2
                        };
                        let query = |channel: usize| data[row * width + channel] * scale;
                        let half_square = |channel: usize| seen(level, 0.5 * query(channel) * query(channel));
                        let logit_of = |keys: &[f64]| -> f64 {
                            (0..width - 1).map(|channel| seen(level, query(channel)) * keys[place(channel)]).sum()
                        };
                        let (logit, lone) = (logit_of(&mean_values), logit_of(&farthest_values) - 64.0_f64.ln());
                        let half: f64 =
                            (0..width - 1).map(|channel| half_square(channel) * variance_values[place(channel)]).sum();
                        let uncertainty = half.min(6.0) * (2.0 * (half - half.min(6.0)).min(6.0)).exp();
                        let half = half.min(6.0);
                        let uncertainty = uncertainty.max(32.0 * (2.0 * (lone - half).min(0.0)).exp());
                        let half = half.max(lone);
                        seen_lone[usize::from(half == lone)] = true;
                        let at = row * stride + first + cluster;
                        assert!((f64::from(halves[at]) / uncertainty - 1.0).abs() < 1e-4, "{level:?}");
                        assert!((f64::from(masses[at]) - logit - half).abs() < 1e-4 * (1.0 + logit.abs()), "{level:?}");
                    }
                }
                assert!(masses[..first].iter().all(|&value| value == 0.0), "nothing before the first column");
            }
        }
        assert_eq!(seen_lone, [true; 2]);
    }

    #[test]
    fn no_rows_have_no_estimates() {
        let (summary, mut masses) = (vec![0; 4 * PANEL_CLUSTERS], vec![1.0; 2 * PANEL_CLUSTERS]);
        let mut uncertainties = masses.clone();
        let mut queries = ClusterQueries::default();
        queries.begin(0, 4);
        let summaries =
            ClusterSummaries { keys: 64, means: &summary, variances: &summary, farthest: &summary, values: &[] };
        for level in levels() {
            queries.estimate_at(level, summaries, &mut masses, &mut uncertainties, PANEL_CLUSTERS, 0);
            assert!(masses.iter().chain(&uncertainties).all(|value| *value == 1.0), "{level:?}");
        }
    }

    #[test]
    fn sums_of_cluster_values() {
        for level in levels() {
            for (rows, clusters, value_dim) in
                [(1, 16, 16), (2, 32, 64), (6, 600, 128), (5, 48, 80), (3, 6, 48), (4, 2, 256)]
            {
                let mut random = Random::new(clusters as u64);
                let stride = clusters + 3;
                let masses: Vec<f32> = random.normals(rows * stride, 1.0);
                let (values, wide) = brain(&random.normals(clusters * value_dim, 1.0));
                let mut output = random.normals(rows * value_dim, 1.0);
                let expected: Vec<f64> = (0..rows * value_dim)
                    .map(|index| {
                        let (row, column) = (index / value_dim, index % value_dim);
                        let terms = (0..clusters).map(|cluster| {
                            let place = 2 * (cluster / 2 * value_dim + column) + cluster % 2;
                            seen(level, masses[row * stride + cluster]) * wide[place]
                        });
                        f64::from(output[index]) + terms.sum::<f64>()
                    })
                    .collect();
                let operation =
                    WeightedClusters { masses: &masses, stride, rows, values: &values, value_dim, output: &mut output };
                operation.run(level, &mut vec![0; 1536]);
                assert_close(&output, &expected, 1e-5, format!("{level:?}, {rows} × {clusters} × {value_dim}"));
            }
        }
    }
}
