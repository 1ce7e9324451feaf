//! How much of the estimate each head can bear, measured on a few of its queries.
//!
//! The estimate of a cluster's error holds up to a factor that differs from head to head (how far keys in a cluster are
//! correlated, and their values with them). For a few queries everything is computed exactly and compared with what
//! would come out if the clusters of the least estimated error were left to the estimate, one after another; where the
//! true error passes the budget, the sum of the estimated ones gives the head's limit.

use iceformer_kernels::attention::{AttentionTile, ClusterQueries};

use super::Budgeted;
use super::index::{CLUSTER_KEYS, REGION_CLUSTERS};
use super::tile::{FALLBACK_SHARE, squared_error_factor};
use crate::tiles::{self, Task};

/// Queries measured for each head.
pub(super) const SAMPLES: usize = 12;
/// The limit is that of the most demanding query measured, less this factor for the more demanding ones among the rest.
const SAFETY: f32 = 1.4;
/// Errors are taken to be no smaller than the allowed one over this.
const MOST_ROOM: f32 = 16.0;
/// Largest error in relation to the output: where values average out, as under diffuse attention to unrelated values,
/// an error that is small beside a value can still be all of the output.
const MOST_OF_OUTPUT: f32 = 0.5;

/// What was measured of a query head.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Calibration {
    /// Queries measured.
    pub samples: usize,
    /// Root of the sum of squared errors, as estimated, that clusters left to the estimate may have; 0: too little for
    /// clusters to pay.
    pub limit: f32,
    /// Missed mass of a row in that unit, as seen at the limit: of most rows, not of the worst.
    pub error_factor: f32,
}

impl Calibration {
    /// Both measurements together.
    pub fn merge(self, other: Self) -> Self {
        match (self.samples, other.samples) {
            (0, _) => other,
            (_, 0) => self,
            _ => Self {
                samples: self.samples + other.samples,
                limit: self.limit.min(other.limit),
                error_factor: self.error_factor.max(other.error_factor),
            },
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct CalibrationScratch {
    near: AttentionTile,
    cluster: AttentionTile,
    queries: ClusterQueries,
    /// Logarithm of each cluster's mass as estimated. `[clusters]`
    estimates: Vec<f32>,
    /// `[clusters]`
    uncertainties: Vec<f32>,
    /// Log-sum-exp of each cluster. `[rows][clusters]`
    masses: Vec<f32>,
    /// Output of each cluster alone. `[rows][clusters][value_dim]`
    outputs: Vec<f32>,
    /// Squared error of each cluster as estimated, and its number; ascending.
    order: Vec<(f32, u32)>,
    /// Sum of the output so far, and its exact value. `[value_dim]`
    sum: Vec<f32>,
    exact: Vec<f32>,
}

/// True errors of a row over the sum of estimated squared errors, cluster after cluster left to the estimate.
struct Curve {
    /// (sum of estimated squared errors, missed mass), in the order in which clusters leave.
    points: Vec<(f32, f32)>,
    /// Missed mass that the row may have.
    allowed: f32,
}

impl Curve {
    /// Clusters that may be left to the estimate: all before the first that takes the error past the budget.
    fn first_past(&self) -> usize {
        // A NaN is within nothing.
        let is_within = |(_, missed): &(f32, f32)| *missed <= self.allowed;
        self.points.iter().position(|point| !is_within(point)).unwrap_or(self.points.len())
    }

    /// Sum of estimated squared errors that stays within the budget. Where even all clusters do, what the error would
    /// let be added: errors grow with the square root of the sum.
    fn limit(&self) -> f32 {
        match (self.first_past(), self.points.last()) {
            (past, Some(&(sum, missed))) if past == self.points.len() => {
                let room = self.allowed / missed.max(self.allowed / MOST_ROOM);
                sum * room * room
            }
            (0, _) => 0.0,
            (past, _) => self.points[past - 1].0,
        }
    }
}

/// Measures the query heads of `kv_head`.
pub(super) fn calibrate(budgeted: &Budgeted<'_>, kv_head: usize, scratch: &mut CalibrationScratch) -> Vec<Calibration> {
    let call = &budgeted.call;
    let group = call.group();
    let mut curves: Vec<Vec<Curve>> = (0..group).map(|_| Vec::new()).collect();
    let tokens = call.tokens();
    let samples = SAMPLES.min(tokens);
    for sample in 0..samples {
        // The last of each stretch of queries: under a causal mask those that see most.
        let token = (sample + 1) * tokens / samples - 1;
        let task = Task { kv_head, tokens: token..token + 1, keys: 0..call.cache.len() };
        for (row, curve) in scratch.curves(budgeted, &task).into_iter().enumerate() {
            curves[row].push(curve);
        }
    }
    curves.iter().map(|curves| judge(curves)).collect()
}

fn judge(curves: &[Curve]) -> Calibration {
    let least = curves.iter().map(Curve::limit).fold(f32::INFINITY, f32::min);
    if curves.is_empty() {
        return Calibration::default();
    }
    // The fewer were measured, the more demanding ones there are among the rest.
    let safety = SAFETY * (SAMPLES as f32 / curves.len() as f32).powf(0.25);
    let limit = least / (safety * safety);
    let (mut left, mut clusters, mut worst, mut sum) = (0, 0, 0.0_f32, 0.0);
    for curve in curves {
        let within = curve.points.iter().take_while(|(sum, _)| *sum <= limit).count();
        left += within;
        clusters += curve.points.len();
        if within > 0 {
            let missed = curve.points[within - 1].1;
            worst = worst.max(missed);
            sum += missed;
        }
    }
    let pays = limit > 0.0 && (clusters - left) as f32 <= FALLBACK_SHARE * clusters as f32;
    Calibration {
        samples: curves.len(),
        limit: if pays { limit.sqrt() } else { 0.0 },
        // Between the mean of a few rows and the worst of them lies about the 90th percentile of all.
        error_factor: if pays { 0.5 * (worst + sum / curves.len() as f32) / limit.sqrt() } else { 0.0 },
    }
}

impl CalibrationScratch {
    /// The curve of each head's row of a task of one token; none when it sees no far region.
    fn curves(&mut self, budgeted: &Budgeted<'_>, task: &Task) -> Vec<Curve> {
        let call = &budgeted.call;
        let shape = call.cache.shape();
        let regions = budgeted.far_regions(task);
        if regions.is_empty() {
            return Vec::new();
        }
        let head = budgeted.index.head(task.kv_head);
        let (group, value_dim) = (call.group(), shape.value_dim);
        let clusters = regions.len() * REGION_CLUSTERS;

        let seen = tiles::begin(&mut self.near, call, task);
        budgeted.accumulate_near(&mut self.near, task, &regions, seen);
        tiles::begin(&mut self.cluster, call, task);
        self.masses.resize(group * clusters, 0.0);
        self.outputs.resize(group * clusters * value_dim, 0.0);
        for cluster in 0..clusters {
            let (first, block) = budgeted.clusters(task.kv_head, &regions, cluster..cluster + 1);
            self.cluster.clear();
            self.cluster.accumulate(first, block, None);
            for row in 0..group {
                let place = row * clusters + cluster;
                let output = &mut self.outputs[place * value_dim..][..value_dim];
                self.masses[place] = self.cluster.finish_row(row, output);
            }
        }
        let spread = std::f32::consts::SQRT_2 * head.value_spread(regions.len());
        (0..group).map(|row| self.curve(budgeted, task, &regions, row, spread)).collect()
    }

    fn curve(&mut self, budgeted: &Budgeted<'_>, task: &Task, regions: &[usize], row: usize, spread: f32) -> Curve {
        let call = &budgeted.call;
        let shape = call.cache.shape();
        let value_dim = shape.value_dim;
        let head = budgeted.index.head(task.kv_head);
        let clusters = regions.len() * REGION_CLUSTERS;
        self.queries.begin(1, shape.padded_key_dim());
        let query = call.query(task.kv_head * call.group() + row, task.tokens.start);
        self.queries.set_row(0, query, call.attention.scale);
        self.estimates.resize(clusters, 0.0);
        self.uncertainties.resize(clusters, 0.0);
        for (place, &region) in regions.iter().enumerate() {
            let summaries = head.regions[region].summaries();
            let (estimates, uncertainties) = (&mut self.estimates, &mut self.uncertainties);
            self.queries.estimate(summaries, estimates, uncertainties, clusters, place * REGION_CLUSTERS);
        }

        // Masses relative to the largest there is.
        let masses = &self.masses[row * clusters..][..clusters];
        let outputs = &self.outputs[row * clusters * value_dim..][..clusters * value_dim];
        self.exact.resize(value_dim, 0.0);
        let near = self.near.finish_row(row, &mut self.exact);
        let keys = (CLUSTER_KEYS as f32).ln();
        let reference = masses.iter().chain(&self.estimates).copied().fold(near, f32::max);
        let near = (near - reference).exp();
        let mass = |cluster: usize| (masses[cluster] - reference).exp();
        let estimates = &self.estimates;
        let estimate = |cluster: usize| (estimates[cluster] + keys - reference).exp();
        let estimated_total = near + (0..clusters).map(estimate).sum::<f32>();

        self.exact.iter_mut().for_each(|value| *value *= near);
        let mut total = near;
        for cluster in 0..clusters {
            let output = &outputs[cluster * value_dim..][..value_dim];
            self.exact.iter_mut().zip(output).for_each(|(sum, value)| *sum += mass(cluster) * value);
            total += mass(cluster);
        }
        self.sum.clone_from(&self.exact);
        self.exact.iter_mut().for_each(|value| *value /= total);

        self.order.clear();
        let factor = squared_error_factor(estimated_total);
        for cluster in 0..clusters {
            let mass = estimate(cluster);
            self.order.push((factor * mass * mass * self.uncertainties[cluster], cluster as u32));
        }
        self.order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));

        let size = self.exact.iter().map(|value| value * value).sum::<f32>().sqrt() / spread;
        let allowed = budgeted.settings.budget.min(MOST_OF_OUTPUT * size);
        let mut curve = Curve { points: Vec::with_capacity(clusters), allowed };
        let mut errors = 0.0;
        for &(error, cluster) in &self.order {
            let cluster = cluster as usize;
            let region = &head.regions[regions[cluster / REGION_CLUSTERS]];
            let (mass, estimate) = (mass(cluster), estimate(cluster));
            let output = &outputs[cluster * value_dim..][..value_dim];
            let mean = region.value(cluster % REGION_CLUSTERS, shape);
            for ((sum, value), mean) in self.sum.iter_mut().zip(output).zip(mean) {
                *sum += estimate * mean - mass * value;
            }
            total += estimate - mass;
            errors += error;
            let square: f32 = self
                .sum
                .iter()
                .zip(&self.exact)
                .map(|(sum, exact)| (sum / total - exact) * (sum / total - exact))
                .sum();
            curve.points.push((errors, square.sqrt() / spread));
        }
        curve
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_demanding_query_sets_the_limit() {
        let curve = |points: &[(f32, f32)]| Curve { points: points.to_vec(), allowed: 0.1 };
        let many = |points: &[(f32, f32)]| -> Vec<Curve> { (0..SAMPLES).map(|_| curve(points)).collect() };
        let easy = curve(&[(1e-6, 0.0), (1e-5, 0.01), (1e-4, 0.05), (1e-3, 0.09)]);
        let hard = curve(&[(1e-6, 0.01), (1e-5, 0.02), (1e-4, 0.2), (1e-3, 0.05)]);
        assert_eq!(hard.limit(), 1e-5);
        assert!((easy.limit() - 1e-3 / 0.81).abs() < 1e-6, "room for a little more");
        let both = judge(&[easy, hard]);
        assert_eq!(both.samples, 2);
        // 1e-5 / 1.4²: one cluster of four is left in each, too few to pay.
        assert_eq!(both.limit, 0.0);
        let hopeless = judge(&[curve(&[(1e-6, f32::NAN), (1.0, 0.0)])]);
        assert_eq!((hopeless.limit, hopeless.samples), (0.0, 1));
        let fine = judge(&many(&[(1e-6, 0.01), (2e-6, 0.02), (2.2e-6, 0.03), (9e-6, 0.06), (1.0, 0.2)]));
        assert!((fine.limit - 3e-3 / 1.4).abs() < 1e-6, "{fine:?}");
        assert!((fine.error_factor - 14.0).abs() < 1e-2, "{fine:?}");
    }

    #[test]
    fn measurements_add_up() {
        let (a, b) = (
            Calibration { samples: 2, limit: 0.1, error_factor: 3.0 },
            Calibration { samples: 1, limit: 0.05, error_factor: 2.0 },
        );
        assert_eq!(a.merge(b), Calibration { samples: 3, limit: 0.05, error_factor: 3.0 });
        assert_eq!(Calibration::default().merge(a), a);
        assert_eq!(a.merge(Calibration::default()), a);
    }
}
