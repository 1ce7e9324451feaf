//! One tile of queries: near keys exactly, clusters by estimate or exactly, as the budget says.

use std::ops::{Range, RangeInclusive};

use iceformer_kernels::attention::{AttentionTile, KeyBlock, MICRO_ROWS};

use super::calibration::Calibration;
use super::chosen::Chosen;
use super::estimate::Estimate;
use super::index::{ClusterIndex, HeadClusters};
use super::places::anywhere_in;
use super::region::{CLUSTER_KEYS, Region, begins_block};
use super::settings::BudgetSettings;
use crate::HeadReport;
use crate::tiles::{self, Call, HeadKeys, Task};

/// Keys before the queries of a causal tile that are always exact. Without a causal mask every key is in a cluster that
/// every query sees, and those near a query are as good a guess as any.
pub(super) const NEAR_KEYS: usize = 64;
/// Above this share of clusters to compute, exact attention over the keys in their own order is faster.
pub(super) const FALLBACK_SHARE: f32 = 0.5;
/// Micro-tiles in a row that may fall back before the rest of the tile does untried.
const MOST_FAILURES: usize = 2;
/// One tile of so many is audited, …
const AUDITED_TILES: usize = 16;
/// … the last of each call of so many tokens, …
pub(super) const AUDITED_CALL: usize = 128;
/// … and one decoded token of so many: a prime number, lest they be those that are measured, which are exact.
const AUDITED_TOKENS: usize = 251;
/// Clusters that all micro-tiles compute before the next: their keys and values stay in the second-level cache meanwhile.
const PASS_CLUSTERS: u32 = 4096 / CLUSTER_KEYS as u32;

/// A call with its clusters.
pub(super) struct Budgeted<'a> {
    pub call: Call<'a>,
    pub settings: BudgetSettings,
    pub index: &'a ClusterIndex,
    /// Whether the last tile is audited.
    pub audits_last: bool,
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct TileScratch {
    estimate: Estimate,
    /// `[key_dim]`
    query: Vec<f32>,
    chosen: Chosen,
    /// `[value_dim]`
    output: Vec<f32>,
    /// `[value_dim]`
    audited_output: Vec<f32>,
    audit: AttentionTile,
}

/// The rows of a task and the regions that they see whole and from afar.
pub(super) struct Work<'a> {
    pub budgeted: &'a Budgeted<'a>,
    pub task: &'a Task,
    /// Numbers of the regions.
    pub regions: &'a [usize],
}

impl<'a> Budgeted<'a> {
    /// Regions of which every key is seen by every query of `task`, and none is near one before it.
    pub fn far_regions(&self, task: &Task) -> Vec<usize> {
        let Call { attention, first_position, .. } = self.call;
        let seen = task.tokens.clone().map(|token| self.call.seen(token));
        let Some((start, end)) = seen.map(|seen| (seen.start, seen.end)).reduce(|a, b| (a.0.max(b.0), a.1.min(b.1)))
        else {
            return Vec::new();
        };
        let first_near = (first_position + task.tokens.start + 1).saturating_sub(NEAR_KEYS);
        let is_far = |keys: Range<usize>| {
            keys.start >= start && keys.end <= end && (keys.end <= first_near || !attention.mask.causal)
        };
        let regions = self.index.head(task.kv_head).regions.iter().enumerate();
        regions.filter(|(_, region)| is_far(region.keys())).map(|(number, _)| number).collect()
    }

    /// Whether clusters pay for some micro-tile of `task`: for all heads that have rows in it, which share the clusters
    /// that are computed.
    pub fn pays(&self, task: &Task) -> bool {
        let (head, mut heads) = (self.index.head(task.kv_head), 0..self.call.group());
        match self.is_decoding(task) {
            true => heads.all(|query_head| head.calibration(query_head).pays()),
            false => heads.any(|query_head| head.calibration(query_head).pays()),
        }
    }

    /// Adds the keys of `seen` that are in none of `regions`.
    pub fn accumulate_near(&self, tile: &mut AttentionTile, task: &Task, regions: &[usize], seen: Range<usize>) {
        let near = HeadKeys::of(&self.call, task);
        let mut first = tiles::block_start(self.call.cache, seen.start);
        for &region in regions {
            let keys = self.index.head(task.kv_head).regions[region].keys();
            near.accumulate(tile, first..keys.start, |_| true);
            first = keys.end;
        }
        near.accumulate(tile, first..seen.end, |_| true);
    }

    /// Whether a task has too few rows for a probe to cost little.
    fn is_decoding(&self, task: &Task) -> bool {
        task.tokens.len() < MICRO_ROWS
    }

    /// Attends from the queries of `task` to all keys that they see; the result stays in `tile`.
    pub fn run(&self, task: &Task, tile: &mut AttentionTile, scratch: &mut TileScratch, reports: &mut Vec<HeadReport>) {
        let regions = self.far_regions(task);
        let work = Work { budgeted: self, task, regions: &regions };
        if regions.is_empty() || !self.pays(task) {
            tiles::attend_to_all(tile, &self.call, task);
            work.report_exact(!regions.is_empty(), reports);
            return;
        }
        let mut chosen = std::mem::take(&mut scratch.chosen);
        work.choose(tile, scratch, &mut chosen, reports);
        work.compute_chosen(&chosen, tile);
        if self.audits(task) {
            work.audit(&chosen, scratch, reports, |row, output| tile.finish_row(row, output));
        }
        scratch.chosen = chosen;
    }

    /// Whether a row of each head of `task` is also computed exactly.
    pub fn audits(&self, task: &Task) -> bool {
        let position = self.call.first_position + task.tokens.start;
        let is_last = task.tokens.end == self.call.tokens();
        let is_next = match self.is_decoding(task) {
            true => position % AUDITED_TOKENS == AUDITED_TOKENS / 2,
            false => {
                let tile = position / task.tokens.len() + task.kv_head;
                tile % AUDITED_TILES == anywhere_in(tile / AUDITED_TILES, AUDITED_TILES)
            }
        };
        is_next || is_last && self.audits_last
    }
}

impl Work<'_> {
    /// Starts `reports`, one for each query head, with the keys that the rows may see.
    fn begin_reports(&self, reports: &mut Vec<HeadReport>) {
        let (call, tokens) = (&self.budgeted.call, &self.task.tokens);
        let allowed_keys = tokens.clone().map(|token| call.seen(token).len() as u64).sum();
        reports.clear();
        reports.resize(call.group(), HeadReport { rows: tokens.len() as u64, allowed_keys, ..HeadReport::default() });
    }

    /// Reports, one for each query head, that every key was computed, and whether that is as clusters do not pay.
    pub fn report_exact(&self, fell_back: bool, reports: &mut Vec<HeadReport>) {
        self.begin_reports(reports);
        for report in reports {
            (report.evaluated_keys, report.kept_keys) = (report.allowed_keys, report.allowed_keys);
            report.fallback_rows = if fell_back { report.rows } else { 0 };
        }
    }

    /// Starts `tile` with the near keys and what is left to the estimate. What else is to be computed of the far regions is
    /// in `chosen` then.
    pub fn choose(
        &self,
        tile: &mut AttentionTile,
        scratch: &mut TileScratch,
        chosen: &mut Chosen,
        reports: &mut Vec<HeadReport>,
    ) {
        let seen = tiles::begin(tile, &self.budgeted.call, self.task);
        self.budgeted.accumulate_near(tile, self.task, self.regions, seen);
        self.begin_reports(reports);
        let micro_tiles = self.micro_tiles();
        chosen.begin(micro_tiles);
        let limits: Vec<f32> =
            (0..self.budgeted.call.group()).map(|head| self.calibration(head).safe_limit()).collect();
        // Where the first micro-tiles of a head needed everything, the next will too, and estimates cost.
        let (mut failures, mut failing) = (0, 0);
        for micro_tile in 0..micro_tiles {
            let heads = self.heads_of(micro_tile);
            if *heads.start() != failing {
                (failures, failing) = (0, *heads.start());
            }
            let pays = heads.clone().all(|head| self.calibration(head).pays());
            let is_unlike = pays && self.is_unlike_measured(micro_tile, &mut scratch.query);
            let estimated = match pays && !is_unlike && failures < MOST_FAILURES {
                true => scratch.estimate.add(self, micro_tile, &limits, self.most_computed(), tile),
                false => None,
            };
            let Some(errors) = estimated else {
                chosen.compute_all(micro_tile);
                // What is unlike tells nothing of the next.
                failures += usize::from(!is_unlike);
                continue;
            };
            failures = 0;
            chosen.select(micro_tile, scratch.estimate.selected());
            for (row, error) in self.rows_of(micro_tile).zip(errors) {
                let (head, _) = self.task.head_and_token(row);
                reports[head].estimated_missed_mass.add(self.calibration(head).error_factor * error);
            }
        }
        self.count(chosen, reports);
    }

    /// Adds what [`choose`](Self::choose) has left to be computed.
    pub fn compute_chosen(&self, chosen: &Chosen, tile: &mut AttentionTile) {
        self.compute_selections(0..self.clusters() as u32, chosen, tile);
        if chosen.any_is_exact() {
            self.accumulate_exactly(tile, |micro_tile| chosen.is_exact(micro_tile));
        }
    }

    /// Adds those of the selected clusters of all micro-tiles that are among `clusters`, key by key.
    pub fn compute_selections(&self, clusters: Range<u32>, chosen: &Chosen, tile: &mut AttentionTile) {
        // A single micro-tile has nobody to share them with.
        let is_alone = chosen.selections().filter(|selected| !selected.is_empty()).count() <= 1;
        let pass = if is_alone { clusters.len() as u32 } else { PASS_CLUSTERS };
        let mut first = clusters.start;
        while first < clusters.end {
            let last = clusters.end.min(first + pass);
            for (micro_tile, selected) in chosen.selections().enumerate() {
                let start = selected.partition_point(|cluster| *cluster < first);
                let end = selected.partition_point(|cluster| *cluster < last);
                self.compute(micro_tile, &selected[start..end], tile);
            }
            first = last;
        }
    }

    /// Adds all keys of the far regions to the micro-tiles that `wanted` names.
    pub fn accumulate_exactly(&self, tile: &mut AttentionTile, wanted: impl Fn(usize) -> bool) {
        HeadKeys::of(&self.budgeted.call, self.task).accumulate(tile, self.far_keys(), wanted);
    }

    /// The keys of the far regions, which follow one another.
    pub fn far_keys(&self) -> Range<usize> {
        let keys_of = |region: Option<&usize>| region.map_or(0..0, |region| self.head().regions[*region].keys());
        keys_of(self.regions.first()).start..keys_of(self.regions.last()).end
    }

    fn head(&self) -> &HeadClusters {
        self.budgeted.index.head(self.task.kv_head)
    }

    /// The regions that the rows see from afar.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().map(|region| &self.head().regions[*region])
    }

    /// How values go with keys within the clusters of the head: see [`CrossCovariance::values`](super::cross_covariance::CrossCovariance::values).
    pub fn cross_covariance(&self) -> &[u16] {
        self.head().cross_covariance.values()
    }

    pub fn clusters(&self) -> usize {
        self.regions().map(Region::clusters).sum()
    }

    /// Clusters of a micro-tile above which it falls back.
    pub fn most_computed(&self) -> usize {
        (FALLBACK_SHARE * self.clusters() as f32) as usize
    }

    pub fn rows(&self) -> usize {
        self.budgeted.call.group() * self.task.tokens.len()
    }

    pub fn micro_tiles(&self) -> usize {
        self.rows().div_ceil(MICRO_ROWS)
    }

    pub fn rows_of(&self, micro_tile: usize) -> Range<usize> {
        micro_tile * MICRO_ROWS..self.rows().min((micro_tile + 1) * MICRO_ROWS)
    }

    /// Query heads of the group that have rows in a micro-tile.
    pub fn heads_of(&self, micro_tile: usize) -> RangeInclusive<usize> {
        let rows = self.rows_of(micro_tile);
        self.task.head_and_token(rows.start).0..=self.task.head_and_token(rows.end - 1).0
    }

    /// What was measured of query head `head` of the group.
    fn calibration(&self, head: usize) -> &Calibration {
        self.head().calibration(head)
    }

    /// The spread of row `row`: see [`Region::logit_spread`].
    pub fn spread_of(&self, row: usize, buffer: &mut Vec<f32>) -> f32 {
        let query = self.query(row, buffer);
        let scale = self.budgeted.call.attention.scale;
        self.regions().last().map_or(0.0, |region| region.logit_spread(query, scale))
    }

    /// The query of row `row`, in `buffer` unless it can be read where it lies.
    pub fn query<'b>(&'b self, row: usize, buffer: &'b mut Vec<f32>) -> &'b [f32] {
        let call = &self.budgeted.call;
        let (head, token) = self.task.head_and_token(row);
        call.query(self.task.kv_head * call.group() + head, token, buffer)
    }

    /// Whether some row of a micro-tile is unlike those that were measured of its head.
    fn is_unlike_measured(&self, micro_tile: usize, buffer: &mut Vec<f32>) -> bool {
        self.rows_of(micro_tile).any(|row| {
            let (head, _) = self.task.head_and_token(row);
            self.calibration(head).is_unlike(self.spread_of(row, buffer))
        })
    }

    /// Adds the `selected` clusters key by key.
    pub fn compute(&self, micro_tile: usize, selected: &[u32], tile: &mut AttentionTile) {
        // Every row sees all keys of a block, wherever they were: as it does those of a region.
        let position = self.head().regions[self.regions[0]].keys().start;
        let mut blocks = self.blocks(selected);
        let mut next = blocks.next();
        while let Some(block) = next {
            next = blocks.next();
            tile.accumulate_in(position, block, next, micro_tile..micro_tile + 1, |_| true);
        }
    }

    /// The keys and values of the `selected` clusters, those that lie together as one block.
    fn blocks(&self, selected: &[u32]) -> impl Iterator<Item = KeyBlock<'_>> {
        let (cache, kv_head) = (self.budgeted.call.cache, self.task.kv_head);
        let mut regions = self.regions();
        let (mut region, mut first) = (regions.next(), 0);
        selected.chunk_by(|before, after| before + 1 == *after && !begins_block(*after)).map(move |together| {
            while let Some(passed) = region
                && together[0] >= first + passed.clusters() as u32
            {
                first += passed.clusters() as u32;
                region = regions.next();
            }
            let start = (together[0] - first) as usize;
            region.expect("a cluster of some region").block(start..start + together.len(), cache, kv_head)
        })
    }

    /// Counts keys and rows.
    fn count(&self, chosen: &Chosen, reports: &mut [HeadReport]) {
        let clusters = self.clusters();
        let far = (clusters * CLUSTER_KEYS) as u64;
        let near = |token: usize| self.budgeted.call.seen(token).len() as u64 - far;
        for (micro_tile, selected) in chosen.selections().enumerate() {
            let is_exact = chosen.is_exact(micro_tile);
            let computed = (selected.len() * CLUSTER_KEYS) as u64;
            for row in self.rows_of(micro_tile) {
                let (head, token) = self.task.head_and_token(row);
                let report = &mut reports[head];
                let kept = near(token) + if is_exact { far } else { computed };
                report.kept_keys += kept;
                report.evaluated_keys += kept + if is_exact { 0 } else { clusters as u64 };
                report.fallback_rows += u64::from(is_exact);
            }
        }
    }

    /// Computes one row of each head exactly, of those that left something to an estimate, and tells how far off it was, as
    /// `output_of` gives the output of a row.
    pub fn audit(
        &self,
        chosen: &Chosen,
        scratch: &mut TileScratch,
        reports: &mut [HeadReport],
        output_of: impl Fn(usize, &mut [f32]),
    ) {
        let (call, tokens, kv_head) = (&self.budgeted.call, &self.task.tokens, self.task.kv_head);
        let (shape, group) = (call.cache.shape(), call.group());
        let value_scale = self.value_scale();
        let TileScratch { audit, output, audited_output, .. } = scratch;
        let first = anywhere_in(call.first_position + tokens.start, tokens.len());
        let is_estimated = |head: usize, token: usize| !chosen.is_exact(self.task.row(head, token) / MICRO_ROWS);
        let from_first = || (tokens.start + first..tokens.end).chain(tokens.start..tokens.start + first);
        let of_head = |head: usize| Some((head, from_first().find(|token| is_estimated(head, *token))?));
        let rows: Vec<(usize, usize)> = (0..group).filter_map(of_head).collect();
        if rows.is_empty() {
            return;
        }
        let seen = tiles::begin_rows(audit, call, rows.len(), 0..call.cache.len(), |row| {
            let (head, token) = rows[row];
            (kv_head * group + head, token)
        });
        let first = tiles::block_start(call.cache, seen.start);
        let keys = HeadKeys::of_tokens(call, kv_head, rows.iter().map(|&(_, token)| token..token + 1));
        keys.accumulate(audit, first..seen.end, |_| true);
        output.resize(shape.value_dim, 0.0);
        audited_output.resize(shape.value_dim, 0.0);
        for (row, &(head, token)) in rows.iter().enumerate() {
            output_of(self.task.row(head, token), output);
            audit.finish_row(row, audited_output);
            reports[head].audited_missed_mass.add(distance(output, audited_output) / value_scale);
        }
    }

    /// √2 · the spread of the values that the rows see from afar (padding may hold any): the length of an error that counts
    /// as a missed mass of 1.
    pub fn value_scale(&self) -> f32 {
        std::f32::consts::SQRT_2 * self.head().value_spread(self.regions)
    }
}

/// `‖a − b‖`
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt()
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Mutex;

    use iceformer_testing::random::Random;

    use super::*;
    use crate::budgeted::region::RegionScratch;
    use crate::strided::StridedView;
    use crate::{Attention, CacheShape, KeyValueCache, KeyValueType, Mask, Method, ThreadTeam};

    pub const KEYS: usize = 3_000;
    pub const WIDTH: usize = 16;

    /// Lets `look` at the last `tokens` tokens of `heads` query heads on one key/value head of [`KEYS`] keys of
    /// [`WIDTH`], in two regions, once `passed` of them need not lie in order.
    pub fn look_at_work(
        kind: KeyValueType,
        shape: (usize, usize),
        passed: usize,
        random: &mut Random,
        look: impl Fn(&Work<'_>),
    ) {
        let [keys, values] = [random.normals(KEYS * WIDTH, 1.0), random.normals(KEYS * WIDTH, 1.0)];
        look_at_work_on(kind, shape, passed, [&keys, &values], random, look);
    }

    /// The same of `[KEYS][WIDTH]` keys and values that are given.
    pub fn look_at_work_on(
        kind: KeyValueType,
        (heads, tokens): (usize, usize),
        passed: usize,
        [keys, values]: [&[f32]; 2],
        random: &mut Random,
        look: impl Fn(&Work<'_>),
    ) {
        let (team, scratch) = (ThreadTeam::new(1), [Mutex::new(RegionScratch::default())]);
        let attention = Attention { method: Method::Exact, mask: Mask::causal(), scale: 0.5 };
        let queries = random.normals(tokens * heads * WIDTH, 1.0);
        let queries = StridedView::token_major(&queries, tokens, heads, WIDTH);
        fn call<'a>(attention: &'a Attention, queries: StridedView<'a>, cache: &'a KeyValueCache) -> Call<'a> {
            Call { attention, queries, first_position: KEYS - queries.shape()[2], cache, soft_cap: None }
        }
        let mut cache = KeyValueCache::new(CacheShape { kv_heads: 1, key_dim: WIDTH, value_dim: WIDTH }, kind);
        cache.append(keys, values, &team);
        {
            let mut index = cache.clusters().write().unwrap();
            index.extend(&call(&attention, queries, &cache), KEYS, 0, 1, &team, &scratch);
            index.heads_mut().iter_mut().for_each(|head| head.note_tokens(tokens));
            index.note_call(passed, false);
        }
        cache.compact(&team);

        let (index, call) = (cache.clusters().read().unwrap(), call(&attention, queries, &cache));
        let budgeted = Budgeted { call, settings: BudgetSettings { budget: 0.1 }, index: &index, audits_last: false };
        let task = Task { kv_head: 0, tokens: 0..tokens, keys: 0..KEYS };
        let regions = budgeted.far_regions(&task);
        assert_eq!(regions, [0, 1]);
        look(&Work { budgeted: &budgeted, task: &task, regions: &regions });
    }

    #[test]
    fn all_clusters_one_by_one_are_all_keys_wherever_they_lie() {
        let mut random = Random::new(21);
        for kind in KeyValueType::ALL {
            // Copies of both regions, of the second, of none.
            for passed in [0, KEYS / 2, KEYS] {
                look_at_work(kind, (1, 1), passed, &mut random, |work| {
                    let output = |add: &dyn Fn(&mut AttentionTile)| {
                        let (mut tile, mut output) = (AttentionTile::default(), vec![0.0; WIDTH]);
                        tiles::begin(&mut tile, &work.budgeted.call, work.task);
                        add(&mut tile);
                        tile.finish_row(0, &mut output);
                        let log_sum_exp = tile.log_sum_exp(0);
                        output.push(log_sum_exp);
                        output
                    };
                    let clusters: Vec<u32> = (0..work.clusters() as u32).collect();
                    let computed = output(&|tile| work.compute(0, &clusters, tile));
                    let exact = output(&|tile| work.accumulate_exactly(tile, |_| true));
                    let allowed = if kind == KeyValueType::F32 { 1e-5 } else { 3e-3 };
                    assert!(distance(&computed, &exact) < allowed, "{}, {passed} passed", kind.name());
                    // Those of each region alone, too.
                    let parts =
                        [&clusters[..16], &clusters[16..]].map(|part| output(&|tile| work.compute(0, part, tile)));
                    let share = |part: &[f32]| (part[WIDTH] - exact[WIDTH]).exp();
                    for channel in 0..WIDTH {
                        let merged: f32 = parts.iter().map(|part| share(part) * part[channel]).sum();
                        assert!((merged - exact[channel]).abs() < allowed, "{}, {passed} passed", kind.name());
                    }
                });
            }
        }
    }
}
