//! Method `dci`: the keys with the largest logits, found by multi-level Prioritized DCI, and a softmax over those.
//!
//! This is IceFormer as published ([Mao, Ester and Li 2024](https://arxiv.org/abs/2405.02842)): keys and queries are
//! lifted so that a nearest-neighbour search finds the largest products ([`lift`]), keys form a tree of random pivots
//! ([`index`]), each node of which is a Prioritized DCI ([`projections`]), and a query goes down it with a beam
//! ([`search`]). Beyond the paper, the tree outlives the prompt: decode steps append to it.

mod beam;
mod index;
mod level;
mod lift;
mod node;
mod parent;
mod projections;
mod random;
mod rank;
mod scoring;
mod search;
mod settings;

use std::ops::Range;
use std::sync::{Mutex, PoisonError, RwLockWriteGuard};

use iceformer_kernels::InstructionSet;
use iceformer_kernels::panels::Panels;
use iceformer_kernels::rows::ROW_MULTIPLE;
use iceformer_kernels::softmax::softmax_in_place;

pub(crate) use index::DciIndex;
pub use settings::{DciSettings, DciSettingsError};

use self::node::PanelBuffer;
use self::parent::ParentScratch;
use self::rank::unpack;
use self::search::{Descent, MOST_SCORES, SearchScratch};
use crate::output::Output;
use crate::report::{HeadReport, Report};
use crate::strided::FromF32;
use crate::tiles::Call;
use crate::{KeyValueCache, KeyValueType, ThreadTeam};

/// Queries of one task, at least: consecutive tokens of one head.
const TILE_TOKENS: usize = 64;
/// And at most: keys come from memory once for all of them, but their scores have to stay in the caches.
const MOST_TILE_TOKENS: usize = 256;
/// Values that are asked for ahead of their use.
const FETCHED_VALUES: usize = 64;
/// Tasks that each thread should have before they grow.
const TASKS_PER_THREAD: usize = 8;

/// Buffers reused from call to call.
#[derive(Default)]
pub(crate) struct DciScratch {
    /// One per thread.
    parents: Vec<Mutex<ParentScratch>>,
    /// One per thread.
    searches: Vec<Mutex<SearchScratch>>,
    /// One per thread.
    rows: Vec<Mutex<RowScratch>>,
    /// One per task.
    parts: Vec<Part>,
}

/// Buffers of one task.
#[derive(Default)]
struct RowScratch {
    /// `[tokens][row width]`: the queries times the scale, filled up with zeros.
    queries: Vec<f32>,
    /// The query, where it has to be widened.
    widened: Vec<f32>,
    value: Vec<f32>,
    logits: Vec<f32>,
    near: NearKeys,
    /// Queries that are compared with all of `near` they see, and those compared with all of the first keys.
    with_near: Vec<u32>,
    with_first: Vec<u32>,
}

/// What a task leaves.
#[derive(Default)]
struct Part {
    /// `[tokens][value_dim]`
    output: Vec<f32>,
    /// `[tokens]`
    log_sum_exp: Vec<f32>,
    report: HeadReport,
}

/// Keys of a range of positions, read from the cache, for queries that see too few for a search and those not among the
/// first.
struct NearKeys {
    range: Range<usize>,
    panels: PanelBuffer,
    /// A key, filled up with zeros.
    key: Vec<f32>,
}

impl Default for NearKeys {
    fn default() -> Self {
        Self { range: 0..0, panels: PanelBuffer::new(true), key: Vec::new() }
    }
}

/// One call with what it searches.
struct Search<'a> {
    call: Call<'a>,
    settings: &'a DciSettings,
    /// `None` where no query needs it.
    index: Option<&'a DciIndex>,
}

/// Name of the kernel that compares queries with the keys of a cache of this type.
pub(crate) fn kernel_name(kind: KeyValueType) -> &'static str {
    let panels = if index::full_precision(kind) { Panels::F32(&[]) } else { Panels::Bf16(&[]) };
    panels.kernel_name(InstructionSet::current())
}

/// Runs `call` over the keys found for each query. Shapes and settings were checked by the caller.
pub(crate) fn run<T: FromF32>(
    call: &Call<'_>,
    settings: &DciSettings,
    output: Output<'_, T>,
    team: &ThreadTeam,
    scratch: &mut DciScratch,
) -> Report {
    let (heads, tokens, cache) = (call.query_heads(), call.tokens(), call.cache);
    scratch.parents.resize_with(team.threads(), Mutex::default);
    scratch.searches.resize_with(team.threads(), Mutex::default);
    scratch.rows.resize_with(team.threads(), Mutex::default);

    let _turn = team.take_turn();
    let needs_index = |seen: Range<usize>| seen.len() > settings.whole_range || seen.end <= settings.whole_range;
    let needs_index = cache.keys_are_final() && (0..tokens).any(|token| needs_index(call.seen(token)));
    let guard = needs_index.then(|| {
        let mut guard = cache.search_index().write().unwrap_or_else(PoisonError::into_inner);
        let index = match guard.take() {
            Some(index) if index.fits(settings) => guard.insert(index),
            _ => guard.insert(DciIndex::new(settings, cache)),
        };
        index.extend(cache, team, &scratch.parents);
        // Other calls may search the index from here on, but none may replace it.
        RwLockWriteGuard::downgrade(guard)
    });
    let index = guard.as_ref().and_then(|guard| guard.as_ref());
    let search = Search { call: *call, settings, index };

    let tile_tokens = heads * tokens / (TASKS_PER_THREAD * team.threads());
    // What they find has to be held, too.
    let most = MOST_SCORES / settings.kept_keys.min(cache.len()).max(1);
    let tile_tokens = tile_tokens.clamp(TILE_TOKENS, MOST_TILE_TOKENS).min(most.max(1));
    let tiles = tokens.div_ceil(tile_tokens);
    if scratch.parts.len() < heads * tiles {
        scratch.parts.resize_with(heads * tiles, Part::default);
    }
    let parts = &mut scratch.parts[..heads * tiles];
    // Heads that share a tree run one behind the other, so that it stays in the caches.
    team.run_chunks(parts, 1, |task, part, worker| {
        let (head, first) = (task / tiles, task % tiles * tile_tokens);
        let mut searching = scratch.searches[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows = scratch.rows[worker].lock().unwrap_or_else(PoisonError::into_inner);
        search.tile(head, first..tokens.min(first + tile_tokens), &mut part[0], &mut rows, &mut searching);
    });

    let mut report = Report::of_heads(heads, &HeadReport::default());
    for (task, part) in parts.iter().enumerate() {
        report.heads[task / tiles] += &part.report;
    }
    let value_dim = cache.shape().value_dim;
    for mut row in output.into_rows(1) {
        let part = &mut parts[row.kv_head * tiles + row.token / tile_tokens];
        let offset = row.token % tile_tokens;
        let log_sum_exp = part.log_sum_exp[offset];
        row.write(0, &mut part.output[offset * value_dim..(offset + 1) * value_dim], || log_sum_exp);
    }
    report
}

impl Search<'_> {
    /// Attends from the queries `tokens` of `head`.
    fn tile(
        &self,
        head: usize,
        tokens: Range<usize>,
        part: &mut Part,
        rows: &mut RowScratch,
        search: &mut SearchScratch,
    ) {
        let call = &self.call;
        let shape = call.cache.shape();
        let kv_head = head / call.group();
        let whole_range = self.settings.whole_range;
        let is_near =
            |seen: &Range<usize>| self.index.is_none() || (seen.len() <= whole_range && seen.end > whole_range);
        rows.near.read(call.cache, kv_head, tokens.clone().map(|token| call.seen(token)).filter(is_near));

        let width = shape.key_dim.next_multiple_of(ROW_MULTIPLE);
        let RowScratch { queries, widened, near, with_first, with_near, .. } = rows;
        queries.resize(tokens.len() * width, 0.0);
        search.begin(self.settings.kept_keys, tokens.clone().map(|token| call.seen(token)));
        with_first.clear();
        with_near.clear();
        for (offset, (row, token)) in queries.chunks_exact_mut(width).zip(tokens.clone()).enumerate() {
            let query = call.query(head, token, widened);
            row.iter_mut().zip(query).for_each(|(target, value)| *target = value * call.attention.scale);
            row[shape.key_dim..].fill(0.0);
            let visible = &search.descent(offset).visible;
            if visible.is_empty() {
                // An empty range may lie behind the last key.
            } else if is_near(visible) {
                with_near.push(offset as u32);
            } else if visible.end <= whole_range {
                with_first.push(offset as u32);
            } else {
                search.queue(offset);
            }
        }
        search.compare_with_all(with_near, queries, width, near.panels.panels(), near.range.start);
        if let Some(index) = self.index {
            search.compare_with_all(with_first, queries, width, index.first_keys(kv_head), 0);
            index.search(kv_head, self.settings).find(queries, search);
        }

        part.report = HeadReport { rows: tokens.len() as u64, ..HeadReport::default() };
        part.output.clear();
        part.output.resize(tokens.len() * shape.value_dim, 0.0);
        part.log_sum_exp.clear();
        for (offset, output) in part.output.chunks_exact_mut(shape.value_dim).enumerate() {
            if offset + 1 < tokens.len() {
                for &packed in search.descent(offset + 1).found().iter().take(FETCHED_VALUES) {
                    call.cache.fetch_value(kv_head, unpack(packed).1 as usize);
                }
            }
            let descent = search.descent(offset);
            part.report.allowed_keys += descent.visible.len() as u64;
            part.report.evaluated_keys += descent.evaluated;
            let (kept, log_sum_exp) = self.weigh(kv_head, offset * width..(offset + 1) * width, rows, descent, output);
            part.log_sum_exp.push(log_sum_exp);
            part.report.kept_keys += kept as u64;
        }
    }

    /// Softmax over the keys that the descent of `query` (a range of the queries) found, and the weighted sum of their
    /// values. Returns their number and the log-sum-exp.
    fn weigh(
        &self,
        kv_head: usize,
        query: Range<usize>,
        rows: &mut RowScratch,
        descent: &Descent,
        output: &mut [f32],
    ) -> (usize, f32) {
        let found = descent.found();
        rows.logits.clear();
        rows.logits.extend(found.iter().map(|&packed| unpack(packed).0));
        let log_sum_exp = softmax_in_place(&mut rows.logits);
        for (&packed, &weight) in found.iter().zip(&rows.logits) {
            self.call.cache.add_value(kv_head, unpack(packed).1 as usize, weight, output, &mut rows.value);
        }
        let mean = self.call.cache.key_mean(kv_head);
        let centre: f32 = rows.queries[query].iter().zip(mean).map(|(query, mean)| query * mean).sum();
        (found.len(), log_sum_exp + centre)
    }
}

impl NearKeys {
    /// Reads the keys of all `ranges` and those between.
    fn read(&mut self, cache: &KeyValueCache, kv_head: usize, ranges: impl Iterator<Item = Range<usize>>) {
        let ranges = ranges.filter(|range| !range.is_empty());
        self.range = ranges.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0);
        let key_dim = cache.shape().key_dim;
        self.key.clear();
        self.key.resize(key_dim.next_multiple_of(ROW_MULTIPLE), 0.0);
        for (row, position) in self.range.clone().enumerate() {
            cache.read_centred_key(kv_head, position, &mut self.key[..key_dim]);
            self.panels.push(row, &self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attention, AttentionScratch, CacheShape, Mask, Method, Queries};

    #[test]
    fn one_head_of_one_sequence_is_work_for_many_threads() {
        let rows = |kept_keys: usize, tokens: usize, threads: usize| -> Vec<usize> {
            let team = ThreadTeam::new(threads);
            let mut cache = KeyValueCache::new(CacheShape { kv_heads: 1, key_dim: 2, value_dim: 1 }, KeyValueType::F32);
            cache.append(&vec![1.0; 2 * tokens], &vec![1.0; tokens], &team);
            let settings = DciSettings { kept_keys, whole_range: tokens, ..DciSettings::default() };
            let attention = Attention { method: Method::Dci(settings), mask: Mask::causal(), scale: 1.0 };
            let queries = Queries { data: &vec![1.0; 2 * tokens], query_heads: 1, first_position: 0 };
            let (mut output, mut scratch) = (vec![0.0; tokens], AttentionScratch::default());
            attention.run(queries, &cache, &mut output, None, &team, &mut scratch);
            let rows: Vec<usize> = scratch.dci.parts.iter().map(|part| part.log_sum_exp.len()).collect();
            assert_eq!(rows.iter().sum::<usize>(), tokens);
            rows
        };
        assert!(rows(20, 1_000, 1).len() >= TASKS_PER_THREAD);
        assert!(rows(20, 1_600, 3).len() >= 3 * TASKS_PER_THREAD);
        let long = rows(20, 6_000, 1);
        assert!(long.len() >= TASKS_PER_THREAD && long.iter().all(|&rows| rows <= MOST_TILE_TOKENS), "{long:?}");
        // What a task finds is bounded as well.
        assert!(rows(u32::MAX as usize, 6_000, 1).iter().all(|&rows| rows * 6_000 <= MOST_SCORES));
    }
}
