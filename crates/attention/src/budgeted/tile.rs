//! One tile of queries: near keys exactly, clusters by estimate or exactly, as the budget says.

use std::ops::Range;

use iceformer_kernels::InstructionSet;
use iceformer_kernels::attention::{
    AttentionTile, ClusterQueries, KeyBlock, MICRO_ROWS, TileShape, add_squared_errors, largest, masses_in_place,
};

use super::calibration::Calibration;
use super::index::{CLUSTER_KEYS, ClusterIndex, FIRST_KEYS, REGION_CLUSTERS, REGION_KEYS, SEGMENT_CLUSTERS};
use super::selection::select;
use super::settings::BudgetSettings;
use crate::HeadReport;
use crate::tiles::{self, Call, Task};

/// Keys before (and, without a causal mask, behind) the queries of a tile that are always exact.
pub(super) const NEAR_KEYS: usize = 512;
/// Above this share of clusters to compute, exact attention over the keys in their own order is faster.
pub(super) const FALLBACK_SHARE: f32 = 0.5;
/// Micro-tiles of a head in a row that may fall back before the rest of the tile does untried.
const MOST_FAILURES: usize = 2;
/// One tile of so many is audited …
const AUDITED_TILES: usize = 16;
/// … and one decoded token of so many.
const AUDITED_TOKENS: usize = 256;

/// A call with its clusters.
pub(super) struct Budgeted<'a> {
    pub call: Call<'a>,
    pub settings: BudgetSettings,
    pub index: &'a ClusterIndex,
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct TileScratch {
    queries: ClusterQueries,
    /// `[rows of a micro-tile][clusters]`
    masses: Vec<f32>,
    /// `[rows of a micro-tile][clusters]`
    uncertainties: Vec<f32>,
    /// `[clusters]`
    errors: Vec<f32>,
    /// `[clusters]`
    selected: Vec<bool>,
    /// Clusters that micro-tiles compute, a bit for each of a segment. `[segments][micro-tiles]`
    chosen: Vec<u8>,
    /// Micro-tiles that compute everything.
    exact: Vec<bool>,
    /// `[value_dim]`
    output: Vec<f32>,
    /// `[value_dim]`
    audited_output: Vec<f32>,
    audit: AttentionTile,
}

/// A tile at work.
struct Work<'a> {
    budgeted: &'a Budgeted<'a>,
    task: &'a Task,
    regions: &'a [usize],
    clusters: usize,
    rows: usize,
    /// √2 · the spread of the values.
    value_scale: f32,
}

impl Budgeted<'_> {
    /// Regions of which every key is seen by every query of `task`, and none is near one.
    pub fn far_regions(&self, task: &Task) -> Vec<usize> {
        let Call { attention, queries, .. } = self.call;
        let seen = task.tokens.clone().map(|token| self.call.seen(token));
        let Some((start, end)) = seen.map(|seen| (seen.start, seen.end)).reduce(|a, b| (a.0.max(b.0), a.1.min(b.1)))
        else {
            return Vec::new();
        };
        let first_near = (queries.first_position + task.tokens.start + 1).saturating_sub(NEAR_KEYS);
        let last_near = queries.first_position + task.tokens.end + NEAR_KEYS;
        let is_far = |region: &usize| {
            let keys = region_keys(*region);
            let is_behind = !attention.mask.causal && keys.start >= last_near;
            keys.start >= start && keys.end <= end && (keys.end <= first_near || is_behind)
        };
        (0..self.index.head(task.kv_head).regions.len()).filter(is_far).collect()
    }

    /// Whether `task` has no cluster to make use of.
    pub fn is_exact(&self, task: &Task) -> bool {
        !self.index.head(task.kv_head).pays() || self.far_regions(task).is_empty()
    }

    /// First key's position and keys of `clusters` of `regions`, which lie in one segment.
    pub fn clusters(&self, kv_head: usize, regions: &[usize], clusters: Range<usize>) -> (usize, KeyBlock<'_>) {
        let region = regions[clusters.start / REGION_CLUSTERS];
        let first = clusters.start % REGION_CLUSTERS;
        let shape = self.call.cache.shape();
        let keys = self.index.head(kv_head).regions[region].block(first..first + clusters.len(), shape);
        (region_keys(region).start, keys)
    }

    /// Adds the keys of `seen` that are in none of `regions`.
    pub fn accumulate_near(&self, tile: &mut AttentionTile, task: &Task, regions: &[usize], seen: Range<usize>) {
        let cache = self.call.cache;
        let mut first = tiles::block_start(cache, seen.start);
        for &region in regions {
            let keys = region_keys(region);
            tiles::accumulate(tile, cache, task.kv_head, first..keys.start, |_| true);
            first = keys.end;
        }
        tiles::accumulate(tile, cache, task.kv_head, first..seen.end, |_| true);
    }

    /// Whether a task has too few rows for a probe to cost little.
    fn is_decoding(&self, task: &Task) -> bool {
        task.tokens.len() < MICRO_ROWS
    }

    /// Attends from the queries of `task`; the result stays in `tile`.
    pub fn run(&self, task: &Task, tile: &mut AttentionTile, scratch: &mut TileScratch, reports: &mut Vec<HeadReport>) {
        let group = self.call.group();
        let seen = tiles::begin(tile, &self.call, task);
        let mut regions = self.far_regions(task);
        let falls_back = !regions.is_empty() && !self.index.head(task.kv_head).pays();
        if falls_back {
            regions.clear();
        }
        let allowed: u64 = task.tokens.clone().map(|token| self.call.seen(token).len() as u64).sum();
        let report = HeadReport { rows: task.tokens.len() as u64, allowed_keys: allowed, ..HeadReport::default() };
        reports.clear();
        reports.resize(group, report);
        self.accumulate_near(tile, task, &regions, seen);
        if regions.is_empty() {
            for report in reports.iter_mut() {
                (report.evaluated_keys, report.kept_keys) = (allowed, allowed);
                report.fallback_rows = if falls_back { report.rows } else { 0 };
            }
            return;
        }
        let clusters = self.index.head(task.kv_head);
        let spread = clusters.value_spread(clusters.regions.len());
        let work = Work {
            budgeted: self,
            task,
            regions: &regions,
            clusters: regions.len() * REGION_CLUSTERS,
            rows: group * task.tokens.len(),
            value_scale: std::f32::consts::SQRT_2 * spread,
        };
        work.far(tile, scratch, reports);
        if self.audits(task) {
            work.audit(tile, scratch, reports);
        }
    }

    /// Whether a row of each head of `task` is also computed exactly.
    fn audits(&self, task: &Task) -> bool {
        let position = self.call.queries.first_position + task.tokens.start;
        match self.is_decoding(task) {
            true => position % AUDITED_TOKENS == AUDITED_TOKENS / 2,
            false => (position / task.tokens.len() + task.kv_head).is_multiple_of(AUDITED_TILES),
        }
    }
}

impl Work<'_> {
    /// Adds the keys of the far regions.
    fn far(&self, tile: &mut AttentionTile, scratch: &mut TileScratch, reports: &mut [HeadReport]) {
        let (call, kv_head) = (&self.budgeted.call, self.task.kv_head);
        let micro_tiles = self.rows.div_ceil(MICRO_ROWS);
        scratch.chosen.clear();
        scratch.chosen.resize(self.clusters / SEGMENT_CLUSTERS * micro_tiles, 0);
        scratch.exact.clear();
        scratch.exact.resize(micro_tiles, false);
        // Where the first micro-tiles of a head needed everything, the next will too, and estimates cost.
        let (mut failures, mut head) = (0, 0);
        for micro_tile in 0..micro_tiles {
            let its_head = self.head_and_token(micro_tile * MICRO_ROWS).0;
            if its_head != head {
                (failures, head) = (0, its_head);
            }
            match self.limit(micro_tile).filter(|_| failures < MOST_FAILURES) {
                Some(limit) => self.micro_tile(micro_tile, limit, tile, scratch, reports),
                None => scratch.exact[micro_tile] = true,
            }
            failures = if scratch.exact[micro_tile] { failures + 1 } else { 0 };
        }
        let TileScratch { exact, chosen, .. } = scratch;
        if exact.contains(&true) {
            for &region in self.regions {
                tiles::accumulate(tile, call.cache, kv_head, region_keys(region), |micro_tile| exact[micro_tile]);
            }
        }
        let runs = runs(chosen, micro_tiles);
        let block = |run: &Run| {
            let first = run.segment * SEGMENT_CLUSTERS;
            self.budgeted.clusters(kv_head, self.regions, first + run.clusters.start..first + run.clusters.end)
        };
        for (index, run) in runs.iter().enumerate() {
            let (first, keys) = block(run);
            let next = runs.get(index + 1).map(|next| block(next).1);
            let patterns = &chosen[run.segment * micro_tiles..][..micro_tiles];
            tile.accumulate_in(first, keys, next, |micro_tile| run.is_in(patterns[micro_tile]));
        }
        self.count(scratch, reports);
    }

    fn rows_of(&self, micro_tile: usize) -> Range<usize> {
        micro_tile * MICRO_ROWS..self.rows.min((micro_tile + 1) * MICRO_ROWS)
    }

    /// Query head of the group and token of row `row`.
    fn head_and_token(&self, row: usize) -> (usize, usize) {
        let tokens = self.task.tokens.len();
        (row / tokens, self.task.tokens.start + row % tokens)
    }

    /// Fills `masses` (relative to each row's largest logit, which `tile` learns), `uncertainties` and `errors` (the
    /// mean over the rows of the squared error that each cluster would add, as shares). Returns the rows' softmax sums;
    /// `None` when one is no number.
    fn estimate(
        &self,
        micro_tile: usize,
        tile: &mut AttentionTile,
        scratch: &mut TileScratch,
    ) -> Option<[f32; MICRO_ROWS]> {
        let Budgeted { call, index, .. } = self.budgeted;
        let rows = self.rows_of(micro_tile);
        let shape = call.cache.shape();
        let TileScratch { queries, masses, uncertainties, errors, selected, .. } = scratch;
        queries.begin(rows.len(), shape.padded_key_dim());
        for row in rows.clone() {
            let (head, token) = self.head_and_token(row);
            let query = call.query(self.task.kv_head * call.group() + head, token);
            queries.set_row(row - rows.start, query, call.attention.scale);
        }
        masses.resize(rows.len() * self.clusters, 0.0);
        uncertainties.resize(rows.len() * self.clusters, 0.0);
        let regions = &index.head(self.task.kv_head).regions;
        for (place, &region) in self.regions.iter().enumerate() {
            let first = place * REGION_CLUSTERS;
            queries.estimate(regions[region].summaries(), masses, uncertainties, self.clusters, first);
        }
        errors.clear();
        errors.resize(self.clusters, 0.0);
        selected.resize(self.clusters, false);
        let mut totals = [0.0; MICRO_ROWS];
        let matrices = masses.chunks_exact_mut(self.clusters).zip(uncertainties.chunks_exact(self.clusters));
        for ((row, total), (masses, uncertainties)) in rows.clone().zip(&mut totals).zip(matrices) {
            let reference = largest(masses).max(tile.maximum(row));
            tile.raise_maximum(row, reference);
            *total = tile.sum(row) + masses_in_place(masses, reference, CLUSTER_KEYS as f32);
            if !(total.is_finite() && *total > 0.0) {
                return None;
            }
            add_squared_errors(masses, uncertainties, squared_error_factor(*total) / rows.len() as f32, errors);
        }
        Some(totals)
    }

    /// The least limit of the heads of a micro-tile's rows; `None` where clusters do not pay for one.
    fn limit(&self, micro_tile: usize) -> Option<f32> {
        let limit = |row| self.calibration(row).limit;
        Some(self.rows_of(micro_tile).map(limit).fold(f32::INFINITY, f32::min)).filter(|limit| *limit > 0.0)
    }

    /// What was measured of the head of row `row`.
    fn calibration(&self, row: usize) -> Calibration {
        self.budgeted.index.head(self.task.kv_head).calibration(self.head_and_token(row).0)
    }

    /// Adds the clusters that `limit` leaves to the estimate and marks the others in `chosen`.
    fn micro_tile(
        &self,
        micro_tile: usize,
        limit: f32,
        tile: &mut AttentionTile,
        scratch: &mut TileScratch,
        reports: &mut [HeadReport],
    ) {
        let Some(totals) = self.estimate(micro_tile, tile, scratch) else {
            scratch.exact[micro_tile] = true;
            return;
        };
        let rows = self.rows_of(micro_tile);
        let micro_tiles = self.rows.div_ceil(MICRO_ROWS);
        let TileScratch { masses, uncertainties, errors, selected, chosen, exact, .. } = scratch;
        let count = select(errors, limit * limit, selected);
        if count as f32 > FALLBACK_SHARE * self.clusters as f32 {
            exact[micro_tile] = true;
            return;
        }
        for cluster in (0..self.clusters).filter(|&cluster| selected[cluster]) {
            chosen[cluster / SEGMENT_CLUSTERS * micro_tiles + micro_tile] |= 1 << (cluster % SEGMENT_CLUSTERS);
            (0..rows.len()).for_each(|row| masses[row * self.clusters + cluster] = 0.0);
        }
        let matrices = masses.chunks_exact(self.clusters).zip(uncertainties.chunks_exact(self.clusters));
        for ((row, total), (masses, uncertainties)) in rows.clone().zip(totals).zip(matrices) {
            errors.fill(0.0);
            add_squared_errors(masses, uncertainties, squared_error_factor(total), errors);
            let error = self.calibration(row).error_factor * errors.iter().sum::<f32>().sqrt();
            reports[self.head_and_token(row).0].estimated_missed_mass.add(error);
        }
        let regions = &self.budgeted.index.head(self.task.kv_head).regions;
        for (place, &region) in self.regions.iter().enumerate() {
            let masses = &masses[place * REGION_CLUSTERS..];
            tile.add_clusters(rows.start, rows.len(), masses, self.clusters, regions[region].summaries().values);
        }
    }

    /// Counts keys and rows.
    fn count(&self, scratch: &TileScratch, reports: &mut [HeadReport]) {
        let micro_tiles = self.rows.div_ceil(MICRO_ROWS);
        let far = (self.clusters * CLUSTER_KEYS) as u64;
        let near = |token: usize| self.budgeted.call.seen(token).len() as u64 - far;
        for micro_tile in 0..micro_tiles {
            let is_exact = scratch.exact[micro_tile];
            let patterns = scratch.chosen.iter().skip(micro_tile).step_by(micro_tiles);
            let chosen = patterns.map(|pattern| pattern.count_ones() as usize).sum::<usize>();
            for row in self.rows_of(micro_tile) {
                let (head, token) = self.head_and_token(row);
                let report = &mut reports[head];
                let kept = near(token) + if is_exact { far } else { (chosen * CLUSTER_KEYS) as u64 };
                report.kept_keys += kept;
                report.evaluated_keys += kept + if is_exact { 0 } else { self.clusters as u64 };
                report.fallback_rows += u64::from(is_exact);
            }
        }
    }

    /// Computes one row of each head exactly and tells how far off it was.
    fn audit(&self, tile: &AttentionTile, scratch: &mut TileScratch, reports: &mut [HeadReport]) {
        let call = &self.budgeted.call;
        let shape = call.cache.shape();
        let (group, token) = (call.group(), self.task.tokens.start + self.task.tokens.len() / 2);
        let seen = call.seen(token);
        let TileScratch { audit, output, audited_output, exact, .. } = scratch;
        let tile_shape =
            TileShape { rows: group, key_dim: shape.padded_key_dim(), value_dim: shape.padded_value_dim() };
        audit.begin(InstructionSet::current(), tile_shape, call.cache.kind().empty_block());
        for head in 0..group {
            let query = call.query(self.task.kv_head * group + head, token);
            audit.set_row(head, query, call.attention.scale, (seen.start, seen.end));
        }
        let first = tiles::block_start(call.cache, seen.start);
        tiles::accumulate(audit, call.cache, self.task.kv_head, first..seen.end, |_| true);
        output.resize(shape.value_dim, 0.0);
        audited_output.resize(shape.value_dim, 0.0);
        for (head, report) in reports.iter_mut().enumerate() {
            let row = head * self.task.tokens.len() + token - self.task.tokens.start;
            if exact[row / MICRO_ROWS] {
                continue;
            }
            tile.finish_row(row, output);
            audit.finish_row(head, audited_output);
            let square: f32 =
                output.iter().zip(audited_output.iter()).map(|(used, exact)| (used - exact) * (used - exact)).sum();
            report.audited_missed_mass.add(square.sqrt() / self.value_scale);
        }
    }
}

/// Neighbouring clusters of a segment that some micro-tiles compute, and neither the one before nor the one behind: a
/// block of several clusters costs less than as many blocks.
struct Run {
    segment: usize,
    clusters: Range<usize>,
}

impl Run {
    /// Whether a micro-tile that computes the clusters of `pattern` computes this run as one.
    fn is_in(&self, pattern: u8) -> bool {
        // A clear bit on either side ends a run at the border of a segment too.
        let pattern = u16::from(pattern) << 1;
        let run = ((1_u16 << self.clusters.len()) - 1) << (self.clusters.start + 1);
        let border = 1 << self.clusters.start | 1 << (self.clusters.end + 1);
        pattern & (run | border) == run
    }
}

/// The runs that `chosen` `[segments][micro-tiles]` holds, in order.
fn runs(chosen: &[u8], micro_tiles: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    for (segment, patterns) in chosen.chunks_exact(micro_tiles).enumerate() {
        if patterns.iter().all(|&pattern| pattern == 0) {
            continue;
        }
        for start in 0..SEGMENT_CLUSTERS {
            for end in start + 1..=SEGMENT_CLUSTERS {
                let run = Run { segment, clusters: start..end };
                if patterns.iter().any(|&pattern| run.is_in(pattern)) {
                    runs.push(run);
                }
            }
        }
    }
    runs
}

/// Positions of the keys of region `region`.
fn region_keys(region: usize) -> Range<usize> {
    let first = FIRST_KEYS + region * REGION_KEYS;
    first..first + REGION_KEYS
}

/// Factor on (mass² · uncertainty) that makes it the squared error of a cluster: with independent keys, the weighted
/// mean of its values is off by the standard deviation of its weights over the square root of their number.
pub(super) fn squared_error_factor(total: f32) -> f32 {
    2.0 / (CLUSTER_KEYS as f32 * total * total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_every_chosen_cluster_once() {
        for pattern in 0..16_u8 {
            let chosen = [pattern, 0, 0b0110];
            let runs = runs(&chosen, 3);
            for (micro_tile, &pattern) in chosen.iter().enumerate() {
                let mut covered = 0_u8;
                for run in runs.iter().filter(|run| run.is_in(chosen[micro_tile])) {
                    for cluster in run.clusters.clone() {
                        assert_eq!(covered >> cluster & 1, 0, "{pattern:04b}: cluster {cluster} twice");
                        covered |= 1 << cluster;
                    }
                }
                assert_eq!(covered, pattern, "{pattern:04b}");
            }
        }
        let whole = runs(&[0b1111, 0b1011], 1);
        let clusters: Vec<_> = whole.iter().map(|run| (run.segment, run.clusters.clone())).collect();
        assert_eq!(clusters, [(0, 0..4), (1, 0..2), (1, 3..4)]);
    }
}
