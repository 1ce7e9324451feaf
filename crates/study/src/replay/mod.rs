//! Replays choices of keys on a layer: what a choice keeps of the softmax, how far its output is off, what it costs.
//!
//! A causal row keeps the first [`SINK_KEYS`] keys and the keys near it, from a boundary of segments that lies at least
//! [`NEAR_KEYS`] back; everything between is *far* and chosen from. Without a causal mask all keys are far. Rows are
//! looked at in tiles of [`TILE`] tokens spread over the sequence, a few rows in each. Everything is f32 loops over
//! slices, written to be read; nothing here is fast.

mod choice;
mod limits;
mod pages;
mod scores;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use choice::{Choice, Scorer, Tail, standard_choices};
pub use limits::{DROPPED_MASS, Limits};

use crate::error::{Row, RowError, Truth, quantile};
use crate::random::Random;
use crate::{Inputs, Shape};
use pages::{Pages, dot};

/// Keys at the start that are always kept.
pub const SINK_KEYS: usize = 16;
/// Keys before a tile that are always kept, at least.
pub const NEAR_KEYS: usize = 512;
/// Keys that are put in pages together.
pub const SEGMENT_KEYS: usize = 1024;
/// Keys of a page.
pub const PAGE_KEYS: usize = 16;
/// Keys of a large page.
pub const LARGE_PAGE_KEYS: usize = 64;
/// Keys of a block of the antidiagonal scorer.
pub const BLOCK_KEYS: usize = 128;
/// Tokens of a tile; choices share their keys among as many or fewer.
pub const TILE: usize = 128;
/// Tokens of a tile that are looked at, counted from its start.
const LOOKED_AT: [usize; 4] = [31, 63, 95, 127];

/// A layer and how its attention reads it.
pub struct Layer<'a> {
    /// There is a query for each key.
    pub inputs: &'a Inputs,
    /// Of `inputs`.
    pub shape: Shape,
    /// Factor on the logits.
    pub scale: f32,
    /// Whether a query sees no key behind its position.
    pub causal: bool,
}

/// What a choice did for one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Share of the softmax mass on the keys kept.
    pub retained: f64,
    /// Of the output.
    pub error: RowError,
    /// Share of the visible keys that were kept.
    pub touched: f64,
    /// Multiply-adds for each visible key, relative to exact attention, those of choosing included.
    pub operations: f64,
}

/// Figures of many outcomes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Rows.
    pub rows: usize,
    /// 1st, 5th and 50th percentile.
    pub retained: [f64; 3],
    /// 50th, 95th and 99th percentile.
    pub missed_mass: [f64; 3],
    /// Median.
    pub relative_error: f64,
    /// Mean.
    pub touched: f64,
    /// Mean.
    pub operations: f64,
}

impl Summary {
    /// `None` without outcomes.
    pub fn new(outcomes: &[Outcome]) -> Option<Self> {
        let of = |field: fn(&Outcome) -> f64| outcomes.iter().map(field).collect::<Vec<_>>();
        let mean = |field: fn(&Outcome) -> f64| of(field).iter().sum::<f64>() / outcomes.len() as f64;
        let (retained, missed) = (of(|outcome| outcome.retained), of(|outcome| outcome.error.missed_mass));
        Some(Self {
            rows: outcomes.len(),
            retained: [quantile(&retained, 0.01)?, quantile(&retained, 0.05)?, quantile(&retained, 0.5)?],
            missed_mass: [quantile(&missed, 0.5)?, quantile(&missed, 0.95)?, quantile(&missed, 0.99)?],
            relative_error: quantile(&of(|outcome| outcome.error.relative), 0.5)?,
            touched: mean(|outcome| outcome.touched),
            operations: mean(|outcome| outcome.operations),
        })
    }
}

/// What a replay of one layer gives.
#[derive(Clone, Debug, Default)]
pub struct Replay {
    /// For each choice, its outcomes.
    pub outcomes: Vec<Vec<Outcome>>,
    /// What no choice can do better, for each tile and key/value head.
    pub limits: Vec<Limits>,
}

/// Why a layer cannot be replayed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{tokens} tokens are too few to choose from; a replay of this mask takes at least {needed}: repeat the dump with --tokens"
)]
pub struct TooShort {
    tokens: usize,
    needed: usize,
}

/// One key/value head.
pub struct Head<'a> {
    layer: &'a Layer<'a>,
    kv_head: usize,
}

impl Head<'_> {
    /// Key `index`. `[key_dim]`
    pub fn key(&self, index: usize) -> &[f32] {
        let Shape { kv_heads, key_dim, .. } = self.layer.shape;
        &self.layer.inputs.keys[(index * kv_heads + self.kv_head) * key_dim..][..key_dim]
    }

    /// Value `index`. `[value_dim]`
    pub fn value(&self, index: usize) -> &[f32] {
        let Shape { kv_heads, value_dim, .. } = self.layer.shape;
        &self.layer.inputs.values[(index * kv_heads + self.kv_head) * value_dim..][..value_dim]
    }

    /// The query of a row, times the factor on the logits. `[key_dim]`
    fn query(&self, row: Row) -> Vec<f32> {
        let Shape { query_heads, key_dim, .. } = self.layer.shape;
        let query = &self.layer.inputs.queries[(row.token * query_heads + row.head) * key_dim..][..key_dim];
        query.iter().map(|value| value * self.layer.scale).collect()
    }

    /// Query heads that read this head.
    fn query_heads(&self) -> Range<usize> {
        let group = self.layer.shape.query_heads / self.layer.shape.kv_heads;
        self.kv_head * group..(self.kv_head + 1) * group
    }
}

/// A tile of one key/value head, with what all choices need of it.
struct Tile<'a> {
    head: &'a Head<'a>,
    /// First token.
    start: usize,
    /// Keys that are chosen from.
    far: Range<usize>,
    /// Neighbours, neighbours in blocks, and keys that lie close together in small and large pages.
    neighbours: &'a Pages,
    blocks: &'a Pages,
    clusters: &'a Pages,
    large_clusters: &'a Pages,
    rows: Vec<ExactRow>,
}

/// A row that is looked at.
struct ExactRow {
    row: Row,
    /// Softmax weights of the keys that it sees.
    weights: Vec<f32>,
    truth: Truth,
}

impl<'a> Layer<'a> {
    /// Keys that a row at `token` sees.
    pub fn visible(&self, token: usize) -> usize {
        if self.causal { token + 1 } else { self.shape.key_tokens }
    }

    /// Keys that the tile that starts at `token` chooses from.
    fn far(&self, token: usize) -> Range<usize> {
        if !self.causal {
            return 0..self.shape.key_tokens / BLOCK_KEYS * BLOCK_KEYS;
        }
        let room = token.saturating_sub(NEAR_KEYS + SINK_KEYS);
        SINK_KEYS..SINK_KEYS + room / SEGMENT_KEYS * SEGMENT_KEYS
    }

    /// First tokens of `count` tiles, one from each of as many equal pieces of the part of the sequence that has far
    /// keys, the last at its end.
    ///
    /// # Errors
    /// When no part has.
    pub fn tiles(&self, count: usize, seed: u64) -> Result<Vec<usize>, TooShort> {
        let tokens = self.shape.key_tokens;
        let first = if self.causal { SINK_KEYS + NEAR_KEYS + 2 * SEGMENT_KEYS } else { 0 };
        let needed = first + TILE;
        if tokens < needed {
            return Err(TooShort { tokens, needed });
        }
        let last = tokens - TILE;
        let mut random = Random::new(seed);
        let pieces = count.min(last - first + 1);
        let mut starts: Vec<usize> = (0..pieces)
            .map(|piece| {
                let (start, end) = (piece * (last - first + 1) / pieces, (piece + 1) * (last - first + 1) / pieces);
                first + start + random.below(end - start)
            })
            .collect();
        if let Some(start) = starts.last_mut() {
            *start = last;
        }
        Ok(starts)
    }

    /// Rows that are looked at in the tiles that start at `starts`.
    pub fn rows(&self, starts: &[usize]) -> Vec<Row> {
        let heads = self.shape.query_heads;
        let tokens = starts.iter().flat_map(|start| LOOKED_AT.map(|offset| start + offset));
        tokens.flat_map(|token| (0..heads).map(move |head| Row { token, head })).collect()
    }

    /// Replays `choices` on the tiles that start at `starts`, by `threads` threads; `progress(done, total)` is told after
    /// each tile of a key/value head. The result does not depend on the number of threads.
    pub fn replay(
        &self,
        choices: &[Choice],
        starts: &[usize],
        threads: usize,
        progress: impl Fn(usize, usize) + Sync,
    ) -> Replay {
        let kv_heads = self.shape.kv_heads;
        let end = starts.iter().map(|&start| self.far(start).end).max().unwrap_or(0);
        let first = if self.causal { SINK_KEYS } else { 0 };
        let heads: Vec<Head<'_>> = (0..kv_heads).map(|kv_head| Head { layer: self, kv_head }).collect();
        let in_pages = |head: &Head<'_>| {
            let close = Some(SEGMENT_KEYS);
            [(PAGE_KEYS, None), (BLOCK_KEYS, None), (PAGE_KEYS, close), (LARGE_PAGE_KEYS, close)]
                .map(|(size, segment)| Pages::new(head, first..end, size, segment))
        };
        let pages = in_parallel(kv_heads, threads, |head| in_pages(&heads[head]), |_| {});
        let tasks = starts.len() * kv_heads;
        let replay_tile = |task: usize| {
            let (start, kv_head) = (starts[task / kv_heads], task % kv_heads);
            let tile = Tile::new(&heads[kv_head], start, &pages[kv_head]);
            let outcomes: Vec<Vec<Outcome>> = choices.iter().map(|choice| tile.outcomes(choice)).collect();
            (outcomes, tile.limits())
        };
        let mut replay = Replay { outcomes: vec![Vec::new(); choices.len()], limits: Vec::new() };
        for (outcomes, limits) in in_parallel(tasks, threads, replay_tile, |done| progress(done, tasks)) {
            replay.outcomes.iter_mut().zip(outcomes).for_each(|(all, tile)| all.extend(tile));
            replay.limits.push(limits);
        }
        replay
    }
}

/// Results of `work` on `0..tasks`, in order; `done` is told how many are.
fn in_parallel<T: Send>(
    tasks: usize,
    threads: usize,
    work: impl Fn(usize) -> T + Sync,
    done: impl Fn(usize) + Sync,
) -> Vec<T> {
    let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let run = || {
        let mut results = Vec::new();
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return results;
            }
            results.push((task, work(task)));
            done(finished.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    let mut results: Vec<(usize, T)> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(run)).collect();
        handles.into_iter().flat_map(|handle| handle.join().expect("a replay does not panic")).collect()
    });
    results.sort_by_key(|&(task, _)| task);
    results.into_iter().map(|(_, result)| result).collect()
}

impl<'a> Tile<'a> {
    fn new(head: &'a Head<'a>, start: usize, pages: &'a [Pages; 4]) -> Self {
        let layer = head.layer;
        let mut rows = Vec::new();
        for token in LOOKED_AT.map(|offset| start + offset) {
            for query_head in head.query_heads() {
                let row = Row { token, head: query_head };
                let visible = layer.visible(token);
                let weights = softmax(&logits(head, &head.query(row), visible));
                let truth = Truth::new(layer.inputs, layer.shape, row, 0..visible, f64::from(layer.scale));
                rows.push(ExactRow { row, weights, truth });
            }
        }
        let [neighbours, blocks, clusters, large_clusters] = pages;
        Self { head, start, far: layer.far(start), neighbours, blocks, clusters, large_clusters, rows }
    }

    /// Number of `pages` that this tile chooses from.
    fn far_pages(&self, pages: &Pages) -> usize {
        pages.before(if self.head.layer.causal { SINK_KEYS } else { 0 }, self.far.end)
    }

    /// Outcome of `choice` for each row that is looked at.
    fn outcomes(&self, choice: &Choice) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        // Rows of one piece of the tile, and of one head or the whole group, share their keys.
        let mut last = None;
        for exact in &self.rows {
            let first = self.start + (exact.row.token - self.start) / choice.tile * choice.tile;
            let heads = if choice.shares_group { self.head.query_heads() } else { exact.row.head..exact.row.head + 1 };
            let key = (first, heads.clone());
            if last.as_ref().is_none_or(|(known, _)| *known != key) {
                last = Some((key, self.choose(choice, first, heads)));
            }
            let kept = &last.as_ref().expect("chosen above").1;
            outcomes.push(self.outcome(choice, kept, exact));
        }
        outcomes
    }

    fn outcome(&self, choice: &Choice, kept: &scores::Kept, exact: &ExactRow) -> Outcome {
        let Shape { key_dim, value_dim, .. } = self.head.layer.shape;
        let visible = exact.weights.len();
        let chosen: f64 = kept.keys.iter().map(|&key| f64::from(exact.weights[key])).sum();
        let always = self.always_kept(visible);
        let near: f64 = always.clone().map(|key| f64::from(exact.weights[key])).sum();
        let mut output = self.output(choice, kept, exact.row);
        if let Some(stride) = choice.delta {
            // The error of a row that is also computed exactly stands for that of the rows behind it.
            let token = self.start + (exact.row.token - self.start) / stride * stride;
            let row = Row { token, ..exact.row };
            let sparse = self.output(choice, kept, row);
            let layer = self.head.layer;
            let seen = 0..layer.visible(token);
            let truth = Truth::new(layer.inputs, layer.shape, row, seen, f64::from(layer.scale));
            for ((output, sparse), truth) in output.iter_mut().zip(&sparse).zip(&truth.output) {
                *output += *truth as f32 - sparse;
            }
        }
        let touched = (kept.keys.len() + always.count()) as f64 / visible as f64;
        let far_share = self.far.len() as f64 / visible as f64;
        let (key_dim, value_dim) = (key_dim as f64, value_dim as f64);
        let mut operations = touched * (key_dim + value_dim);
        operations += far_share * choice.operations(key_dim);
        operations += kept.dropped.len() as f64 / visible as f64
            * match choice.tail {
                Tail::None => 0.0,
                _ => value_dim,
            };
        operations += choice.delta.map_or(0.0, |stride| (key_dim + value_dim) / stride as f64);
        Outcome {
            // A sum of nothing is −0.
            retained: chosen + near + 0.0,
            error: exact.truth.error(&output),
            touched,
            operations: operations / (key_dim + value_dim),
        }
    }

    /// Sinks and near keys.
    fn always_kept(&self, visible: usize) -> impl Iterator<Item = usize> + Clone {
        (0..self.far.start).chain(self.far.end..visible)
    }

    /// Output of a row over the keys kept, and the estimate of the pages dropped. `[value_dim]`
    fn output(&self, choice: &Choice, kept: &scores::Kept, row: Row) -> Vec<f32> {
        let query = self.head.query(row);
        let visible = self.head.layer.visible(row.token);
        let keys = kept.keys.iter().copied().chain(self.always_kept(visible));
        let exact = keys.map(|key| (dot(&query, self.head.key(key)), self.head.value(key)));
        let pages = choice.pages(self);
        let estimated = kept.dropped.iter().filter_map(|&page| {
            let page = &pages.pages[page];
            let mass = choice.tail.log_mass(page, pages.size, &query)?;
            Some((mass, page.value_mean.as_slice()))
        });
        let parts: Vec<(f32, &[f32])> = exact.chain(estimated).collect();
        let largest = parts.iter().map(|part| part.0).fold(f32::NEG_INFINITY, f32::max);
        let mut output = vec![0.0; self.head.layer.shape.value_dim];
        let mut total = 0.0;
        for (logit, value) in parts {
            let weight = (logit - largest).exp();
            total += weight;
            output.iter_mut().zip(value).for_each(|(output, value)| *output += weight * value);
        }
        // Where nothing is kept and nothing estimated, nothing is said.
        if total > 0.0 {
            output.iter_mut().for_each(|output| *output /= total);
        }
        output
    }
}

/// Logits of the first `visible` keys.
fn logits(head: &Head<'_>, query: &[f32], visible: usize) -> Vec<f32> {
    (0..visible).map(|key| dot(query, head.key(key))).collect()
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| (logit - largest).exp()).collect();
    let total: f32 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

#[cfg(test)]
mod tests;
